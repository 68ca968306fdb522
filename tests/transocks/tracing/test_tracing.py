"""What the kernel tells of a traced packet, as bytes and as a way; packets as bytes."""

from __future__ import annotations

import random
import struct
from ipaddress import ip_address

import attrs
import pytest

from transocks.tracing.events import ACK, RST, SYN, Event, Packet, Verdict, parse
from transocks.tracing.frames import datagram, frame
from transocks.tracing.table import FIRST, LAST, TABLE
from transocks.tracing.way import way_of

PACKETS = [
    Packet(6, ip_address(source), 61000, ip_address(destination), 443, SYN)
    for source, destination in (("192.0.2.7", "203.0.113.1"), ("2001:db8::7", "2001:db8:ffff::1"))
]


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(packet: Packet, *, verdict: int, handle: int = 7, mark: int = 0) -> bytes:
    """As nfnetlink has it, from struct nfgenmsg on."""
    raw = datagram(packet)
    size = 20 if packet.source.version == 4 else 40
    number = struct.Struct(">I")
    return bytes((1, 0, 0, 0)) + b"".join([
        attribute(1, b"transocks\0"), attribute(2, b"redirect_tcp\0"), attribute(3, struct.pack(">Q", handle)),
        attribute(4, number.pack(3)), attribute(5 | 0x8000, attribute(1, struct.pack(">i", verdict))),
        attribute(6, number.pack(99)), attribute(8, raw[:size]), attribute(9, raw[size:]),
        attribute(12, number.pack(3)), *([attribute(14, number.pack(mark))] if mark else []),
    ])  # fmt: skip


@pytest.mark.parametrize("packet", PACKETS, ids=["IPv4", "IPv6"])
def test_a_rule_that_matched(packet: Packet) -> None:
    assert parse(message(packet, verdict=-3, mark=5)) == Event(
        family="inet", table="transocks", chain="redirect_tcp", handle=7, verdict=Verdict.JUMP, mark=5, id=99,
        packet=packet, oif=3,
    )  # fmt: skip


def test_what_is_not_understood_is_left_out() -> None:
    """Other kernels may tell more, or otherwise; a name need not be UTF-8."""
    whole = message(PACKETS[0], verdict=1)
    source = random.Random(1)
    for _ in range(20_000):
        broken = bytearray(whole[: source.randrange(len(whole) + 1)])
        for _ in range(source.randrange(4)):
            if broken:
                broken[source.randrange(len(broken))] = source.randrange(256)
        parse(bytes(broken))
    assert parse(b"") is None
    assert parse(message(PACKETS[0], verdict=1).replace(b"redirect", b"r\xff\xfeirect")) is not None


@pytest.mark.parametrize("packet", PACKETS, ids=["IPv4", "IPv6"])
def test_packets_as_bytes(packet: Packet) -> None:
    """Sums over the whole, checksums included, are all ones: RFC 1071."""
    raw = datagram(packet)
    size = 20 if packet.source.version == 4 else 40
    pseudo = packet.source.packed + packet.destination.packed + struct.pack(">HH", 6, len(raw) - size)
    assert _sum(pseudo + raw[size:]) == 0xFFFF
    assert size == 40 or _sum(raw[:20]) == 0xFFFF
    assert struct.unpack_from(">HHI", raw, size) == (61000, 443, 1)
    assert struct.unpack_from(">HHI", datagram(attrs.evolve(packet, flags=RST)), size)[2] == 2, "behind the SYN"
    udp = datagram(attrs.evolve(packet, protocol=17))
    assert _sum(pseudo[:-4] + struct.pack(">HH", 17, 8) + udp[size:]) == 0xFFFF
    assert frame(packet, b"\1" * 6)[12:14] == (b"\x08\x00" if size == 20 else b"\x86\xdd")


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def told(chain: str, packet: Packet | None, *, table: str = TABLE, handle: int | None = None, mark: int = 0,
         verdict: Verdict = Verdict.ACCEPT, oif: int = 0) -> Event:  # fmt: skip
    return Event(
        family="inet", table=table, chain=chain, handle=handle, verdict=verdict, mark=mark, id=1, packet=packet, oif=oif
    )


def place(hook: str, priority: int) -> str:
    return f"{hook}_{'m' if priority < 0 else 'p'}{abs(priority)}"


def test_a_way() -> None:
    """A redirection by a rule, a mark by something that nft does not show, a drop; then the same segment again."""
    first, turned = PACKETS[0], attrs.evolve(PACKETS[0], destination=ip_address("127.0.0.1"), dport=1081)
    events = [
        told(place("output", FIRST), first, oif=2),
        told(place("output", -151), first),
        told(place("output", -149), first, mark=5),
        told(place("output", -101), first, mark=5),
        told("c", first, table="theirs", handle=3, verdict=Verdict.CONTINUE, mark=5),
        told("c", None, table="theirs", handle=4, mark=5),
        told(place("output", -89), turned, mark=5),
        told(place("output", LAST), turned, mark=5),
        told("d", turned, table="theirs", handle=9, verdict=Verdict.DROP, mark=5),
    ]
    again = [told("ingress", first), told(place("output", FIRST), first)]
    way = way_of([*events, *again], 61000)
    assert way is not None
    assert way.events == tuple(events)
    assert (way.packet, way.destination) == (first, (ip_address("127.0.0.1"), 1081))
    assert way.turn is not None
    assert (way.turn.rule, way.turn.to) == (events[5], (ip_address("127.0.0.1"), 1081))
    (mark,) = way.marks
    assert (mark.rule, mark.place, mark.before, mark.after) == (None, "mangle", 0, 5)
    assert (way.dropped, way.delivered, way.left) == (events[8], False, False)
    assert way_of(events, 61000, back=True) is None
    back = attrs.evolve(first, sport=443, dport=61000, flags=SYN | ACK)
    assert way_of([*events, told(place("input", LAST), back)], 61000, back=True) is not None


@pytest.mark.parametrize(
    ("hook", "priority", "oif", "lost"),
    [
        ("output", -201, 2, ("connection tracking", None)),
        ("input", -1, 0, ("filter", None)),
        ("prerouting", LAST, 0, (None, "by routing, behind PREROUTING")),
        ("postrouting", LAST, 1, (None, "on its way through lo")),
        ("postrouting", LAST, 2, (None, None)),
        ("input", LAST, 0, (None, None)),
    ],
)
def test_where_a_packet_was_lost(hook: str, priority: int, oif: int, lost: tuple[str | None, str | None]) -> None:
    way = way_of([told(place(hook, priority), PACKETS[0], oif=oif)], 61000)
    assert way is not None
    assert (way.lost_in, way.lost) == lost

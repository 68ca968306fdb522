"""The kernel's reports of a traced packet, as bytes and as a trace; packets as bytes."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import attrs
import pytest

from transocks.tracing.packets import datagram
from transocks.tracing.reports import ACK, RST, SYN, TCP, UDP, Packet, Report, Verdict, parse
from transocks.tracing.trace import FIRST, LAST, TABLE, Cause, Rewrite, trace_of

PACKETS = [
    Packet(TCP, ip_address(source), 61000, ip_address(destination), 443, SYN)
    for source, destination in (("192.0.2.7", "203.0.113.1"), ("2001:db8::7", "2001:db8:ffff::1"))
]
both_families = pytest.mark.parametrize("packet", PACKETS, ids=["IPv4", "IPv6"])


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(packet: Packet, *, verdict: int, handle: int = 7, mark: int = 0) -> bytes:
    """A message as from nfnetlink, beginning with struct nfgenmsg."""
    raw = datagram(packet)
    size = 20 if packet.source.version == 4 else 40
    number = struct.Struct(">I")
    return bytes((1, 0, 0, 0)) + b"".join([
        attribute(1, b"transocks\0"), attribute(2, b"redirect_tcp\0"), attribute(3, struct.pack(">Q", handle)),
        attribute(4, number.pack(3)), attribute(5 | 0x8000, attribute(1, struct.pack(">i", verdict))),
        attribute(6, number.pack(99)), attribute(8, raw[:size]), attribute(9, raw[size:]),
        attribute(12, number.pack(3)), *([attribute(14, number.pack(mark))] if mark else []),
    ])  # fmt: skip


@both_families
def test_a_rule_that_matched(packet: Packet) -> None:
    assert parse(message(packet, verdict=-3, mark=5)) == Report(
        family="inet", table="transocks", chain="redirect_tcp", handle=7, verdict=Verdict.JUMP, mark=5, id=99,
        packet=packet, oif=3,
    )  # fmt: skip


def test_reports_that_are_not_understood_are_left_out() -> None:
    """Other kernels may report in another way (tests/fuzz has more of them); a name need not be UTF-8."""
    whole = message(PACKETS[0], verdict=1)
    assert {parse(whole[:size]) for size in range(20)} == {None}
    assert parse(whole.replace(b"redirect", b"r\xff\xfeirect")) is not None


@both_families
def test_packets_as_bytes(packet: Packet) -> None:
    """Sums over the whole, checksums included, are all ones: RFC 1071."""
    raw = datagram(packet)
    size = 20 if packet.source.version == 4 else 40
    pseudo = packet.source.packed + packet.destination.packed
    assert _sum(pseudo + struct.pack(">HH", TCP, len(raw) - size) + raw[size:]) == 0xFFFF
    assert size == 40 or _sum(raw[:20]) == 0xFFFF
    assert struct.unpack_from(">HHI", raw, size) == (61000, 443, 1)
    assert struct.unpack_from(">HHI", datagram(attrs.evolve(packet, flags=RST)), size)[2] == 2, "behind the SYN"
    udp = datagram(attrs.evolve(packet, protocol=UDP))
    assert _sum(pseudo + struct.pack(">HH", UDP, 8) + udp[size:]) == 0xFFFF


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def report(chain: str | tuple[str, int], packet: Packet | None, *, table: str = TABLE, handle: int | None = None,
           mark: int = 0, verdict: Verdict = Verdict.ACCEPT, oif: int = 0) -> Report:  # fmt: skip
    if isinstance(chain, tuple):
        chain = f"{chain[0]}_{'m' if chain[1] < 0 else 'p'}{abs(chain[1])}"
    return Report(
        family="inet", table=table, chain=chain, handle=handle, verdict=verdict, mark=mark, id=1, packet=packet, oif=oif
    )


def test_a_path() -> None:
    """A redirection by a rule, a mark by something that nft does not show, a drop; then the same segment again."""
    first, turned = PACKETS[0], attrs.evolve(PACKETS[0], destination=ip_address("127.0.0.1"), dport=1081)
    events = [
        report(("output", FIRST), first, oif=2),
        report(("output", -151), first),
        report(("output", -149), first, mark=5),
        report(("output", -101), first, mark=5),
        report("c", first, table="theirs", handle=3, verdict=Verdict.CONTINUE, mark=5),
        report("c", None, table="theirs", handle=4, mark=5),
        report(("output", -89), turned, mark=5),
        report(("output", LAST), turned, mark=5),
        report("d", turned, table="theirs", handle=9, verdict=Verdict.DROP, mark=5),
    ]
    again = [report("ingress", first), report(("output", FIRST), first)]
    trace = trace_of([*events, *again], TCP, 61000)
    assert trace is not None
    assert trace.reports == tuple(events)
    assert (trace.packet, trace.destination) == (first, (ip_address("127.0.0.1"), 1081))
    assert trace.turn == Rewrite(Cause(events[5], 4, "output", "nat"), to=trace.destination)
    assert trace.marks == (Rewrite(Cause(None, 4, "output", "mangle"), 0, 5),)
    assert trace.stop is not None
    assert (trace.stop.rule, trace.delivered, trace.left, trace.ended) == (events[8], False, False, True)
    assert trace_of(events, UDP, 61000) is None
    assert trace_of(events, TCP, 61000, back=True) is None
    back = attrs.evolve(first, sport=443, dport=61000, flags=SYN | ACK)
    assert trace_of([*events, report(("input", LAST), back)], TCP, 61000, back=True) is not None


@pytest.mark.parametrize(
    ("hook", "priority", "oif", "behind"),
    [
        ("output", -201, 2, "connection tracking"),
        ("input", -1, 0, "filter"),
        ("prerouting", LAST, 0, "routing"),
        ("postrouting", LAST, 1, "lo"),
        ("postrouting", LAST, 2, None),
        ("input", LAST, 0, None),
    ],
)
def test_where_a_packet_was_lost(hook: str, priority: int, oif: int, behind: str | None) -> None:
    trace = trace_of([report((hook, priority), PACKETS[0], oif=oif)], TCP, 61000)
    assert trace is not None
    assert trace.stop == (behind and Cause(None, 4, hook, behind))
    assert trace.ended is (behind is None)

"""The kernel's reports of a packet that it traces: NFT_MSG_TRACE of nfnetlink, one message for each rule and chain."""

from __future__ import annotations

import struct
from enum import IntEnum
from ipaddress import ip_address

import attrs

from usocksd.host.netlink import attributes
from usocksd.net.address import IPAddress

# linux/netfilter/nf_tables.h
MESSAGE = 10 << 8 | 17  # NFNL_SUBSYS_NFTABLES, NFT_MSG_TRACE
_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK, _TRANSPORT, _IIF, _OIF, _MARK, _POLICY = 8, 9, 10, 12, 14, 16
_VERDICT_CODE = 1
_TYPE_RULE = 3
_FAMILIES = {1: "inet", 2: "ip", 5: "netdev", 7: "bridge", 10: "ip6"}

TCP, UDP = 6, 17
SYN, RST, ACK = 0x02, 0x04, 0x10


class Verdict(IntEnum):
    """The verdict of a rule or chain: linux/netfilter.h and nf_tables.h."""

    DROP = 0
    ACCEPT = 1
    STOLEN = 2
    QUEUE = 3
    CONTINUE = -1
    BREAK = -2
    JUMP = -3
    GOTO = -4
    RETURN = -5


@attrs.frozen
class Packet:
    """Both ends of a packet of TCP or UDP, and TCP's flags."""

    protocol: int
    source: IPAddress
    sport: int
    destination: IPAddress
    dport: int
    flags: int = 0


@attrs.frozen(kw_only=True)
class Report:
    """A rule that matched, or the end of a chain."""

    family: str
    table: str
    chain: str
    handle: int | None
    """of the rule; None: the chain itself, by its policy or at its end"""
    verdict: Verdict
    mark: int
    id: int
    """of the packet, as long as the kernel has it"""
    packet: Packet | None
    """in the first report of each hooked chain"""
    iif: int = 0
    oif: int = 0


def parse(message: bytes) -> Report | None:
    """Parse a message without its netlink header; None if it is not understood."""
    try:
        return _parse(message)
    except (struct.error, ValueError, LookupError):
        return None


def _parse(message: bytes) -> Report:
    family = _FAMILIES[message[0]]
    found = dict(attributes(message[4:]))
    code = found.get(_POLICY)
    if _VERDICT in found:
        code = dict(attributes(found[_VERDICT]))[_VERDICT_CODE]
    verdict = Verdict.CONTINUE if code is None else Verdict(struct.unpack(">i", code)[0])
    rule = _number(found, _TYPE) == _TYPE_RULE
    return Report(
        family=family, table=_name(found[_TABLE]), chain=_name(found[_CHAIN]),
        handle=_number(found, _HANDLE) if rule and _HANDLE in found else None,
        verdict=verdict, mark=_number(found, _MARK), id=_number(found, _ID),
        packet=_packet(found.get(_NETWORK, b""), found.get(_TRANSPORT, b"")),
        iif=_number(found, _IIF), oif=_number(found, _OIF),
    )  # fmt: skip


def _number(found: dict[int, bytes], key: int) -> int:
    return int.from_bytes(found.get(key, b""), "big")


def _name(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "backslashreplace")


def _packet(network: bytes, transport: bytes) -> Packet | None:
    if len(transport) < 4 or not network:
        return None
    if network[0] >> 4 == 4 and len(network) >= 20:
        protocol, source, destination = network[9], network[12:16], network[16:20]
    elif network[0] >> 4 == 6 and len(network) >= 40:
        protocol, source, destination = network[6], network[8:24], network[24:40]
    else:
        return None
    sport, dport = struct.unpack_from(">HH", transport)
    flags = transport[13] if protocol == TCP and len(transport) > 13 else 0
    return Packet(protocol, ip_address(source), sport, ip_address(destination), dport, flags)

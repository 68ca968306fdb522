"""Packets as bytes: RFC 791, RFC 8200, RFC 9293. What is not said is as in an ordinary first segment."""

from __future__ import annotations

import struct

from transocks.tracing.events import RST, Packet

_TCP = 6
_TTL = 64
_IPV4, _IPV6 = 0x0800, 0x86DD
_FROM_NOBODY = bytes((2, 0, 0, 0, 0, 1))  # a hardware address of local administration


def frame(packet: Packet, to: bytes) -> bytes:
    """An Ethernet frame with this packet, without payload, to this hardware address."""
    ether_type = _IPV4 if packet.source.version == 4 else _IPV6
    return to + _FROM_NOBODY + struct.pack(">H", ether_type) + datagram(packet)


def datagram(packet: Packet) -> bytes:
    """An IP packet with the header of TCP or UDP, without payload."""
    source, destination = packet.source.packed, packet.destination.packed
    if packet.protocol == _TCP:
        sequence = 2 if packet.flags & RST else 1  # behind the SYN
        head = struct.pack(">HHIIBB", packet.sport, packet.dport, sequence, 0, 5 << 4, packet.flags)
        before, after = head + struct.pack(">H", 65535), bytes(2)
    else:
        before, after = struct.pack(">HHH", packet.sport, packet.dport, 8), b""
    size = len(before) + 2 + len(after)
    pseudo = source + destination + struct.pack(">II", size, packet.protocol)
    segment = before + struct.pack(">H", _checksum(pseudo + before + bytes(2) + after)) + after
    if packet.source.version == 6:
        return struct.pack(">IHBB", 6 << 28, size, packet.protocol, _TTL) + source + destination + segment
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 1, 0, _TTL, packet.protocol, 0) + source + destination
    return ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:] + segment


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

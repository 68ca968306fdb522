"""The header of a relayed UDP datagram, in both roles: RSV, FRAG, ATYP, DST.ADDR, DST.PORT (RFC 1928 section 7)."""

from __future__ import annotations

from socket import AF_INET6, inet_ntoa, inet_ntop
from typing import NamedTuple

from usocksd.socks.wire import AddressType, decode_name, encode_name, pack_ip

_IPV4, _NAME, _IPV6 = int(AddressType.IPV4), int(AddressType.NAME), int(AddressType.IPV6)


class BadDatagram(Exception):
    """A datagram that can't be relayed. `cause` is one of CAUSES."""

    CAUSES = ("short", "reserved", "fragment", "address_type", "name")

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Header(NamedTuple):
    """A parsed header."""

    host: str
    """A numeric address, or the name as the client sent it"""
    port: int
    size: int
    """The bytes of the header; the payload follows."""


def header(host: str, port: int) -> bytes:
    """The header for a datagram to or from this numeric address or name.

    ValueError for a name that is empty, has control characters or more than 255 bytes.
    """
    ip = pack_ip(host)
    if ip is None:
        name = encode_name(host)
        return b"\0\0\0\x03" + bytes((len(name),)) + name + port.to_bytes(2)
    return (b"\0\0\0\x01" if len(ip) == 4 else b"\0\0\0\x04") + ip + port.to_bytes(2)


def parse(data: bytes | bytearray | memoryview, size: int) -> Header:
    """The header of a datagram of `size` bytes at the beginning of `data`. Raises BadDatagram.

    FRAG other than 0 is a fragment, which a server that does not reassemble must drop.
    """
    if size < 5:
        raise BadDatagram("short")
    if data[2]:
        raise BadDatagram("fragment")
    if data[0] or data[1]:
        raise BadDatagram("reserved")
    kind = data[3]
    if kind == _IPV4:
        end = 10
    elif kind == _IPV6:
        end = 22
    elif kind == _NAME:
        end = 7 + data[4]
    else:
        raise BadDatagram("address_type")
    if size < end:
        raise BadDatagram("short")
    port = data[end - 2] << 8 | data[end - 1]
    if kind == _IPV4:
        return Header(inet_ntoa(data[4:8]), port, end)
    if kind == _IPV6:
        return Header(inet_ntop(AF_INET6, data[4:20]), port, end)
    try:
        return Header(decode_name(bytes(data[5 : end - 2])), port, end)
    except ValueError:
        raise BadDatagram("name") from None

"""The PROXY protocol, version 2: a header in front of a connection says whose connection it is. Pure.

https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt, section 2.2:

    12 bytes of signature; version 2 and command (LOCAL or PROXY); family and protocol; 2 bytes of length;
    then as many bytes: source and destination address, source and destination port, TLVs

Rules of this file:

- A header is required, or there is none: an optional one could not be trusted.
- Bytes that can't become a header are refused at the first wrong one: a peer that speaks another protocol may wait for
  an answer, and never send 16 bytes.
- PROXY has to name an address: TCP over IPv4 or IPv6. A Unix socket, UDP, or UNSPEC name no client to judge. LOCAL is
  the sender's own connection, a health check: its addresses are ignored.
- TLVs are skipped. They may make a header long, so its length is bounded.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple, NoReturn

from usocksd.errors import ProtocolError
from usocksd.net.address import HostPort, IPAddress

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"

MAX_LENGTH: Final = 4096
"""The most bytes behind the first 16: two addresses and 4 KiB of TLVs, certificates among them."""

_HEAD: Final = struct.Struct("!12sBBH")
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_ADDRESSES = {_TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")}
_VERSION_1 = b"PROXY "
_TLS_HANDSHAKE = 0x16


class HeaderFault(ProtocolError):
    """The peer sent something else than a header; `http`: probably it waits for an answer in HTTP."""

    def __init__(self, message: str, *, http: bool = False) -> None:
        super().__init__(message)
        self.http = http


class Header(NamedTuple):
    """The addresses of the connection; both None if it is the sender's own (LOCAL)."""

    source: HostPort | None
    destination: HostPort | None


def header(source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The header of a connection from `source` to `destination`: numeric addresses, and ports.

    If one is IPv4 and the other is not, both are written as IPv6 (IPv4-mapped). Raises ValueError.
    """
    hosts = [ip_address(host.partition("%")[0]) for host, _ in (source, destination)]
    if all(isinstance(host, IPv4Address) for host in hosts):
        family, packed = _TCP4, [host.packed for host in hosts]
    else:
        family, packed = _TCP6, [_as_ipv6(host) for host in hosts]
    body = _ADDRESSES[family].pack(*packed, source[1], destination[1])
    return _HEAD.pack(SIGNATURE, _PROXY, family, len(body)) + body


LOCAL_HEADER: Final = _HEAD.pack(SIGNATURE, _LOCAL, 0, 0)
"""The header of a connection of the sender's own: a health check."""


class Receiver:
    """The header in front of what one peer sends."""

    __slots__ = ("_buffer", "trailing_data")

    def __init__(self) -> None:
        self._buffer = b""
        self.trailing_data = b""
        """After the header: what came behind it."""

    @property
    def received(self) -> bytes:
        """The received part of an incomplete header."""
        return self._buffer

    def receive_data(self, data: bytes) -> Header | None:
        """Add what the peer sent; returns the header once it is complete. Not to be called again then.

        Raises HeaderFault when no header can come of it.
        """
        buffer = self._buffer = self._buffer + data
        if not _begins(buffer, SIGNATURE):
            if len(buffer) < len(_VERSION_1) and _begins(buffer, _VERSION_1):
                return None  # it may be version 1: wait, to say so
            _refuse(buffer)
        if len(buffer) > 12 and buffer[12] not in (_LOCAL, _PROXY):
            version, command = divmod(buffer[12], 16)
            raise HeaderFault(f"PROXY header of version {version}, command {command}")
        if len(buffer) < _HEAD.size:
            return None
        _, command, family, length = _HEAD.unpack_from(buffer)
        if length > MAX_LENGTH:
            raise HeaderFault(f"PROXY header of {length} bytes, at most {MAX_LENGTH} are taken")
        layout = _ADDRESSES.get(family)
        if command == _PROXY and layout is None:
            raise HeaderFault(f"PROXY header for family and protocol 0x{family:02x}, which name no client by TCP")
        if command == _PROXY and layout is not None and length < layout.size:
            raise HeaderFault(f"PROXY header with {length} bytes where the addresses take {layout.size}")
        end = _HEAD.size + length
        if len(buffer) < end:
            return None
        self.trailing_data = buffer[end:]
        if command == _LOCAL or layout is None:
            return Header(None, None)
        source, destination, source_port, destination_port = layout.unpack_from(buffer, _HEAD.size)
        return Header(HostPort(_text(source), source_port), HostPort(_text(destination), destination_port))


def _refuse(data: bytes) -> NoReturn:
    first = data[0]
    if data.startswith(_VERSION_1):
        raise HeaderFault("PROXY header of version 1, the text: expected version 2")
    if 0x41 <= first <= 0x5A:  # A to Z: HTTP's methods begin so
        raise HeaderFault("spoke HTTP where a PROXY header is expected", http=True)
    if first in (4, 5):
        raise HeaderFault("spoke SOCKS with no PROXY header in front")
    if first == _TLS_HANDSHAKE:
        raise HeaderFault("spoke TLS where a PROXY header is expected")
    raise HeaderFault(f"first byte 0x{first:02x}: no PROXY header")


def _begins(data: bytes, whole: bytes) -> bool:
    """Whether `data` is the beginning of `whole`, or begins with it."""
    return data.startswith(whole) if len(data) >= len(whole) else whole.startswith(data)


def unlikely(claimed: IPAddress, peer: IPAddress) -> str | None:
    """What is wrong with a client address that `peer` claims, or None.

    No client has the unspecified address or a multicast one; a loopback address is possible only if the peer is on this
    host too.
    """
    if claimed.is_unspecified or claimed.is_multicast:
        return f"claimed to come from {claimed}"
    if claimed.is_loopback and not peer.is_loopback:
        return f"claimed to come from {claimed}, loopback of another host"
    return None


def _as_ipv6(host: IPv4Address | IPv6Address) -> bytes:
    return host.packed if isinstance(host, IPv6Address) else b"\0" * 10 + b"\xff\xff" + host.packed


def _text(packed: bytes) -> str:
    """The address; an IPv4-mapped one is IPv4."""
    address = ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(address if mapped is None else mapped)

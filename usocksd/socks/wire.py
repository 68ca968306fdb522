"""The SOCKS wire formats: numbers, limits, encoding of addresses and names, and the messages of a server."""

from __future__ import annotations

import re
from enum import IntEnum
from socket import AF_INET, AF_INET6, inet_pton


class Version(IntEnum):
    """The first byte of a connection. SOCKS4a is version 4 too."""

    SOCKS4 = 4
    SOCKS5 = 5


class Method(IntEnum):
    """Authentication methods (RFC 1928 section 3). GSSAPI is known so that it can be declined by name."""

    NO_AUTHENTICATION = 0
    GSSAPI = 1
    USERNAME_PASSWORD = 2
    PROBE = 0xF5
    """Offered first by a client that asks whether the server is a usocksd; only a usocksd chooses it.

    A usocksd takes greeting, credentials, request and payload in one segment. The number is of the private range of
    section 3 (0x80 to 0xFE); servers that don't know it ignore it. No request can follow, so the method gives nobody
    access.
    """
    NO_ACCEPTABLE = 0xFF


class Command(IntEnum):
    """The command of a request (RFC 1928 section 4). SOCKS4 has the first two."""

    CONNECT = 1
    BIND = 2
    UDP_ASSOCIATE = 3


class AddressType(IntEnum):
    """ATYP (RFC 1928 section 5)."""

    IPV4 = 1
    NAME = 3
    IPV6 = 4


class Reply(IntEnum):
    """REP (RFC 1928 section 6): the verdict on a request, for every version."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


SOCKS4_PROBE = bytes((4, Method.PROBE)) + bytes(7)
"""Asks a SOCKS4 server whether it is there: a request with a command that does not exist, which every server refuses. A
usocksd knows it, and records no fault."""


class Socks4Reply(IntEnum):
    """CD of a SOCKS4 reply. The last two are about identd, which has gone out of use."""

    GRANTED = 90
    REJECTED = 91
    IDENTD_UNREACHABLE = 92
    IDENTD_MISMATCH = 93


# SOCKS5 bounds its fields by length bytes; SOCKS4 ends them with NUL, so we bound them alike.
MAX_FIELD = 255
"""The most bytes of a user name, a password, a SOCKS4 USERID or a host name."""

MAX_INCOMPLETE = 8 + MAX_FIELD + 1 + MAX_FIELD
"""The most bytes that an unfinished message may have: a SOCKS4a request without its last NUL."""

AUTHENTICATION_VERSION = 1
"""VER of the username/password messages (RFC 1929 section 2): of the sub-negotiation, not of SOCKS."""

AUTHENTICATION_SUCCESS = b"\x01\x00"
AUTHENTICATION_FAILURE = b"\x01\x01"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def decode_name(raw: bytes) -> str:
    """The host name in `raw`, as sent. ValueError when it is empty, not UTF-8, or has control characters."""
    name = raw.decode()
    if not name:
        raise ValueError("empty")
    # isprintable() answers for nearly every name; it is also False for some characters that IDNA allows.
    if not name.isprintable() and _CONTROL.search(name):
        raise ValueError("control character")
    return name


def encode_name(name: str) -> bytes:
    """The bytes of host name `name`. ValueError for what decode_name refuses, or more than 255 bytes."""
    raw = encode_field(name, "host name")
    decode_name(raw)
    return raw


def encode_field(text: str, what: str) -> bytes:
    """`text` in UTF-8. ValueError when that is more than 255 bytes."""
    raw = text.encode()
    if len(raw) > MAX_FIELD:
        raise ValueError(f"{what} of {len(raw)} bytes: SOCKS has room for {MAX_FIELD}")
    return raw


def pack_ip(host: str) -> bytes | None:
    """The 4 or 16 bytes of a numeric address, None for anything else."""
    try:
        return inet_pton(AF_INET6 if ":" in host else AF_INET, host)
    except (OSError, ValueError):  # ValueError: NUL inside, or not encodable
        return None


def end_of_credentials(data: bytes) -> int:
    """Where VER, ULEN, UNAME, PLEN, PASSWD at the beginning of `data` end; -1 when they are not complete."""
    size = len(data)
    if size < 2 or size <= (middle := 2 + data[1]) or size < (end := middle + 1 + data[middle]):
        return -1
    return end


# The messages of a server.

METHOD_SELECTION = {method: bytes((5, method)) for method in Method}

# Replies without an address. Of SOCKS4's refusals, those about identd are not used.
_SOCKS5 = {reply: bytes((5, reply, 0, 1)) + bytes(6) for reply in Reply}
_SOCKS4_GRANTED = bytes((0, Socks4Reply.GRANTED)) + bytes(6)
_SOCKS4_REJECTED = bytes((0, Socks4Reply.REJECTED)) + bytes(6)

_HTTP_TEXT = b"This port is a SOCKS proxy (SOCKS4, SOCKS4a, SOCKS5). It does not speak HTTP.\n"
HTTP_ERROR = (
    b"HTTP/1.1 501 SOCKS proxy, not HTTP\r\n"
    b"Content-Type: text/plain\r\n"
    b"Content-Length: %d\r\n"
    b"Connection: close\r\n"
    b"\r\n%s" % (len(_HTTP_TEXT), _HTTP_TEXT)
)

_VERSION5 = Version.SOCKS5  # looking an enum member up through its class costs as much as the rest


def failure(version: Version | None, reply: Reply) -> bytes:
    """The reply that refuses a request of that version."""
    return _SOCKS5[reply] if version is _VERSION5 else _SOCKS4_REJECTED


def success(version: Version | None, bound: tuple[str, int] | None) -> bytes:
    """The reply that grants a request of that version, with the address as getsockname(2) tells it.

    ValueError when that is not numeric.
    """
    if bound is None:
        return _SOCKS5[Reply.SUCCEEDED] if version is _VERSION5 else _SOCKS4_GRANTED
    ip = pack_ip(bound[0].partition("%")[0])  # (a link-local address has its scope)
    if ip is None:
        raise ValueError(f"bound address {bound[0]!r} is not numeric")
    port = bound[1].to_bytes(2)
    if version is _VERSION5:
        return (b"\x05\x00\x00\x01" if len(ip) == 4 else b"\x05\x00\x00\x04") + ip + port
    if len(ip) == 4:
        return _SOCKS4_GRANTED[:2] + port + ip
    return _SOCKS4_GRANTED  # a 4a name may have led to IPv6, which SOCKS4 can't express

"""The numbers of the SOCKS wire formats, their limits, and how addresses and names are written there."""

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
    """Offered, first, by a client that asks whether it speaks to a usocksd, and chosen by a usocksd alone.

    It says: takes greeting, credentials, request and payload in one segment. Private, of the range that section 3
    leaves for that (0x80 to 0xFE): no standard has a method for the question, and a server that does not know this one
    passes it over. It leads to no request, and so gives nobody access.
    """
    NO_ACCEPTABLE = 0xFF


class Command(IntEnum):
    """What a request asks for (RFC 1928 section 4). SOCKS4 has the first two."""

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
"""What asks a SOCKS4 server whether it is there: a request with a command that does not exist, which any will refuse. A
usocksd knows this one, and that nothing is wrong."""


class Socks4Reply(IntEnum):
    """CD of a SOCKS4 reply. The last two are about identd, which nobody asks any more."""

    GRANTED = 90
    REJECTED = 91
    IDENTD_UNREACHABLE = 92
    IDENTD_MISMATCH = 93


# What SOCKS5 bounds by its length bytes has to be bounded by us where SOCKS4 ends a field with NUL.
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

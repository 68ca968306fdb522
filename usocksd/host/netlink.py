"""Messages of netlink(7), taken apart."""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id"""

_ATTRIBUTE = struct.Struct("=HH")
_ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type and flags of each message in what was received, and what is behind its header."""
    while len(data) >= HEADER.size:
        length, kind, flags, _, _ = HEADER.unpack_from(data)
        yield kind, flags, data[HEADER.size : length]
        data = data[max(length + 3 & ~3, HEADER.size) :]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a message, or in an attribute: type and value of each."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & _ATTRIBUTE_TYPE, data[_ATTRIBUTE.size : length]
        data = data[max(length, _ATTRIBUTE.size) + 3 & ~3 :]

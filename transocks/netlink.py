"""Messages of netlink(7), taken apart."""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id"""


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type of each message in what was received, and what is behind its header."""
    while len(data) >= HEADER.size:
        length, kind, *_ = HEADER.unpack_from(data)
        yield kind, data[HEADER.size : length]
        data = data[max(length + 3 & ~3, HEADER.size) :]

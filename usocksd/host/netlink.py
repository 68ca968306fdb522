"""netlink(7): requests to the kernel, and its messages parsed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

# linux/netlink.h
ROUTE, SOCK_DIAG, NETFILTER = 0, 4, 12
"""Families: NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_NETFILTER."""
ACK, DUMP = 0x4, 0x300
"""Flags of a request."""
DUMP_INTR = 0x10
"""A flag of messages: the list changed while it was dumped, so it may be incomplete."""
DONE = 3
RECEIVE_SIZE = 1 << 16
"""The kernel fills at most 32 KiB into one datagram of a dump."""

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id"""

_REQUEST, _ERROR = 0x1, 2
_CODE = struct.Struct("=i")  # struct nlmsgerr
_ATTRIBUTE = struct.Struct("=HH")
_ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER


class Message(NamedTuple):
    """A message: its body, and two fields of its header."""

    kind: int
    flags: int
    body: bytes


def connect(family: int) -> socket.socket:
    """A socket for requests of this netlink family. Raises OSError where a sandbox forbids it."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)


def request(kind: int, flags: int, body: bytes, sequence: int = 1) -> bytes:
    """A message to the kernel, with its header."""
    return HEADER.pack(HEADER.size + len(body), kind, _REQUEST | flags, sequence, 0) + body


def ask(sock: socket.socket, kind: int, flags: int, body: bytes) -> Iterator[Message]:
    """Send a request with DUMP or ACK, and yield the answer: of a dump each message, the last one (DONE) too.

    The kernel answers from memory, so this does not block. Raises OSError, also for an error that the kernel answers.
    """
    sock.send(request(kind, flags, body))
    while True:
        for message in messages(sock.recv(RECEIVE_SIZE)):
            if message.kind == _ERROR:
                (code,) = _CODE.unpack_from(message.body)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            yield message
            if message.kind == DONE:
                return


def messages(data: bytes) -> Iterator[Message]:
    """The messages in what was received."""
    while len(data) >= HEADER.size:
        length, kind, flags, _, _ = HEADER.unpack_from(data)
        yield Message(kind, flags, data[HEADER.size : length])
        data = data[max(length + 3 & ~3, HEADER.size) :]


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a message, or in an attribute: type and value of each."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & _ATTRIBUTE_TYPE, data[_ATTRIBUTE.size : length]
        data = data[max(length, _ATTRIBUTE.size) + 3 & ~3 :]

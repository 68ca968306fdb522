"""How many connections are allowed: by descriptors, and by [limits] over all workers."""

from __future__ import annotations

import mmap
import os
import resource
import socket
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes

# Reserved for other descriptors: log file, epoll, name and state files.
_RESERVE = 48
# A connection has two sockets.
_PER_CONNECTION = 2
# One descriptor in 16 is for pipes, which bulk streams borrow; if none is left, a stream works without.
_FOR_PIPES = 16
# One in 16 is for queries to name servers. Only half of them are reserved, since a session that waits for a name does
# not use its second descriptor.
_FOR_NAMES = 16
# One in 16 is for further attempts of races between addresses.
_FOR_RACES = 16


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, as getrlimit(2) allows. Returns the new limit.

    The hard limit may be infinite on paper; the kernel's own is fs.nr_open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = int(Path("/proc/sys/fs/nr_open").read_text())
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_connections(descriptors: int) -> int:
    """How many connections `descriptors` open files allow, at least one.

    Descriptors that are open already (inherited sockets, for example) don't count.
    """
    open_now = len(os.listdir("/proc/self/fd"))
    kept = _RESERVE + 2 * most_pipes(descriptors) + most_name_sockets(descriptors) // 2 + most_spare(descriptors)
    return max((descriptors - open_now - kept) // _PER_CONNECTION, 1)


def most_pipes(descriptors: int) -> int:
    """How many pipes, of two descriptors each, fit into their share of `descriptors`."""
    return descriptors // _FOR_PIPES // 2


def most_name_sockets(descriptors: int) -> int:
    """How many sockets to name servers fit into their share of `descriptors`."""
    return max(descriptors // _FOR_NAMES, 2)


def most_spare(descriptors: int) -> int:
    """How many further sockets races of addresses may have, beside those of their sessions."""
    return descriptors // _FOR_RACES


# Rows of the shared table: the first counts all connections, the others those of clients, by hash. Two clients that
# share a row share the limit too; with so many rows that needs hundreds of clients at their limit at once. Behind the
# rows is the key of the hash: without a key, anybody could find addresses that share the row of a client.
_ROWS = 1 << 14
COLUMNS = 256
"""One for each worker at a time: of the present generation, of two that drain, and of one to come."""
NOBODY = 0
"""The row of a client that is not known yet: its connections count in the first row only."""
_CELL = 4
_ROW = COLUMNS * _CELL
_SIZE = _ROWS * _ROW
_KEY = 32
_MAPPED = bytes(10) + b"\xff\xff"


def make_table() -> int:
    """A descriptor of the memory that all workers count in: a row a client, a column a worker, and a key of its own."""
    fd = os.memfd_create("connections", os.MFD_CLOEXEC)
    os.ftruncate(fd, _SIZE)
    os.pwrite(fd, token_bytes(_KEY), _SIZE)
    return fd


def owner(client: str) -> bytes:
    """What identifies the client with this numeric address: an IPv4 address itself, or the /64 of an IPv6 address,
    since everybody has the 2**64 addresses of a network (or of a link, if the address has a zone).
    """
    address, _, zone = client.partition("%")
    if ":" not in address:
        return socket.inet_aton(address)
    packed = socket.inet_pton(socket.AF_INET6, address)
    return packed[12:] if packed.startswith(_MAPPED) else packed[:8] + zone.encode()


def clear_column(fd: int, column: int) -> None:
    """A worker is gone: forget its counts. Memory that was never written stays unused."""
    end = 0
    while end < _SIZE:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes from here on
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), _SIZE)
        for at in range(start - start % _ROW + column * _CELL, end, _ROW):
            if any(os.pread(fd, _CELL, at)):
                os.pwrite(fd, bytes(_CELL), at)


class Tally:
    """The present connections of all workers: each worker writes its own column, and sums the row.

    Without limits nothing is counted. (Two workers may let one too many in when they look at the same moment.)
    """

    def __init__(self, fd: int, column: int, *, most: int = 0, per_client: int, kind: bytes = b"") -> None:
        """`most` in all and `per_client` from one `owner`; 0 is no limit. With a `kind`, what is counted are not
        connections, but something of their clients, by rows of its own.
        """
        self._kind = kind
        self._most = most
        self._per_client = per_client
        self._column = column
        self._counts = bool(most or per_client)
        if self._counts:
            self._cells = memoryview(mmap.mmap(fd, _SIZE)).cast("i")
            self._key = os.pread(fd, _KEY, _SIZE)

    def row(self, client: str) -> int:
        """The row of the client with this numeric address."""
        if not self._counts:
            return 0
        return 1 + int.from_bytes(blake2b(owner(client) + self._kind, key=self._key, digest_size=4).digest()) % (
            _ROWS - 1
        )

    def exceeded(self, row: int) -> str | None:
        """The limit that forbids another connection of this row, by its name in [limits]; None if none does."""
        if not self._counts:
            return None
        if self._most and self._sum(0) >= self._most:
            return "connections"
        if self._per_client and row and self._sum(row) >= self._per_client:
            return "per_client"
        return None

    def add(self, row: int, number: int) -> None:
        """Add this number of connections."""
        if self._counts:
            if row:
                self._cells[row * COLUMNS + self._column] += number
            if not self._kind:
                self._cells[self._column] += number

    def _sum(self, row: int) -> int:
        return sum(self._cells[row * COLUMNS : (row + 1) * COLUMNS])

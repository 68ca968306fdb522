"""Pipes for splice(2), borrowed by flows of bulk data and given back when they run dry."""

from __future__ import annotations

import fcntl
import os

# Measured, CPU seconds of the proxy per GB: 0.13 with 256 KiB or 1 MiB pipes, 0.30 with the default 64 KiB.
PIPE_SIZE = 256 * 1024
# How many empty pipes are kept for the next borrower.
_KEEP = 16


class Pipe:
    """A non-blocking pipe of PIPE_SIZE bytes; `filled` of them are in use."""

    __slots__ = ("filled", "reader", "writer")

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer
        self.filled = 0

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class PipePool:
    """Lends up to `most` pipes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: list[Pipe] = []
        self.lent = 0

    def borrow(self) -> Pipe | None:
        """An empty pipe; None if all are lent, or the user's share of pipe pages (pipe(7)) is used up. Then use recv
        and send.
        """
        if self.lent >= self._most:
            return None
        if self._free:
            self.lent += 1
            return self._free.pop()
        try:
            reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        pipe = Pipe(reader, writer)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # EPERM: without privileges, pipe pages are limited per user, and this pipe may hold only 8 KiB.
            pipe.close()
            return None
        self.lent += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take `pipe` back. A pipe with bytes in it is closed, since nobody else may get them."""
        self.lent -= 1
        if pipe.filled or len(self._free) >= _KEEP:
            pipe.close()
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close the pipes that are not lent."""
        while self._free:
            self._free.pop().close()

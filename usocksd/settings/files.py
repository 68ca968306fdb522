"""Files that a configuration names, lists and users, with the content that they had when it was read.

A worker that replaces a dead one gets the same content as the others, even if the files have changed. So the first
worker of a generation keeps what it reads, and the master passes it on to the later ones.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import attrs


class NotRegular(OSError):
    """Not a regular file: a pipe may block, a device may never end, a directory can't be read."""


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, NotRegular; ValueError for NUL in the path."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegular(f"{path}: expected a regular file")
    return path.read_bytes()


@attrs.define
class NamedFiles:
    """Contents of files, one after the other, in memory that can be passed on: `fd`, of memfd_create(2). `places` has
    the offset and size of each. `fd` is None until a file is kept.
    """

    fd: int | None = None
    places: dict[str, tuple[int, int]] = attrs.field(factory=dict)

    def keep(self, path: Path) -> bytes:
        """Read a file and keep its content, unless it is kept already. Raises as `read_file` does."""
        if str(path) in self.places:
            return self.read(path)
        content = read_file(path)
        if self.fd is None:
            self.fd = os.memfd_create("named files")
        with open(self.fd, "ab", closefd=False) as file:
            self.places[str(path)] = file.tell(), len(content)
            file.write(content)
        return content

    def read(self, path: Path) -> bytes:
        """The kept content of a file, or else the present one. Raises as `read_file` does."""
        place = self.places.get(str(path))
        if place is None or self.fd is None:
            return read_file(path)
        start, size = place
        pieces = []  # (By pread: processes that share the descriptor share its position.)
        while size and (piece := os.pread(self.fd, size, start)):
            pieces.append(piece)
            start, size = start + len(piece), size - len(piece)
        return b"".join(pieces)

    @property
    def fds(self) -> list[int]:
        """The descriptor, if there is one; it is passed on beside `places`."""
        return [] if self.fd is None else [self.fd]

    @classmethod
    def received(cls, places: dict[str, list[int]], fds: list[int]) -> NamedFiles:
        """The files that another process has passed on."""
        return cls(fds[0] if fds else None, {path: (start, size) for path, (start, size) in places.items()})

    def copy(self) -> NamedFiles:
        """A copy that is closed separately."""
        return NamedFiles(None if self.fd is None else os.dup(self.fd), dict(self.places))

    def close(self) -> None:
        """Close the descriptor, if it is open."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

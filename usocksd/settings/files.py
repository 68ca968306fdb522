"""Files that a configuration names, lists and users: as they were when it was read.

A worker that takes the place of a dead one is to have what the others have, whatever lies in the file system by then.
So what the first worker of a generation has read goes, through the master, to all that come after it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import attrs


class NotRegular(OSError):
    """A pipe, which may block, a device, which may never end, or a directory."""


def read_file(path: Path) -> bytes:
    """What is in a regular file. Raises OSError, NotRegular; ValueError for NUL in the path."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegular(f"{path}: expected a regular file")
    return path.read_bytes()


@attrs.define
class NamedFiles:
    """Their contents one behind the other in memory that can be passed on: `fd`, of memfd_create(2).

    `places` are where each begins, and its size. Without a descriptor there is none yet.
    """

    fd: int | None = None
    places: dict[str, tuple[int, int]] = attrs.field(factory=dict)

    def keep(self, path: Path) -> bytes:
        """Read a file, or what has been kept of it. Raises as `read_file` does."""
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
        """What has been kept of a file, or else the file. Raises as `read_file` does."""
        place = self.places.get(str(path))
        if place is None or self.fd is None:
            return read_file(path)
        start, size = place
        pieces = []  # (By pread: who has been passed the descriptor shares its position.)
        while size and (piece := os.pread(self.fd, size, start)):
            pieces.append(piece)
            start, size = start + len(piece), size - len(piece)
        return b"".join(pieces)

    @property
    def fds(self) -> list[int]:
        """The descriptor, if there is one: what is passed on beside `places`."""
        return [] if self.fd is None else [self.fd]

    @classmethod
    def received(cls, places: dict[str, list[int]], fds: list[int]) -> NamedFiles:
        """What was passed on."""
        return cls(fds[0] if fds else None, {path: (start, size) for path, (start, size) in places.items()})

    def copy(self) -> NamedFiles:
        """The same, to be closed by itself."""
        return NamedFiles(None if self.fd is None else os.dup(self.fd), dict(self.places))

    def close(self) -> None:
        """Let go of the memory. A second time does nothing."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

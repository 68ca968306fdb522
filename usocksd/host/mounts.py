"""The mounts of this process: /proc/PID/mountinfo of proc(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """A mount."""

    root: str
    """the folder of the file system that is mounted here"""
    point: str
    kind: str
    options: tuple[str, ...]
    """options of the file system; for control groups of version 1, the controllers"""


def mounts(*kinds: str, proc: Path = PROC) -> Iterator[Mount]:
    """The mounts of these file systems, in the order in which they were made. Raises OSError."""
    for line in lines(proc / "self/mountinfo"):
        of_mount, _, of_system = line.partition(b" - ")
        kind, _, options = os.fsdecode(of_system).split(" ")
        if kind in kinds:
            root, point = (os.fsdecode(_ESCAPED.sub(_unescape, text)) for text in of_mount.split(b" ")[3:5])
            yield Mount(root, point, kind, tuple(options.split(",")))


def lines(file: Path) -> list[bytes]:
    """The lines of a file below /proc that has names in it. Users may choose them (fusermount), of any bytes: only a
    newline ends a line, only a space a word, and the kernel escapes both in names.
    """
    return file.read_bytes().removesuffix(b"\n").split(b"\n")


def _unescape(match: re.Match[bytes]) -> bytes:
    return bytes((int(match[1], 8),))

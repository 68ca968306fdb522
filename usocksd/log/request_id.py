"""Request ids: what joins the records of one connection."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable


def request_ids() -> Callable[[], str]:
    """A generator of UUIDs that never repeat: 74 random bits of this process, then 48 that count.

    They are of version 8, whose bits are the application's own (RFC 9562, section 5.8). A random UUID for every
    connection would cost a system call each.
    """
    head = int.from_bytes(os.urandom(10))
    text = f"{head >> 32 & 0xFFFFFFFF:08x}-{head >> 16 & 0xFFFF:04x}-8{head & 0xFFF:03x}-{0x8000 | head >> 66:04x}"
    count = itertools.count(1)
    return lambda: f"{text}-{next(count):012x}"

"""One change of the rules at a time: two at once would each take away what the other has just loaded."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import IO

from transocks.tools import FirewallError

FILE = "/run/transocks-rules.lock"
"""For root alone: who may hold it keeps root from changing rules. Stays, as /run/xtables.lock does."""
_WITHIN, _EVERY = 30.0, 0.05  # seconds


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock; it goes with the process, however that ends. Raises FirewallError if others keep it too long."""
    deadline = time.monotonic() + _WITHIN
    with _open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FirewallError(f"another `transocks rules` has been at work for {_WITHIN:.0f} s") from None
                time.sleep(_EVERY)
            else:
                break
        yield


def _open() -> IO[bytes]:
    try:
        # To read: where /run is read-only (in a service, say), it will do when the file is there.
        return open(FILE, "rb", opener=_for_root)
    except OSError:
        # A read-only /run without it, or that of another user: the network namespace itself, which all can open.
        return open("/proc/self/ns/net", "rb")


def _for_root(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)

"""The question of `transocks rules apply` on a terminal: whether to keep the rules."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

SECONDS = 60
"""How long the rules are on trial, and the question waits"""
_YES, _NO = b"yY", b"nNqQ\r\n\x04"


def can_ask() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def is_to_keep(seconds: int) -> bool | None:
    """Ask, and count down on the same line. Ctrl-C is a no; None: no answer within `seconds`."""
    deadline = time.monotonic() + seconds
    try:
        with _single_keys():
            while (left := deadline - time.monotonic()) > 0:
                print(f"\rkeep these rules? [y/N] {math.ceil(left):>3} s ", end="", flush=True)
                if not select.select([sys.stdin], [], [], left % 1 or 1)[0]:
                    continue
                key = os.read(sys.stdin.fileno(), 1)
                if key in _YES and key:
                    return True
                if key in _NO:  # nothing at all, too: the terminal is gone
                    return False
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # another signal
            raise
        return False
    finally:
        print(flush=True)
    return None


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Read keys without Enter, and not those that were pressed before."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

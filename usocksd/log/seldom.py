"""Logs a repeated record only now and then, with the number of times."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final

EVERY: Final = 600.0
"""Seconds in which the same record is logged once."""

_MOST = 1000


class Seldom:
    """Counts the same, and tells when it is time to say it. Knows so many of different ones, and forgets the oldest."""

    def __init__(self, *, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._known: dict[Hashable, tuple[float, int]] = {}
        """When each was said, and how often it happened since."""

    def due(self, what: Hashable) -> int | None:
        """It has happened once more. How often it has since it was last said, this time included; None if that is not
        long enough ago to say it again.
        """
        now = self._clock()
        said, count = self._known.get(what, (-self._every, 0))
        if now - said < self._every:
            self._known[what] = said, count + 1
            return None
        self._known.pop(what, None)
        if len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[what] = now, 0
        return count + 1

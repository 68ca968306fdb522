"""Who goes next when there are more names to ask for than sockets: the newest.

What has an answer has it quickly; what piles up has none. So under pressure the newest goes first, and one that has
had its chance gives way: names that nobody answers for don't hold up the others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

# Seconds. So long one can be sure of its turn, and so often those that wait are looked after.
_SURE_OF = 1.0
_LOOK_EVERY = 0.25


class Turns:
    """At most so many at a time. `run` must be running for those that never end to give way."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._running: dict[trio.CancelScope, float] = {}
        """Since when, the oldest first."""
        self._waiting: dict[trio.Event, None] = {}
        """The newest last."""
        self._pressure = trio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for one. When it has to give way to others, what is inside is cancelled, and nothing raised."""
        if self._free:
            self._free -= 1
        else:
            await self._wait()
        scope = trio.CancelScope()
        self._running[scope] = trio.current_time()
        try:
            with scope:
                yield
        finally:
            del self._running[scope]
            self._pass_on()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._waiting:
                self._pressure = trio.Event()
                await self._pressure.wait()
            await trio.sleep(_LOOK_EVERY)
            sure = trio.current_time() - _SURE_OF
            done = [scope for scope, since in self._running.items() if since <= sure]
            for scope in done[: len(self._waiting)]:
                scope.cancel()

    async def _wait(self) -> None:
        event = trio.Event()
        self._waiting[event] = None
        self._pressure.set()
        try:
            await event.wait()
        except trio.Cancelled:
            if self._waiting.pop(event, event) is event:  # it was given a turn in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        if self._waiting:
            event, _ = self._waiting.popitem()
            event.set()
        else:
            self._free += 1

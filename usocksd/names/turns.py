"""The order in which names are queried, if more are requested than may be queried at a time.

Most names are answered quickly; names that pile up have no answer. So the next turn goes to the client with the fewest
names, and to its newest one. After a second a name gives way to clients with fewer names. When too many wait, one is
refused at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

# Seconds for which a turn is guaranteed, and between two checks which turns should end.
_SURE_OF = 1.0
_LOOK_EVERY = 0.25


class TooManyWaiting(Exception):
    """Too many names wait."""


class Ticket:
    """A name that needs a turn, and the client that it counts for."""

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.scope = trio.CancelScope()
        self.refused = False
        self.called = trio.Event()


class Turns:
    """Grants turns, a limited number at a time. `run` must be running: it ends the turns of unanswered names."""

    def __init__(self, most: int, *, waiting: int) -> None:
        """`most`: how many turns at a time; `waiting`: how many may wait."""
        self._free = most
        self._may_wait = waiting
        self._running: dict[Ticket, float] = {}
        """since when, the oldest first"""
        self._of: Counter[bytes] = Counter()
        """how many of each owner are running"""
        self._waiting: dict[bytes, dict[Ticket, None]] = {}
        """by owner; the newest last"""
        self._wait = 0
        self._pressure = trio.Event()

    @asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a turn. If it must give way to others, the block is cancelled, and nothing is raised.

        Raises TooManyWaiting when too many names wait, and the owner of this one has the most.
        """
        if self._free:
            self._free -= 1
            self._begin(ticket)
        else:
            await self._queue(ticket)
        try:
            with ticket.scope:
                yield
        finally:
            del self._running[ticket]
            self._count(ticket.owner, -1)
            self._free += 1
            self._call_next()

    def shared(self, ticket: Ticket, owner: bytes) -> None:
        """Another client asks for the same name: it counts for the client with fewer names."""
        if self._load(owner) >= self._load(ticket.owner):
            return
        if ticket in self._running:
            self._count(ticket.owner, -1)
            self._count(owner, 1)
            ticket.owner = owner
        elif ticket in self._waiting.get(ticket.owner, ()):
            self._take_out(ticket)
            ticket.owner = owner
            self._put_in(ticket)

    async def run(self) -> None:
        """End turns of unanswered names when others wait, until cancelled."""
        while True:
            if not self._wait:
                self._pressure = trio.Event()
                await self._pressure.wait()
            await trio.sleep(_LOOK_EVERY)
            self._make_room()

    def _make_room(self) -> None:
        """Turns that are over a second old give way to names of clients with fewer."""
        sure = trio.current_time() - _SURE_OF
        done = [ticket for ticket, since in self._running.items() if since <= sure]
        load = Counter(self._of)
        # (Stable: of one owner the oldest first.)
        done.sort(key=lambda ticket: -load[ticket.owner])
        wanted = sorted(load[owner] for owner, tickets in self._waiting.items() for _ in tickets)
        for ticket, least in zip(done, wanted, strict=False):
            if load[ticket.owner] < max(least, 1):
                break
            ticket.scope.cancel()

    async def _queue(self, ticket: Ticket) -> None:
        self._put_in(ticket)
        self._pressure.set()
        if self._wait > self._may_wait:
            crowd = max(self._waiting.values(), key=len)
            self._refuse(next(iter(crowd)))
        try:
            await ticket.called.wait()
        except trio.Cancelled:
            if ticket in self._running:  # it got a turn at the same moment
                del self._running[ticket]
                self._count(ticket.owner, -1)
                self._free += 1
                self._call_next()
            elif not ticket.refused:
                self._take_out(ticket)
            raise
        if ticket.refused:
            raise TooManyWaiting

    def _refuse(self, ticket: Ticket) -> None:
        self._take_out(ticket)
        ticket.refused = True
        ticket.called.set()

    def _call_next(self) -> None:
        if not self._free or not self._wait:
            return
        # (Of owners with equally few, the one that came last.)
        owner = min(reversed(self._waiting), key=lambda owner: self._of[owner])
        ticket = next(reversed(self._waiting[owner]))
        self._take_out(ticket)
        self._free -= 1
        self._begin(ticket)
        ticket.called.set()

    def _begin(self, ticket: Ticket) -> None:
        self._running[ticket] = trio.current_time()
        self._count(ticket.owner, 1)

    def _put_in(self, ticket: Ticket) -> None:
        self._waiting.setdefault(ticket.owner, {})[ticket] = None
        self._wait += 1

    def _take_out(self, ticket: Ticket) -> None:
        tickets = self._waiting[ticket.owner]
        del tickets[ticket]
        self._wait -= 1
        if not tickets:
            del self._waiting[ticket.owner]

    def _load(self, owner: bytes) -> int:
        return self._of[owner] + len(self._waiting.get(owner, ()))

    def _count(self, owner: bytes, number: int) -> None:
        self._of[owner] += number
        if not self._of[owner]:
            del self._of[owner]

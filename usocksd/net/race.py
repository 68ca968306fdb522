"""Several addresses of one destination: happy eyeballs (RFC 8305)."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from math import inf
from socket import SocketType
from typing import TYPE_CHECKING, NamedTuple

from usocksd.errors import DialError
from usocksd.net.endpoint import DeadlineExpired, Endpoint, Interruptible
from usocksd.net.reactor import Reactor, Waitable

if TYPE_CHECKING:
    from usocksd.net.dial import Dialer, Target

# The most seconds of an attempt if the next one may not begin beside it. (A lost SYN is sent again after one.)
_LONGEST_ALONE = 3.0


class Pace(NamedTuple):
    """The times of a race."""

    delay: float = 0.25
    """RFC 8305, section 5: seconds until the next address is tried beside the one before."""
    shortest: float = 0.1
    """The same if there are too many addresses to try all of them in the first half of the time."""
    at_once: int = 16
    """How many attempts of one race may be under way."""


PACE = Pace()


class RaceAttempt(Endpoint):
    """One attempt of a race, to which it reports every event."""

    __slots__ = ("race", "target")

    def __init__(self, race: Race, target: Target, reactor: Reactor, sock: SocketType) -> None:
        self.race: Race | None = race
        self.target = target
        super().__init__(reactor, sock, connecting=True)

    def on_event(self, flags: int) -> None:
        super().on_event(flags)
        if self.race is not None:
            self.race.wake()

    def on_deadline(self, now: float) -> None:
        self.interrupt(DeadlineExpired())

    def interrupt(self, reason: BaseException) -> None:
        if self.race is not None:
            self.race.stop(reason)
        else:
            super().interrupt(reason)


class Race(Waitable):
    """Attempts begin a moment apart, or as soon as one has failed; the first to connect wins.

    The race is one session, which looks at every attempt before it begins another: once one has connected, none begins.

    A session counts as two descriptors. A race borrows further ones from `Dialer.spare`, and never more than it leaves
    there for others. If it can borrow none, each attempt has its share of the time, and then gives way to the next.
    """

    def __init__(self, dialer: Dialer, targets: Sequence[Target], deadline: float) -> None:
        reactor = dialer.reactor
        super().__init__(reactor)
        self._dialer = dialer
        self._untried = deque(targets)
        self._deadline = deadline
        spread = (deadline - reactor.clock()) / (2 * len(targets))
        self._delay = max(min(dialer.pace.delay, spread), dialer.pace.shortest)
        self._running: dict[RaceAttempt, None] = {}
        """In the order in which they began. All but one are borrowed."""
        self._failed: list[DialError] = []
        self._stopped: BaseException | None = None
        # When the next attempt may begin beside running ones, and when it may replace one of them.
        self._beside_at = self._instead_at = -inf

    async def run(self, client: Interruptible | None) -> tuple[Endpoint, Target]:
        """As `dial`."""
        if client is not None:
            client.on_interrupt = self.stop
        winner = None
        try:
            while (winner := self._connected()) is None:
                if self._stopped is not None:
                    raise self._stopped
                if self._untried and self._may_begin():
                    self._begin(self._untried.popleft())
                elif self._running:
                    await self._wait()
                else:
                    raise self._failed[0]
            winner.race = None
            return winner, winner.target
        except DeadlineExpired:
            if self._failed:
                raise self._failed[0] from None
            oldest = next(iter(self._running))
            raise DialError(errno.ETIMEDOUT, str(oldest.target)) from None
        finally:
            if client is not None:
                client.on_interrupt = None
            self._dialer.spare += max(len(self._running) - 1, 0)
            for attempt in self._running:
                if attempt is not winner:
                    attempt.close()

    def stop(self, reason: BaseException) -> None:
        """End it with `reason`."""
        self._stopped = self._stopped or reason
        self.wake()

    def _connected(self) -> RaceAttempt | None:
        """The attempt that has connected, if any. Attempts that have failed are dropped."""
        for attempt in list(self._running):
            if attempt.writable:
                error = attempt.connect_error()
                if not error:
                    return attempt
                self._failed.append(DialError(error, str(attempt.target)))
                self._drop(attempt)
                self._beside_at = -inf
        return None

    def _may_begin(self) -> bool:
        """Whether it is time for another attempt, and room: the one that has waited longest gives way if it has to."""
        running = self._running
        if not running:
            # After the deadline, each attempt would end as soon as it began; with many targets, that takes long.
            return not self._failed or self.reactor.clock() < self._deadline
        now = self.reactor.clock()
        if now < self._beside_at:
            return False
        if len(running) < self._dialer.pace.at_once:
            if len(running) <= self._dialer.spare:
                return True
            if now < self._instead_at:
                return False
        self._drop(next(iter(running)))
        return True

    def _begin(self, target: Target) -> None:
        try:
            attempt = self._dialer.start(target, lambda sock, _: RaceAttempt(self, target, self.reactor, sock))
        except DialError as error:
            self._failed.append(error)
            return
        attempt.deadline = self._deadline
        if self._running:
            self._dialer.spare -= 1
        self._running[attempt] = None
        now = self.reactor.clock()
        self._beside_at = now + self._delay
        share = (self._deadline - self.reactor.clock()) / (len(self._untried) + 1)
        self._instead_at = now + min(max(share, self._delay), _LONGEST_ALONE)

    def _drop(self, attempt: RaceAttempt) -> None:
        if len(self._running) > 1:
            self._dialer.spare += 1
        del self._running[attempt]
        attempt.close()

    async def _wait(self) -> None:
        """Wait for news of an attempt, or until another one may begin."""
        if not self._untried:
            await self.wait()
            return
        # (Another race may return a descriptor meanwhile.)
        now = self.reactor.clock()
        at = self._beside_at if now < self._beside_at else min(self._instead_at, now + self._delay)
        await self.wait_until(at)

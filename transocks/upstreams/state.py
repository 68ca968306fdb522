"""What one worker knows of an upstream: whether it is up, since when and why, and who waits for it.

What this file keeps:

- Whatever is newer counts. Every finding has the time at which it began to be true (on the reactor's clock, which is
  the same for all processes of a host), and an upstream that was heard of since is not down.
- A connection that succeeds is the best evidence. A probe is only the next best.
- One bad sample decides nothing for long: docs/design.md says what bounds each thing that is remembered here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from typing import Any, NamedTuple

import trio

from usocksd.log.metrics import Counter
from usocksd.net.endpoint import Endpoint, PeerReset


class Answer(NamedTuple):
    """What an upstream has said to a probe, and after how many seconds, connecting included."""

    latency: float
    ours: bool = False
    """It is a usocksd: takes greeting, credentials, request and payload in one segment."""
    pipelines: bool | None = None
    """It takes greeting, credentials and request in one; None: not known."""
    round_trip: float = 0.0
    """In seconds, as the kernel has measured it: however busy the program was."""
    slow: bool = False
    """It took longer than is waited for one that hangs."""


class Attempt:
    """One try to reach a destination through one upstream, as long as that has not answered the request."""

    __slots__ = ("_better", "_client", "_replaceable", "left", "pipelined", "sent", "since")

    def __init__(self, client: Endpoint, *, replaceable: bool, better: Callable[[], bool] = lambda: False) -> None:
        """`client`: that of the session. `replaceable`: there is something else to try. `better` tells whether that
        includes an upstream that is well.
        """
        self.since = client.reactor.clock()
        """When it began."""
        self.sent = False
        """The upstream was sent what the client has said, and that may not be said to another."""
        self.pipelined = False
        """The upstream was told all at once, since it is known to take that."""
        self.left = False
        """Nobody waits for it any more: it ends as if the client were gone."""
        self._better = better
        self._client = client
        self._replaceable = replaceable

    def check(self) -> None:
        """Raise PeerReset if it is `left`, or the client is gone. To be asked after every wait: that may have come when
        the wait was over already, and its task about to run, and then nobody says so again.
        """
        if self.left:
            raise PeerReset
        self._client.check_peer()

    def leave(self) -> None:
        """Give it up, if there is something else to try. The session tries that; or, if the client has to ask again,
        its next session does.
        """
        if self._replaceable and not self.left:
            self.left = True
            if self._client.on_reset is not None:
                self._client.on_reset()

    def leave_for_better(self) -> None:
        """Give it up, if the session may go on with an upstream that is well."""
        if not self.sent and self._better():
            self.leave()


class State:
    """What is known of one upstream in this worker."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.up = True
        """Until something says otherwise."""
        self.why = ""
        """it is down"""
        self.since: float | None = None
        """When that was last found to be otherwise, in seconds since the epoch; None: not since the start."""
        self.latency: float | None = None
        """Of the last probe, in seconds; None: it has answered none since it was last gone."""
        self.round_trip = 0.0
        """The shorter one of the last two probes, in seconds."""
        self.slow = False
        """It answers, and takes longer for it than is waited for one that hangs."""
        self.worked = False
        """There was a tunnel through it, since it was last gone."""
        self.trial = False
        """It is down, and the next client may try it: it accepts connections, and may be one that answers no probes."""
        self.ours: bool | None = None
        self.pipelines: bool | None = None
        self.heard = 0.0
        """When it last answered anything."""
        self.waiting: dict[Attempt, None] = {}
        """The attempts that have no answer yet, in the order of their start."""
        self.has_others = False
        """There is something to try instead of it: then its silence is looked into."""
        self.gauges: list[Counter] = []
        """1 while it is up, in each of its groups."""
        self.changed: Callable[[State], None] = lambda _: None
        """Called when it goes down or comes up, unless another worker has found that out."""
        self._at = 0.0
        self._last_round_trip = inf
        self._clock = clock
        self._idle: trio.Event | None = None

    def enter(self, attempt: Attempt) -> None:
        """This attempt waits for it, until it is taken out of `waiting`."""
        self.waiting[attempt] = None
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    async def occupied(self) -> None:
        """Return when some attempt waits."""
        if not self.waiting:
            self._idle = trio.Event()
            await self._idle.wait()

    @property
    def well(self) -> bool:
        """Whether to try it before those that are not."""
        return self.trial or (self.up and not self.slow)

    def worked_now(self) -> None:
        """There is a tunnel through it: no probe says more."""
        self.worked = True
        if not self.up:
            self.heard = now = self._clock()
            self._set_up(now)
            self.since = time.time()
            self.changed(self)

    def failed(self, why: str, at: float | None = None, *, gone: bool = False) -> None:
        """It does not answer: what began `at` (None: now) says so. Attempts that wait for it go elsewhere.

        `gone`: nothing is there any more, and another program may take its place.
        """
        if gone:
            self.latency, self.worked = None, False
        if self._set_down(why, self._clock() if at is None else at):
            self.since = time.time()
            self.changed(self)

    def answered(self, answer: Answer, at: float) -> None:
        """It has answered a probe that began `at`."""
        if not self.up and at < self._at:
            return  # it has failed since
        self.heard = max(self.heard, self._clock())
        self._learn(answer)
        if self._set_up(at):
            self.since = time.time()
            self.changed(self)

    def forget(self) -> None:
        """What was learned of it turns out to be wrong."""
        self.ours = self.pipelines = None

    def as_json(self) -> dict[str, Any]:
        """As `take` takes it, in another process."""
        found = {"up": self.up, "why": self.why, "since": self.since, "at": self._at}
        found |= {"latency": self.latency, "ours": self.ours, "pipelines": self.pipelines}
        return found | {"round_trip": self.round_trip, "slow": self.slow}

    def take(self, found: dict[str, Any]) -> None:
        """What the keeper has found, if that is newer than what is known here."""
        at = found["at"]
        if at <= self._at:
            return
        if found["up"]:
            if found["latency"] is not None:
                ours, pipelines = bool(found["ours"]), found["pipelines"]
                self._learn(Answer(found["latency"], ours, pipelines, found["round_trip"], found["slow"]))
            changed = self._set_up(at)
        else:
            changed = self._set_down(found["why"], at)
        if changed or self.since is None:
            self.since = found["since"]

    def status(self) -> dict[str, Any]:
        """As JSON values, for operators."""
        since = None if self.since is None else datetime.fromtimestamp(self.since, UTC)
        return {
            "upstream": self.name,
            "up": self.up,
            "why": self.why or None,
            "since": None if since is None else since.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "latency": None if self.latency is None else round(self.latency, 6),
            "slow": self.slow,
            "ours": self.ours,
            "pipelines": self.pipelines,
        }

    def _learn(self, answer: Answer) -> None:
        was_slow, self.slow = self.slow, answer.slow
        self.latency = answer.latency
        # One that was long may have waited in a queue on the way.
        self.round_trip = min(answer.round_trip, self._last_round_trip)
        self._last_round_trip = answer.round_trip
        if answer.pipelines is not None or answer.ours != self.ours:
            self.pipelines = answer.pipelines
        if self.ours and not answer.ours:
            # Another program has its place. It may well wait for more, when all has been said to it already.
            self._leave()
        elif self.slow and not was_slow:
            for attempt in list(self.waiting):
                attempt.leave_for_better()
        self.ours = answer.ours

    def _set_down(self, why: str, at: float) -> bool:
        if at < self._at or at < self.heard:
            return False
        was, self.up, self.why, self._at = self.up, False, why, at
        self.forget()
        self._leave()
        self._show()
        return was

    def _set_up(self, at: float) -> bool:
        was, self.up, self.why, self._at = self.up, True, "", max(at, self._at)
        self.trial = False
        self._show()
        return not was

    def _leave(self) -> None:
        for attempt in list(self.waiting):
            attempt.leave()

    def _show(self) -> None:
        for gauge in self.gauges:
            gauge.value = int(self.up)

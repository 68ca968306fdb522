"""The state of an upstream in one worker: whether it is up, since when and why, and which attempts wait for it.

Rules of this file:

- The newer finding counts. Each has the time at which it began to be true (on the reactor's clock, which all processes
  of a host share), and an upstream that has answered since then is not down.
- A connection that succeeds is the best evidence, a probe the next best.
- No single bad sample has a lasting effect: docs/design.md lists the limit of everything that is remembered here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from typing import Any, NamedTuple

import trio

from transocks.upstreams.request import Attempt
from usocksd.log.metrics import Counter

# Seconds after which an upstream that has no UDP ASSOCIATE is asked for it again.
_ASK_UDP_AGAIN_AFTER = 600.0


class Answer(NamedTuple):
    """The answer of an upstream to a probe."""

    latency: float
    """seconds that it took, connecting included"""
    ours: bool = False
    """It is a usocksd: takes greeting, credentials, request and payload in one segment."""
    pipelines: bool | None = None
    """It takes greeting, credentials and request in one segment; None: not known."""
    round_trip: float = 0.0
    """the round trip in seconds as measured by the kernel, so independent of how busy the program was"""
    slow: bool = False
    """The answer took longer than a connection waits for an upstream that may hang."""


class UpstreamState:
    """The state of one upstream in this worker."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.up = True
        """Assumed until something shows otherwise."""
        self.why = ""
        """why it is down"""
        self.since: float | None = None
        """When it last went down or came up, in seconds since the epoch; None: not since the start."""
        self.latency: float | None = None
        """How long the last probe took, in seconds; None: no probe was answered since it was last gone."""
        self.round_trip = 0.0
        """The shorter round trip of the last two probes, in seconds."""
        self.slow = False
        """It answers, but takes longer than a connection waits for an upstream that may hang."""
        self.worked = False
        """There was a tunnel through it, since it was last gone."""
        self.trial = False
        """It is down and the next client may try it, since it accepts connections and may be one that never answers
        probes.
        """
        self.ours: bool | None = None
        self.pipelines: bool | None = None
        self.has_udp: bool | None = None
        """Whether it has UDP ASSOCIATE; None: nobody has asked yet."""
        self.heard = 0.0
        """When it last answered anything."""
        self.waiting: dict[Attempt, None] = {}
        """The attempts that have no answer yet, in the order of their start."""
        self.has_others = False
        """Something else can be tried instead of it, so its silence is investigated."""
        self.gauges: list[Counter] = []
        """1 while it is up, in each of its groups."""
        self.changed: Callable[[UpstreamState], None] = lambda _: None
        """Called when it goes down or comes up, unless another worker has found that out."""
        self._at = 0.0
        self._last_round_trip = inf
        self._ask_udp_again_at = 0.0
        self._clock = clock
        self._idle: trio.Event | None = None

    def enter(self, attempt: Attempt) -> None:
        """The attempt waits for the upstream, until it is removed from `waiting`."""
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
        """Whether to try it before those that are not well."""
        return self.trial or (self.up and not self.slow)

    @property
    def may_have_udp(self) -> bool:
        """False if it has said lately that it has no UDP ASSOCIATE."""
        return self.has_udp is not False or self._clock() >= self._ask_udp_again_at

    def lacks_udp(self) -> None:
        """It has answered that it has no UDP ASSOCIATE."""
        self.has_udp = False
        self._ask_udp_again_at = self._clock() + _ASK_UDP_AGAIN_AFTER

    def silent_since(self, heard: float) -> bool:
        """Whether it is down, by a finding that is newer than `heard`."""
        return not self.up and heard < self._at

    def worked_now(self) -> None:
        """A tunnel through it works, which is better evidence than a probe."""
        self.worked = True
        if not self.up:
            self.heard = now = self._clock()
            self._set_up(now)
            self.since = time.time()
            self.changed(self)

    def failed(self, why: str, at: float | None = None, *, gone: bool = False) -> None:
        """It does not answer, by a finding that began `at` (None: now). Attempts that wait for it go elsewhere.

        `gone`: the program or host is gone, and another program may take its place.
        """
        if gone:
            self.latency, self.worked, self.has_udp = None, False, None
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
        """The findings, for `take` in another process."""
        names = ("up", "why", "since", "latency", "ours", "pipelines", "round_trip", "slow")
        return {"at": self._at, **{name: getattr(self, name) for name in names}}

    def take(self, found: dict[str, Any]) -> None:
        """Take over the findings of the keeper, if they are newer."""
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
        """The state as JSON values, for operators."""
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
            "udp": self.has_udp,
        }

    def _learn(self, answer: Answer) -> None:
        was_slow, self.slow = self.slow, answer.slow
        self.latency = answer.latency
        # A long round trip may include a queue on the way.
        self.round_trip = min(answer.round_trip, self._last_round_trip)
        self._last_round_trip = answer.round_trip
        if answer.pipelines is not None or answer.ours != self.ours:
            self.pipelines = answer.pipelines
        if self.ours and not answer.ours:
            # Another program has taken its place. It may be waiting for more, although everything was sent already.
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
            gauge.value = float(self.up)

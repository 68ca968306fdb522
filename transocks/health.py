"""Which upstreams answer: marked down by what fails, up again by what answers, and known to all workers.

What this file keeps:

1. Whatever is newer counts. Every finding has the time at which it began to be true (on the reactor's clock, which is
   the same for all processes of a host), and an upstream that was heard of since is not down.
2. An upstream is marked down by an attempt to use it that failed, or by a probe that was not answered. It is marked up
   by a probe that was answered, in the worker that asked and, when that is the keeper, in all.
3. A slow destination is no fault of its upstream. So silence alone marks nothing down: it has the upstream probed, on
   a connection of its own, one at a time however many attempts wait.
4. What timed out in a process that did not run proves nothing.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import trio

from transocks.config import HealthConfig
from usocksd.errors import DialError, Error
from usocksd.runtime.endpoint import Endpoint
from usocksd.runtime.metrics import Counter, Metrics

log = logging.getLogger(__name__)

# Seconds until an upstream that has just been marked down is probed for the first time; then twice as long each time.
_FIRST_PAUSE = 0.5
# What went wrong here, not there. (EADDRNOTAVAIL: out of ports.)
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES}
_TRIES_IF_LATE = 3


class ProbeTimedOut(DialError):
    """There was no answer in time. `late`: this process did not run meanwhile, so it may be its own fault."""

    def __init__(self, address: str, step: str, *, late: bool) -> None:
        super().__init__(errno.ETIMEDOUT, address, step)
        self.late = late


class Answer(NamedTuple):
    """What an upstream has said to a probe, and after how many seconds, connecting included."""

    latency: float
    ours: bool = False
    """It is a usocksd: takes greeting, credentials, request and payload in one segment."""
    pipelines: bool | None = None
    """It takes greeting, credentials and request in one; None: not known."""


class Attempt:
    """One try to reach a destination through one upstream, as long as that has not answered the request."""

    __slots__ = ("_client", "_replaceable", "left", "pipelined", "sent", "since")

    def __init__(self, client: Endpoint, *, replaceable: bool) -> None:
        """`replaceable`: there is another upstream to try instead. `client` is whose session it is."""
        self.since = client.reactor.clock()
        self.sent = False
        """The upstream was sent what the client has said, and that may not be said to another."""
        self.pipelined = False
        """The upstream was told all at once, since it is known to take that."""
        self.left = False
        """Nobody waits for it any more: it ends as if the client were gone."""
        self._client = client
        self._replaceable = replaceable

    def leave(self) -> None:
        """Give it up, if the session has something else to try and may."""
        if self._replaceable and not self.sent and not self.left:
            self.left = True
            if self._client.on_reset is not None:
                self._client.on_reset()


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
        """Of the last probe, in seconds."""
        self.ours: bool | None = None
        self.pipelines: bool | None = None
        self.heard = 0.0
        """When it last answered anything."""
        self.waiting: dict[Attempt, None] = {}
        """The attempts that have no answer yet, in the order of their start."""
        self.gauges: list[Counter] = []
        """1 while it is up, in each of its groups."""
        self.changed: Callable[[State], None] = lambda _: None
        """Called when it goes down or comes up, unless another worker has found that out."""
        self._at = 0.0
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

    def failed(self, why: str, at: float | None = None) -> None:
        """It does not answer: what began `at` (None: now) says so. Attempts that wait for it go elsewhere."""
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
        return found | {"latency": self.latency, "ours": self.ours, "pipelines": self.pipelines}

    def take(self, found: dict[str, Any]) -> None:
        """What the keeper has found, if that is newer than what is known here."""
        at = found["at"]
        if at <= self._at:
            return
        if found["up"]:
            if found["latency"] is not None:
                self._learn(Answer(found["latency"], bool(found["ours"]), found["pipelines"]))
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
            "ours": self.ours,
            "pipelines": self.pipelines,
        }

    def _learn(self, answer: Answer) -> None:
        self.latency = answer.latency
        if answer.pipelines is not None or answer.ours != self.ours:
            self.pipelines = answer.pipelines
        if self.ours and not answer.ours:
            # Another program has its place. It may well wait for more, when all has been said to it already.
            self._leave()
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
        self._show()
        return not was

    def _leave(self) -> None:
        for attempt in list(self.waiting):
            attempt.leave()

    def _show(self) -> None:
        for gauge in self.gauges:
            gauge.value = int(self.up)


class Probed(Protocol):
    """An upstream as it is seen from here."""

    @property
    def key(self) -> str:
        """What it is called between processes."""

    @property
    def state(self) -> State:
        """What is known of it."""

    async def probe(self, *, connect: float, answer: float, learn: bool) -> Answer:
        """Ask it whether it is there: it has so many seconds to accept a connection, and to answer on it, or three
        times as long as it took to accept. `learn`: find out whether it takes pipelining too, if that is not known.

        Raises Error.
        """


class Health:
    """Finds out how upstreams are: `run` in every worker, `keep` in one."""

    def __init__(
        self,
        upstreams: Sequence[Probed],
        config: HealthConfig,
        share: Callable[[Any], None],
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`share` gives what is found out to all workers. `clock` is the reactor's."""
        self._upstreams = upstreams
        self._config = config
        self._share = share
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()
        self._recovering: set[str] = set()
        probes = metrics.counters("upstream_probes_total", "Probes of upstreams: ok or failed", "upstream", "result")
        self._counters = {
            upstream.key: [probes.labels(upstream.state.name, result) for result in ("failed", "ok")]
            for upstream in upstreams
        }
        self._by_state = {upstream.state: upstream for upstream in upstreams}
        for state in self._by_state:
            state.changed = self._changed

    def take(self, found: Any) -> None:
        """What the keeper shares, perhaps under another configuration: what is not known here is left out."""
        for upstream in self._upstreams:
            if upstream.key in found:
                was = upstream.state.up
                upstream.state.take(found[upstream.key])
                if was and not upstream.state.up:
                    self._recover_later(upstream)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """What each worker does: look after attempts that wait, and probe what is down. Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for upstream in self._upstreams:
                self._nursery.start_soon(self._watch, upstream)
                if not upstream.state.up:
                    self._recover_later(upstream)
            task_status.started()
            await trio.sleep_forever()

    async def keep(self) -> None:
        """What one worker does for all: probe what is up, and share what is known. Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._share_news)
            for upstream in self._upstreams:
                nursery.start_soon(self._keep, upstream)

    async def _keep(self, upstream: Probed) -> None:
        while True:
            if upstream.state.up:
                await self._check(upstream)
            await trio.sleep(self._config.interval)

    async def _share_news(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            self._share({upstream.key: upstream.state.as_json() for upstream in self._upstreams})

    async def _check(self, upstream: Probed) -> None:
        """Probe it, without haste."""
        timeout, began = self._config.timeout, self._clock()
        try:
            answer = await upstream.probe(connect=timeout, answer=timeout, learn=True)
        except Error as error:
            self._unanswered(upstream, error, began)
        else:
            self._answered(upstream, answer, began)
        self._news.set()

    async def _recover(self, upstream: Probed) -> None:
        pause = min(_FIRST_PAUSE, self._config.interval)
        while not upstream.state.up:
            await trio.sleep(pause)
            pause = min(pause * 2, self._config.interval)
            if not upstream.state.up:
                await self._check(upstream)
        self._recovering.discard(upstream.key)

    def _recover_later(self, upstream: Probed) -> None:
        if self._nursery is not None and upstream.key not in self._recovering:
            self._recovering.add(upstream.key)
            self._nursery.start_soon(self._recover, upstream)

    async def _watch(self, upstream: Probed) -> None:
        """Probe it when those who wait for it hear nothing."""
        state, after, probed = upstream.state, self._config.suspect_after, 0.0
        while True:
            await state.occupied()
            # Not until the attempt is old enough, but so long each time: most are over by then.
            await trio.sleep(after)
            while state.waiting:
                now = self._clock()
                oldest, youngest = next(iter(state.waiting)), next(reversed(state.waiting))
                # Who waits for long waits for a slow destination, most likely.
                due = max(state.heard, probed, oldest.since) + max(after, (now - youngest.since) / 2)
                if now < due:
                    await trio.sleep(due - now)
                    continue
                await self._suspect(upstream)
                probed = self._clock()

    async def _suspect(self, upstream: Probed) -> None:
        """Probe it, in haste: its attempts wait."""
        limit = self._config.suspect_timeout
        usual = upstream.state.latency or 0.0
        for tries_left in reversed(range(_TRIES_IF_LATE)):
            began = self._clock()
            try:
                # (A probe is a round trip to connect and one to answer.)
                answer = await upstream.probe(connect=max(limit, 1.5 * usual), answer=limit, learn=False)
            except ProbeTimedOut as error:
                if error.late and tries_left:
                    continue
                self._unanswered(upstream, error, began)
            except Error as error:
                self._unanswered(upstream, error, began)
            else:
                self._answered(upstream, answer, began)
            return

    def _answered(self, upstream: Probed, answer: Answer, began: float) -> None:
        self._counters[upstream.key][True].value += 1
        upstream.state.answered(answer, began)

    def _unanswered(self, upstream: Probed, error: Error, began: float) -> None:
        if isinstance(error, DialError) and error.errno in _OURS:
            return
        self._counters[upstream.key][False].value += 1
        upstream.state.failed(str(error), began)

    def _changed(self, state: State) -> None:
        fields: dict[str, Any] = {"upstream": state.name}
        if state.up:
            log.info("upstream is up again", extra={"fields": fields})
        else:
            log.warning("upstream is down", extra={"fields": fields | {"error": state.why}})
            self._recover_later(self._by_state[state])
        self._news.set()

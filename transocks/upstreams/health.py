"""Which upstreams answer: marked down by what fails, up again by what answers, and known to all workers.

What this file keeps, beside upstream_state.py:

1. An upstream is marked down by an attempt to use it that failed, or by a probe that was not answered. It is marked up
   by a probe that was answered, in the worker that asked and, when that is the keeper, in all.
2. A slow destination is no fault of its upstream. So silence alone marks nothing down: it has the upstream probed, on
   a connection of its own, one at a time however many attempts wait.
3. What timed out in a process that did not run proves nothing.
4. An upstream that answers late may have had a bad moment: it is probed once more. If it is late again it is slow, and
   is used when no other is well.
5. Silence counts against an upstream that has answered probes before, or through which no tunnel has ever worked.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from transocks.config import HealthConfig
from transocks.upstreams.state import Answer, State
from usocksd.errors import DialError, Error
from usocksd.log.metrics import Metrics
from usocksd.serve.service import Stopping

log = logging.getLogger(__name__)

# Seconds until an upstream that has just been marked down is probed for the first time; then twice as long each time.
_FIRST_PAUSE = 0.5
# What went wrong here, not there. (EADDRNOTAVAIL: out of ports.)
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES}
# Errors that say that the host or its proxy is gone; other errors concern this connection or this host. (A time-out is
# silence, which probes judge.)
_GONE = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
_TRIES_IF_LATE = 3


def is_gone(error: Error) -> bool:
    """Whether the error says that the upstream or its host is gone."""
    return isinstance(error, DialError) and error.step == "connect" and error.errno in _GONE


class ProbeTimedOut(DialError):
    """There was no answer in time. `late`: this process did not run meanwhile, so it may be its own fault."""

    def __init__(self, address: str, step: str, *, late: bool) -> None:
        super().__init__(errno.ETIMEDOUT, address, step)
        self.accepted = step != "connect"
        self.late = late


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
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for upstream in self._upstreams:
                if upstream.state.has_others:
                    nursery.start_soon(self._watch, upstream)
                if not upstream.state.up:
                    self._recover_later(upstream)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

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
        timeout = self._config.timeout
        await self._probe(upstream, connect=timeout, answer=timeout, hasty=False)
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
                # (Not the attempts themselves: what this task keeps outlives them.)
                oldest, youngest = next(iter(state.waiting)).since, next(reversed(state.waiting)).since
                # An attempt that has waited long is probably waiting for a slow destination.
                due = max(state.heard, probed, oldest) + max(after, (now - youngest) / 2)
                if now < due:
                    # In steps: those that come meanwhile are due before.
                    await trio.sleep(min(due - now, after))
                    continue
                await self._suspect(upstream)
                probed = self._clock()

    async def _suspect(self, upstream: Probed) -> None:
        """Probe it, in haste: its attempts wait."""
        state, limit = upstream.state, self._config.suspect_timeout
        # (The last latency counts only for a slow upstream, of which it is expected.)
        usual = 1.5 * (state.latency or 0.0) if state.slow else 0.0
        await self._probe(upstream, connect=self._haste(state.round_trip), answer=max(limit, usual), hasty=True)

    def _haste(self, round_trip: float) -> float:
        """The time for each step of a hasty probe, by the round trip."""
        return max(self._config.suspect_timeout, 3 * round_trip)

    async def _probe(self, upstream: Probed, *, connect: float, answer: float, hasty: bool) -> None:
        state, asked_again = upstream.state, False
        for tries_left in reversed(range(_TRIES_IF_LATE)):
            began = self._clock()
            try:
                found = await upstream.probe(connect=connect, answer=answer, learn=not hasty)
            except ProbeTimedOut as error:
                if error.late and tries_left:
                    continue
                self._unanswered(upstream, error, began, hasty=hasty)
            except Error as error:
                self._unanswered(upstream, error, began, hasty=hasty)
            except Stopping:
                pass  # all that is connected is ended, since this process is about to: that is no finding
            else:
                slow = found.latency - found.round_trip > self._haste(found.round_trip)
                if slow and not (state.slow or hasty or asked_again):
                    asked_again = True
                    continue
                self._answered(upstream, found._replace(slow=slow), began)
            return

    def _answered(self, upstream: Probed, answer: Answer, began: float) -> None:
        state = upstream.state
        was_slow = state.slow
        self._counters[upstream.key][True].value += 1
        state.answered(answer, began)
        if state.slow != was_slow and state.has_others:
            fields = {"upstream": state.name, "latency": round(answer.latency, 3)}
            log.info(f"upstream is {'slow' if state.slow else 'no longer slow'}", extra={"fields": fields})

    def _unanswered(self, upstream: Probed, error: Error, began: float, *, hasty: bool) -> None:
        if isinstance(error, DialError) and error.errno in _OURS:
            return
        self._counters[upstream.key][False].value += 1
        state = upstream.state
        if isinstance(error, ProbeTimedOut) and error.accepted and state.latency is None:
            # It has never answered a probe. Perhaps it answers none, and a client can tell.
            if not hasty:
                state.trial = not state.up
            if state.worked or not hasty:
                return
        state.failed(str(error), began, gone=is_gone(error))

    def _changed(self, state: State) -> None:
        fields: dict[str, Any] = {"upstream": state.name}
        if state.up:
            log.info("upstream is up again", extra={"fields": fields})
        else:
            log.warning("upstream is down", extra={"fields": fields | {"error": state.why}})
            self._recover_later(self._by_state[state])
        self._news.set()

"""Which upstreams answer: failures mark them down, answers mark them up, and all workers are told.

Rules of this file, beside those of state.py:

1. An upstream is marked down by a failed attempt to use it, or by a probe without an answer. It is marked up by a probe
   that was answered: in the worker that asked, and in all workers if that is the keeper.
2. A slow destination is no fault of its upstream. So silence alone marks nothing down: it has the upstream probed, on
   a connection of its own, one at a time however many attempts wait.
3. A time-out proves nothing if this process did not run meanwhile.
4. An upstream that answers late may have had a bad moment: it is probed once more. If it is late again it is slow, and
   is used when no other is well.
5. Silence counts against an upstream that has answered probes before, or through which no tunnel has ever worked.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from transocks.config import HealthConfig
from transocks.upstreams.probes import ProbeTimedOut
from transocks.upstreams.state import Answer, UpstreamState
from transocks.upstreams.upstream import Upstream, UpstreamMetrics, is_gone
from usocksd.errors import DialError, Error
from usocksd.log.metrics import Counter
from usocksd.serve.service import Stopping

log = logging.getLogger(__name__)

# Seconds until an upstream that has just been marked down is probed for the first time; then twice as long each time.
_FIRST_PAUSE = 0.5
# Errors whose cause is this host, not the upstream. (EADDRNOTAVAIL: out of ports.)
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES}
_TRIES_IF_LATE = 3


class Health:
    """Watches upstreams: `run` in every worker, `keep` in one."""

    def __init__(
        self,
        config: HealthConfig,
        share: Callable[[Any], None],
        metrics: UpstreamMetrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`share` passes findings to all workers. `clock` is the reactor's."""
        self._upstreams: dict[str, Upstream] = {}
        """By key"""
        self._metrics = metrics
        self._config = config
        self._share = share
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()
        self._keepers: trio.Nursery | None = None
        self._recovering: set[str] = set()
        self._counters: dict[str, list[Counter]] = {}
        self._by_state: dict[UpstreamState, Upstream] = {}
        self._scopes: dict[str, list[trio.CancelScope]] = {}

    def add(self, upstream: Upstream) -> None:
        """Watch this one, too."""
        key, state = upstream.key, upstream.state
        self._upstreams[key] = upstream
        self._by_state[state] = upstream
        self._counters[key] = [self._metrics.probes.labels(state.name, result) for result in ("failed", "ok")]
        self._scopes[key] = []
        state.changed = self._changed
        if self._nursery is not None:
            self._begin(self._nursery, upstream)
        if self._keepers is not None:
            self._keepers.start_soon(self._while_watched, self._keep, upstream)

    def remove(self, upstream: Upstream) -> None:
        """It is no longer used for new connections."""
        upstream.state.changed = lambda _: None
        del self._upstreams[upstream.key], self._by_state[upstream.state]
        self._recovering.discard(upstream.key)
        for scope in self._scopes.pop(upstream.key):
            scope.cancel()

    async def _while_watched(self, watch: Callable[[Upstream], Awaitable[None]], upstream: Upstream) -> None:
        scopes = self._scopes.get(upstream.key)
        if scopes is not None and self._upstreams.get(upstream.key) is upstream:
            with trio.CancelScope() as scope:
                scopes.append(scope)
                await watch(upstream)
            scopes.remove(scope)

    def _begin(self, nursery: trio.Nursery, upstream: Upstream) -> None:
        if upstream.state.has_others:
            nursery.start_soon(self._while_watched, self._watch, upstream)
        if not upstream.state.up:
            self._recover_later(upstream)

    def take(self, found: Any) -> None:
        """Learn what the keeper shares. It may be of another configuration, with other upstreams."""
        for upstream in self._upstreams.values():
            if upstream.key in found:
                was = upstream.state.up
                upstream.state.take(found[upstream.key])
                if was and not upstream.state.up:
                    self._recover_later(upstream)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """In every worker, until cancelled: probe upstreams that are silent or down."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for upstream in self._upstreams.values():
                self._begin(nursery, upstream)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def keep(self) -> None:
        """In one worker, until cancelled: probe upstreams that are up, and share all findings."""
        async with trio.open_nursery() as nursery:
            self._keepers = nursery
            nursery.start_soon(self._share_news)
            for upstream in self._upstreams.values():
                nursery.start_soon(self._while_watched, self._keep, upstream)
            try:
                await trio.sleep_forever()
            finally:
                self._keepers = None

    async def _keep(self, upstream: Upstream) -> None:
        while True:
            if upstream.state.up:
                await self._check(upstream)
            await trio.sleep(self._config.interval)

    async def _share_news(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            self._share({key: upstream.state.as_json() for key, upstream in self._upstreams.items()})

    async def _check(self, upstream: Upstream) -> None:
        """Probe it with full patience."""
        timeout = self._config.timeout
        await self._probe(upstream, connect=timeout, answer=timeout, hasty=False)
        self._news.set()

    async def _recover(self, upstream: Upstream) -> None:
        pause = min(_FIRST_PAUSE, self._config.interval)
        while not upstream.state.up:
            await trio.sleep(pause)
            pause = min(pause * 2, self._config.interval)
            if not upstream.state.up:
                await self._check(upstream)
        self._recovering.discard(upstream.key)

    def _recover_later(self, upstream: Upstream) -> None:
        if self._nursery is not None and upstream.key not in self._recovering:
            self._recovering.add(upstream.key)
            self._nursery.start_soon(self._while_watched, self._recover, upstream)

    async def _watch(self, upstream: Upstream) -> None:
        """Probe it when attempts wait for it and it is silent."""
        state, after, probed = upstream.state, self._config.suspect_after, 0.0
        while True:
            await state.occupied()
            # Wait for the full time, whatever the attempt's age: most attempts have ended by then.
            await trio.sleep(after)
            while state.waiting:
                now = self._clock()
                # (No reference to the attempts: this task would keep them alive.)
                oldest, youngest = next(iter(state.waiting)).since, next(reversed(state.waiting)).since
                # An attempt that has waited long is probably waiting for a slow destination.
                due = max(state.heard, probed, oldest) + max(after, (now - youngest) / 2)
                if now < due:
                    # In short steps, since attempts that begin meanwhile are due earlier.
                    await trio.sleep(min(due - now, after))
                    continue
                await self._suspect(upstream)
                probed = self._clock()

    async def _suspect(self, upstream: Upstream) -> None:
        """Probe it in haste, since attempts wait."""
        state, limit = upstream.state, self._config.suspect_timeout
        # (A slow upstream is given the time that it usually takes.)
        usual = 1.5 * (state.latency or 0.0) if state.slow else 0.0
        await self._probe(upstream, connect=self._haste(state.round_trip), answer=max(limit, usual), hasty=True)

    def _haste(self, round_trip: float) -> float:
        """The time for each step of a hasty probe, by the round trip."""
        return max(self._config.suspect_timeout, 3 * round_trip)

    async def _probe(self, upstream: Upstream, *, connect: float, answer: float, hasty: bool) -> None:
        state, asked_again = upstream.state, False
        for tries_left in reversed(range(_TRIES_IF_LATE)):
            began = self._clock()
            try:
                found = await upstream.prober.probe(connect=connect, answer=answer, learn=not hasty)
            except ProbeTimedOut as error:
                if error.late and tries_left:
                    continue
                self._unanswered(upstream, error, began, hasty=hasty)
            except Error as error:
                self._unanswered(upstream, error, began, hasty=hasty)
            except Stopping:
                pass  # this process is stopping, and ends its own connections: no finding
            else:
                slow = found.latency - found.round_trip > self._haste(found.round_trip)
                if slow and not (state.slow or hasty or asked_again):
                    asked_again = True
                    continue
                self._answered(upstream, found._replace(slow=slow), began)
            return

    def _answered(self, upstream: Upstream, answer: Answer, began: float) -> None:
        state = upstream.state
        was_slow = state.slow
        self._counters[upstream.key][True].value += 1
        state.answered(answer, began)
        if state.slow != was_slow and state.has_others:
            fields = {"upstream": state.name, "latency": round(answer.latency, 3)}
            log.info(f"upstream is {'slow' if state.slow else 'no longer slow'}", extra={"fields": fields})

    def _unanswered(self, upstream: Upstream, error: Error, began: float, *, hasty: bool) -> None:
        if isinstance(error, DialError) and error.errno in _OURS:
            return
        self._counters[upstream.key][False].value += 1
        state = upstream.state
        if isinstance(error, ProbeTimedOut) and error.accepted and state.latency is None:
            # It has never answered a probe. Perhaps it answers none, and only a client's connection can tell.
            if not hasty:
                state.trial = not state.up
            if state.worked or not hasty:
                return
        state.failed(str(error), began, gone=is_gone(error))

    def _changed(self, state: UpstreamState) -> None:
        fields: dict[str, Any] = {"upstream": state.name}
        if state.up:
            log.info("upstream is up again", extra={"fields": fields})
        else:
            log.warning("upstream is down", extra={"fields": fields | {"error": state.why}})
            self._recover_later(self._by_state[state])
        self._news.set()

"""Groups of upstreams: the order in which they are tried, and when the next one is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from transocks.config import DIRECT, FAILOVER, ROUND_ROBIN, STICKY, GroupConfig
from transocks.direct import Direct
from transocks.upstreams.probes import WAITING
from transocks.upstreams.request import Attempt, Progress, Tunnel, TunnelRequest
from transocks.upstreams.state import UpstreamState
from transocks.upstreams.upstream import Upstream, UpstreamMetrics
from usocksd.errors import DialError, Error, ResolveError, UpstreamError
from usocksd.names.match import rendezvous, weighted_rendezvous
from usocksd.net.endpoint import Interruptible
from usocksd.settings.types import Timeouts
from usocksd.socks import AuthenticationFailed, Reply, RequestRefused, Socks4Reply, UpstreamFault

# The table of refusals. After these replies of SOCKS no other proxy is tried: they are about the destination, where
# another one would fail as well, or the proxy's policy, which another one must not be used to get around. Any other
# code, assigned or not, is the proxy's own trouble. With HTTP, those of `_HTTP_OWN_TROUBLE` are; squid uses
# 503 for a destination too, and tinyproxy 500, but one more try does no harm.
_FINAL: set[int] = {
    Reply.NOT_ALLOWED,
    Reply.HOST_UNREACHABLE,
    Reply.CONNECTION_REFUSED,
    Reply.TTL_EXPIRED,
    Socks4Reply.REJECTED,  # SOCKS4 has only this code
}
# In the place of weight 0, which is "a very small chance" (RFC 2782).
_LEAST_WEIGHT = 0.001
_HTTP_OWN_TROUBLE = {405, 429, 500, 501, 503, 505}


class NoUdp(UpstreamError):
    """No upstream of the group carries UDP."""


class NoUpstream(UpstreamError):
    """The group has no upstream: the name that stands for them has none."""


class Place(NamedTuple):
    """An upstream, and its place in a group that DNS tells of: see Member."""

    upstream: Upstream
    priority: int = 0
    weight: int = 1


class UpstreamGroup:
    """Proxies that stand in for each other."""

    def __init__(
        self, name: str, config: GroupConfig, upstreams: Sequence[Upstream], direct: Direct, metrics: UpstreamMetrics
    ) -> None:
        """`upstreams` are those of `config`, in its order; none if `found` will tell of them."""
        self.name = name
        self.upstreams: tuple[Upstream, ...] = ()
        self._policy = config.policy
        self._when_all_down = config.when_all_down
        self._when_no_udp = config.when_no_udp
        self._direct = direct if config.when_all_down == DIRECT else None
        self._turn = count()
        self._metrics = metrics
        self._places: tuple[Place, ...] = ()
        """Of upstreams that DNS tells of"""
        self._use(upstreams)

    def found(self, places: Sequence[Place]) -> None:
        """These are the upstreams now. Attempts that are under way go on with those that were."""
        self._places = tuple(places)
        self._use([each.upstream for each in places])

    def _use(self, upstreams: Sequence[Upstream]) -> None:
        before, self.upstreams = self.upstreams, tuple(dict.fromkeys(upstreams))
        for each in self.upstreams:
            each.state.has_others |= len(self.upstreams) > 1 or self._direct is not None or bool(self._places)
            if each not in before:
                self._metrics.failovers.labels(self.name, each.name)  # is there from now on, as 0
                gauge = self._metrics.up.labels(self.name, each.name)
                gauge.value = float(each.state.up)
                each.state.gauges.append(gauge)

    async def connect(
        self, request: TunnelRequest, client: Interruptible, timeouts: Timeouts, access: Progress
    ) -> Tunnel:
        """Reach what `request` is for through one of the proxies. Each is tried at most once; all tries together have
        `timeouts` (see Upstream.connect). `access` is told of every try.

        Raises the Error of the last try, or PeerReset when `client` is gone.
        """
        found = await self._through(request, client, timeouts, access, self._order(request))
        if found is None:
            assert self._direct is not None
            return await self._direct.connect(request, client, timeouts, access)
        return found[0]

    async def associate(
        self, request: TunnelRequest, client: Interruptible, timeouts: Timeouts, access: Progress
    ) -> tuple[Tunnel, UpstreamState] | None:
        """A UDP association with one of the proxies that have it, and the state of that proxy. None: send datagrams
        directly.

        Raises NoUdp, and what `connect` does.
        """
        while able := deque(each for each in self._order(request) if each.carries_udp):
            try:
                return await self._through(request, client, timeouts, access, able)
            except RequestRefused as error:
                if error.reply != Reply.COMMAND_NOT_SUPPORTED:
                    raise
                # It was the last one, and counts no longer. Those that were tried before it may be back.
                if any(each.carries_udp for each in self.upstreams):
                    raise
        if self._when_no_udp == DIRECT:
            return None
        raise NoUdp(f"no upstream of {self.name} carries UDP")

    @property
    def carries_udp(self) -> bool:
        """Whether datagrams have a way, through a proxy or directly, as far as is known."""
        return self._when_no_udp == DIRECT or any(each.carries_udp for each in self.upstreams)

    async def _through(
        self,
        request: TunnelRequest,
        client: Interruptible,
        timeouts: Timeouts,
        access: Progress,
        untried: deque[Upstream],
    ) -> tuple[Tunnel, UpstreamState] | None:
        """Through one of these proxies; None: all are down, and the direct way is allowed."""
        reactor = client.reactor
        deadline = reactor.clock() + timeouts.connect
        while True:
            upstream = self._next(untried)
            if upstream is None:
                return None
            access.trying(self.name, upstream.name, upstream.scheme)
            attempt = Attempt(
                client,
                replaceable=bool(untried) or self._direct is not None,
                better=lambda: any(each.state.well for each in untried),
            )
            try:
                tunnel = await upstream.connect(request, client, timeouts, access, attempt=attempt, deadline=deadline)
                return tunnel, upstream.state
            except Error as error:
                if attempt.pipelined and isinstance(error, UpstreamFault):
                    # It no longer accepts pipelining: try again step by step, unless that would send bytes twice.
                    upstream.state.forget()
                    untried.appendleft(upstream)
                elif attempt.pipelined and is_late(error):
                    # Perhaps it no longer accepts pipelining, and drops the rest: next time step by step.
                    upstream.state.forget()
                if not (untried or self._direct) or not goes_on(error, attempt) or reactor.clock() >= deadline:
                    raise
                self._metrics.failovers.labels(self.name, upstream.name).value += 1

    def status(self) -> dict[str, object]:
        """The state as JSON values, for operators."""
        return {
            "policy": self._policy,
            "when_all_down": self._when_all_down,
            "when_no_udp": self._when_no_udp,
            "upstreams": [upstream.status() for upstream in self.upstreams]
            if not self._places
            else [each.upstream.status() | {"priority": each.priority, "weight": each.weight} for each in self._places],
        }

    def _order(self, request: TunnelRequest) -> deque[Upstream]:
        """All upstreams, the preferred one first."""
        upstreams = self.upstreams
        if self._places:
            return self._order_by_weight(request)
        if len(upstreams) <= 1 or self._policy == FAILOVER:
            return deque(upstreams)
        if self._policy == STICKY:
            return deque(rendezvous(_key(request), upstreams, _identity))
        assert self._policy == ROUND_ROBIN
        up = [each for each in upstreams if each.state.well] or upstreams
        first = next(self._turn) % len(up)
        return deque((*up[first:], *up[:first], *(each for each in upstreams if each not in up)))

    def _order_by_weight(self, request: TunnelRequest) -> deque[Upstream]:
        """Those of the lowest priority first, and among them each as often as its weight says (RFC 2782)."""
        key = _key(request) if self._policy == STICKY else os.urandom(8)
        order = weighted_rendezvous(key, self._places, _identity_of_place, _weight)
        return deque(each.upstream for each in sorted(order, key=_priority))

    def _next(self, untried: deque[Upstream]) -> Upstream | None:
        """Take out the next one to try: the first that is well, else the first that is up, else the first; None: go
        directly.
        """
        found = next((each for each in untried if each.state.well), None)
        if found is None:
            found = next((each for each in untried if each.state.up), None)
        if found is not None:
            untried.remove(found)
            found.state.trial = False
            return found
        # All are down: go directly if that is allowed, else try them, since they may have recovered.
        if self._direct is not None:
            return None
        if not untried:
            raise NoUpstream(f"{self.name} has no upstream: its name stands for none")
        return untried.popleft()


def goes_on(error: Error, attempt: Attempt) -> bool:
    """Whether another upstream may be tried after this error."""
    match error:
        case RequestRefused():
            reply = error.reply
            # (A proxy that refuses has passed nothing on. From 300 on it is an HTTP status.)
            return reply not in _FINAL if reply < 300 else reply in _HTTP_OWN_TROUBLE
        case AuthenticationFailed() | ResolveError():
            return True
        case DialError():
            if is_late(error):
                return False
            # Not connected: nothing was sent, or only on the SYN.
            return error.step == "connect" or not attempt.sent
    return not attempt.sent


def is_late(error: Error) -> bool:
    """Whether the upstream was asked and has not answered in time."""
    return isinstance(error, DialError) and error.step == WAITING


def _key(request: TunnelRequest) -> bytes:
    """The same for what stays with one upstream. (A UDP association is for all destinations.)"""
    host = "" if request.udp else request.name or request.destination.host
    return f"{request.client.host} {host}".encode()


def _identity(upstream: Upstream) -> bytes:
    return upstream.key.encode()


def _identity_of_place(place: Place) -> bytes:
    return _identity(place.upstream)


def _priority(place: Place) -> int:
    return place.priority


def _weight(place: Place) -> float:
    return max(place.weight, _LEAST_WEIGHT)

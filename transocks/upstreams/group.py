"""Groups of upstreams: the order in which they are tried, and when the next one is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Any

from transocks.config import DIRECT, FAILOVER, ROUND_ROBIN, STICKY, GroupConfig, HealthConfig
from transocks.direct import Direct
from transocks.upstreams.health import Health
from transocks.upstreams.probes import WAITING
from transocks.upstreams.proxy_url import ProxyURL
from transocks.upstreams.request import Attempt, Progress, Tunnel, TunnelRequest
from transocks.upstreams.state import UpstreamState
from transocks.upstreams.upstream import Upstream, UpstreamMetrics
from usocksd.errors import DialError, Error, ResolveError, UpstreamError
from usocksd.log.metrics import Metrics
from usocksd.names.match import rendezvous
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort
from usocksd.net.dial import Dialer
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
_HTTP_OWN_TROUBLE = {405, 429, 500, 501, 503, 505}


class NoUdp(UpstreamError):
    """No upstream of the group carries UDP."""


class UpstreamGroup:
    """Proxies that stand in for each other."""

    def __init__(
        self, name: str, config: GroupConfig, upstreams: Sequence[Upstream], direct: Direct, metrics: UpstreamMetrics
    ) -> None:
        """`upstreams` are those of `config`, in its order."""
        self.name = name
        self._policy = config.policy
        self._when_all_down = config.when_all_down
        self._when_no_udp = config.when_no_udp
        self._upstreams = tuple(dict.fromkeys(upstreams))
        self._direct = direct if config.when_all_down == DIRECT else None
        self._turn = count()
        self._failovers = {each: metrics.failovers.labels(name, each.name) for each in self._upstreams}
        for each in self._upstreams:
            gauge = metrics.up.labels(name, each.name)
            gauge.value = float(each.state.up)
            each.state.gauges.append(gauge)
            each.state.has_others |= len(self._upstreams) > 1 or self._direct is not None

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
                if any(each.carries_udp for each in self._upstreams):
                    raise
        if self._when_no_udp == DIRECT:
            return None
        raise NoUdp(f"no upstream of {self.name} carries UDP")

    @property
    def carries_udp(self) -> bool:
        """Whether datagrams have a way, through a proxy or directly, as far as is known."""
        return self._when_no_udp == DIRECT or any(each.carries_udp for each in self._upstreams)

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
                self._failovers[upstream].value += 1

    def status(self) -> dict[str, object]:
        """The state as JSON values, for operators."""
        return {
            "policy": self._policy,
            "when_all_down": self._when_all_down,
            "when_no_udp": self._when_no_udp,
            "upstreams": [upstream.status() for upstream in self._upstreams],
        }

    def _order(self, request: TunnelRequest) -> deque[Upstream]:
        """All upstreams, the preferred one first."""
        upstreams = self._upstreams
        if len(upstreams) == 1 or self._policy == FAILOVER:
            return deque(upstreams)
        if self._policy == STICKY:
            # (A UDP association is for all destinations.)
            host = "" if request.udp else request.name or request.destination.host
            key = f"{request.client.host} {host}".encode()
            return deque(rendezvous(key, upstreams, _identity))
        assert self._policy == ROUND_ROBIN
        up = [each for each in upstreams if each.state.well] or upstreams
        first = next(self._turn) % len(up)
        return deque((*up[first:], *up[:first], *(each for each in upstreams if each not in up)))

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
        return None if self._direct is not None else untried.popleft()


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


class Upstreams:
    """All upstreams of a configuration, each once, in their groups; and their health."""

    def __init__(
        self,
        groups: Mapping[str, GroupConfig],
        health: HealthConfig,
        *,
        dialer: Dialer,
        resolver: Resolver,
        mark: int | None,
        fast_open: bool,
        direct: Direct,
        share: Callable[[Any], None],
        metrics: Metrics,
    ) -> None:
        """`share`: see Health."""
        measured = UpstreamMetrics(metrics)
        # The same proxy with other credentials, or with PROXY headers, counts as another upstream.
        found: dict[tuple[ProxyURL, bool], Upstream] = {}
        for url, proxied in ((url, group.proxy_protocol) for group in groups.values() for url in group.proxy_url):
            if (url, proxied) not in found:
                key = (
                    (f"{url.username}@" if url.username is not None else "") + str(url) + (" PROXY" if proxied else "")
                )
                found[url, proxied] = Upstream(
                    url,
                    name=_new(str(url), {each.name for each in found.values()}),
                    key=_new(key, {each.key for each in found.values()}),
                    dialer=dialer,
                    resolver=resolver,
                    mark=mark,
                    fast_open=fast_open,
                    proxy_protocol=proxied,
                    metrics=measured,
                )
        self.groups = {
            name: UpstreamGroup(
                name, group, [found[url, group.proxy_protocol] for url in group.proxy_url], direct, measured
            )
            for name, group in groups.items()
        }
        self._all = tuple(found.values())
        self.health = Health(self._all, health, share, measured, clock=dialer.reactor.clock)
        self._parts: list[frozenset[HostPort]] = []
        self._addresses: frozenset[HostPort] = frozenset()

    @property
    def addresses(self) -> frozenset[HostPort]:
        """The addresses of all upstreams, as they are known now."""
        parts = [upstream.addresses for upstream in self._all]
        if parts != self._parts:
            self._parts, self._addresses = parts, frozenset().union(*parts)
        return self._addresses

    def status(self) -> dict[str, object]:
        """All groups as JSON values, for operators."""
        return {name: group.status() for name, group in self.groups.items()}


def _new(text: str, taken: Collection[str]) -> str:
    """`text`, with a number behind it if it is taken."""
    found = text
    number = 1
    while found in taken:
        number += 1
        found = f"{text} ({number})"
    return found


def _identity(upstream: Upstream) -> bytes:
    return upstream.key.encode()

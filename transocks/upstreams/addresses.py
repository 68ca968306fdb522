"""The addresses of an upstream: the one in its URL, or those of its name, resolved again when their TTL is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import inf

from transocks.upstreams.proxy_url import ProxyURL
from usocksd.errors import ResolveError
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort, IPAddress, without_zone
from usocksd.net.dial import Target
from usocksd.net.endpoint import Interruptible

# Seconds. If the name servers fail, or take longer, the addresses known before stay in use (RFC 8767).
_RESOLVE_WITHIN = 1.0
_STALE_FOR = 5.0


class UpstreamAddresses:
    """The addresses of one upstream, as they are known now."""

    def __init__(
        self, url: ProxyURL, *, clock: Callable[[], float], resolver: Resolver, mark: int | None, fast_open: bool
    ) -> None:
        self.targets: Sequence[Target] = ()
        """The addresses to dial."""
        self.known: frozenset[HostPort] = frozenset()
        """The same, without zones."""
        self._name = url.host if isinstance(url.host, str) else None
        self._port = url.port
        self._clock = clock
        self._resolver = resolver
        self._mark = mark
        self._fast_open = fast_open
        self._resolved: Sequence[IPAddress] = ()
        self._stale_until = -inf
        if not isinstance(url.host, str):
            self._learn((url.host,))

    async def refresh_for(self, client: Interruptible, deadline: float) -> None:
        """Resolve the name, on behalf of a client, unless its addresses are still valid. Raises ResolveError, if there
        are no addresses, and PeerReset.
        """
        now = self._clock()
        if self._name is not None and now >= self._stale_until:
            within = min(deadline, now + _RESOLVE_WITHIN) if self.targets else deadline
            await self._look_up(self._resolver.search(self._name, client, within))

    async def refresh(self, *, in_haste: bool) -> None:
        """Resolve the name; in haste only if there are no addresses, since slow name servers are not the upstream's
        fault. Raises ResolveError.
        """
        if self._name is not None and not (in_haste and self.targets):
            await self._look_up(self._resolver.search(self._name))

    async def _look_up(self, search: Awaitable[Sequence[IPAddress]]) -> None:
        try:
            self._learn(await search)
        except ResolveError as error:
            if not self.targets or error.absent:
                raise
            self._stale_until = self._clock() + _STALE_FOR

    def _learn(self, addresses: Sequence[IPAddress]) -> None:
        if addresses != self._resolved:
            self._resolved = addresses
            self.targets = [
                Target(str(address), self._port, mark=self._mark, fast_open=self._fast_open) for address in addresses
            ]
            self.known = frozenset(HostPort(str(without_zone(address)), self._port) for address in addresses)

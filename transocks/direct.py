"""The direct way, past all proxies: from here to the destination itself."""

from __future__ import annotations

from collections.abc import Callable

from transocks.upstreams.request import Progress, Tunnel, TunnelRequest
from usocksd.errors import Denied
from usocksd.names.match import PROTECTED_NETWORKS, judged_addresses
from usocksd.names.resolver import Resolver
from usocksd.net.address import IPAddress
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import Interruptible
from usocksd.settings.types import Timeouts

NAME = "direct"
"""Its name in records and configuration."""


class Direct:
    """Connects to destinations; has the same `connect` as an UpstreamGroup."""

    def __init__(
        self, *, dialer: Dialer, resolver: Resolver, mark: int | None, is_local: Callable[[IPAddress], bool]
    ) -> None:
        """`mark` exempts its connections from the redirect rules. `is_local` knows this host's addresses."""
        self._dialer = dialer
        self._resolver = resolver
        self._mark = mark
        self._is_local = is_local

    async def connect(
        self, request: TunnelRequest, client: Interruptible, timeouts: Timeouts, access: Progress
    ) -> Tunnel:
        """Connect to the destination of `request` within `timeouts.connect`: to the addresses of its name if it has
        one, else to the original address. (The route matched the name, so the original address counts only if the name
        servers list it.)

        Raises DialError, ResolveError, Denied (the name is one of this host), PeerReset (`client` is gone).
        """
        access.trying(NAME, NAME, None)
        deadline = client.reactor.clock() + timeouts.connect
        host, port = request.destination
        hosts = [host] if request.name is None else await self._hosts(request, request.name, client, deadline)
        targets = [Target(each, port, mark=self._mark) for each in hosts]
        endpoint, target = await self._dialer.dial(targets, deadline=deadline, client=client)
        access.connected(endpoint, target)
        return Tunnel(endpoint, b"", request.first)

    async def _hosts(self, request: TunnelRequest, name: str, client: Interruptible, deadline: float) -> list[str]:
        original = request.destination.host
        found = await self._resolver.resolve_for(client, request.client.host, name, deadline)
        plain = original.partition("%")[0]
        hosts = [
            original if str(each) == plain else str(each)
            for each in found
            if str(each) == plain or not self._means_us(each)
        ]
        if not hosts:
            raise Denied(f"the way past the proxies: {name} is {found[0]}")
        return hosts

    def _means_us(self, address: IPAddress) -> bool:
        """Whether the address belongs to this host or is protected: no name may lead a gateway's client to the gateway
        itself, or to the metadata service that has its credentials.
        """
        return any(
            PROTECTED_NETWORKS.match(each) is not None or self._is_local(each) for each in judged_addresses(address)
        )

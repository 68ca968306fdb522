"""Where a connection goes: ordered routes, and the first that matches decides. Pure.

A route matches if the protocol, the client, the port and the destination match; the destination if `to` has its address
or its name. The name comes from the client, which may lie. So `direct` dials what the route matched: if that was the
name, the addresses of that name. (Datagrams have no name.)
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from usocksd.names.match import judged_addresses
from usocksd.names.site_index import PortIndex, SiteIndex, mask_of
from usocksd.names.sites import SiteList
from usocksd.net.address import IPAddress, IPNetwork

DEFAULT = "default"
"""The group of `proxy_url`, and in records the route of connections that no route matches."""
DIRECT, REJECT = "direct", "reject"
"""Targets of routes other than groups."""
TCP, UDP = "tcp", "udp"


@frozen(kw_only=True)
class Route:
    """One route. None matches everything."""

    name: str
    via: str
    """a group, DIRECT or REJECT"""
    protocol: str | None = None
    """TCP or UDP"""
    clients: tuple[IPNetwork, ...] | None = None
    to: tuple[SiteList, ...] | None = None
    ports: tuple[tuple[int, int], ...] | None = None
    """first and last of each range"""
    send_name: bool = True
    """ask a proxy for the name, if there is one"""


@frozen
class RouteDecision:
    """The name of the route, where it leads, and whether to ask for the name instead of the address."""

    route: str
    via: str
    by_name: bool


class Routes:
    """The routes, in order, then the group "default". Asked once for each connection, so cheap."""

    def __init__(self, routes: Sequence[Route], *, send_name: bool) -> None:
        """`send_name` is for connections that no route matches."""
        self._routes = tuple(routes)
        self._default = RouteDecision(DEFAULT, DEFAULT, send_name)
        self._protocols = {each: mask_of(route.protocol in {None, each} for route in routes) for each in (TCP, UDP)}
        self._anyone = mask_of(route.clients is None for route in routes)
        self._clients = SiteIndex.of_networks([route.clients for route in routes])
        self._ports = PortIndex([route.ports for route in routes])
        self._anywhere = mask_of(route.to is None for route in routes)
        self._rejecting = mask_of(route.via == REJECT for route in routes)
        self._sites = SiteIndex.of_rules([route.to for route in routes])

    @property
    def names(self) -> list[str]:
        """The names of the routes."""
        return [route.name for route in self._routes]

    def decide(
        self, client: IPAddress, address: IPAddress, name: str | None, port: int, protocol: str = TCP
    ) -> RouteDecision:
        """Where a connection (with `protocol` UDP: a datagram) from `client` to `address`, `port` goes. `name` is
        canonical; None if none is known or it proves nothing. IPv4-mapped addresses come as IPv4.
        """
        if not self._routes:
            return self._default
        mask = self._protocols[protocol] & self._ports.match(port) & (self._anyone | self._clients.of_address(client))
        here = self._anywhere | self._sites.of_address(address)
        if name is None:
            here |= self._sites.nameless
        # A route that rejects an IPv4 network rejects the IPv6 addresses that lead to it.
        for inner in judged_addresses(address)[1:]:
            here |= self._sites.of_address(inner) & self._rejecting
        mask &= here if name is None else here | self._sites.of_name(name)
        bit = mask & -mask
        if not bit:
            return self._default
        route = self._routes[bit.bit_length() - 1]
        return RouteDecision(route.name, route.via, not bit & here if route.via == DIRECT else route.send_name)

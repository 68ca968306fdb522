"""One redirected connection, from accept to access record: the map of transocks.

    accept -> original destination -> no loop? -> first bytes, name -> route -> upstream dial + handshake
           -> relay -> record

Each stage lives in the file of its name; only this one joins them.
"""

from __future__ import annotations

from collections.abc import Mapping

from transocks.access_log import AccessLog, RedirectedRecords
from transocks.direct import Direct
from transocks.first_bytes import First, FirstBytes
from transocks.original_dst import LoopGuard, original_destination, tproxy_destination
from transocks.route_settings import ADDRESS, NAME, NamesConfig
from transocks.routes import DIRECT, REJECT, Routes
from transocks.upstreams.group import UpstreamGroup
from transocks.upstreams.request import Tunnel, TunnelRequest
from usocksd.errors import Denied, Error, ResolveError
from usocksd.net.address import HostPort, numeric_address
from usocksd.net.ending import Limits
from usocksd.net.endpoint import Endpoint, PeerReset
from usocksd.net.keepalive import KeepAlive
from usocksd.net.pipes import PipePool
from usocksd.net.relay import close_pair, relay
from usocksd.settings.types import Timeouts
from usocksd.socks import Reply, RequestRefused

# The replies of SOCKS5 and HTTP that say that a name leads nowhere (RFC 9110 section 15.6: from 502 on the fault is not
# the proxy's). SOCKS4 has one number for all refusals.
_UNRESOLVED = frozenset({Reply.HOST_UNREACHABLE, 502, 503, 504})


class RedirectedSessions:
    """Everything that a session needs, and `serve`, which is one session."""

    def __init__(
        self,
        *,
        guard: LoopGuard,
        first_bytes: FirstBytes,
        routes: Routes,
        ways: Mapping[str, UpstreamGroup | Direct],
        names: NamesConfig,
        pipes: PipePool,
        timeouts: Timeouts,
        keepalive: KeepAlive,
        access_log: AccessLog,
    ) -> None:
        """`ways` are where routes lead, by name."""
        self._guard = guard
        self._first_bytes = first_bytes
        self._routes = routes
        self._ways = ways
        self._trust_outer = names.when_ech == NAME
        self._fall_back = names.when_unresolved == ADDRESS
        self._timeouts = timeouts
        self._limits = Limits(timeouts.idle, timeouts.half_closed, keepalive)
        self._access_log = access_log
        self._pipes = pipes

    async def serve(self, client: Endpoint, host: str, port: int) -> None:
        """Serve one accepted connection to its end. `host` is the client's numeric address."""
        access = client.about = RedirectedRecords(self._access_log, host, port)
        try:
            destination = (
                tproxy_destination(client.sock, self._guard.is_ours)
                if client.transparent
                else original_destination(client.sock)
            )
            access.destination = str(destination)
            request = TunnelRequest(HostPort(host, port), destination)
            self._guard.enter(request.client, destination)
        except Error as error:
            access.refused(error)
            client.reset()
            return
        try:
            await self._carry(client, request, access)
        finally:
            self._guard.leave(destination)

    async def _carry(self, client: Endpoint, request: TunnelRequest, access: RedirectedRecords) -> None:
        """first bytes, name -> route -> upstream dial + handshake -> relay -> record"""
        tunnel = None
        try:
            first = await self._first_bytes.read(client, request.destination)
            tunnel = await self._reach(client, request, first, access)
        except Error as error:
            access.refused(error)
        except PeerReset:
            access.gave_up()
        finally:
            if tunnel is None:
                # A reset, not an end: it tells the application that it has no connection, and may try another address.
                client.reset()
        if tunnel is None:
            return
        upstream, early, unsent, _ = tunnel
        sent = len(first.data) - len(unsent)
        del first, tunnel  # the relay lets go of the bytes when they are gone, and this frame should too
        try:
            access.starts()
            relaying = relay(
                client,
                upstream,
                to_upstream=unsent,
                sent=sent,
                to_client=early,
                pipes=self._pipes,
                limits=self._limits,
                record=access,
            )
            del early, unsent
            await close_pair(client, upstream, await relaying)
        finally:
            upstream.close()

    async def _reach(self, client: Endpoint, request: TunnelRequest, first: First, access: RedirectedRecords) -> Tunnel:
        """route -> upstream dial + handshake; again without the name if that leads nowhere.

        Raises Denied if a route rejects it, and the errors of `connect`.
        """
        opening = first.opening
        request = request._replace(first=first.data, repeatable=opening.repeatable)
        source, destination = numeric_address(request.client.host), request.destination
        name = opening.name if self._trust_outer or not opening.encrypted else None
        access.sniffed(opening)
        while True:
            decision = self._routes.decide(source, numeric_address(destination.host), name, destination.port)
            access.routed(decision.route)
            if decision.via == REJECT:
                raise Denied(decision.route)
            if decision.via != DIRECT and "%" in destination.host:
                # At the proxy, this address would mean another host, or none.
                raise Denied(f'{decision.route}: no proxy reaches a link-local address, only via = "direct" does')
            way = self._ways[decision.via]
            asked = request._replace(name=name) if decision.by_name else request
            try:
                return await way.connect(asked, client, self._timeouts, access)
            except (RequestRefused, ResolveError) as error:
                # Another route may apply: a route by name is only for the addresses of the name.
                if asked.name is None or not self._fall_back or not _leads_nowhere(error, asked.name):
                    raise
                access.unresolved(error)
                name = None


def _leads_nowhere(error: RequestRefused | ResolveError, name: str) -> bool:
    """Whether the error means that the requested host does not exist (not that it is denied, nor that the proxy's own
    name is unknown).
    """
    return error.reply in _UNRESOLVED if isinstance(error, RequestRefused) else error.name == name

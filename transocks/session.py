"""One redirected connection, from accept to access record: the map of transocks.

    accept -> original destination -> no loop? -> upstream dial + handshake -> relay -> record

Each stage lives in the file of its name; only this one joins them.
"""

from __future__ import annotations

from transocks.access_log import Access, AccessLog
from transocks.original_dst import Destination, LoopGuard, original_destination, tproxy_destination
from transocks.pool import UpstreamGroup
from transocks.request import Request
from usocksd.errors import Error
from usocksd.runtime.ending import Limits
from usocksd.runtime.endpoint import Endpoint, PeerReset
from usocksd.runtime.pipes import PipePool
from usocksd.runtime.relay import close_pair, relay
from usocksd.runtime.settings import Timeouts


class Sessions:
    """Everything that a session needs, and `serve`, which is one session."""

    def __init__(
        self, *, guard: LoopGuard, upstream: UpstreamGroup, pipes: PipePool, timeouts: Timeouts, access_log: AccessLog
    ) -> None:
        self._guard = guard
        self._upstream = upstream
        self._timeouts = timeouts
        self._limits = Limits(timeouts.idle, timeouts.half_closed)
        self._access_log = access_log
        self._pipes = pipes

    async def serve(self, client: Endpoint, host: str, port: int) -> None:
        """Serve one accepted connection to its end. `host` is the client's numeric address."""
        access = client.about = self._access_log.begin(host, port)
        try:
            destination = (
                tproxy_destination(client.sock, self._guard.is_ours)
                if client.transparent
                else original_destination(client.sock)
            )
            access.destination = destination
            self._guard.enter(Destination(host, port), destination)
        except Error as error:
            access.refused(error)
            client.reset()
            return
        try:
            await self._carry(client, Request(Destination(host, port), destination), access)
        finally:
            self._guard.leave(destination)

    async def _carry(self, client: Endpoint, request: Request, access: Access) -> None:
        """upstream dial + handshake -> relay -> record"""
        tunnel = None
        try:
            tunnel = await self._upstream.connect(request, client, self._timeouts, access)
        except Error as error:
            access.refused(error)
        except PeerReset:
            access.gave_up()
        finally:
            if tunnel is None:
                # A reset, not an end: the application shall see that it has no connection, and try its next address.
                client.reset()
        if tunnel is None:
            return
        upstream = tunnel.endpoint
        try:
            access.starts()
            result = await relay(
                client,
                upstream,
                to_upstream=tunnel.unsent,
                to_client=tunnel.early,
                pipes=self._pipes,
                limits=self._limits,
                record=access,
            )
            await close_pair(client, upstream, result)
        finally:
            upstream.close()

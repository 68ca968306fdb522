"""The listener for proxies, where each connection begins with a PROXY header that names its client.

    peer trusted? -> PROXY header -> client allowed? -> counted as that client's

From then on it counts as a connection of the client in the header. A client that is not allowed gets the
answer to its request: after a reset, the proxy would consider this server broken and ask another.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from usocksd.access_log import SocksRecords
from usocksd.clients import Client, ClientRules
from usocksd.net.address import numeric_address
from usocksd.net.endpoint import Endpoint
from usocksd.net.proxy_protocol import Header, HeaderFault, Receiver, unlikely
from usocksd.socks import ClientFault, Kind, Server
from usocksd.socks.wire import HTTP_ERROR


@attrs.frozen
class ProxiedListener:
    """The listener for proxies: which proxies it trusts, and which clients they may name."""

    port: int
    trusted: ClientRules
    """Which proxies may name clients."""
    clients: ClientRules
    """Which clients they may name."""
    count_as: Callable[[Endpoint, str, int], bool]
    """See `usocksd.serve.daemon.Parts`."""

    def admits(self, client: Client) -> bool:
        """Whether a client that a trusted proxy has named may use this server. The proxy itself may (LOCAL), since it
        could claim to be an allowed client anyway.
        """
        return client.local or self.clients.admits(client.address)

    async def learn_client(
        self, endpoint: Endpoint, peer: Client, server: Server, access: SocksRecords
    ) -> Client | None:
        """The client that `peer` names; `server` gets the bytes after the header.

        None if the peer is not trusted, or the client has too many connections: the connection is reset and logged.
        Raises ClientFault, DeadlineExpired, OSError.
        """
        if not self.trusted.admits(peer.address):
            access.peer_denied()
            endpoint.reset()
            return None
        receiver = Receiver()
        try:
            source = (await _receive(endpoint, receiver)).source
            if source is None:
                client = Client(peer.host, peer.port, peer.address, proxy=peer.address, local=True)
            else:
                client = Client(source.host, source.port, numeric_address(source.host), proxy=peer.address)
                if (problem := unlikely(client.address, peer.address)) is not None:
                    raise HeaderFault(problem)
        except HeaderFault as fault:
            raise ClientFault(Kind.MALFORMED, HTTP_ERROR if fault.http else b"", str(fault)) from None
        access.named(client)
        if receiver.trailing_data:
            server.receive_data(receiver.trailing_data)
        if self.admits(client) and not self.count_as(endpoint, client.host, client.port):
            return None
        return client


async def _receive(endpoint: Endpoint, receiver: Receiver) -> Header:
    """The PROXY header. Raises HeaderFault, ClientFault if it ends early, DeadlineExpired, OSError."""
    while True:
        data = await endpoint.receive()
        if not data:
            where = "inside its PROXY header" if receiver.received else "before it said anything"
            raise ClientFault(Kind.EOF, b"", f"closed {where}")
        header = receiver.receive_data(data)
        if header is not None:
            return header

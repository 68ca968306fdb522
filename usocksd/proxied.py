"""The listener for proxies, where each connection begins with a PROXY header that says whose it is.

    peer trusted? -> PROXY header -> client allowed? -> counted as that client's

From then on it is a connection like others, and the client is the one that the header names. One that is not allowed
learns so in answer to its request: a proxy that was reset would take this server for a broken one, and ask another.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import attrs

from usocksd.access_log import Access
from usocksd.clients import ClientRules
from usocksd.net.endpoint import Endpoint
from usocksd.net.proxy_protocol import Header, HeaderFault, Receiver, unlikely
from usocksd.socks import ClientFault, Kind, Server
from usocksd.socks.answers import HTTP_ERROR


class Named(Enum):
    """What becomes of the client that a PROXY header names."""

    ALLOWED = "allowed"
    DENIED = "denied"
    """By `clients`: to be answered so."""
    GONE = "gone"
    """The connection has been reset."""


@attrs.frozen
class ProxiedListener:
    """What decides on the connections of one port."""

    port: int
    trusted: ClientRules
    """Who may say whose connection it is."""
    clients: ClientRules
    """Who may be named."""
    count_as: Callable[[Endpoint, str, int], bool]
    """See `usocksd.serve.daemon.Parts`."""

    async def learn_client(self, client: Endpoint, peer: tuple[str, int], server: Server, access: Access) -> Named:
        """Make it the connection of the client that `peer` names; `server` gets what came behind the header.

        GONE where the peer is not trusted, or the client has too many connections; the log knows. What is the peer's
        own (LOCAL) needs no more than its being trusted: it could as well claim to be somebody who is allowed.
        Raises ClientFault, DeadlineExpired, OSError.
        """
        host, port = peer
        if not self.trusted.admits(host):
            access.peer_denied()
            client.reset()
            return Named.GONE
        receiver = Receiver()
        try:
            header = await _receive(client, receiver)
            if header.source is None:
                access.claimed(host, port)
            elif (problem := unlikely(header.source.host, host)) is not None:
                raise HeaderFault(problem)
            else:
                host, port = header.source
                access.claimed(host, port)
        except HeaderFault as fault:
            raise ClientFault(Kind.MALFORMED, HTTP_ERROR if fault.http else b"", str(fault)) from None
        if receiver.trailing_data:
            server.receive_data(receiver.trailing_data)
        if header.source is not None and not self.clients.admits(host):
            return Named.DENIED
        return Named.ALLOWED if self.count_as(client, host, port) else Named.GONE


async def _receive(client: Endpoint, receiver: Receiver) -> Header:
    """The PROXY header. Raises HeaderFault, ClientFault if it ends early, DeadlineExpired, OSError."""
    while True:
        data = await client.receive()
        if not data:
            where = "inside its PROXY header" if receiver.received else "before it said anything"
            raise ClientFault(Kind.EOF, b"", f"closed {where}")
        header = receiver.receive_data(data)
        if header is not None:
            return header

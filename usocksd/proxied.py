"""The listener for proxies, where each connection begins with a PROXY header that says whose it is.

    peer trusted? -> PROXY header -> client allowed? -> counted as that client's

From then on it is a connection like others, and the client is the one that the header names.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from usocksd.access_log import Access
from usocksd.clients import ClientRules
from usocksd.proxy_protocol import Header, HeaderFault, Receiver, unlikely
from usocksd.runtime.endpoint import Endpoint
from usocksd.socks import ClientFault, Kind, Server
from usocksd.socks.answers import HTTP_ERROR


@attrs.frozen
class ProxiedListener:
    """What decides on the connections of one port."""

    port: int
    trusted: ClientRules
    """Who may say whose connection it is."""
    clients: ClientRules
    """Who may be named."""
    count_as: Callable[[Endpoint, str, int], bool]
    """See `usocksd.runtime.processes.plan.Parts`."""

    async def learn_client(self, client: Endpoint, peer: tuple[str, int], server: Server, access: Access) -> bool:
        """Make it the connection of the client that `peer` names; `server` gets what came behind the header.

        False if there is no such client; the peer knows, and so does the log. What is the peer's own (LOCAL) needs no
        more than the peer's being trusted, which could as well claim to be somebody who is allowed.
        Raises ClientFault, DeadlineExpired, OSError.
        """
        host, port = peer
        if not self.trusted.admits(host):
            access.peer_denied()
            client.reset()
            return False
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
                if not self.clients.admits(host):
                    access.client_denied()
                    client.reset()
                    return False
        except HeaderFault as fault:
            raise ClientFault(Kind.MALFORMED, HTTP_ERROR if fault.http else b"", str(fault)) from None
        if receiver.trailing_data:
            server.receive_data(receiver.trailing_data)
        return self.count_as(client, host, port)


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

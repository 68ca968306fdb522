"""UDP ASSOCIATE: opens an association, and keeps it while the client's TCP connection lives (RFC 1928, section 4)."""

from __future__ import annotations

import errno
from itertools import chain
from math import inf
from random import randrange
from socket import SocketType

from usocksd.access_log import SocksRecords
from usocksd.association import ClientAssociation, Means
from usocksd.association_log import AssociationRecords
from usocksd.clients import Client
from usocksd.errors import Denied, DialError
from usocksd.net.address import HostPort, IPAddress, bound_to, unmapped
from usocksd.net.datagrams import Ended, open_socket
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import Endpoint, PeerReset
from usocksd.net.limits import Tally
from usocksd.socks import Reply, Request, Server

PER_CLIENT = "udp.per_client"


class UDPService:
    """Serves UDP ASSOCIATE: what is configured in [udp], and how many associations a client has."""

    def __init__(
        self,
        means: Means,
        *,
        ports: tuple[int, int] | None = None,
        public: tuple[IPAddress, ...] = (),
        per_client: Tally,
        reply_within: float,
    ) -> None:
        """`ports`: the first and last port for relay sockets; None leaves the choice to the kernel. `public`: what
        clients are told as the relay's address, one for each family. `reply_within`: seconds for the client to take its
        reply.
        """
        self._means = means
        self._ports = ports
        self._public = {address.version: str(address) for address in public}
        self._tally = per_client
        self._reply_within = reply_within

    async def serve(
        self, endpoint: Endpoint, client: Client, request: Request, server: Server, access: SocksRecords
    ) -> None:
        """Serve an association to its end. `client` is the one that rules and limits know: perhaps not the peer, if a
        proxy has named it; then the proxy relays its datagrams too.

        Before the reply it raises Denied if the client has too many, and DialError if there is no socket for it.
        Raises DeadlineExpired, PeerReset or OSError if the client does not take its reply.
        """
        row = self._tally.row(client.host)
        if self._tally.exceeded(row):
            raise Denied(PER_CLIENT)
        sock = self._open_socket(unmapped(bound_to(endpoint.sock).host))
        self._tally.add(row, 1)
        association: ClientAssociation | None = None
        try:
            host, port = sock.getsockname()[:2]
            relay = HostPort(self._public.get(6 if ":" in host else 4, host), port)
            records = AssociationRecords(access, relay, endpoint.reactor.clock())
            peer = endpoint.sock.getpeername()
            peer_host = unmapped(peer[0]).partition("%")[0]
            # Many clients say 0.0.0.0, and some a name: a port without the client's address means nothing.
            peer_port = request.port if request.host == peer_host else 0
            association = ClientAssociation(self._means, endpoint, client, sock, records)
            association.await_client(HostPort(peer_host, peer_port))
            server.reply(Reply.SUCCEEDED, relay)
            endpoint.deadline = endpoint.reactor.clock() + self._reply_within
            await endpoint.send_all(server.data_to_send())
            await self._keep(endpoint, association, records, access)
        finally:
            self._tally.add(row, -1)
            if association is None:
                sock.close()
            else:
                association.close()

    async def _keep(
        self, endpoint: Endpoint, association: ClientAssociation, records: AssociationRecords, access: SocksRecords
    ) -> None:
        """Until the client closes its connection, or the association is ended otherwise."""
        associations = self._means.associations
        endpoint.about = None  # `connections` shows the association
        associations.enter(association)
        access.associated()
        records.starts()
        try:
            endpoint.deadline = inf
            while await endpoint.receive():
                await endpoint.reactor.yield_turn()
            association.end(Reason.CLOSED, Side.CLIENT)
        except Ended:
            pass
        except (PeerReset, OSError):
            association.end(Reason.RESET, Side.CLIENT)
        finally:
            associations.leave(association)
            association.close()
            records.ends(association)

    def _open_socket(self, host: str) -> SocketType:
        """A socket at this address, which is the connection's: clients send to that, whatever the reply says.

        Raises DialError.
        """
        v6 = ":" in host
        if self._ports is None:
            return open_socket(v6=v6, host=host)
        first, last = self._ports
        begin = randrange(first, last + 1)
        for port in chain(range(begin, last + 1), range(first, begin)):
            try:
                return open_socket(v6=v6, host=host, port=port)
            except DialError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise DialError(errno.EADDRINUSE, f"a port of {first}-{last} (udp.ports)", "bind")

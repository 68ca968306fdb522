"""One client connection, from accept to access record: the map of usocksd.

    accept (-> PROXY header) -> client allowed? -> handshake -> rules on name -> resolve -> rules on address
           -> egress address -> dial -> reply -> relay -> record

Each stage lives in the file of its name; only this one joins them.
"""

from __future__ import annotations

from functools import partial

from usocksd.access_log import AccessLog, SocksRecords
from usocksd.acl import BIND, CONNECT
from usocksd.auth import Users
from usocksd.bind import Binder
from usocksd.clients import ALLOW_FROM, Client
from usocksd.decision import Decision, Policy
from usocksd.egress import EgressPools, Source
from usocksd.errors import CommandNotSupported, Denied, Error
from usocksd.names.resolver import Resolver
from usocksd.net.address import numeric_address
from usocksd.net.bridge import in_trio
from usocksd.net.dial import Dialer, Target
from usocksd.net.ending import Limits
from usocksd.net.endpoint import DeadlineExpired, Endpoint, OutOfWatches, PeerReset
from usocksd.net.keepalive import KeepAlive
from usocksd.net.pipes import PipePool
from usocksd.net.relay import close_pair, relay
from usocksd.proxied import ProxiedListener
from usocksd.replies import reply_for
from usocksd.settings.types import Timeouts
from usocksd.socks import NEED_DATA, ClientFault, Command, Credentials, Kind, Method, Reply, Request, Server
from usocksd.udp import UDPService

# After a failure reply the connection must be closed within 10 s (RFC 1928, section 6).
_LAST_WORD_WITHIN = 5.0
_MOST_REMEMBERED = 1024
# Looking a member of an Enum up through its class is slow.
_CONNECT, _BIND, _UDP_ASSOCIATE = Command.CONNECT, Command.BIND, Command.UDP_ASSOCIATE


class SocksSessions:
    """Everything that a session needs, and `serve`, which is one session."""

    def __init__(
        self,
        *,
        policy: Policy,
        users: Users | None,
        resolver: Resolver,
        egress: EgressPools,
        dialer: Dialer,
        pipes: PipePool,
        timeouts: Timeouts,
        keepalive: KeepAlive,
        access_log: AccessLog,
        proxied: ProxiedListener | None = None,
        udp: UDPService | None = None,
        binder: Binder | None = None,
    ) -> None:
        self._policy = policy
        self._proxied = {} if proxied is None else {proxied.port: proxied}
        self._udp = udp
        self._binder = binder
        self._users = users
        if users is None:
            # A client that insists on sending a password is accepted like any other.
            self._methods: tuple[Method, ...] = (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD)
        elif policy.required:
            self._methods = (Method.USERNAME_PASSWORD,)
        else:
            self._methods = (Method.USERNAME_PASSWORD, Method.NO_AUTHENTICATION)
        self._resolver = resolver
        self._egress = egress
        self._dialer = dialer
        self._timeouts = timeouts
        self._limits = Limits(timeouts.idle, timeouts.half_closed, keepalive)
        self._access_log = access_log
        self._pipes = pipes
        self._tls_clients: set[str] = set()
        """Clients that have spoken TLS."""

    async def serve(self, endpoint: Endpoint, host: str, port: int) -> None:
        """Serve one accepted connection to its end. `host` is the client's numeric address."""
        client = Client.at(host, port)
        local = endpoint.local_address()
        access = endpoint.about = SocksRecords(self._access_log, client, local)
        endpoint.deadline = endpoint.reactor.clock() + self._timeouts.handshake
        proxied = self._proxied.get(local[1])
        if proxied is None and not self._policy.clients.admits(client.address):
            access.client_denied()
            endpoint.reset()
            return
        connected = await self._connect(endpoint, client, proxied, access)
        if connected is None:
            return
        upstream, early = connected
        try:
            result = await relay(
                endpoint, upstream, to_upstream=early, pipes=self._pipes, limits=self._limits, record=access
            )
            await close_pair(endpoint, upstream, result)
        finally:
            upstream.close()

    async def _connect(
        self, endpoint: Endpoint, client: Client, proxied: ProxiedListener | None, access: SocksRecords
    ) -> tuple[Endpoint, bytes] | None:
        """From the handshake to the reply. `proxied` is the listener for proxies if the connection came to that.
        Returns the connection to the destination, and the client's bytes for it so far. None if there is no connection:
        the client has been told, and it is logged.
        """
        server = Server(methods=self._methods)
        try:
            reached = await self._reach(endpoint, client, proxied, server, access)
            if reached is None:
                return None
        except ClientFault as fault:
            access.misspoke(fault, server, news=fault.kind is not Kind.TLS or self._is_news(client.host))
            await endpoint.finish(fault.reply, _LAST_WORD_WITHIN)
            return None
        except OutOfWatches as shortage:
            access.client_gone(server, str(shortage))
            return None
        except Error as error:
            reply = reply_for(error)
            access.refused(error, reply)
            server.reply(reply)
            await endpoint.finish(server.data_to_send(), _LAST_WORD_WITHIN)
            return None
        except DeadlineExpired:
            access.timed_out(server)
            return None
        except (PeerReset, OSError):
            access.client_gone(server)
            return None
        upstream, target, decision = reached
        bound = upstream.local_address()
        # BIND's second reply has the peer's address.
        server.reply(Reply.SUCCEEDED, bound if decision.command is CONNECT else (target.host, target.port))
        endpoint.deadline = endpoint.reactor.clock() + self._timeouts.handshake
        try:
            await endpoint.send_all(server.data_to_send())
        except (DeadlineExpired, OSError):
            upstream.close()
            access.client_gone(server)
            return None
        except BaseException:
            upstream.close()
            raise
        # Not before the reply is sent, so that every "starts" has its "ends".
        decision.connected(target.host)
        access.starts(target, bound)
        return upstream, server.trailing_data

    async def _reach(
        self,
        endpoint: Endpoint,
        client: Client,
        proxied: ProxiedListener | None,
        server: Server,
        access: SocksRecords,
    ) -> tuple[Endpoint, Target, Decision] | None:
        """From the handshake to the connection, its address and the decision on it. None if the client has not asked
        for one: it has been served. Raises ClientFault, Error, DeadlineExpired, PeerReset, OSError.
        """
        if proxied is not None:
            named = await proxied.learn_client(endpoint, client, server, access)
            if named is None:
                return None
            client = named
        request, client = await self._handshake(endpoint, client, server, access)
        if request is None:
            access.probed()
            await endpoint.finish(server.data_to_send(), _LAST_WORD_WITHIN)
            return None
        if proxied is not None and not proxied.admits(client):
            raise Denied(ALLOW_FROM)
        if request.command is _UDP_ASSOCIATE and self._udp is not None:
            await self._udp.serve(endpoint, client, request, server, access)
            return None
        deadline = endpoint.reactor.clock() + self._timeouts.connect
        if request.command is _BIND and self._binder is not None:
            return await self._bind(endpoint, client, request, server, access)
        if request.command is not _CONNECT:
            raise CommandNotSupported(f"{request.command.name} is not supported")
        decision = Decision(self._policy.rules, client, request.host, request.port)
        access.decision = decision
        targets = await self._targets(decision, endpoint, request.host, deadline)
        upstream, target = await self._dialer.dial(targets, deadline=deadline, client=endpoint)
        return upstream, target, decision

    async def _bind(
        self, endpoint: Endpoint, client: Client, request: Request, server: Server, access: SocksRecords
    ) -> tuple[Endpoint, Target, Decision]:
        """From a BIND to the peer's connection; between them is the first reply. Raises as `_reach` does."""
        assert self._binder is not None
        rules, clock = self._policy.rules, endpoint.reactor.clock
        decision = Decision(rules, client, request.host, request.port, BIND)
        access.decision = decision
        targets = await self._targets(decision, endpoint, request.host, clock() + self._timeouts.connect)
        rendezvous = self._binder.listen(
            endpoint,
            decision,
            [(target.host, Source(*target[2:7])) for target in targets],
            lambda peer: rules.judge(client, None, numeric_address(peer), request.port, command=BIND).allowed,
        )
        try:
            server.reply(Reply.SUCCEEDED, rendezvous.address, final=False)
            await endpoint.send_all(server.data_to_send())
            upstream, place = await rendezvous.peer()
        finally:
            rendezvous.close()
        return upstream, Target(place.host, place.port), decision

    async def _handshake(
        self, endpoint: Endpoint, client: Client, server: Server, access: SocksRecords
    ) -> tuple[Request | None, Client]:
        """The client's request, None if it was a probe; and the client with its user.

        Raises ClientFault, DeadlineExpired, OSError.
        """
        while True:
            event = server.next_event()
            if event is NEED_DATA:
                if answer := server.data_to_send():
                    await endpoint.send_all(answer)
                server.receive_data(await endpoint.receive())
            elif isinstance(event, Request):
                access.requested(event, server.method)
                return event, client
            elif isinstance(event, Credentials):
                client = await self._authenticate(event, endpoint, client, server, access)
            else:
                return None, client

    async def _authenticate(
        self, credentials: Credentials, endpoint: Endpoint, client: Client, server: Server, access: SocksRecords
    ) -> Client:
        """The client with its user. Raises ClientFault, DeadlineExpired, PeerReset."""
        # If authentication is optional, an empty password counts as none: Java sends one with the login name.
        anonymous = not self._policy.required and not credentials.password
        if self._users is not None and not anonymous:
            if not await in_trio(
                endpoint,
                endpoint.deadline + self._users.failure_takes,  # a client that fails at the last moment is told so
                partial(self._users.verify, credentials.username, credentials.password, client=client.host),
            ):
                access.tried_user = credentials.username
                server.answer_credentials(accepted=False)
                raise ClientFault(Kind.NO_METHOD, server.data_to_send(), "wrong user or password")
            client = client.authenticated(credentials.username)
        access.authenticated(client)
        server.answer_credentials(accepted=True)
        return client

    async def _targets(self, decision: Decision, endpoint: Endpoint, host: str, deadline: float) -> list[Target]:
        """rules on name -> resolve -> rules on address -> egress address

        Raises Denied, ResolveError, NoEgress, PeerReset.
        """
        if decision.unresolved:
            client = decision.client.host
            await decision.resolve(
                self._resolver.full_names(host),
                lambda name: self._resolver.resolve_for(endpoint, client, name, deadline),
            )
        port = decision.port
        return [Target(address, port, *source) for address, source in decision.choose_egress(self._egress.pick)]

    def _is_news(self, host: str) -> bool:
        """Whether this client speaks TLS for the first time: only that is logged, not every attempt."""
        if host in self._tls_clients:
            return False
        if len(self._tls_clients) >= _MOST_REMEMBERED:
            self._tls_clients.clear()
        self._tls_clients.add(host)
        return True

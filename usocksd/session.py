"""One client connection, from accept to access record: the map of usocksd.

    accept (-> PROXY header) -> client allowed? -> handshake -> rules on name -> resolve -> rules on address
           -> egress address -> dial -> reply -> relay -> record

Each stage lives in the file of its name; only this one joins them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial

from usocksd.access_log import Access, AccessLog
from usocksd.acl import AccessRules
from usocksd.auth import Users
from usocksd.clients import ALLOW_FROM, ClientRules
from usocksd.egress import EgressPools, Usable, sites
from usocksd.errors import CommandNotSupported, Denied, Error, NoEgress, ResolveError
from usocksd.names.answers import ABSENT, NO_SUCH_NAME
from usocksd.names.match import canonical_host
from usocksd.names.resolver import Resolver
from usocksd.net.address import IPAddress, numeric_address
from usocksd.net.dial import Dialer, Target
from usocksd.net.ending import Limits
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset, Unwatched
from usocksd.net.keepalive import KeepAlive
from usocksd.net.pipes import PipePool
from usocksd.net.relay import close_pair, relay
from usocksd.proxied import Named, ProxiedListener
from usocksd.replies import reply_for
from usocksd.settings.types import Timeouts
from usocksd.socks import (
    NEED_DATA,
    AddressType,
    ClientFault,
    Command,
    Credentials,
    Kind,
    Method,
    Reply,
    Request,
    Server,
)

# After a failure reply the connection must be closed within 10 s (RFC 1928, section 6).
_LAST_WORD_WITHIN = 5.0
_MOST_REMEMBERED = 1024


class Sessions:
    """Everything that a session needs, and `serve`, which is one session."""

    def __init__(
        self,
        *,
        clients: ClientRules,
        users: Users | None,
        users_required: bool,
        rules: AccessRules,
        resolver: Resolver,
        egress: EgressPools,
        usable: Callable[[], Usable],
        dialer: Dialer,
        pipes: PipePool,
        timeouts: Timeouts,
        keepalive: KeepAlive,
        access_log: AccessLog,
        proxied: ProxiedListener | None = None,
    ) -> None:
        self._clients = clients
        self._proxied = {} if proxied is None else {proxied.port: proxied}
        self._users = users
        self._users_required = users_required
        if users is None:
            # A client that insists on sending a password is let through as anybody else would be.
            self._methods: tuple[Method, ...] = (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD)
        elif users_required:
            self._methods = (Method.USERNAME_PASSWORD,)
        else:
            self._methods = (Method.USERNAME_PASSWORD, Method.NO_AUTHENTICATION)
        self._rules = rules
        self._resolver = resolver
        self._egress = egress
        self._usable = usable
        self._dialer = dialer
        self._timeouts = timeouts
        self._limits = Limits(timeouts.idle, timeouts.half_closed, keepalive)
        self._access_log = access_log
        self._pipes = pipes
        self._spoke_tls: set[str] = set()

    async def serve(self, client: Endpoint, host: str, port: int) -> None:
        """Serve one accepted connection to its end. `host` is the client's numeric address."""
        local = client.local_address()
        access = client.about = self._access_log.begin(host, port, local)
        client.deadline = client.reactor.clock() + self._timeouts.handshake
        proxied = self._proxied.get(local[1])
        if proxied is None and not self._clients.admits(host):
            access.client_denied()
            client.reset()
            return
        connected = await self._connect(client, (host, port), proxied, access)
        if connected is None:
            return
        upstream, early = connected
        try:
            result = await relay(
                client, upstream, to_upstream=early, pipes=self._pipes, limits=self._limits, record=access
            )
            await close_pair(client, upstream, result)
        finally:
            upstream.close()

    async def _connect(
        self, client: Endpoint, peer: tuple[str, int], proxied: ProxiedListener | None, access: Access
    ) -> tuple[Endpoint, bytes] | None:
        """From the handshake to the reply: the connection to the destination, and what the client said already.
        `peer` is whom it came from, and `proxied` the listener for proxies if it came to that.

        None if it was refused or given up; the client knows, and so does the log.
        """
        clock = client.reactor.clock
        server = Server(methods=self._methods)
        try:
            named = Named.ALLOWED
            if proxied is not None:
                named = await proxied.learn_client(client, peer, server, access)
                if named is Named.GONE:
                    return None
            request = await self._handshake(client, server, access)
            if request is None:
                access.probed()
                await client.finish(server.data_to_send(), _LAST_WORD_WITHIN)
                return None
            if named is Named.DENIED:
                raise Denied(ALLOW_FROM)
            deadline = clock() + self._timeouts.connect
            targets = await self._targets(request, client, access, deadline)
            upstream, target = await self._dialer.dial(targets, deadline=deadline, client=client)
        except ClientFault as fault:
            access.misspoke(fault, server, news=fault.kind is not Kind.TLS or self._is_news(access.client_host))
            await client.finish(fault.reply, _LAST_WORD_WITHIN)
            return None
        except Unwatched as error:
            access.client_gone(server, str(error))
            return None
        except Error as error:
            reply = reply_for(error)
            access.refused(error, reply)
            server.reply(reply)
            await client.finish(server.data_to_send(), _LAST_WORD_WITHIN)
            return None
        except DeadlineExpired:
            access.timed_out(server)
            return None
        except (PeerReset, OSError):
            access.client_gone(server)
            return None
        bound = upstream.sock.getsockname()
        server.reply(Reply.SUCCEEDED, bound)
        client.deadline = clock() + self._timeouts.handshake
        try:
            await client.send_all(server.data_to_send())
        except (DeadlineExpired, OSError):
            upstream.close()
            access.client_gone(server)
            return None
        except BaseException:
            upstream.close()
            raise
        # Not before the client has the reply: every "starts" has its "ends".
        access.starts(target, bound)
        return upstream, server.trailing_data

    async def _handshake(self, client: Endpoint, server: Server, access: Access) -> Request | None:
        """The client's request, None if it was a probe. Raises ClientFault, DeadlineExpired, OSError."""
        while True:
            event = server.next_event()
            if event is NEED_DATA:
                if answer := server.data_to_send():
                    await client.send_all(answer)
                server.receive_data(await client.receive())
            elif isinstance(event, Request):
                access.requested(event, server.method)
                return event
            elif isinstance(event, Credentials):
                await self._authenticate(event, client, server, access)
            else:
                return None

    async def _authenticate(self, credentials: Credentials, client: Endpoint, server: Server, access: Access) -> None:
        """Raises ClientFault, DeadlineExpired, PeerReset."""
        # Where nobody has to authenticate, an empty password is no try to: Java sends the login name and none.
        anonymous = not self._users_required and not credentials.password
        if self._users is None or anonymous:
            access.authenticated(None)
            server.accept_credentials()
        elif await client.meanwhile(
            client.deadline + self._users.failure_takes,  # so that who is wrong at the last moment still hears of it
            partial(self._users.verify, credentials.username, client=access.client_host),
            credentials.password,
        ):
            access.authenticated(credentials.username)
            server.accept_credentials()
        else:
            access.tried_user = credentials.username
            server.reject_credentials()
            raise ClientFault(Kind.NO_METHOD, server.data_to_send(), "wrong user or password")

    async def _targets(self, request: Request, client: Endpoint, access: Access, deadline: float) -> list[Target]:
        """rules on name -> resolve -> rules on address -> egress address

        Raises Denied, ResolveError, NoEgress, CommandNotSupported.
        """
        if request.command is not Command.CONNECT:
            raise CommandNotSupported(f"{request.command.name} is not supported")
        port = request.port
        try:
            destination = canonical_host(request.host)
        except ValueError as error:
            raise ResolveError(request.host, str(error)) from None
        who = numeric_address(access.client_host)
        if not isinstance(destination, str):
            decision = self._rules.decide_name(who, access.user, destination, port)
            access.rule, access.pool = decision.rule, decision.egress
            if not decision.allowed:
                raise Denied(decision.rule)
            # (IPv4-mapped IPv6 is IPv4 from here on; an IPv4 address is in its one form already.)
            text = request.host if request.address_type is AddressType.IPV4 else str(destination)
            return [self._target(text, port, sites((destination,)), decision.egress, access)]
        targets: list[Target] = []
        denied: Error | None = None
        unusable: Error | None = None
        name, addresses = await self._resolve(request, destination, client, access, deadline)
        sent = None if name == destination else destination
        access.name = name
        access.candidates = candidates = []
        where = sites(addresses)
        for address in addresses:
            decision = self._rules.decide_address(who, access.user, name, address, port, sent=sent)
            text = str(address)
            candidates.append((text, decision))
            if not decision.allowed:
                denied = denied or Denied(decision.rule)
                continue
            if not targets and unusable is None:
                access.rule, access.pool = decision.rule, decision.egress
            try:
                target = self._target(text, port, where, decision.egress, access)
            except NoEgress as error:
                unusable = unusable or error
                continue
            if not targets:  # should none of them answer, the record is about the one that was tried first
                access.rule, access.pool = decision.rule, decision.egress
            targets.append(target)
        if not targets:
            raise unusable or denied or ResolveError(name, "no address")
        return targets

    async def _resolve(
        self, request: Request, sent: str, client: Endpoint, access: Access, deadline: float
    ) -> tuple[str, tuple[IPAddress, ...]]:
        """The first of the names that the requested one, canonical as `sent`, may stand for which has addresses.

        Each is judged before it is asked for; the denied ones are left out. Raises Denied, ResolveError.
        """
        who = numeric_address(access.client_host)
        denied: Denied | None = None
        absent: ResolveError | None = None
        for name in self._resolver.full_names(request.host):
            also = None if name == sent else sent
            decision = self._rules.decide_name(who, access.user, name, request.port, sent=also)
            if not decision.allowed:
                if denied is None:
                    denied = Denied(decision.rule)
                    access.name = name
                continue
            access.rule, access.pool = decision.rule, decision.egress
            try:
                return name, await self._resolver.resolve_for(client, access.client_host, name, deadline)
            except ResolveError as error:
                if error.cause not in ABSENT:
                    raise
                absent = absent or error
        raise denied or absent or ResolveError(request.host, NO_SUCH_NAME)

    def _target(self, address: str, port: int, where: Mapping[int, str], pool: str, access: Access) -> Target:
        version, family = (6, socket.AF_INET6) if ":" in address else (4, socket.AF_INET)
        who = numeric_address(access.client_host)
        source = self._egress.pick(pool, who, where[version], family, self._usable())
        return Target(address, port, source.address, source.iface, source.mark, source.spare, source.routed)

    def _is_news(self, host: str) -> bool:
        """Whether this client speaks TLS to us for the first time: said once, not at every try."""
        if host in self._spoke_tls:
            return False
        if len(self._spoke_tls) >= _MOST_REMEMBERED:
            self._spoke_tls.clear()
        self._spoke_tls.add(host)
        return True

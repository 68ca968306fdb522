"""One upstream proxy: connect to it and ask it for the destination, or whether it is there at all."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Sequence
from math import inf
from typing import NamedTuple, Protocol

import trio

from transocks.health import Answer, Attempt, ProbeTimedOut, State
from transocks.http_connect import HttpConnect
from transocks.original_dst import Destination
from transocks.proxy_url import ProxyScheme, ProxyURL
from transocks.request import Request
from usocksd.errors import DialError, Error, ResolveError, UpstreamError
from usocksd.match import IPAddress
from usocksd.proxy_protocol import LOCAL_HEADER, header
from usocksd.resolver import ABSENT, Resolver
from usocksd.runtime.dial import Target, dial
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.runtime.metrics import SECONDS, Metrics
from usocksd.runtime.reactor import Reactor
from usocksd.runtime.settings import Timeouts
from usocksd.socks import (
    AuthenticationFailed,
    Client,
    ClientRole,
    Established,
    Probe,
    Probed,
    RequestRefused,
    Version,
)

# Seconds. When the name servers fail, or think for longer, the addresses that were known go on being used (RFC 8767).
_RESOLVE_WITHIN = 1.0
_STALE_FOR = 5.0
# Whatever is asked, one that takes pipelining answers within a round trip; one that does not is silent. So many times
# as long as its first answer took, and some seconds.
_LEARN_TIMES, _LEARN_MORE = 2.0, 0.5
# A timer that is so many seconds late tells of this process, not of the upstream.
_LATE = 0.1

# What is sent to see whether there is an answer; what that is does not matter. To HTTP, RFC 9110 section 9.3.7 calls it
# a ping. SOCKS4 has nothing like it, so: a command that does not exist.
_HTTP_PING = b"OPTIONS * HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
_SOCKS4_PING = b"\x04\x00\x00\x00\x00\x00\x00\x00\x00"

WAITING = "waiting for the answer of"
"""The step of a DialError: the upstream was asked, and has not answered in time."""
# errno values that say that the host or its proxy is gone; others are about this connection or this host.
_GONE = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


class Tunnel(NamedTuple):
    """A connection through the upstream to the destination."""

    endpoint: Endpoint
    early: bytes
    """What the destination already said."""
    unsent: bytes = b""
    """Of Request.first, what is not sent yet: the relay has to begin with it."""


class Unanswered(UpstreamError):
    """The upstream was found to be down while it was waited for."""


class Progress(Protocol):
    """Wants to know what becomes of a request."""

    def trying(self, group: str, upstream: str, scheme: ProxyScheme | None) -> None:
        """It is tried with this upstream of this group; scheme None: with none, directly. Called for each try."""

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        """There is a connection to the upstream, or to the destination directly."""


class Upstream:
    """One upstream proxy."""

    def __init__(
        self,
        url: ProxyURL,
        *,
        reactor: Reactor,
        resolver: Resolver,
        mark: int | None,
        fast_open: bool,
        metrics: UpstreamMetrics,
        proxy_protocol: bool = False,
    ) -> None:
        """`proxy_protocol`: it wants to be told whose connection it is."""
        self.name = str(url)
        """For log records: without user and password."""
        self.key = self.name if url.username is None else f"{url.username}@{self.name}"
        if proxy_protocol:
            self.key += " PROXY"
        self.scheme = url.scheme
        self.state = State(self.name, reactor.clock)
        self.addresses: frozenset[Destination] = frozenset()
        """As far as they are known now."""
        self._url = url
        self._password = None if url.password is None else url.password.reveal()
        self._reactor = reactor
        self._resolver = resolver
        self._mark = mark
        self._fast_open = fast_open
        self._proxy_protocol = proxy_protocol
        self._local = LOCAL_HEADER if proxy_protocol else b""
        """What is in front of all that is said to it on our own behalf."""
        self._targets: Sequence[Target] = ()
        self._resolved: Sequence[IPAddress] = ()
        self._stale_until = -inf
        self._ok, self._refused, self._failed = (
            metrics.seconds.labels(self.name, result) for result in ("ok", "refused", "failed")
        )
        if not isinstance(url.host, str):
            self._learn((url.host,))

    async def connect(
        self,
        request: Request,
        client: Endpoint,
        timeouts: Timeouts,
        access: Progress,
        *,
        attempt: Attempt,
        deadline: float,
    ) -> Tunnel:
        """Reach what `request` is for through the proxy: until `deadline` to reach it; for its answer as long as
        `timeouts.connect`, since it has to connect in turn, and `timeouts.handshake` for what it has to say itself.
        `access` is told of the connection that was made to it, also when nothing comes of it.

        Raises UpstreamError (it refused, or broke its protocol, or can't be asked this), Unanswered (see `attempt`),
        DialError (it can't be reached in time), ResolveError (its name is not known), PeerReset (`client` is gone).
        """
        reactor, state = self._reactor, self.state
        pipelined = attempt.pipelined = bool(state.pipelines)
        handshake = self._handshake(request, pipelined=pipelined)
        if isinstance(self._url.host, str):
            await self._resolve(client, deadline)
        since = attempt.since = reactor.clock()
        state.enter(attempt)
        try:
            endpoint, target = await dial(reactor, self._targets, deadline=deadline, client=client)
            try:
                if attempt.left:  # in the moment in which it was connected
                    raise PeerReset
                endpoint.deadline = reactor.clock() + timeouts.connect + timeouts.handshake
                client.on_reset = endpoint.give_up
                access.connected(endpoint, target)
                tunnel = await self._ask(endpoint, handshake, request, attempt)
            except DeadlineExpired:
                endpoint.close()
                raise DialError(errno.ETIMEDOUT, str(target), WAITING) from None
            except OSError as error:
                endpoint.close()
                raise DialError(error.errno or errno.EIO, str(target), "asking") from None
            except BaseException:
                endpoint.close()
                raise
            finally:
                client.on_reset = None
        except PeerReset:
            if not attempt.left:
                raise
            self._failed.observe(reactor.clock() - since)
            raise Unanswered(f"{self.name} was given up: {state.why or 'another program is there now'}") from None
        except Error as error:
            self._note(error, reactor.clock() - since)
            raise
        finally:
            state.waiting.pop(attempt, None)
        self._ok.observe(reactor.clock() - since)
        return tunnel

    async def probe(self, *, connect: float, answer: float, learn: bool) -> Answer:
        """See health.Probed."""
        where = self.name
        with trio.move_on_after(connect) as scope:
            # In haste, what is known has to do: slow name servers are not the upstream's fault.
            if isinstance(self._url.host, str) and (learn or not self._targets):
                await self._look_up(self._resolver.search(self._url.host))
            began = trio.current_time()
            endpoint, target = await dial(self._reactor, self._plain_targets(), deadline=inf)
        if scope.cancelled_caught:
            raise _timed_out(scope, where, "connect")
        where = str(target)
        connected = trio.current_time() - began
        try:
            with trio.move_on_after(max(answer, 3 * connected)) as scope:
                ours = await self._ask_whether(endpoint)
            if scope.cancelled_caught:
                raise _timed_out(scope, where, WAITING)
        except OSError as error:
            raise DialError(error.errno or errno.EIO, where, "probe") from None
        finally:
            endpoint.close()
        latency = trio.current_time() - began
        pipelines = True if ours else None
        if learn and not ours and self.state.pipelines is None and self.scheme in _SOCKS5:
            with trio.move_on_after(_LEARN_TIMES * latency + _LEARN_MORE):
                pipelines = await self._takes_pipelining()
            pipelines = bool(pipelines)
        return Answer(latency, ours, pipelines)

    def _note(self, error: Error, seconds: float) -> None:
        """An attempt ended so, after so long."""
        (self._refused if isinstance(error, RequestRefused) else self._failed).observe(seconds)
        match error:
            case AuthenticationFailed():
                self.state.failed(str(error))
            case DialError(step="connect") if error.errno in _GONE:
                self.state.failed(str(error))

    async def _ask(self, endpoint: Endpoint, handshake: ClientRole, request: Request, attempt: Attempt) -> Tunnel:
        state, reactor = self.state, self._reactor
        data, unsent = handshake.data_to_send(), request.first
        if self._proxy_protocol:
            data = header(request.client, request.destination) + data
        if unsent and attempt.pipelined and state.ours:
            # All in one segment. Should this proxy fail, another may be told only what is safe to repeat; and so may
            # this one, which gets twice what is on a SYN that got lost.
            if not request.repeatable:
                if endpoint.unproven:
                    await endpoint.send_all(data)
                    await endpoint.proven()
                    data = b""
                attempt.sent = True
            data, unsent = data + unsent, b""
        await endpoint.send_all(data)
        while True:
            handshake.receive_data(await endpoint.receive())
            state.heard = reactor.now
            event = handshake.next_event()
            if isinstance(event, Established):
                return Tunnel(endpoint, handshake.trailing_data, unsent)
            if data := handshake.data_to_send():
                await endpoint.send_all(data)

    def _handshake(self, request: Request, *, pipelined: bool) -> ClientRole:
        url = self._url
        host, port = request.destination
        if request.name is not None and url.scheme.takes_names:
            host = request.name
        try:
            match url.scheme:
                case ProxyScheme.HTTP:
                    return HttpConnect(host, port, username=url.username, password=self._password)
                case ProxyScheme.SOCKS4A:
                    return Client(host, port, version=Version.SOCKS4, user_id=url.username or "")
                case _:
                    return Client(host, port, username=url.username, password=self._password, pipelined=pipelined)
        except ValueError as error:
            raise UpstreamError(str(error)) from None

    async def _ask_whether(self, endpoint: Endpoint) -> bool:
        """Whether it is a usocksd; returns as soon as it answers. Raises UpstreamError, OSError."""
        if self.scheme not in _SOCKS5:
            http = _HTTP_PING % self.name.removeprefix("http://").encode()
            await endpoint.send_all(self._local + (http if self.scheme is ProxyScheme.HTTP else _SOCKS4_PING))
            await endpoint.receive()  # the end will do: a program has seen to it
            return False
        return (await _drive(endpoint, Probe(self._url.username, self._password), self._local)).ours

    async def _takes_pipelining(self) -> bool:
        endpoint, _ = await dial(self._reactor, self._plain_targets(), deadline=inf)
        try:
            probe = Probe(self._url.username, self._password, pipelined=True)
            first = await _drive(endpoint, probe, self._local)
            return bool(first.pipelines or (await _drive(endpoint, probe)).pipelines)
        except (OSError, UpstreamError):
            return False
        finally:
            endpoint.close()

    def _plain_targets(self) -> list[Target]:
        """For probes, which are about the whole way: without Fast Open, which hides some of it."""
        return [target._replace(fast_open=False) for target in self._targets]

    async def _resolve(self, client: Endpoint, deadline: float) -> None:
        """See to it that there are addresses, those in force now if the name servers tell them in time."""
        now = self._reactor.clock()
        if now >= self._stale_until:
            within = min(deadline, now + _RESOLVE_WITHIN) if self._targets else deadline
            await self._look_up(self._resolver.search_for(client, str(self._url.host), within))

    async def _look_up(self, search: Awaitable[Sequence[IPAddress]]) -> None:
        try:
            self._learn(await search)
        except ResolveError as error:
            if not self._targets or error.cause in ABSENT:
                raise
            self._stale_until = self._reactor.clock() + _STALE_FOR

    def _learn(self, addresses: Sequence[IPAddress]) -> None:
        if addresses != self._resolved:
            port = self._url.port
            self._resolved = addresses
            self._targets = [
                Target(str(address), port, mark=self._mark, fast_open=self._fast_open) for address in addresses
            ]
            self.addresses = frozenset(Destination(str(address), port) for address in addresses)


_SOCKS5 = (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)


class UpstreamMetrics:
    """What is measured of all upstreams."""

    def __init__(self, metrics: Metrics) -> None:
        self.seconds = metrics.histograms(
            "upstream_seconds",
            "Time that an upstream took from connect to its answer: ok, refused (it said no) or failed",
            SECONDS,
            "upstream",
            "result",
        )


async def _drive(endpoint: Endpoint, probe: Probe, before: bytes = b"") -> Probed:
    """Up to the next event of a probe; `before` goes in front of what it says."""
    while not isinstance(event := probe.next_event(), Probed):
        if data := probe.data_to_send():
            await endpoint.send_all(before + data)
            before = b""
        probe.receive_data(await endpoint.receive())
    return event


def _timed_out(scope: trio.CancelScope, address: str, step: str) -> ProbeTimedOut:
    return ProbeTimedOut(address, step, late=trio.current_time() - scope.deadline > _LATE)

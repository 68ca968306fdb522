"""One upstream proxy: connect to it and ask it for the destination, or whether it is there at all."""

from __future__ import annotations

import errno
from math import inf
from typing import NamedTuple, Protocol

import trio

from transocks.http_connect import HttpConnect
from transocks.original_dst import Destination
from transocks.upstreams.addresses import UpstreamAddresses
from transocks.upstreams.health import ProbeTimedOut, is_gone
from transocks.upstreams.probes import Questions
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from transocks.upstreams.request import Request
from transocks.upstreams.state import Answer, Attempt, State
from usocksd.errors import DialError, Error, ResolveError, UpstreamError
from usocksd.log.metrics import SECONDS, Metrics
from usocksd.names.resolver import ABSENT, Resolver
from usocksd.net import tcp_info
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.net.proxy_protocol import LOCAL_HEADER, header
from usocksd.settings.types import Timeouts
from usocksd.socks import AuthenticationFailed, Client, ClientRole, Established, RequestRefused, Version

# Whatever is asked, one that takes pipelining answers within a round trip; one that does not is silent. So many times
# as long as its first answer took, and some seconds.
_LEARN_TIMES, _LEARN_MORE = 2.0, 0.5
# A timer that is so many seconds late tells of this process, not of the upstream.
_LATE = 0.1

WAITING = "waiting for the answer of"
"""The step of a DialError: the upstream was asked, and has not answered in time."""
# Seconds after which an upstream that did not answer is asked again whether it takes pipelining.
_ASK_AGAIN_AFTER = 600.0


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
        name: str,
        key: str,
        dialer: Dialer,
        resolver: Resolver,
        mark: int | None,
        fast_open: bool,
        metrics: UpstreamMetrics,
        proxy_protocol: bool = False,
    ) -> None:
        """`name` is for records and metrics, without user and password; `key` for other workers, and not to be shown.
        `proxy_protocol`: it wants to be told whose connection it is.
        """
        self.name = name
        self.key = key
        self.scheme = url.scheme
        self.state = State(name, dialer.reactor.clock)
        self._url = url
        self._password = None if url.password is None else url.password.reveal()
        self._dialer = dialer
        self._reactor = reactor = dialer.reactor
        self._addresses = UpstreamAddresses(url, reactor=reactor, resolver=resolver, mark=mark, fast_open=fast_open)
        self._proxy_protocol = proxy_protocol
        self._questions = Questions(url, LOCAL_HEADER if proxy_protocol else b"")
        self._asked_again_at = 0.0
        self._ok, self._refused, self._failed = (
            metrics.seconds.labels(name, result) for result in ("ok", "refused", "failed")
        )

    @property
    def addresses(self) -> frozenset[Destination]:
        """Where it is, as far as that is known now."""
        return self._addresses.known

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
        since = attempt.since
        state.enter(attempt)
        try:
            await self._addresses.refresh_for(client, deadline)
            attempt.check()
            since = reactor.clock()
            endpoint, target = await self._dialer.dial(self._addresses.targets, deadline=deadline, client=client)
            try:
                attempt.check()
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
            why = state.why or ("it is slow" if state.slow else "another program is there now")
            raise Unanswered(f"{self.name} was given up: {why}") from None
        except Error as error:
            self._note(error, reactor.clock() - since)
            raise
        finally:
            state.waiting.pop(attempt, None)
        self._ok.observe(reactor.clock() - since)
        state.worked_now()
        return tunnel

    async def probe(self, *, connect: float, answer: float, learn: bool) -> Answer:
        """See health.Probed."""
        where = self.name
        with trio.move_on_after(connect) as scope:
            await self._addresses.refresh(in_haste=not learn)
            began = trio.current_time()
            endpoint, target = await self._dial_plainly()
        if scope.cancelled_caught:
            raise _timed_out(scope, where, "connect")
        where = str(target)
        connected = trio.current_time() - began
        try:
            with trio.move_on_after(max(answer, 3 * connected)) as scope:
                ours = await self._questions.is_ours(endpoint)
            if scope.cancelled_caught:
                raise _timed_out(scope, where, WAITING)
            round_trip = tcp_info.round_trip(endpoint.sock)
        except OSError as error:
            raise DialError(error.errno or errno.EIO, where, "probe") from None
        finally:
            endpoint.close()
        latency = trio.current_time() - began
        pipelines = True if ours else None
        if learn and not ours and self._may_learn():
            self._asked_again_at = self._reactor.clock() + _ASK_AGAIN_AFTER
            pipelines = await self._takes_pipelining(_LEARN_TIMES * latency + _LEARN_MORE)
        return Answer(latency, ours, pipelines, connected if round_trip is None else round_trip)

    def _may_learn(self) -> bool:
        """Whether to find out if it takes pipelining."""
        known = self.state.pipelines
        again = known is False and self._reactor.clock() >= self._asked_again_at
        return self._questions.may_pipeline and (known is None or again)

    async def _takes_pipelining(self, within: float) -> bool | None:
        """None: it could not be asked this time, for want of descriptors, say."""
        with trio.move_on_after(within):
            try:
                endpoint, _ = await self._dial_plainly()
            except DialError:
                return None
            try:
                return await self._questions.pipelines(endpoint)
            finally:
                endpoint.close()
        return False

    async def _dial_plainly(self) -> tuple[Endpoint, Target]:
        """For probes, which are about the whole way: without Fast Open, which hides some of it."""
        targets = [target._replace(fast_open=False) for target in self._addresses.targets]
        return await self._dialer.dial(targets, deadline=inf)

    def _note(self, error: Error, seconds: float) -> None:
        """An attempt ended so, after so long."""
        (self._refused if isinstance(error, RequestRefused) else self._failed).observe(seconds)
        match error:
            case RequestRefused():
                self.state.heard = self._reactor.now
            case AuthenticationFailed():
                self.state.failed(str(error))
            case DialError() if is_gone(error):
                self.state.failed(str(error), gone=True)
            case ResolveError() if error.cause in ABSENT:
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
                    attempt.check()
                    data = b""
                attempt.sent = True
            data, unsent = data + unsent, b""
        await endpoint.send_all(data)
        while True:
            handshake.receive_data(await endpoint.receive())
            event = handshake.next_event()
            # (Whoever closes, or speaks something else, raises UpstreamFault: that is no sign of life.)
            state.heard = reactor.now
            if isinstance(event, Established):
                return Tunnel(endpoint, handshake.trailing_data, unsent)
            attempt.check()
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


def _timed_out(scope: trio.CancelScope, address: str, step: str) -> ProbeTimedOut:
    return ProbeTimedOut(address, step, late=trio.current_time() - scope.deadline > _LATE)

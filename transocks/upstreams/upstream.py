"""One upstream proxy: connect to it and ask it for the destination."""

from __future__ import annotations

import contextlib
import errno

from transocks.http_connect import HttpConnect
from transocks.upstreams.addresses import UpstreamAddresses
from transocks.upstreams.probes import WAITING, Prober
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from transocks.upstreams.request import Attempt, Progress, Tunnel, TunnelRequest
from transocks.upstreams.state import UpstreamState
from usocksd.errors import DialError, Error, ResolveError, UpstreamError
from usocksd.log.metrics import SECONDS, Metrics
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort, numeric_address, peer_of
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import DeadlineExpired, Endpoint, Interruptible, PeerReset
from usocksd.net.proxy_protocol import LOCAL_HEADER, header
from usocksd.settings.types import Timeouts
from usocksd.socks import (
    AuthenticationFailed,
    ClientRole,
    Command,
    Established,
    Kind,
    Reply,
    RequestRefused,
    SocksConnect,
    UpstreamFault,
    Version,
)

# Errors that say that the host or its proxy is gone; other errors concern this connection or this host. (A time-out is
# silence, which probes judge.)
_GONE = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


def is_gone(error: Error) -> bool:
    """Whether the error says that the upstream or its host is gone."""
    return isinstance(error, DialError) and error.step == "connect" and error.errno in _GONE


class UpstreamDown(UpstreamError):
    """The upstream was found to be down while a connection waited for it."""


class UpstreamMetrics:
    """The metrics of all upstreams and groups."""

    def __init__(self, metrics: Metrics) -> None:
        # The minimum over all workers: it is down if one worker can't reach it.
        self.up = metrics.minimums("upstream_up", "Whether an upstream is up", "group", "upstream")
        self.failovers = metrics.counters(
            "upstream_failovers_total",
            "Connections that were given to another upstream, or led past it, after this one had failed",
            "group",
            "upstream",
        )
        self.seconds = metrics.histograms(
            "upstream_seconds",
            "Time that an upstream took from connect to its answer: ok, refused (it said no) or failed",
            SECONDS,
            "upstream",
            "result",
        )
        self.probes = metrics.counters(
            "upstream_probes_total", "Probes of upstreams: ok or failed", "upstream", "result"
        )


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
        """`name` is for records and metrics, without user and password; `key` is for other workers, and not to be
        shown. `proxy_protocol`: connections to it begin with a PROXY header.
        """
        self.name = name
        self.key = key
        self.scheme = url.scheme
        self.state = UpstreamState(name, dialer.reactor.clock)
        self._url = url
        self._dialer = dialer
        self._reactor = reactor = dialer.reactor
        self._addresses = UpstreamAddresses(url, clock=reactor.clock, resolver=resolver, mark=mark, fast_open=fast_open)
        self._proxy_protocol = proxy_protocol
        before = LOCAL_HEADER if proxy_protocol else b""
        self.prober = Prober(url, self.state, self._addresses, dialer, before)
        self._ok, self._refused, self._failed = (
            metrics.seconds.labels(name, result) for result in ("ok", "refused", "failed")
        )

    @property
    def addresses(self) -> frozenset[HostPort]:
        """Its addresses as they are known now."""
        return self._addresses.known

    @property
    def carries_udp(self) -> bool:
        """False if it has no UDP ASSOCIATE, as far as is known."""
        return self.scheme.is_socks5 and self.state.may_have_udp

    def status(self) -> dict[str, object]:
        """The state as JSON values, for operators."""
        status: dict[str, object] = self.state.status()
        return status if self.scheme.is_socks5 else status | {"udp": False}

    async def connect(
        self,
        request: TunnelRequest,
        client: Interruptible,
        timeouts: Timeouts,
        access: Progress,
        *,
        attempt: Attempt,
        deadline: float,
    ) -> Tunnel:
        """Connect to the destination of `request` through the proxy, or get a UDP association. The proxy must be
        reached by `deadline`; its answer may take `timeouts.connect`, since it has to connect in turn, and
        `timeouts.handshake` for its own part. `access` is told of the connection to the proxy, also if that fails
        afterwards.

        Raises UpstreamError (it refused, or broke its protocol, or can't be asked this), UpstreamDown (see `attempt`),
        DialError (it can't be reached in time), ResolveError (its name is not known), PeerReset (`client` is gone).
        """
        reactor, state = self._reactor, self.state
        pipelined = attempt.pipelined = bool(state.pipelines)
        handshake = None if request.udp else self._handshake(request, pipelined=pipelined)
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
                client.on_interrupt = endpoint.interrupt
                access.connected(endpoint, target)
                if handshake is None:
                    handshake = self._association(target, pipelined=pipelined)
                tunnel = await self._ask(endpoint, handshake, request, attempt)
            except DeadlineExpired:
                endpoint.close()
                raise DialError(errno.ETIMEDOUT, str(target), WAITING) from None
            except OSError as failure:
                endpoint.close()
                raise DialError(failure.errno or errno.EIO, str(target), "asking") from None
            except BaseException:
                endpoint.close()
                raise
            finally:
                client.on_interrupt = None
        except PeerReset:
            if not attempt.left:
                raise
            self._failed.observe(reactor.clock() - since)
            why = state.why or ("it is slow" if state.slow else "another program is there now")
            raise UpstreamDown(f"{self.name} was given up: {why}") from None
        except Error as error:
            self._note(error, reactor.clock() - since)
            raise
        finally:
            state.waiting.pop(attempt, None)
        self._ok.observe(reactor.clock() - since)
        state.worked_now()
        if request.udp:
            state.has_udp = True
        return tunnel

    def _note(self, error: Error, seconds: float) -> None:
        """An attempt ended with this error, after this many seconds."""
        (self._refused if isinstance(error, RequestRefused) else self._failed).observe(seconds)
        match error:
            case RequestRefused():
                self.state.heard = self._reactor.now
                if error.reply == Reply.COMMAND_NOT_SUPPORTED:  # (CONNECT is supported by all)
                    self.state.lacks_udp()
            case AuthenticationFailed():
                self.state.failed(str(error))
            case DialError() if is_gone(error):
                self.state.failed(str(error), gone=True)
            case ResolveError() if error.absent:
                self.state.failed(str(error))

    async def _ask(self, endpoint: Endpoint, handshake: ClientRole, request: TunnelRequest, attempt: Attempt) -> Tunnel:
        state, reactor = self.state, self._reactor
        data, unsent = handshake.data_to_send(), request.first
        if self._proxy_protocol:
            data = header(request.client, request.destination) + data
        if unsent and attempt.pipelined and state.ours:
            # All in one segment. If this proxy fails, only bytes that are safe to repeat may be sent to another one; or
            # to this one, if they were on a SYN that got lost.
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
            # (A proxy that closes or breaks the protocol raises UpstreamFault: that is no sign of life.)
            state.heard = reactor.now
            if isinstance(event, Established):
                relay = _relay(event, endpoint) if request.udp else None
                return Tunnel(endpoint, handshake.trailing_data, unsent, relay)
            attempt.check()
            if data := handshake.data_to_send():
                await endpoint.send_all(data)

    def _handshake(self, request: TunnelRequest, *, pipelined: bool) -> ClientRole:
        url = self._url
        host, port = request.destination
        if request.name is not None and url.scheme.takes_names:
            host = request.name
        try:
            match url.scheme:
                case ProxyScheme.HTTP:
                    return HttpConnect(host, port, username=url.username, password=url.secret)
                case ProxyScheme.SOCKS4A:
                    return SocksConnect(host, port, version=Version.SOCKS4, user_id=url.username or "")
                case _:
                    return SocksConnect(host, port, username=url.username, password=url.secret, pipelined=pipelined)
        except ValueError as error:
            raise UpstreamError(str(error)) from None

    def _association(self, target: Target, *, pipelined: bool) -> ClientRole:
        """The request for a UDP association, on a connection to `target`. Which port our datagrams will come from is
        not known here, as there may be NAT on the way.
        """
        url, unknown = self._url, "::" if ":" in target.host else "0.0.0.0"
        return SocksConnect(
            unknown, 0, username=url.username, password=url.secret, pipelined=pipelined, command=Command.UDP_ASSOCIATE
        )


def _relay(reply: Established, endpoint: Endpoint) -> HostPort:
    """Where datagrams go, from the reply on this connection. Many proxies say 0.0.0.0 and mean the address at which
    they were reached. Raises UpstreamFault.
    """
    address = None
    with contextlib.suppress(ValueError):
        address = numeric_address(reply.bound_host)
    if address is None or not reply.bound_port or address.is_multicast:
        raise UpstreamFault(Kind.MALFORMED, f"the server wants datagrams at {reply.bound_host}:{reply.bound_port}")
    proxy = peer_of(endpoint.sock)
    if address.is_unspecified or address == numeric_address(proxy.host):
        return HostPort(proxy.host, reply.bound_port)
    return HostPort(str(address), reply.bound_port)

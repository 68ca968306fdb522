"""Probes: whether an upstream answers, how fast, and whether it accepts pipelining. Each uses its own connection."""

from __future__ import annotations

import errno
from math import inf

import trio

from transocks.http_connect import HttpConnect
from transocks.upstreams.addresses import UpstreamAddresses
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from transocks.upstreams.state import Answer, UpstreamState
from usocksd.errors import DialError, UpstreamError
from usocksd.net import tcp_info
from usocksd.net.bridge import in_session
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import Endpoint
from usocksd.socks import NEED_DATA, SOCKS4_PROBE, Kind, Probe, Probed, RequestRefused, UpstreamFault

WAITING = "waiting for the answer of"
"""The step of a DialError: the upstream has not answered a request in time."""

# HTTP proxies are asked to connect to an address to which TCP can't connect, so connect(2) fails at once and sends
# nothing. A proxy forwards nothing of a CONNECT, so a probe does no harm. Other requests can: pproxy and older
# tinyproxy connect to the host in Host, or without one to port 80 of their own host, where they may listen themselves,
# and forward the request.
_NOWHERE = ("255.255.255.255", 1)
# A server that accepts pipelining answers within a round trip; another is silent. It has this many times as long as its
# first answer took, plus these seconds.
_PIPELINING_TIMES, _PIPELINING_MORE = 2.0, 0.5
# Seconds after which a server that did not answer is tested for pipelining again.
_ASK_AGAIN_AFTER = 600.0
# A timer that fires this many seconds late says that this process did not run, and nothing of the upstream.
_LATE = 0.1


class ProbeTimedOut(DialError):
    """There was no answer in time. `late`: this process did not run meanwhile, so the fault may be its own."""

    def __init__(self, address: str, step: str, *, late: bool) -> None:
        super().__init__(errno.ETIMEDOUT, address, step)
        self.accepted = step != "connect"
        self.late = late


def ping(url: ProxyURL) -> bytes:
    """The request for an HTTP or SOCKS4 proxy, which leads to no connection."""
    return _connect_nowhere(url).data_to_send() if url.scheme is ProxyScheme.HTTP else SOCKS4_PROBE


def _connect_nowhere(url: ProxyURL) -> HttpConnect:
    return HttpConnect(*_NOWHERE, username=url.username, password=url.secret)


class Prober:
    """Probes one upstream."""

    def __init__(
        self,
        url: ProxyURL,
        state: UpstreamState,
        addresses: UpstreamAddresses,
        dialer: Dialer,
        before: bytes,
    ) -> None:
        """`before` goes in front of everything that is sent."""
        self._url = url
        self._state = state
        self._addresses = addresses
        self._dialer = dialer
        self._reactor = dialer.reactor
        self._clock = dialer.reactor.clock
        self._before = before
        self._ask_again_at = 0.0

    async def probe(self, *, connect: float, answer: float, learn: bool) -> Answer:
        """Ask the upstream whether it is there. It has `connect` seconds to accept a connection, and `answer` seconds
        to answer on it, or three times as long as it took to accept. `learn`: also find out whether it takes
        pipelining, if that is not known.

        Raises Error.
        """
        where = self._state.name
        with trio.move_on_after(connect) as scope:
            await self._addresses.refresh(in_haste=not learn)
            began = trio.current_time()
            endpoint, target = await in_session(self._reactor, self._dial())
        if scope.cancelled_caught:
            raise _timed_out(scope, where, "connect")
        where = str(target)
        connected = trio.current_time() - began
        try:
            with trio.move_on_after(max(answer, 3 * connected)) as scope:
                ours = await in_session(self._reactor, self._is_usocksd(endpoint))
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
            self._ask_again_at = self._clock() + _ASK_AGAIN_AFTER
            pipelines = await self._takes_pipelining(_PIPELINING_TIMES * latency + _PIPELINING_MORE)
        return Answer(latency, ours, pipelines, connected if round_trip is None else round_trip)

    async def _dial(self) -> tuple[Endpoint, Target]:
        """Without Fast Open: a probe is about the whole way, and Fast Open hides some of it."""
        targets = [target._replace(fast_open=False) for target in self._addresses.targets]
        return await self._dialer.dial(targets, deadline=inf)

    async def _is_usocksd(self, endpoint: Endpoint) -> bool:
        """Returns as soon as the upstream answers. Raises UpstreamError, OSError."""
        if self._url.scheme.is_socks5:
            return (await self._next(endpoint, Probe(self._url.username, self._url.secret), self._before)).ours
        # The end of the connection counts as an answer: a program has closed it.
        if self._url.scheme is ProxyScheme.HTTP:
            await self._ask_http(endpoint)
        else:
            await endpoint.send_all(self._before + SOCKS4_PROBE)
            await endpoint.receive()
        return False

    async def _ask_http(self, endpoint: Endpoint) -> None:
        """Returns after any answer of HTTP; raises UpstreamError if it wants other credentials."""
        handshake = _connect_nowhere(self._url)
        await endpoint.send_all(self._before + handshake.data_to_send())
        try:
            while handshake.next_event() is NEED_DATA:
                handshake.receive_data(await endpoint.receive())
        except RequestRefused:
            pass
        except UpstreamFault as fault:
            if fault.kind is not Kind.EOF:
                raise

    def _may_learn(self) -> bool:
        known = self._state.pipelines
        again = known is False and self._clock() >= self._ask_again_at
        return self._url.scheme.is_socks5 and (known is None or again)

    async def _takes_pipelining(self, within: float) -> bool | None:
        """Whether a SOCKS5 server takes greeting, credentials and request in one segment; None: this could not be
        tested now, for example for want of descriptors.
        """
        with trio.move_on_after(within):
            return await in_session(self._reactor, self._try_pipelining())
        return False

    async def _try_pipelining(self) -> bool | None:
        probe = Probe(self._url.username, self._url.secret, pipelined=True)
        try:
            endpoint, _ = await self._dial()
        except DialError:
            return None
        try:
            first = await self._next(endpoint, probe, self._before)
            return bool(first.pipelines or (await self._next(endpoint, probe)).pipelines)
        except (OSError, UpstreamError):
            return False
        finally:
            endpoint.close()

    async def _next(self, endpoint: Endpoint, probe: Probe, before: bytes = b"") -> Probed:
        """The next event of a handshake; `before` goes in front of what it sends."""
        while not isinstance(event := probe.next_event(), Probed):
            if data := probe.data_to_send():
                await endpoint.send_all(before + data)
                before = b""
            probe.receive_data(await endpoint.receive())
        return event


def _timed_out(scope: trio.CancelScope, address: str, step: str) -> ProbeTimedOut:
    return ProbeTimedOut(address, step, late=trio.current_time() - scope.deadline > _LATE)

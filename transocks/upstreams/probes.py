"""What is said to an upstream to find out whether it answers, and how much it takes at once."""

from __future__ import annotations

from transocks.http_connect import HttpConnect
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from usocksd.errors import UpstreamError
from usocksd.net.endpoint import Endpoint
from usocksd.socks import NEED_DATA, SOCKS4_PROBE, Kind, Probe, Probed, RequestRefused, UpstreamFault

_SOCKS5 = (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)
# What an HTTP proxy is asked to connect to: an address to which TCP connects nowhere, so that connect(2) fails at once,
# and sends nothing. A CONNECT is what it is there for, and nothing of it is passed on: the harm that a probe does ends
# here. Any other request can be taken for one to the proxy itself: pproxy and older tinyproxy connect to what Host
# says, or to port 80 of their host without one, and pass the request on, to themselves if that is where they listen.
_NOWHERE = ("255.255.255.255", 1)


def ping(url: ProxyURL) -> bytes:
    """What an HTTP or SOCKS4 proxy is asked, which leads to no connection."""
    return _connect_nowhere(url).data_to_send() if url.scheme is ProxyScheme.HTTP else SOCKS4_PROBE


def _connect_nowhere(url: ProxyURL) -> HttpConnect:
    password = None if url.password is None else url.password.reveal()
    return HttpConnect(*_NOWHERE, username=url.username, password=password)


class Questions:
    """What one upstream is asked, each time on a new connection."""

    def __init__(self, url: ProxyURL, before: bytes) -> None:
        """`before` is in front of all that is said to it on our own behalf."""
        self._url = url
        self._password = None if url.password is None else url.password.reveal()
        self._before = before

    async def is_ours(self, endpoint: Endpoint) -> bool:
        """Whether it is a usocksd; returns as soon as it answers. Raises UpstreamError, OSError."""
        if self._url.scheme in _SOCKS5:
            return (await self._next(endpoint, Probe(self._url.username, self._password), self._before)).ours
        # The end will do for an answer: a program has seen to it.
        if self._url.scheme is ProxyScheme.HTTP:
            await self._is_http(endpoint)
        else:
            await endpoint.send_all(self._before + SOCKS4_PROBE)
            await endpoint.receive()
        return False

    async def _is_http(self, endpoint: Endpoint) -> None:
        """Any answer of HTTP will do, but that it wants other credentials."""
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

    @property
    def may_pipeline(self) -> bool:
        """Whether `pipelines` can be asked."""
        return self._url.scheme in _SOCKS5

    async def pipelines(self, endpoint: Endpoint) -> bool:
        """Whether it takes greeting, credentials and request in one. One that does answers within a round trip, one
        that does not may be silent: don't wait for long.
        """
        probe = Probe(self._url.username, self._password, pipelined=True)
        try:
            first = await self._next(endpoint, probe, self._before)
            return bool(first.pipelines or (await self._next(endpoint, probe)).pipelines)
        except (OSError, UpstreamError):
            return False

    async def _next(self, endpoint: Endpoint, probe: Probe, before: bytes = b"") -> Probed:
        """Up to the next event of a probe; `before` goes in front of what it says."""
        while not isinstance(event := probe.next_event(), Probed):
            if data := probe.data_to_send():
                await endpoint.send_all(before + data)
                before = b""
            probe.receive_data(await endpoint.receive())
        return event

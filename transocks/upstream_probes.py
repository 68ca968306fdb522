"""What is said to an upstream to find out whether it answers, and how much it takes at once."""

from __future__ import annotations

from transocks.proxy_url import ProxyScheme, ProxyURL
from usocksd.errors import UpstreamError
from usocksd.runtime.endpoint import Endpoint
from usocksd.runtime.hostport import join_port
from usocksd.socks import SOCKS4_PROBE, Probe, Probed

_SOCKS5 = (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)
# What it is does not matter, as long as there is an answer. RFC 9110 section 9.3.7 calls it a ping.
_HTTP_PING = "OPTIONS * HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n"


def ping(url: ProxyURL) -> bytes:
    """What an HTTP or SOCKS4 proxy is asked, which leads to no connection."""
    http = _HTTP_PING.format(join_port(url.host, url.port)).encode()
    return http if url.scheme is ProxyScheme.HTTP else SOCKS4_PROBE


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
        await endpoint.send_all(self._before + ping(self._url))
        await endpoint.receive()  # the end will do: a program has seen to it
        return False

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

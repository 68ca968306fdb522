"""The upstream proxy: connect to it and ask it for the destination."""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from transocks.config import ProxyScheme, ProxyURL
from transocks.http_connect import HttpConnect
from transocks.original_dst import Destination
from usocksd.errors import DialError, Error
from usocksd.match import IPAddress
from usocksd.resolver import Resolver
from usocksd.runtime.dial import Target, dial
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint
from usocksd.runtime.metrics import SECONDS, Metrics
from usocksd.runtime.settings import Timeouts
from usocksd.socks import Client, ClientRole, Established, RequestRefused


class Tunnel(NamedTuple):
    """A connection through the upstream to the destination."""

    endpoint: Endpoint
    early: bytes
    """What the destination already said."""


class Connected(Protocol):
    """Wants to know of connections to an upstream."""

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        """There is one."""


class Upstream:
    """One upstream proxy."""

    def __init__(
        self, url: ProxyURL, *, resolver: Resolver, mark: int | None, metrics: Metrics, fast_open: bool = False
    ) -> None:
        self._url = url
        self._resolver = resolver
        self._mark = mark
        self._fast_open = fast_open
        self._known: frozenset[Destination] = frozenset()
        self.name = str(url)
        """For log records: without user and password."""
        self.scheme = url.scheme
        seconds = metrics.histograms(
            "upstream_seconds",
            "Time that an upstream took from connect to its answer: ok, refused (it said no) or failed",
            SECONDS,
            "upstream",
            "result",
        )
        self._ok, self._refused, self._failed = (
            seconds.labels(self.name, result) for result in ("ok", "refused", "failed")
        )
        if not isinstance(url.host, str):
            self._learn((url.host,))

    @property
    def addresses(self) -> Collection[Destination]:
        """Its addresses as far as they are known now."""
        return self._known

    async def connect(
        self, destination: Destination, client: Endpoint, timeouts: Timeouts, access: Connected
    ) -> Tunnel:
        """Reach `destination` through the proxy: `timeouts.connect` to reach it; for its answer as long again, since
        it has to connect in turn, and `timeouts.handshake` for what it has to say itself. `access` is told of the
        connection that was made to it, also when nothing comes of it.

        Raises UpstreamError (it refused, or broke its protocol), DialError (it can't be reached in time),
        ResolveError (its name is not known), PeerReset (`client` is gone).
        """
        reactor = client.reactor
        deadline = reactor.clock() + timeouts.connect
        targets = [
            Target(str(address), self._url.port, mark=self._mark, fast_open=self._fast_open)
            for address in await self._resolve(deadline, client)
        ]
        since = reactor.clock()
        try:
            endpoint, target = await dial(reactor, targets, deadline=deadline, client=client)
            endpoint.deadline = reactor.clock() + timeouts.connect + timeouts.handshake
            client.on_reset = endpoint.give_up
            try:
                access.connected(endpoint, target)
                tunnel = Tunnel(endpoint, await self._ask(endpoint, self._handshake(destination)))
            except DeadlineExpired:
                endpoint.close()
                raise DialError(errno.ETIMEDOUT, str(target), "waiting for the answer of") from None
            except OSError as error:
                endpoint.close()
                raise DialError(error.errno or errno.EIO, str(target), "asking") from None
            except BaseException:
                endpoint.close()
                raise
            finally:
                client.on_reset = None
        except Error as error:
            seconds = self._refused if isinstance(error, RequestRefused) else self._failed
            seconds.observe(reactor.clock() - since)
            raise
        self._ok.observe(reactor.clock() - since)
        return tunnel

    async def _ask(self, endpoint: Endpoint, handshake: ClientRole) -> bytes:
        while True:
            event = handshake.next_event()
            if isinstance(event, Established):
                return handshake.trailing_data
            if data := handshake.data_to_send():
                await endpoint.send_all(data)
            handshake.receive_data(await endpoint.receive())

    def _handshake(self, destination: Destination) -> ClientRole:
        url = self._url
        password = None if url.password is None else url.password.reveal()
        kind = HttpConnect if url.scheme is ProxyScheme.HTTP else Client
        return kind(destination.host, destination.port, username=url.username, password=password)

    async def _resolve(self, deadline: float, client: Endpoint) -> Sequence[IPAddress]:
        host = self._url.host
        if not isinstance(host, str):
            return (host,)
        addresses = await self._resolver.search_for(client, host, deadline)
        self._learn(addresses)
        return addresses

    def _learn(self, addresses: Sequence[IPAddress]) -> None:
        self._known = frozenset(Destination(str(address), self._url.port) for address in addresses)

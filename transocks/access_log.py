"""The access records of transocks, and the counters of its connections."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from transocks.original_dst import Loop, NotRedirected
from transocks.routes import DEFAULT
from transocks.sniff import Opening, Protocol
from transocks.upstreams.proxy_url import ProxyScheme
from usocksd.errors import Denied, Error, UpstreamError
from usocksd.log.access import AccessRecords, ConnectionRecords, pair_member
from usocksd.log.log import Log
from usocksd.log.metrics import Metrics
from usocksd.net.dial import Target
from usocksd.net.endpoint import Endpoint
from usocksd.socks import Reply, RequestRefused

_KEYS = (
    "request_id",
    "client_addr",
    "dest_addr",
    "name",
    "name_from",
    "route",
    "group",
    "upstream",
    "tries",
    "src_addr",
    "upstream_addr",
)
# Of an established connection. No text is an address with a zone: the names of interfaces may need escaping.
_TEXTS = ("request_id", "client_addr", "src_addr", "upstream_addr")
_NUMBERS = ("tries",)
_FEW = ("name_from", "route", "group", "upstream")

# Label values.
_VERSIONS: dict[ProxyScheme | None, str] = {
    ProxyScheme.SOCKS5: "SOCKS5",
    ProxyScheme.SOCKS5H: "SOCKS5",
    ProxyScheme.SOCKS4A: "SOCKS4",
    ProxyScheme.HTTP: "HTTP",
    None: "direct",
}
_NO_UPSTREAM = "unknown"
_NOT_REDIRECTED, _LOOP, _GONE = "not_redirected", "loop", "client_gone"
_REJECTED = "rejected"
_UNVERIFIED = "unverified"
# The replies of SOCKS5 and HTTP that mean a proxy's rules deny the request: nothing is wrong.
_DENIED = frozenset({Reply.NOT_ALLOWED, 403})
_GRANTED, _REFUSED, _UNREACHABLE = "granted", "upstream_refused", "upstream_unreachable"


class AccessLog(AccessRecords):
    """The records of all connections, and their counters."""

    def __init__(self, log: Log, metrics: Metrics, routes: Iterable[str] = ()) -> None:
        """`routes` are the names of all routes."""
        super().__init__(log, _KEYS, logging.getLogger(__name__), metrics, texts=_TEXTS, numbers=_NUMBERS, few=_FEW)
        self.repeats = Repeats()
        self.connections = metrics.counters(
            "connections_total",
            "Client connections, by what their upstream speaks and how they began",
            "version",
            "status",
        )
        for status in (_NOT_REDIRECTED, _LOOP, _REJECTED):
            self.connections.labels(_NO_UPSTREAM, status)
        for version in _VERSIONS.values():
            for status in (_GRANTED, _REFUSED, _UNREACHABLE, _GONE):
                self.connections.labels(version, status)

        names = metrics.counters("names_total", "Connections, by where the name in their first bytes is from", "source")
        sources = (None, Protocol.TLS.value, Protocol.HTTP.value, _UNVERIFIED)
        self.names = {source: names.labels(source or "none") for source in sources}
        self.unresolved = metrics.counter(
            "names_unresolved_total", "Names that led nowhere, so that the address was asked for"
        )
        by_route = metrics.counters("route_connections_total", "Connections, by the route that they took", "route")
        self.by_route = {route: by_route.labels(route) for route in (DEFAULT, *routes)}


class RedirectedRecords(ConnectionRecords):
    """The records of one connection. The session tells it what it learns, and asks it nothing."""

    __slots__ = (
        "_group",
        "_host",
        "_log",
        "_name",
        "_name_from",
        "_proxy",
        "_route",
        "_tries",
        "_upstream",
        "_version",
        "destination",
    )

    def __init__(self, records: AccessLog, host: str, port: int) -> None:
        super().__init__(records, host, port)
        self._log = records
        self._host = host
        self.destination: str | None = None
        """The original destination."""
        self._name: str | None = None
        self._name_from: str | None = None
        self._route: str | None = None
        self._group: str | None = None
        self._upstream: str | None = None
        self._tries = 0
        self._version = _NO_UPSTREAM
        self._proxy: str | None = None

    def sniffed(self, opening: Opening) -> None:
        """The first bytes, and what they are."""
        if opening.name is not None:
            self._name = opening.name
            self._name_from = _UNVERIFIED if opening.encrypted else opening.protocol.value
        self._log.names[self._name_from].value += 1

    def routed(self, route: str) -> None:
        """Which route it takes."""
        self._route = route

    def unresolved(self, error: Error) -> None:
        """Its name leads nowhere, as `error` says: the address is tried instead."""
        self._log.unresolved.value += 1
        self.event(logging.INFO, "name leads nowhere", error=str(error))

    def trying(self, group: str, upstream: str, scheme: ProxyScheme | None) -> None:
        """A try through this upstream of this group begins; scheme None: a direct connection."""
        self._group = group
        self._upstream = upstream
        self._version = _VERSIONS[scheme]
        self._tries += 1
        self._source = self._proxy = None

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        """The proxy is connected. Both addresses are as in the proxy's own records."""
        host, port = endpoint.sock.getsockname()[:2]
        self._source = pair_member(host, port)
        self._proxy = pair_member(proxy.host, proxy.port)

    def starts(self) -> None:
        """The proxy has connected to the destination."""
        self._count(_GRANTED)
        self._begin()

    def refused(self, error: Error) -> None:
        """The client is reset."""
        level = logging.ERROR
        more: dict[str, object] = {}
        match error:
            case NotRedirected():
                # Mostly a health check, every few seconds.
                level, message, status = logging.DEBUG, "not redirected", _NOT_REDIRECTED
                if (times := self._log.repeats.due((self._host, str(error)))) is not None:
                    level, more = logging.WARNING, {"count": times} if times > 1 else {}
            case Loop():
                message, status = "loop refused", _LOOP
            case Denied():
                level, message, status = logging.INFO, "rejected by route", _REJECTED
            case _:
                self._log.not_connected(error)
                message = "failed to connect to proxy server"
                status = _REFUSED if isinstance(error, UpstreamError) else _UNREACHABLE
                if isinstance(error, RequestRefused) and error.reply in _DENIED:
                    level = logging.WARNING
        self._count(status)
        self.event(level, message, error=str(error), **more)

    def gave_up(self) -> None:
        """The client is gone before it had a connection."""
        self._count(_GONE)
        self.event(logging.INFO, "client is gone")

    def _count(self, status: str) -> None:
        if self._route is not None:
            self._log.by_route[self._route].value += 1
        self._log.connections.labels(self._version, status).value += 1

    def values(self) -> tuple[object, ...]:
        return (
            self._id,
            self._client,
            self.destination,
            self._name,
            self._name_from,
            self._route,
            self._group,
            self._upstream,
            self._tries or None,
            self._source,
            self._proxy,
        )

    def _details(self) -> dict[str, Any]:
        return {
            "destination": self.destination,
            "name": self._name,
            "user": None,
            "rule": None,
            "egress": None,
            "route": self._route,
            "upstream": self._upstream,
        }


class Repeats:
    """Limits records that repeat to one in ten minutes, with their number. Remembers the latest 1000."""

    def __init__(self, *, every: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._known: dict[Hashable, tuple[float, int]] = {}
        """When each was last written, and how often it has happened since then."""

    def due(self, what: Hashable) -> int | None:
        """Count this. Returns how often it has happened since its last record if a new one is due, else None."""
        now = self._clock()
        written, count = self._known.pop(what, (-self._every, 0))
        if now - written < self._every:
            self._known[what] = written, count + 1
            return None
        self._known[what] = now, 0
        if len(self._known) > 1000:
            del self._known[next(iter(self._known))]
        return count + 1

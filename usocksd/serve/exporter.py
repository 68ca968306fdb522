"""The metrics endpoint: /metrics as OpenMetrics or Prometheus text, /healthz as one word."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from io import BytesIO
from itertools import accumulate
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from usocksd.log.metrics import MetricKind, Snapshot
from usocksd.net.address import bound_to
from usocksd.net.limits import owner
from usocksd.serve.server import BoundedServer, Peer, ServerLimits

log = logging.getLogger(__name__)

READY = "ready"

# A scrape takes milliseconds.
LIMITS: Final = ServerLimits(clients=64, request=16 * 1024, ask_within=2.0, take_within=10.0)

_TEXT = "text/plain"


class BadRequest(Exception):
    """The request is not acceptable; has the status of the answer."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class HttpRequest(NamedTuple):
    """A client's request."""

    head: bool
    """Only the head of the answer (HEAD)"""
    path: str
    accept: str


def parse_request(data: bytes) -> HttpRequest:
    """An HTTP request (RFC 9112). Raises BadRequest."""
    line, _, rest = data.partition(b"\n")
    try:
        method, target, version = line.decode("ascii").split()
        path = urlsplit(target).path
        accept = parse_headers(BytesIO(rest)).get("Accept", "")
    except (ValueError, HTTPException):
        raise BadRequest(HTTPStatus.BAD_REQUEST) from None
    if not version.startswith("HTTP/1."):
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    if method not in ("GET", "HEAD"):
        raise BadRequest(HTTPStatus.NOT_IMPLEMENTED)
    return HttpRequest(method == "HEAD", path, str(accept))


class Exporter(BoundedServer):
    """Serves /metrics and /healthz over HTTP. `collect` returns the sum of all processes; `health` is one word;
    everything but READY is an HTTP error (503), so that a load balancer avoids this host.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        collect: Callable[[], Snapshot],
        health: Callable[[], str],
        limits: ServerLimits = LIMITS,
    ) -> None:
        super().__init__(sockets, limits)
        self.addresses = list(map(bound_to, sockets))
        self._collect = collect
        self._health = health
        self._rendering = trio.Lock()
        self._snapshots = 0
        self._snapshot: Snapshot = {}
        self._bodies: dict[str, bytes] = {}
        """The latest snapshot by content type"""

    def identify(self, sock: trio.socket.SocketType) -> Peer:
        """The network that the client is alone in."""
        return Peer(owner(sock.getpeername()[0]))

    def is_whole(self, data: bytes) -> bool:
        """A head."""
        return b"\r\n\r\n" in data or b"\n\n" in data

    async def answer(self, request: bytes, peer: Peer) -> bytes:
        """An HTTP/1.0 response: the connection ends with it."""
        head = False
        try:
            head, path, accept = parse_request(request)
            status, kind, body = await self._respond(path, accept)
        except BadRequest as error:
            status, kind, body = error.status, _TEXT, b"GET or HEAD, /metrics or /healthz\n"
        except Exception:
            log.exception("metrics failed")
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"see the log\n"
        lines = (
            f"HTTP/1.0 {status} {status.phrase}",
            "Server: transocks",  # not the versions of everything below us
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "\r\n",
        )
        return "\r\n".join(lines).encode() + (b"" if head else body)

    async def _respond(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        match path:
            case "/metrics":
                return HTTPStatus.OK, *await self._render(accept)
            case "/healthz":
                word = self._health()
                status = HTTPStatus.OK if word == READY else HTTPStatus.SERVICE_UNAVAILABLE
                return status, _TEXT, f"{word}\n".encode()
            case _:
                return HTTPStatus.NOT_FOUND, _TEXT, b"/metrics and /healthz are here\n"

    async def _render(self, accept: str) -> tuple[str, bytes]:
        """All metrics, and their content type. Scrapes that wait at the same time share one snapshot."""
        try:
            encode, kind = choose_encoder(accept)
        except Exception:  # the library fails on malformed versions
            encode, kind = choose_encoder("")
        asked = self._snapshots
        async with self._rendering:
            if self._snapshots == asked:
                self._snapshot, self._bodies = self._collect(), {}
                self._snapshots += 1
            if kind not in self._bodies:
                registry = CollectorRegistry()
                registry.register(_Collected(self._snapshot))
                # In a thread, since thousands of values would block the master too long.
                self._bodies[kind] = await trio.to_thread.run_sync(partial(encode, registry))
            return kind, self._bodies[kind]


class _Collected(Collector):
    """A snapshot as the library's metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, metric in self._snapshot.items():
            yield _family(name, metric)


def _family(name: str, metric: dict[str, Any]) -> Metric:
    kind, labels = MetricKind(metric["kind"]), metric["labels"]
    if kind is MetricKind.HISTOGRAM:
        histogram = HistogramMetricFamily(name, metric["help"], labels=labels)
        bounds = [*map(floatToGoString, metric["bounds"]), "+Inf"]
        for values, (*counts, observed) in metric["values"]:
            histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), observed)
        return histogram
    make = CounterMetricFamily if kind is MetricKind.COUNTER else GaugeMetricFamily
    numbers = make(name, metric["help"], labels=labels)
    for values, (number,) in metric["values"]:
        numbers.add_metric(values, number)
    return numbers

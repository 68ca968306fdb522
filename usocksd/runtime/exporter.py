"""The metrics endpoint: /metrics as OpenMetrics or Prometheus text, /healthz as one word.

It lives in threads of its own, so that no client of it can hold up the master: one that accepts, and one for each of
the few connections that there may be at a time, each bounded in time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from math import inf
from typing import Any
from urllib.parse import urlsplit

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from usocksd.runtime.metrics import Kind, Snapshot

log = logging.getLogger(__name__)

READY = "ready"

# A scrape takes milliseconds. Who takes longer than this for request and answer together is cut off.
_PATIENCE = 10.0
_SWEEP_EVERY = 1.0
_MOST_CLIENTS = 16
# With so many there, one that has been there for this long makes room for the next.
_YOUNG = 1.0
# When no connection can be accepted (no descriptors left, say), so long until the next try.
_PAUSE = 0.2


class Exporter:
    """Serves /metrics and /healthz over HTTP on a listening socket until it is closed."""

    def __init__(self, listener: socket.socket, collect: Callable[[], Snapshot], health: Callable[[], str]) -> None:
        """`listener` is the exporter's from now on, until it is closed with it.

        Both functions are called in threads of the exporter's, and may go through trio.from_thread. `collect` gives
        the sum of all processes; `health` one word, and everything but READY is an HTTP error (503), so that a load
        balancer looks elsewhere.
        """
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self.collect = collect
        self.health = health
        listener.setblocking(False)
        self._listener = listener
        self._waker, self._woken = socket.socketpair()
        self._clients: dict[socket.socket, float] = {}
        """Since when each has been connected, the oldest first."""
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, name="metrics", daemon=True)
        self._acceptor.start()

    def fileno(self) -> int:
        """The listening socket's descriptor."""
        return self._listener.fileno()

    def close(self) -> None:
        """Accept no more; who has asked already gets its answer."""
        self._waker.close()
        self._acceptor.join()
        self._listener.close()
        self._cut(before=inf, how=socket.SHUT_RD)

    def _accept(self) -> None:
        with self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(_SWEEP_EVERY if self._clients else None)]
                if self._woken in ready:
                    return
                now = time.monotonic()
                self._cut(before=now - _PATIENCE)
                if ready:
                    self._accept_one(now)

    def _accept_one(self, now: float) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                time.sleep(_PAUSE)
            return
        with self._lock:
            oldest = next(iter(self._clients), None)
            full = len(self._clients) >= _MOST_CLIENTS
            if full and oldest is not None and self._clients[oldest] < now - _YOUNG:
                _shut(oldest)
                del self._clients[oldest]
                full = False
            if not full:
                self._clients[sock] = now
        try:
            if full:
                raise RuntimeError("too many clients")
            threading.Thread(target=self._serve, args=(sock, address), name="metrics client", daemon=True).start()
        except RuntimeError as error:
            log.debug("metrics are not served", extra={"fields": {"client_addr": address[0], "error": error}})
            self._forget(sock)
            sock.close()

    def _serve(self, sock: socket.socket, address: Any) -> None:
        try:
            # Reset, timed out or cut off: that is the client's affair.
            with contextlib.suppress(OSError), sock:
                sock.settimeout(_PATIENCE)
                _Handler(sock, address, self)
                sock.shutdown(socket.SHUT_WR)
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._clients.pop(sock, None)

    def _cut(self, *, before: float, how: int = socket.SHUT_RDWR) -> None:
        """Shut what has been connected since before then; its thread finds that out, and ends."""
        with self._lock:
            for sock, since in self._clients.items():
                if since < before:
                    _shut(sock, how)


class _Handler(BaseHTTPRequestHandler):
    """One request. (HTTP/1.0: the connection ends with its answer.)"""

    def __init__(self, sock: socket.socket, address: Any, exporter: Exporter) -> None:
        self._exporter = exporter
        super().__init__(sock, address, exporter)  # type: ignore[arg-type]  # it is only kept as `server`

    def do_GET(self) -> None:
        try:
            status, kind, body = self._answer()
        except (trio.RunFinishedError, trio.Cancelled):
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"stopped\n"
        except Exception:
            log.exception("metrics failed")
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"see the log\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def version_string(self) -> str:
        """What the Server header says: not the versions of everything below us."""
        return "transocks"

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no news."""

    def _answer(self) -> tuple[HTTPStatus, str, bytes]:
        match urlsplit(self.path).path:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                registry = CollectorRegistry()
                registry.register(_Collected(self._exporter.collect()))
                return HTTPStatus.OK, kind, encode(registry)
            case "/healthz":
                word = self._exporter.health()
                status = HTTPStatus.OK if word == READY else HTTPStatus.SERVICE_UNAVAILABLE
                return status, "text/plain", f"{word}\n".encode()
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics and /healthz are here\n"


class _Collected(Collector):
    """A snapshot as the library's metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, metric in self._snapshot.items():
            yield _family(name, metric)


def _family(name: str, metric: dict[str, Any]) -> Metric:
    kind, labels = Kind(metric["kind"]), metric["labels"]
    if kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(name, metric["help"], labels=labels)
        bounds = [*map(floatToGoString, metric["bounds"]), "+Inf"]
        for values, (*counts, observed) in metric["values"]:
            histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), observed)
        return histogram
    make = CounterMetricFamily if kind is Kind.COUNTER else GaugeMetricFamily
    numbers = make(name, metric["help"], labels=labels)
    for values, (number,) in metric["values"]:
        numbers.add_metric(values, number)
    return numbers


def _shut(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)

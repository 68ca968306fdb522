"""The metrics endpoint: /metrics as OpenMetrics or Prometheus text, /healthz as one word.

It lives in a thread of its own, so that no client of it can hold up the master. That thread never waits for a client:
it reads and writes what goes at once, and when it has more clients than there may be, one makes room for the next.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from itertools import accumulate
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from usocksd.host.limits import owner
from usocksd.log.metrics import Kind, Snapshot
from usocksd.net.address import bound_to

log = logging.getLogger(__name__)

READY = "ready"

# A scrape takes milliseconds. A client that takes longer to send its request, or to take the answer, is cut off.
_ASK_WITHIN = 2.0
_TAKE_WITHIN = 10.0
_MOST_CLIENTS = 64
_MOST_SAID = 16 * 1024
# Seconds until the next try when no connection can be accepted (for want of descriptors, for example).
_PAUSE = 0.2


Bodies: TypeAlias = dict[str, bytes]
"""The answer for all scrapes that wait, by content type: many scrapes cost no more than one."""


class _Client:
    """One connection, and how far it is."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.sock = sock
        self.owner = owner(host)
        self.until = time.monotonic() + _ASK_WITHIN
        self.said = b""
        self.asked = False
        self.answer = memoryview(b"")


class Exporter:
    """Serves /metrics and /healthz over HTTP on listening sockets until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        collect: Callable[[], Snapshot],
        health: Callable[[], str],
        others: Sequence[socket.socket] = (),
    ) -> None:
        """`listener` and `others` are the exporter's from now on, until they are closed with it.

        Both functions are called in the exporter's thread, and may go through trio.from_thread. `collect` gives the
        sum of all processes; `health` one word, and everything but READY is an HTTP error (503), so that a load
        balancer looks elsewhere.
        """
        self.address: tuple[str, int] = bound_to(listener)
        self.addresses: list[tuple[str, int]] = [bound_to(each) for each in (listener, *others)]
        self.collect = collect
        self.health = health
        self._listeners = [listener, *others]
        for each in self._listeners:
            each.setblocking(False)
        self._selector = selectors.DefaultSelector()
        try:
            self._waker, self._woken = socket.socketpair()
        except OSError:
            self._selector.close()
            raise
        self._closing = False
        self._clients: dict[_Client, None] = {}
        """The oldest first."""
        self._waiting: list[_Client] = []
        """Clients whose answer takes longer: scrapes."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def filenos(self) -> list[int]:
        """The descriptors of the listening sockets."""
        return [listener.fileno() for listener in self._listeners]

    def close(self) -> None:
        """Accept no more; who has asked already gets its answer."""
        # The thread is not waited for: it may be about to ask the thread that calls this.
        self._closing = True
        for listener in self._listeners:
            listener.close()
        self._waker.close()

    def _run(self) -> None:
        with self._selector as selector, self._woken:
            selector.register(self._woken, selectors.EVENT_READ)
            with contextlib.suppress(ValueError, KeyError):  # closed already
                for listener in self._listeners:
                    selector.register(listener, selectors.EVENT_READ)
            while not self._closing:
                self._turn()
            selector.unregister(self._woken)
            for client in list(self._clients):
                if not client.asked:
                    self._drop(client)
            while self._clients:
                self._turn()

    def _turn(self) -> None:
        """Do what can be done at once, for all of them, and then what takes longer."""
        now = time.monotonic()
        until = min((client.until for client in self._clients), default=None)
        wait = None if until is None else max(until - now, 0.0)
        for key, _ in self._selector.select(0.0 if self._waiting else wait):
            if isinstance(key.data, _Client):
                self._go_on(key.data)
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._listeners and not self._closing:
                self._accept(key.fileobj)
        now = time.monotonic()
        for client in [client for client in self._clients if client.until <= now]:
            self._drop(client)
        waiting, self._waiting = self._waiting, []
        bodies: Bodies = {}
        for client in waiting:
            if client in self._clients:
                self._answer(client, bodies)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_MOST_CLIENTS):
            try:
                self._admit(*listener.accept())
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                if self._clients:
                    self._make_room()
                elif not self._closing:
                    time.sleep(_PAUSE)
                return

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> None:
        if len(self._clients) >= _MOST_CLIENTS:
            self._make_room()
        sock.setblocking(False)
        client = _Client(sock, address[0])
        self._clients[client] = None
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._go_on(client)  # most have said it all by now

    def _make_room(self) -> None:
        """The client with most connections has one less."""
        ((crowd, _),) = Counter(client.owner for client in self._clients).most_common(1)
        self._drop(next(client for client in self._clients if client.owner == crowd))

    def _go_on(self, client: _Client) -> None:
        """Read from it, or write to it."""
        try:
            if client.asked:
                self._send(client)
            else:
                self._read(client)
        except BlockingIOError:
            pass
        except OSError:  # reset, say: that is the client's affair
            self._drop(client)

    def _read(self, client: _Client) -> None:
        data = client.sock.recv(_MOST_SAID)
        client.said += data
        if data and len(client.said) < _MOST_SAID and not any(end in client.said for end in (b"\r\n\r\n", b"\n\n")):
            return
        if not client.said:
            self._drop(client)
            return
        client.asked = True
        client.until = time.monotonic() + _TAKE_WITHIN
        self._selector.unregister(client.sock)
        # A health check does not wait for scrapes.
        if b"/metrics" in client.said.partition(b"\n")[0]:
            self._waiting.append(client)
        else:
            self._answer(client, {})

    def _answer(self, client: _Client, bodies: Bodies) -> None:
        try:
            client.answer = memoryview(_Handler(client.said, self, bodies).answer)
        except Exception:  # nothing that a client says ends this thread
            log.exception("metrics failed")
            self._drop(client)
            return
        client.until = time.monotonic() + _TAKE_WITHIN
        self._selector.register(client.sock, selectors.EVENT_WRITE, client)
        self._go_on(client)

    def _send(self, client: _Client) -> None:
        client.answer = client.answer[client.sock.send(client.answer) :]
        if not client.answer:
            client.sock.shutdown(socket.SHUT_WR)
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client, None)
        with contextlib.suppress(KeyError, ValueError):  # it waits for its answer, and is not looked at
            self._selector.unregister(client.sock)
        client.sock.close()


class _Handler(BaseHTTPRequestHandler):
    """One request, and its answer. (HTTP/1.0: the connection ends with it.)"""

    def __init__(self, said: bytes, exporter: Exporter, bodies: Bodies) -> None:
        self._exporter = exporter
        self._bodies = bodies
        self.rfile, self._written = BytesIO(said), BytesIO()
        self.wfile = self._written
        super().__init__(None, None, None)  # type: ignore[arg-type]  # they are only kept

    @property
    def answer(self) -> bytes:
        return self._written.getvalue()

    def setup(self) -> None:
        """There are no files to be made of a socket."""

    finish = setup

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
        try:
            path = urlsplit(self.path).path
        except ValueError:
            return HTTPStatus.BAD_REQUEST, "text/plain", b"no such address can be\n"
        match path:
            case "/metrics":
                try:
                    encode, kind = choose_encoder(self.headers.get("Accept", ""))
                except Exception:  # (the library trips over versions that are none)
                    encode, kind = choose_encoder("")
                if kind not in self._bodies:
                    registry = CollectorRegistry()
                    registry.register(_Collected(self._exporter.collect()))
                    self._bodies[kind] = encode(registry)
                return HTTPStatus.OK, kind, self._bodies[kind]
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

"""The metrics endpoint, with real clients and real parsers."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import attrs
import daemons
import pytest
import trio
from prometheus_client import parser as prometheus
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics

from usocksd.log.metrics import BYTES, SECONDS, Metrics, Snapshot, total
from usocksd.net.listeners import listen
from usocksd.serve.exporter import LIMITS, Exporter
from usocksd.serve.server import ServerLimits

# As Prometheus 2.42 and 3.5 say it.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
)
STRANGE = 'deny_sites "a\\b\nc" ü'


class Served:
    """An exporter in a thread, what it collects, and how it is."""

    def __init__(self, limits: ServerLimits = LIMITS, host: str = "127.0.0.1") -> None:
        self.metrics = Metrics("usocksd")
        self.health = "ready"
        self.collect: Callable[[], Snapshot] = lambda: total([self.metrics.snapshot()])
        self.exporter = Exporter([listen(host, 0)], lambda: self.collect(), lambda: self.health, limits)  # noqa: PLW0108  (a test replaces it)
        self.host, self.port = self.exporter.addresses[0]
        self._ready = threading.Event()
        self.thread = threading.Thread(target=trio.run, args=[self._run])
        self.thread.start()
        assert self._ready.wait(daemons.PATIENCE)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: self.exporter.serve(task_status=task_status))
            self._ready.set()

    def close(self) -> None:
        """Close the exporter; its thread ends when all is answered."""
        trio.from_thread.run_sync(self.exporter.close, trio_token=self._token)

    def get(self, path: str, method: str = "GET", accept: str | None = None) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection(self.host, self.port, timeout=daemons.PATIENCE)
        try:
            connection.request(method, path, headers={} if accept is None else {"Accept": accept})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), daemons.PATIENCE)


@contextlib.contextmanager
def serving(limits: ServerLimits = LIMITS, host: str = "127.0.0.1") -> Iterator[Served]:
    served = Served(limits, host)
    try:
        yield served
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            served.close()
        served.thread.join(daemons.PATIENCE)
        assert not served.thread.is_alive()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def fill(metrics: Metrics) -> None:
    denied = metrics.counters("denied_total", "Denied, by rule", "rule")
    denied.labels(STRANGE).value += 3
    denied.labels("allow_from")
    metrics.gauge("live", "Live").value = 7
    metrics.minimum("headroom", "Left").value = 0.5
    seconds = metrics.histograms("seconds", "Seconds", SECONDS, "result")
    seconds.labels("ok").observe(0.002)
    seconds.labels("ok").observe(1e9)
    metrics.histogram("bytes", "Bytes", BYTES).observe(1e9)
    metrics.counter("large_total", "Large").value += 10**15 + 1


def check(found: dict[str, Metric]) -> None:
    samples = {(s.name, *sorted(s.labels.items())): s.value for metric in found.values() for s in metric.samples}
    assert samples["usocksd_denied_total", ("rule", STRANGE)] == 3
    assert samples["usocksd_denied_total", ("rule", "allow_from")] == 0
    assert samples["usocksd_live",] == 7
    assert samples["usocksd_headroom",] == 0.5
    assert samples["usocksd_large_total",] == 10**15 + 1
    assert samples["usocksd_seconds_count", ("result", "ok")] == 2
    assert samples["usocksd_seconds_sum", ("result", "ok")] == 1e9 + 0.002
    buckets = [s for s in found["usocksd_seconds"].samples if s.name.endswith("_bucket")]
    assert [float(s.labels["le"]) for s in buckets] == [*SECONDS, float("inf")]
    assert [s.value for s in buckets] == [0] + [1] * (len(SECONDS) - 1) + [2]
    bounds = [float(s.labels["le"]) for s in found["usocksd_bytes"].samples if s.name.endswith("_bucket")]
    assert bounds == [*BYTES, float("inf")]
    kinds = {name: metric.type for name, metric in found.items()}
    assert kinds["usocksd_live"] == kinds["usocksd_headroom"] == "gauge"
    assert kinds["usocksd_seconds"] == kinds["usocksd_bytes"] == "histogram"


@pytest.mark.parametrize("accept", ACCEPT)
def test_openmetrics_for_prometheus(served: Served, accept: str) -> None:
    fill(served.metrics)
    response, body = served.get("/metrics", accept=accept)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    found = {metric.name: metric for metric in openmetrics.text_string_to_metric_families(body.decode())}
    check(found)
    assert found["usocksd_denied"].type == "counter"
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept", [None, "*/*", "text/plain;version=0.0.4", "text/html", "application/openmetrics-text;version=1.x"]
)
def test_prometheus_text_for_everybody_else(served: Served, accept: str | None) -> None:
    fill(served.metrics)
    response, body = served.get("/metrics?debug=1", accept=accept)
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    check({metric.name: metric for metric in prometheus.text_string_to_metric_families(body.decode())})


def test_every_scrape_collects_anew(served: Served) -> None:
    counter = served.metrics.counter("scrapes_total", "Scrapes")
    for number in range(3):
        assert f"usocksd_scrapes_total {float(number)}" in served.get("/metrics")[1].decode()
        counter.value += 1


def test_health(served: Served) -> None:
    for word, status in (("ready", 200), ("draining", 503), ("broken", 503)):
        served.health = word
        response, body = served.get("/healthz")
        assert (response.status, body.decode()) == (status, f"{word}\n")


@pytest.mark.parametrize(
    ("path", "status"), [("/", 404), ("/metrics/x", 404), ("/?/metrics", 404), ("http://x/metrics", 200)]
)
def test_other_paths(served: Served, path: str, status: int) -> None:
    assert served.get(path)[0].status == status


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    fill(served.metrics)
    got, body = served.get(path)
    response, nothing = served.get(path, "HEAD")
    assert nothing == b""
    assert response.status == got.status
    assert response.headers["Content-Type"] == got.headers["Content-Type"]
    assert int(response.headers["Content-Length"]) == len(body)


def test_other_methods(served: Served) -> None:
    assert served.get("/metrics", "POST")[0].status == 501


def test_curl(served: Served) -> None:
    fill(served.metrics)
    done = subprocess.run(
        ["curl", "-sSf", f"http://127.0.0.1:{served.port}/metrics"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    check({metric.name: metric for metric in prometheus.text_string_to_metric_families(done.stdout)})


def test_a_fault_in_collecting_is_an_answer_and_a_record(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def collect() -> Snapshot:
        raise KeyError("bug")

    served.collect = collect
    response, body = served.get("/metrics")
    assert response.status == 500
    assert b"bug" not in body
    assert "metrics failed" in caplog.text
    assert served.get("/healthz")[0].status == 200


def test_garbage_and_impatient_clients_are_no_news(
    served: Served, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for garbage in (
        b"",
        b"GET http://[/metrics HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01" + bytes(100) + b"\n\n",
        b"GET /metrics\r\n",
        b"X" * 70_000 + b"\r\n\r\n",
    ):
        with served.connect() as client, contextlib.suppress(OSError):  # reset in the middle of too much
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            daemons.receive_all(client)
    for said in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        client = served.connect()
        client.sendall(said)
        daemons.reset(client)
    assert served.get("/healthz")[0].status == 200
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"])
def test_many_slow_clients_keep_nobody_out(served: Served, said: bytes) -> None:
    """Silent clients, clients in the middle of their request, and clients that don't read the answer."""
    large(served)
    slow = [served.connect() for _ in range(2 * LIMITS.clients)]
    try:
        for client in slow:
            client.sendall(said)
        for _ in range(3):
            assert served.get("/healthz")[0].status == 200
            assert served.get("/metrics")[0].status == 200
        with contextlib.suppress(ConnectionResetError):  # the oldest made room
            daemons.receive_all(slow[0])
    finally:
        for client in slow:
            client.close()


def test_the_client_with_most_connections_makes_room(served: Served) -> None:
    """A slow client from another address keeps its connection."""
    with socket.create_connection(("127.0.0.1", served.port), daemons.PATIENCE, ("127.0.0.2", 0)) as early:
        early.sendall(b"GET /healthz HTTP/1.0\r\n")
        crowd = [served.connect() for _ in range(2 * LIMITS.clients)]
        try:
            assert crowd[0].recv(1) == b""
            early.sendall(b"\r\n")
            assert daemons.receive_all(early).endswith(b"ready\n")
        finally:
            for client in crowd:
                client.close()


class Slow(dict[str, Any]):
    """A snapshot that takes long to render."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def items(self) -> Any:
        self.begun.set()
        assert self.go_on.wait(daemons.PATIENCE)
        return super().items()


def test_a_flood_of_scrapes_costs_little_more_than_one(served: Served) -> None:
    """Scrapes that wait share a snapshot, and a health check does not wait for them."""
    slow = Slow()
    snapshots: list[Snapshot] = []

    def collect() -> Snapshot:
        snapshots.append({} if snapshots else slow)
        return snapshots[-1]

    served.collect = collect
    with contextlib.ExitStack() as stack:
        scrapes = [stack.enter_context(served.connect()) for _ in range(20)]
        for client in scrapes:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert slow.begun.wait(daemons.PATIENCE)
        assert served.get("/healthz")[1] == b"ready\n"
        slow.go_on.set()
        for client in scrapes:
            assert daemons.receive_all(client).startswith(b"HTTP/1.0 200 ")
    assert len(snapshots) <= 2


def test_scrapes_that_wait_keep_no_health_check_out(served: Served) -> None:
    slow = Slow()
    served.collect = lambda: slow
    with contextlib.ExitStack() as stack:
        for _ in range(2 * LIMITS.clients):
            stack.enter_context(served.connect()).sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert slow.begun.wait(daemons.PATIENCE)
        assert served.get("/healthz")[1] == b"ready\n"
        slow.go_on.set()


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_a_client_that_takes_too_long_to_ask_is_cut_off(drip: bytes) -> None:
    """Also one that sends something all the time, so that no single wait is long."""
    with serving(attrs.evolve(LIMITS, ask_within=0.2)) as served, served.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        deadline = time.monotonic() + daemons.PATIENCE
        while not select.select([client], [], [], 0.01)[0]:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                client.sendall(drip)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with serving(attrs.evolve(LIMITS, take_within=0.2)) as served:
        large(served)
        with served.connect() as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            daemons.wait_until(lambda: select.select([client], [], [], 0)[0], "the answer begins")
            daemons.wait_until(lambda: not served.exporter._clients, "it is cut off")


def large(served: Served) -> None:
    """Make the answer larger than the buffers of a connection."""
    rules = served.metrics.counters("denied_total", "Denied", "rule")
    for number in range(2000):
        rules.labels(f"{number:05000}")


def test_close_gives_the_port_back_at_once_and_finishes_what_was_asked() -> None:
    slow = Slow()
    with serving() as served, served.connect() as client, served.connect() as silent:
        served.collect = lambda: slow
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert slow.begun.wait(daemons.PATIENCE)
        daemons.wait_until(lambda: len(served.exporter._clients) == 2, "both are there")
        served.close()
        listen("127.0.0.1", served.port).close()
        assert silent.recv(1) == b""
        slow.go_on.set()
        assert daemons.receive_all(client).startswith(b"HTTP/1.0 200 ")


def test_a_socket_may_be_handed_on(served: Served) -> None:
    """As when a master becomes a new version of itself: a duplicate goes on listening, and no client is refused."""
    duplicate = served.exporter.sockets[0].dup()
    served.close()
    served.thread.join()
    with socket.create_connection(("127.0.0.1", served.port), daemons.PATIENCE) as early:
        early.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")

        async def go_on() -> None:
            second = Exporter([duplicate], dict, lambda: "ready")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.serve)
                assert (await trio.to_thread.run_sync(daemons.receive_all, early)).endswith(b"\r\n\r\nready\n")
                second.close()

        trio.run(go_on)


def test_ipv6() -> None:
    with serving(host="::1") as served:
        assert served.get("/healthz")[1] == b"ready\n"

"""The metrics endpoint, asked by real clients, its answers read by the real parsers."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse

import daemons
import pytest
import trio
from prometheus_client import parser as prometheus
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics

from usocksd.log.metrics import BYTES, SECONDS, Metrics, Snapshot, total
from usocksd.net.listeners import ListenError, listen
from usocksd.serve import exporter as module
from usocksd.serve.exporter import Exporter

# As Prometheus 2.42 and 3.5 say it.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
)
STRANGE = 'deny_sites "a\\b\nc" ü'


class Served:
    """An exporter, what it collects, and how it is."""

    def __init__(self) -> None:
        self.metrics = Metrics("usocksd")
        self.health = "ready"
        self.collect: Callable[[], Snapshot] = lambda: total([self.metrics.snapshot()])
        self.exporter = Exporter(listen("127.0.0.1", 0), self._collect, lambda: self.health)
        self.port = self.exporter.address[1]

    def _collect(self) -> Snapshot:
        return self.collect()

    def get(self, path: str, method: str = "GET", accept: str | None = None) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=daemons.PATIENCE)
        try:
            connection.request(method, path, headers={} if accept is None else {"Accept": accept})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), daemons.PATIENCE)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.exporter.close()
    daemons.wait_until(lambda: not threads(), "its thread ends")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "metrics"]


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


async def test_collecting_in_trio_and_after_its_end(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    fill(served.metrics)
    token = trio.lowlevel.current_trio_token()
    served.collect = lambda: trio.from_thread.run_sync(served.metrics.snapshot, trio_token=token)
    response, _ = await trio.to_thread.run_sync(served.get, "/metrics")
    assert response.status == 200

    def in_another_trio() -> trio.lowlevel.TrioToken:
        async def token() -> trio.lowlevel.TrioToken:
            return trio.lowlevel.current_trio_token()

        return trio.run(token)

    token = await trio.to_thread.run_sync(in_another_trio)
    response, _ = await trio.to_thread.run_sync(served.get, "/metrics")
    assert response.status == 503
    assert caplog.text == ""


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
    """Silent ones, those in the middle of their request, and those who don't take the answer."""
    large(served)
    slow = [served.connect() for _ in range(2 * module._MOST_CLIENTS)]
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


def test_room_is_made_by_whoever_has_most(served: Served) -> None:
    """One who comes from another address keeps his place, however slow he is."""
    with socket.create_connection(("127.0.0.1", served.port), daemons.PATIENCE, ("127.0.0.2", 0)) as early:
        early.sendall(b"GET /healthz HTTP/1.0\r\n")
        crowd = [served.connect() for _ in range(2 * module._MOST_CLIENTS)]
        try:
            assert crowd[0].recv(1) == b""
            early.sendall(b"\r\n")
            assert daemons.receive_all(early).endswith(b"ready\n")
        finally:
            for client in crowd:
                client.close()


def test_a_flood_of_scrapes_costs_little_more_than_one(served: Served) -> None:
    """All that have asked meanwhile get one collection; and a health check comes first."""
    began, go_on = threading.Event(), threading.Event()
    collections = []

    def collect() -> Snapshot:
        collections.append(bool(select.select([check], [], [], 0)[0]))
        began.set()
        assert go_on.wait(daemons.PATIENCE)
        return {}

    served.collect = collect
    with contextlib.ExitStack() as stack:
        check = stack.enter_context(served.connect())
        scrapes = [stack.enter_context(served.connect()) for _ in range(20)]
        scrapes[0].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert began.wait(daemons.PATIENCE)
        for client in scrapes[1:]:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        check.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        go_on.set()
        for client in scrapes:
            assert daemons.receive_all(client).startswith(b"HTTP/1.0 200 ")
        assert collections == [False, True]


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_who_takes_too_long_to_ask_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch, drip: bytes) -> None:
    """Also who says something all the time, so that no single wait is long."""
    monkeypatch.setattr(module, "_ASK_WITHIN", 0.2)
    with served.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        deadline = time.monotonic() + daemons.PATIENCE
        while not select.select([client], [], [], 0.01)[0]:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                client.sendall(drip)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_who_does_not_read_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TAKE_WITHIN", 0.2)
    large(served)
    with served.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        daemons.wait_until(lambda: select.select([client], [], [], 0)[0], "the answer begins")
        daemons.wait_until(lambda: not served.exporter._clients, "it is cut off")


def large(served: Served) -> None:
    """Have it tell more than the buffers of a connection take."""
    rules = served.metrics.counters("denied_total", "Denied", "rule")
    for number in range(2000):
        rules.labels(f"{number:05000}")


def test_close_gives_the_port_back_at_once_and_finishes_what_was_asked() -> None:
    served = Served()
    asked, release = threading.Event(), threading.Event()

    def collect() -> Snapshot:
        asked.set()
        release.wait(daemons.PATIENCE)
        return served.metrics.snapshot()

    served.collect = collect
    with served.connect() as client, served.connect() as silent:
        daemons.wait_until(lambda: len(served.exporter._clients) == 2, "both are there")
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert asked.wait(daemons.PATIENCE)
        served.exporter.close()
        listen("127.0.0.1", served.port).close()
        release.set()
        assert silent.recv(1) == b""
        assert daemons.receive_all(client).startswith(b"HTTP/1.0 200 ")
    daemons.wait_until(lambda: not threads(), "its thread ends")


def test_a_socket_may_be_handed_on() -> None:
    """What a master that executes a new version of itself does: a duplicate goes on listening, no client is refused."""
    first = Served()
    fd = socket.socket(fileno=first.exporter.filenos()[0])
    duplicate = fd.dup()
    fd.detach()
    first.exporter.close()
    with socket.create_connection(("127.0.0.1", first.port), daemons.PATIENCE) as early:
        early.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        second = Exporter(duplicate, dict, lambda: "ready")
        try:
            assert daemons.receive_all(early).endswith(b"\r\n\r\nready\n")
            assert second.address == ("127.0.0.1", first.port)
        finally:
            second.close()


def test_a_port_in_use_is_a_listen_error(served: Served) -> None:
    with pytest.raises(ListenError, match=f"can't listen on 127.0.0.1:{served.port}: Address already in use"):
        listen("127.0.0.1", served.port)


def test_ipv6() -> None:
    exporter = Exporter(listen("::1", 0), dict, lambda: "ready")
    try:
        connection = HTTPConnection("::1", exporter.address[1], timeout=daemons.PATIENCE)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ready\n"
        connection.close()
    finally:
        exporter.close()

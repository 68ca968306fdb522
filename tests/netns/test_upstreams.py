"""Several upstreams over a real redirect: whatever happens to one, clients go on by another and notice nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from socket import socket as Socket
from typing import Any, NamedTuple

import daemons
import lab
import pytest
import test_redirect
from daemons import Daemon, Served, receive_exactly, wait_until

from usocksd.serve.verbs.client import ControlClient

PORTS = (2081, 2082, 2083)
SPEAKS_LAST, SPEAKS_FIRST = 443, 25
"""Ports of the destination: where the client speaks first, by TLS, and where the server does."""
# Until the first byte, in seconds: less than the time that an upstream has for an answer.
SOON = 3.0

TRANSOCKS = """
workers = {workers}
listen = "localhost:1081"
mark = 0x7473
control = "{folder}/control.sock"
proxy_url = {urls}
policy = "{policy}"
{more}
[health]
interval = {interval}
timeout = {timeout}
"""


def hello() -> bytes:
    """The first bytes of a TLS client."""
    context, said = ssl.create_default_context(), ssl.MemoryBIO()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said).do_handshake()
    return said.read()


HELLO = hello()


class Proxy:
    """One usocksd on the client's host, to be mistreated."""

    def __init__(self, net: lab.Net, folder: Path, port: int) -> None:
        self.port = port
        self._net = net
        self._folder = folder / str(port)
        self._folder.mkdir()
        self._table = f"blackhole_{port}"
        self.begin()

    @property
    def url(self) -> str:
        return f"socks5://127.0.0.1:{self.port}"

    def begin(self) -> None:
        (self._folder / "usocksd.log").unlink(missing_ok=True)
        config = f'[incoming]\nport = {self.port}\naddresses = ["127.0.0.1"]\n[outgoing]\nmark = 0x7473\n'
        self.daemon = Daemon("usocksd", config, self._folder, popen=self._net.proxy.popen)

    def start(self) -> None:
        self.begin()
        self.daemon.ready()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.daemon.process.wait()

    def hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def vanish(self) -> None:
        chain = f"chain in {{\ntype filter hook input priority 0\ntcp dport {self.port} drop\n}}"
        rules = f"table inet {self._table} {{\n{chain}\n}}\n"
        self._net.proxy.run("nft", "-f", "-", input=rules)

    def appear(self) -> None:
        self._net.proxy.run("nft", "delete", "table", "inet", self._table)

    def served(self) -> int:
        return count(self.daemon, "proxy starts")

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self.daemon.pid, *self.daemon.workers()):
            os.kill(pid, number)


def count(daemon: Daemon, *words: str) -> int:
    """How many records have all of these in them; a long log is not parsed again and again."""
    return sum(all(word in line for word in words) for line in daemon.lines())


class Try(NamedTuple):
    """One client's connection: seconds until the destination's first byte, or what went wrong."""

    began: float
    port: int
    client: str
    took: float
    error: str | None


class Trouble(NamedTuple):
    """A fault of a proxy at an unknown moment between two times."""

    since: float
    until: float
    proxy: Proxy

    def meets(self, each: Try) -> bool:
        return each.began < self.until and self.since < each.began + each.took


class Clients(contextlib.AbstractContextManager["Clients"]):
    """Connect again and again, of both kinds, a few at a time."""

    def __init__(self, net: lab.Net, *, each: int = 3) -> None:
        self.tries: list[Try] = []
        self._net = net
        self._over = threading.Event()
        ports = (SPEAKS_LAST, SPEAKS_FIRST) * each
        self._threads = [threading.Thread(target=self._run, args=(port,)) for port in ports]
        for thread in self._threads:
            thread.start()

    def more(self, count: int) -> None:
        """Wait until this many more have begun and ended."""
        now = time.monotonic()
        wait_until(lambda: sum(each.began > now for each in self.tries) >= count, f"{count} more: {self.tries[-3:]}")

    def _run(self, port: int) -> None:
        while not self._over.wait(0.05):
            self.tries.append(once(self._net, port))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def once(net: lab.Net, port: int) -> Try:
    """One connection to the destination, up to its first byte."""
    began, error, client = time.monotonic(), None, ""
    with net.client.socket() as sock:
        sock.settimeout(daemons.PATIENCE)
        try:
            sock.connect((lab.WEB_V4, port))
            client = "{}:{}".format(*sock.getsockname())
            if port == SPEAKS_LAST:
                sock.sendall(HELLO)
            if receive_exactly(sock, 1) != b"w":
                error = "it ended"
        except OSError as failure:
            error = repr(failure)
    return Try(began, port, client, time.monotonic() - began, error)


def welcome(sock: Socket) -> None:
    sock.sendall(b"w")
    sock.recv(1)


def hello_first(sock: Socket) -> None:
    if receive_exactly(sock, len(HELLO)) == HELLO:
        welcome(sock)


@contextlib.contextmanager
def destination(net: lab.Net) -> Iterator[None]:
    with (
        Served(net.outside.listen(lab.WEB_V4, SPEAKS_LAST), hello_first),
        Served(net.outside.listen(lab.WEB_V4, SPEAKS_FIRST), welcome),
    ):
        yield


@contextlib.contextmanager
def proxies(net: lab.Net, folder: Path, number: int = 3) -> Iterator[list[Proxy]]:
    found = [Proxy(net, folder, port) for port in PORTS[:number]]
    try:
        for proxy in found:
            proxy.daemon.ready()
        yield found
    finally:
        for proxy in found:
            if proxy.daemon.process.poll() is None:
                proxy.kill()


@contextlib.contextmanager
def transocks(
    net: lab.Net,
    folder: Path,
    urls: Sequence[str],
    policy: str = "failover",
    *,
    workers: int = 1,
    interval: float = 0.3,
    timeout: float = 5,
    more: str = "",
) -> Iterator[Daemon]:
    config = TRANSOCKS.format(
        folder=folder,
        urls=list(urls),
        policy=policy,
        workers=workers,
        interval=interval,
        timeout=timeout,
        more=more,
    )
    with Daemon("transocks", config, folder, popen=net.proxy.popen) as daemon:
        test_redirect.load(net, "nft")
        try:
            yield daemon
        finally:
            net.proxy.run("nft", "delete", "table", "inet", "transocks")


def assert_unnoticed(clients: Clients, daemon: Daemon, troubles: Sequence[Trouble]) -> None:
    """All succeeded, and fast. Only connections whose tunnel went through the proxy when it failed are lost."""
    tunnels = {record["client_addr"]: record["upstream"] for record in daemon.records("proxy starts")}
    lost = {
        each
        for trouble in troubles
        for each in clients.tries
        if trouble.meets(each) and tunnels.get(each.client) == trouble.proxy.url
    }
    assert len(lost) < len(clients.tries) / 10
    noticed = [each for each in clients.tries if (each.error or each.took >= SOON) and each not in lost]
    assert [(each, daemon.records(client_addr=each.client)) for each in noticed] == []


def test_each_is_killed_hung_and_blackholed_in_turn(host_net: lab.Net, tmp_path: Path) -> None:
    troubles: list[Trouble] = []
    with (
        proxies(host_net, tmp_path) as found,
        destination(host_net),
        transocks(host_net, tmp_path, [proxy.url for proxy in found], "round-robin", workers=2) as daemon,
        Clients(host_net) as clients,
    ):
        for worst, undo in ((Proxy.kill, Proxy.start), (Proxy.hang, Proxy.go_on), (Proxy.vanish, Proxy.appear)):
            for proxy in found:
                down = ('"upstream is down"', f'"{proxy.url}"')
                clients.more(6)
                marked, since = count(daemon, *down), time.monotonic()
                worst(proxy)
                troubles.append(Trouble(since, time.monotonic(), proxy))
                wait_until(lambda: count(daemon, *down) > marked, f"{proxy.url} is down")
                clients.more(6)
                undo(proxy)
                before = proxy.served()
                wait_until(lambda: proxy.served() > before + 3, f"{proxy.url} is used again")
    assert_unnoticed(clients, daemon, troubles)
    assert Counter(record["tries"] for record in daemon.records("proxy starts")).keys() <= {1, 2, 3}
    assert daemon.records("failed to connect to proxy server") == []


def test_an_upstream_that_accepts_and_never_answers(host_net: lab.Net, tmp_path: Path) -> None:
    """It answers neither requests nor probes; not even the first client waits for long."""
    with (
        Served(host_net.proxy.listen("127.0.0.1"), lambda sock: sock.recv(1 << 16) and sock.recv(1)) as mute,
        proxies(host_net, tmp_path, 1) as (well,),
        destination(host_net),
        transocks(host_net, tmp_path, [f"socks5://127.0.0.1:{mute.port}", well.url], interval=30) as daemon,
    ):
        tries = [once(host_net, port) for port in (SPEAKS_LAST, SPEAKS_FIRST) * 10]
        assert [each for each in tries if each.error or each.took >= SOON] == []
        first, second = upstreams(tmp_path)
        assert (first["up"], second["up"], second["ours"], second["pipelines"]) == (False, True, True, True)
        assert first["why"].startswith("waiting for the answer of 127.0.0.1")
        # Clients after that did not wait.
        wait_until(lambda: len(daemon.records("proxy starts")) == len(tries), "all are recorded")
        assert [record["tries"] for record in daemon.records("proxy starts")] == [2] + [1] * 19


def test_an_upstream_that_stops_for_a_while_and_then_vanishes(host_net: lab.Net, tmp_path: Path) -> None:
    """When it continues, it answers the waiting probe, seconds late. Its next silence is not tolerated for longer."""
    with (
        proxies(host_net, tmp_path, 2) as (first, second),
        destination(host_net),
        transocks(host_net, tmp_path, [first.url, second.url], interval=30) as daemon,
    ):
        wait_until(lambda: all(each["latency"] for each in upstreams(tmp_path)), "both have answered")
        first.hang()
        assert once(host_net, SPEAKS_FIRST).error is None
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + 2.5, "a probe has waited for two seconds")
        first.go_on()
        wait_until(lambda: upstreams(tmp_path)[0]["up"], "it is up again")
        assert not upstreams(tmp_path)[0].get("slow")
        first.vanish()
        tries = [once(host_net, SPEAKS_FIRST) for _ in range(2)]
        assert [each for each in tries if each.error or each.took >= SOON] == []
        wait_until(lambda: len(daemon.records("proxy starts")) == 3, "all are recorded")
        assert {record["upstream"] for record in daemon.records("proxy starts")} == {second.url}


def test_all_are_gone(host_net: lab.Net, tmp_path: Path) -> None:
    gone = ["socks5://127.0.0.1:9", "http://127.0.0.1:9"]
    more = f"""
    [upstream.past]
    proxy_url = {gone}
    when_all_down = "direct"
    [[route]]
    ports = [{SPEAKS_LAST}]
    via = "past"
    """
    with destination(host_net), transocks(host_net, tmp_path, gone, more=more) as daemon:
        assert "reset" in str(once(host_net, SPEAKS_FIRST).error)
        assert daemon.record("failed to connect to proxy server")["tries"] == 2
        assert once(host_net, SPEAKS_LAST).error is None
        record = daemon.record("proxy starts")
        assert (record["group"], record["upstream"]) == ("direct", "direct")
        assert record["upstream_addr"] == record["dest_addr"] == f"{lab.WEB_V4}:{SPEAKS_LAST}"


def test_an_http_proxy_that_answers_no_probe_is_not_gone_past(host_net: lab.Net, tmp_path: Path) -> None:
    """A tunnel through it marks it up; and it is tried again after it was down."""
    probes: list[bytes] = []

    def serve(sock: Socket) -> None:
        head = sock.recv(1000)
        if not head.startswith(f"CONNECT {lab.WEB_V4}:".encode()):
            probes.append(head)
            sock.recv(1)  # without a word
            return
        with host_net.proxy.socket() as onward:
            onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x7473)
            onward.connect((lab.WEB_V4, SPEAKS_FIRST))
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=test_redirect.pump, args=(onward, sock))
            back.start()
            test_redirect.pump(sock, onward)
            back.join()

    more = 'when_all_down = "direct"'
    listener = host_net.proxy.listen("127.0.0.1")
    address = listener.getsockname()
    urls = [f"http://127.0.0.1:{address[1]}"]
    with destination(host_net), transocks(host_net, tmp_path, urls, interval=0.1, timeout=0.4, more=more) as daemon:

        def way() -> str:
            attempt = once(host_net, SPEAKS_FIRST)
            assert attempt.error is None
            found: str = daemon.record("proxy starts", client_addr=attempt.client)["upstream"]
            return found

        with Served(listener, serve):
            for _ in range(3):
                assert way() == urls[0]
                seen = len(probes)
                wait_until(lambda: len(probes) > seen + 2, "it was probed")
            assert way() == urls[0]
        assert way() == "direct"
        with Served(host_net.proxy.listen(*address), serve):
            wait_until(lambda: way() == urls[0], "it is tried again")
        assert daemon.records("upstream is up again")


def test_proxies_of_others(host_net: lab.Net, tmp_path: Path) -> None:
    """One by HTTP that hangs, then one by SOCKS that is killed."""
    missing = [program for program in ("microsocks", "tinyproxy") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: microsocks, tinyproxy-bin)")
    (tmp_path / "tinyproxy.conf").write_text(f"Port 8888\nListen {lab.NEXT_V4}\nAllow 0.0.0.0/0\nLogLevel Critical\n")
    start = host_net.outside.popen
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(
            start("tinyproxy", "-d", "-c", tmp_path / "tinyproxy.conf", stdout=subprocess.DEVNULL)
        )
        stack.callback(http.kill)
        socks = stack.enter_context(start("microsocks", "-i", lab.NEXT_V4, "-p", "1080"))
        stack.callback(socks.kill)
        (own,) = stack.enter_context(proxies(host_net, tmp_path, 1))
        stack.enter_context(destination(host_net))
        for port in (8888, 1080):
            wait_until(lambda: listens(host_net, port), f"{port} is there")
        urls = [f"http://{lab.NEXT_V4}:8888", f"socks5h://{lab.NEXT_V4}:1080", own.url]
        daemon = stack.enter_context(transocks(host_net, tmp_path, urls))

        wait_until(lambda: all(each["latency"] for each in upstreams(tmp_path)), "all have answered")
        assert [each["ours"] for each in upstreams(tmp_path)] == [False, False, True]
        for number, (process, how) in enumerate(((http, signal.SIGSTOP), (socks, signal.SIGKILL), (None, 0))):
            tries = [once(host_net, port) for port in (SPEAKS_LAST, SPEAKS_FIRST) * 3]
            assert [each for each in tries if each.error or each.took >= SOON] == []
            assert daemon.record("proxy starts", client_addr=tries[-1].client)["upstream"] == urls[number]
            if process is not None:
                process.send_signal(how)
        assert daemon.records("failed to connect to proxy server") == []


def listens(net: lab.Net, port: int) -> bool:
    with net.proxy.socket() as sock:
        return sock.connect_ex((lab.NEXT_V4, port)) == 0


def upstreams(folder: Path) -> list[dict[str, Any]]:
    """The upstreams of the group "default", as in the answer to `status`."""
    status: Any = ControlClient("transocks", str(folder / "control.sock")).ask("status")
    found: list[dict[str, Any]] = status["daemon"]["upstreams"]["default"]["upstreams"]
    return found

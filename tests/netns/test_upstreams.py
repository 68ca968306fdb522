"""Several upstreams over a real redirect: whatever happens to one, clients go on by another and notice nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from socket import socket as Socket
from typing import NamedTuple

import daemons
import lab
import test_redirect
from daemons import Daemon, Served, receive_exactly, wait_until

PORTS = (2081, 2082, 2083)
# What a TLS client says first (RFC 8446): a record with a hello, as far as one has to look at it.
HELLO = bytes.fromhex("1603010005010000 0100".replace(" ", ""))
SPEAKS_LAST, SPEAKS_FIRST = 443, 25
"""Ports of the destination: where the client speaks first, by TLS, and where the server does."""
# Until the first byte, in seconds.
SOON = 1.0

TRANSOCKS = """
workers = 2
listen = "localhost:1081"
mark = 0x7473
metrics_port = 9101
control = "{folder}/control.sock"
proxy_url = {urls}
policy = "{policy}"
{more}
[health]
interval = {interval}
"""


class Proxy:
    """One usocksd on the client's host, to be mistreated."""

    def __init__(self, net: lab.Net, folder: Path, port: int) -> None:
        self.port = port
        self._net = net
        self._folder = folder / str(port)
        self._folder.mkdir()
        self._table = f"blackhole_{port}"
        self.start()

    @property
    def url(self) -> str:
        return f"socks5://127.0.0.1:{self.port}"

    def start(self) -> None:
        (self._folder / "usocksd.log").unlink(missing_ok=True)
        config = f'[incoming]\nport = {self.port}\naddresses = ["127.0.0.1"]\n[outgoing]\nmark = 0x7473\n'
        self.daemon = Daemon("usocksd", config, self._folder, popen=self._net.proxy.popen).ready()

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
        return len(self.daemon.records("proxy starts"))

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self.daemon.pid, *self.daemon.workers()):
            os.kill(pid, number)


class Try(NamedTuple):
    """One client's connection: seconds until the destination's first byte, or what went wrong."""

    began: float
    port: int
    client: str
    took: float
    error: str | None


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
        """Wait until so many more have begun and ended."""
        now = time.monotonic()
        wait_until(lambda: sum(each.began > now for each in self.tries) >= count, f"{count} more: {self.tries[-3:]}")

    def _run(self, port: int) -> None:
        while not self._over.wait(0.02):
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
def proxies(net: lab.Net, folder: Path) -> Iterator[list[Proxy]]:
    found = [Proxy(net, folder, port) for port in PORTS]
    try:
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
    policy: str = "round-robin",
    *,
    interval: float = 0.3,
    more: str = "",
) -> Iterator[Daemon]:
    config = TRANSOCKS.format(folder=folder, urls=list(urls), policy=policy, interval=interval, more=more)
    with Daemon("transocks", config, folder, popen=net.proxy.popen) as daemon:
        daemon.ready()
        test_redirect.load(net, "nft")
        try:
            yield daemon
        finally:
            net.proxy.run("nft", "delete", "table", "inet", "transocks")


def assert_unnoticed(clients: Clients, daemon: Daemon, troubles: Sequence[tuple[float, Proxy]]) -> None:
    """All went well, and soon. What had its tunnel already when that tunnel's proxy got into trouble is lost."""
    tunnels = {record["client_addr"]: record["upstream"] for record in daemon.records("proxy starts")}
    lost = [
        each
        for when, proxy in troubles
        for each in clients.tries
        if each.began < when < each.began + each.took and tunnels.get(each.client) == proxy.url
    ]
    assert len(lost) < len(clients.tries) / 20
    bad = [each for each in clients.tries if each.error and each not in lost]
    assert bad == [], [daemon.records(client_addr=each.client) for each in bad]
    assert [each for each in clients.tries if each.took >= SOON and each not in lost] == []


def test_each_is_killed_hung_and_blackholed_in_turn(host_net: lab.Net, tmp_path: Path) -> None:
    troubles: list[tuple[float, Proxy]] = []
    with (
        proxies(host_net, tmp_path) as found,
        destination(host_net),
        transocks(host_net, tmp_path, [proxy.url for proxy in found]) as daemon,
        Clients(host_net) as clients,
    ):
        for worst, undo in ((Proxy.kill, Proxy.start), (Proxy.hang, Proxy.go_on), (Proxy.vanish, Proxy.appear)):
            for proxy in found:
                clients.more(20)
                marked = len(daemon.records("upstream is down", upstream=proxy.url))
                troubles.append((time.monotonic(), proxy))
                worst(proxy)
                wait_until(
                    lambda: len(daemon.records("upstream is down", upstream=proxy.url)) > marked, f"{proxy.url} is down"
                )
                clients.more(20)
                undo(proxy)
                before = proxy.served()
                wait_until(lambda: proxy.served() > before + 3, f"{proxy.url} is used again")
    assert_unnoticed(clients, daemon, troubles)
    assert Counter(record["tries"] for record in daemon.records("proxy starts")).keys() <= {1, 2, 3}
    assert daemon.records("failed to connect to proxy server") == []

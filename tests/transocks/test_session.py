"""transocks from accept to access record: over loopback, with upstreams that behave and that do not.

No rule redirects anything here (tests/netns does that with the real ones), so in most tests the original destination
is put into the kernel's mouth. What the command line does is tested with the daemon as a subprocess.
"""

from __future__ import annotations

import base64
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket as Socket

import daemons
import pytest
import trio
from daemons import Daemon, Log, Served

import transocks.session
from transocks.access_log import AccessLog
from transocks.config import DEFAULT, Config
from transocks.direct import Direct
from transocks.original_dst import Destination, LoopGuard, NotRedirected
from transocks.pool import Upstreams
from transocks.session import Sessions
from usocksd.addresses import HostAddresses
from usocksd.resolver import Resolver
from usocksd.runtime import log as logging
from usocksd.runtime.config import parse
from usocksd.runtime.endpoint import Endpoint
from usocksd.runtime.listeners import Listener, listen
from usocksd.runtime.metrics import Metrics
from usocksd.runtime.pipes import PipePool
from usocksd.runtime.reactor import Reactor
from usocksd.runtime.settings import SocketAddress as Server
from usocksd.runtime.settings import Timeouts, parse_address

WEB = Destination("203.0.113.80", 80)
WEB_V6 = Destination("2001:db8:80::80", 443)


class Proxy(Log):
    """transocks in this process."""

    def __init__(self, path: Path, port: int) -> None:
        super().__init__(path)
        self.port = port
        self.live = 0
        self.failures: list[BaseException] = []

    async def connect(self) -> trio.SocketStream:
        sock = trio.socket.socket()
        try:
            await sock.connect(("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)


@asynccontextmanager
async def running(
    folder: Path,
    url: str,
    *,
    dns: str = "127.0.0.1:53",
    connect: float = 600,
    handshake: float = 600,
    most_per_destination: int = 1000,
) -> AsyncIterator[Proxy]:
    log = logging.setup("transocks", str(folder / "log"), None, "json")
    listener = listen("127.0.0.1", 0)
    proxy = Proxy(folder / "log", listener.getsockname()[1])
    reactor = Reactor(sweep_every=0.02)
    hosts = HostAddresses()
    host, _, port = dns.rpartition(":")
    metrics = Metrics("transocks")
    resolver = Resolver((Server(parse_address(host), int(port)),), metrics)
    config = parse(Config, f'proxy_url = "{url}"', "transocks.toml")
    upstreams = Upstreams(
        config.groups(),
        config.health,
        reactor=reactor,
        resolver=resolver,
        mark=None,
        fast_open=False,
        direct=Direct(resolver=resolver, mark=None, is_local=hosts.is_local),
        share=lambda _: None,
        metrics=metrics,
    )
    guard = LoopGuard(
        listen_ports={proxy.port},
        hosts=hosts,
        upstreams=lambda: upstreams.addresses,
        most_per_destination=most_per_destination,
        own_users=("nobody-has-this",),
    )
    sessions = Sessions(
        guard=guard,
        upstream=upstreams.groups[DEFAULT],
        pipes=PipePool(16),
        timeouts=Timeouts(connect=connect, handshake=handshake),
        access_log=AccessLog(log, metrics),
    )

    async def serve(endpoint: Endpoint, host: str, port: int) -> None:
        try:
            await sessions.serve(endpoint, host, port)
        except Exception as error:
            proxy.failures.append(error)
        finally:
            endpoint.close()
            proxy.live -= 1

    def accepted(endpoint: Endpoint, host: str, port: int) -> None:
        proxy.live += 1
        nursery.start_soon(serve, endpoint, host, port)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            await nursery.start(resolver.run)
            await nursery.start(upstreams.health.run)
            accepting = Listener(reactor, listener, accepted, room=lambda: True)
            try:
                yield proxy
                await proxy.until(lambda: not proxy.live, "every session ends")
                assert proxy.failures == []
            finally:
                accepting.close()
                nursery.cancel_scope.cancel()
    finally:
        guard.close()
        reactor.close()
        log.close()


@pytest.fixture(autouse=True)
def going_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Destination], None]:
    """Says where redirected connections were going: to WEB, if nothing else is said."""

    def say(destination: Destination) -> None:
        monkeypatch.setattr(transocks.session, "original_destination", lambda _: destination)

    say(WEB)
    return say


async def is_reset(connection: Proxy | trio.SocketStream) -> bool:
    """Whether this connection, or one made for it, ends with a reset; that may come before connect(2) has returned."""
    try:
        async with connection if isinstance(connection, trio.SocketStream) else await connection.connect() as stream:
            with trio.fail_after(daemons.PATIENCE):
                return await stream.receive_some() is None
    except ConnectionResetError:
        return True
    except trio.BrokenResourceError as error:
        return isinstance(error.__cause__, ConnectionResetError)


# ---- upstreams


def talk(*lines: bytes | None, then: Callable[[Socket], None] = daemons.echo) -> Callable[[Socket], None]:
    """A script: hears lines of even index, says those of odd index (None hears or says nothing more); then `then`."""

    def handle(sock: Socket) -> None:
        for number, line in enumerate(lines):
            if line is None:
                sock.recv(1)  # until the other side is gone
                return
            if number % 2:
                sock.sendall(line)
            else:
                heard = daemons.receive_exactly(sock, len(line))
                assert heard == line, heard
        then(sock)

    return handle


def socks5(destination: Destination) -> bytes:
    return daemons.request(destination.host, destination.port)


GRANTED = b"\x05\x00\x00\x01\xc6\x33\x64\x0a\x12\x34"
CONNECT = b"CONNECT 203.0.113.80:80 HTTP/1.1\r\nHost: 203.0.113.80:80\r\n"


@pytest.mark.parametrize("destination", [WEB, WEB_V6])
async def test_socks5(tmp_path: Path, going_to: Callable[[Destination], None], destination: Destination) -> None:
    going_to(destination)
    script = talk(daemons.GREETING, b"\x05\x00", socks5(destination), GRANTED)
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"socks5://127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            client = "{}:{}".format(*stream.socket.getsockname())
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.send_eof()
            assert await stream.receive_some() == b""
            await stream.aclose()
            start = await proxy.recorded("proxy starts")
            end = await proxy.recorded("proxy ends")
        assert start["type"] == "access"
        assert (start["client_addr"], start["dest_addr"]) == (client, str(destination))
        assert start["upstream"] == f"socks5://127.0.0.1:{upstream.port}"
        assert start["src_addr"] == "{}:{}".format(*upstream.peers[0])
        assert (end["request_id"], end["tx_bytes"], end["rx_bytes"]) == (start["request_id"], 5, 5)
        assert (end["reason"], end["ended_by"]) == ("closed", "client")


async def test_socks5_with_user_and_password_which_no_record_shows(tmp_path: Path) -> None:
    secret = b"\x01\x05al:ce\x06p@ss/1"
    script = talk(b"\x05\x02\x00\x02", b"\x05\x02", secret, b"\x01\x00", socks5(WEB), GRANTED)
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"socks5://al%3Ace:p%40ss%2F1@127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
            await proxy.recorded("proxy ends")
        assert "p@ss" not in proxy.log.read_text()
        assert "al:ce" not in proxy.log.read_text()


@pytest.mark.parametrize("authenticated", [False, True])
async def test_http_connect(tmp_path: Path, authenticated: bool) -> None:
    basic = base64.b64encode(b"alice:secret")
    head = CONNECT + (b"Proxy-Authorization: Basic " + basic + b"\r\n" if authenticated else b"") + b"\r\n"
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    answer = interim + b"HTTP/1.1 201 Fine\r\nContent-Length: 5\r\n\r\nwelcome"
    with Served(daemons.loopback(), talk(head, answer)) as upstream:
        user = "alice:secret@" if authenticated else ""
        async with running(tmp_path, f"http://{user}127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            assert await stream.receive_some() == b"welcome"
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
        assert "secret" not in proxy.log.read_text()


async def test_what_the_destination_said_already_comes_first(tmp_path: Path) -> None:
    banner = bytes(range(256)) * 400
    script = talk(
        daemons.GREETING, b"\x05\x00", socks5(WEB), GRANTED + banner[:1000], b"", banner[1000:], then=Socket.close
    )
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"socks5://127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            assert b"".join([piece async for piece in stream]) == banner
            await stream.aclose()


@pytest.mark.parametrize(
    ("scheme", "script", "error"),
    [
        ("socks5", talk(daemons.GREETING, b"\x05\x00", socks5(WEB), b"\x05\x05\x00\x01" + bytes(6)), "connection refused"),
        ("socks5", talk(daemons.GREETING, b"\x05\x00", socks5(WEB), b"\x05\x02"), "not allowed"),
        ("socks5", talk(daemons.GREETING, b"\x05\xff"), "wants other than no credentials"),
        ("socks5", talk(daemons.GREETING, b"HTTP/1.1 400 Bad Request\r\n\r\n"), "which is not SOCKS"),
        ("socks5", talk(daemons.GREETING, b"\x05\x00", socks5(WEB), b"\x05\x00\x00", then=Socket.close), "closed"),
        # (It may not have read what it was sent, and then its end is a reset.)
        ("socks5", talk(then=Socket.close), r"closed|ECONNRESET"),
        ("socks5", talk(daemons.GREETING, then=daemons.reset), "ECONNRESET"),
        ("http", talk(CONNECT + b"\r\n", b"HTTP/1.1 407 Who are you?\r\n\r\n"), r"Who are you\?"),
        ("http", talk(CONNECT + b"\r\n", b"HTTP/1.1 403 Forbidden\r\n\r\n"), "403"),
        ("http", talk(CONNECT + b"\r\n", b"220 mail.example.com ESMTP\r\n"), "220 mail"),
        ("http", talk(CONNECT + b"\r\n", b"HTTP/1.1 200 OK\r\n", then=Socket.close), "closed"),
    ],
)  # fmt: skip
async def test_the_client_is_reset_when_the_upstream_fails(
    tmp_path: Path, scheme: str, script: Callable[[Socket], None], error: str
) -> None:
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"{scheme}://127.0.0.1:{upstream.port}") as proxy:
            assert await is_reset(proxy)
            record = await proxy.recorded("failed to connect to proxy server")
    assert re.search(error, record["error"])
    assert (record["severity"], record["type"]) == ("error", "access")
    assert (record["dest_addr"], record["upstream"]) == (str(WEB), f"{scheme}://127.0.0.1:{upstream.port}")
    assert proxy.records("proxy starts") == []


async def test_the_client_is_reset_when_the_upstream_is_not_there(tmp_path: Path) -> None:
    port = daemons.closed_port()
    async with running(tmp_path, f"socks5://127.0.0.1:{port}") as proxy:
        assert await is_reset(proxy)
        record = await proxy.recorded("failed to connect to proxy server")
    assert record["error"] == f"connect 127.0.0.1:{port}: Connection refused (ECONNREFUSED)"


async def test_every_step_has_a_deadline(tmp_path: Path) -> None:
    # The upstream's name is not answered, it does not accept, it is silent in the middle of the handshake.
    with (
        daemons.NameServer({"upstream.test": None}) as dns,
        daemons.blackhole() as full,
        Served(daemons.loopback(), talk(daemons.GREETING, b"\x05\x00", socks5(WEB), b"\x05\x00", None)) as mute,
        Served(daemons.loopback(), talk(CONNECT + b"\r\n", b"HTTP/1.1 200 OK\r\nVia: ", None)) as mute_http,
    ):
        for number, (url, error, limits) in enumerate(
            (
                ("socks5://upstream.test:1080", "upstream.test: timed out", {"connect": 0.1}),
                (f"socks5://127.0.0.1:{full}", f"connect 127.0.0.1:{full}: Conn", {"connect": 0.1}),
                (
                    f"socks5://127.0.0.1:{mute.port}",
                    "waiting for the answer of 127.0.0.1",
                    {"connect": 0.1, "handshake": 0.1},
                ),
                (
                    f"http://127.0.0.1:{mute_http.port}",
                    "waiting for the answer of 127.0.0.1",
                    {"connect": 0.1, "handshake": 0.1},
                ),
            )
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            async with running(folder, url, dns=dns.address, **limits) as proxy:
                assert await is_reset(proxy)
                record = await proxy.recorded("failed to connect to proxy server")
                assert record["error"].startswith(error)


async def test_the_upstream_by_name(tmp_path: Path) -> None:
    script = talk(daemons.GREETING, b"\x05\x00", socks5(WEB), GRANTED)
    with (
        daemons.NameServer({"upstream.test": ["127.0.0.1"]}) as dns,
        Served(daemons.loopback(), script) as upstream,
    ):
        async with running(tmp_path, f"socks5://upstream.test:{upstream.port}", dns=dns.address) as proxy:
            stream = await proxy.connect()
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
        assert proxy.record("proxy starts")["upstream"] == f"socks5://upstream.test:{upstream.port}"


@pytest.mark.parametrize("where", ["connecting", "asking"])
async def test_a_client_that_goes_ends_the_attempt(tmp_path: Path, where: str) -> None:
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def handle(sock: Socket) -> None:
        sock.recv(3)
        token.run_sync_soon(asked.set)
        sock.recv(1)

    with daemons.blackhole() as full, Served(daemons.loopback(), handle) as mute:
        port = full if where == "connecting" else mute.port
        async with running(tmp_path, f"socks5://127.0.0.1:{port}") as proxy:
            stream = await proxy.connect()
            if where == "asking":
                await asked.wait()
            else:
                await proxy.until(lambda: proxy.live == 1, "it is accepted")
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            await stream.aclose()
            assert (await proxy.recorded("client is gone"))["severity"] == "info"


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_a_reset_is_passed_on(tmp_path: Path, who: str) -> None:
    seen: list[type[BaseException]] = []

    def broken(sock: Socket) -> None:
        sock.sendall(sock.recv(5))
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError as error:
            seen.append(type(error))

    def breaking(sock: Socket) -> None:
        sock.recv(5)
        daemons.reset(sock)

    script = talk(daemons.GREETING, b"\x05\x00", socks5(WEB), GRANTED, then=broken if who == "client" else breaking)
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"socks5://127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            await stream.send_all(b"hello")
            if who == "client":
                assert await stream.receive_some() == b"hello"
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                await stream.aclose()
                await proxy.until(lambda: seen, "the upstream sees the reset")
            else:
                assert await is_reset(stream)
            end = await proxy.recorded("proxy ends")
            assert (end["reason"], end["ended_by"]) == ("reset", who)


async def test_loops_and_strangers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_redirected(_: object) -> Destination:
        raise NotRedirected("no")

    async with running(tmp_path, "socks5://127.0.0.1:9") as proxy:
        for number, (original, message, error) in enumerate((
            (lambda _: Destination("127.0.0.1", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: Destination("127.9.9.9", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: Destination("::1", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: Destination("127.0.0.1", 9), "loop refused", "its destination is the upstream"),
            (not_redirected, "not redirected", "no"),
        )):  # fmt: skip
            monkeypatch.setattr(transocks.session, "original_destination", original)
            assert await is_reset(proxy)
            await proxy.until(lambda: len(proxy.records()) > number, "it is recorded")
            record = proxy.records()[-1]
            assert (record["message"], record["type"]) == (message, "access")
            assert record["error"].startswith(error)


async def test_no_destination_takes_it_all(tmp_path: Path, going_to: Callable[[Destination], None]) -> None:
    """The last resort against a loop, when nothing tells the proxies' connections from others."""

    def grant(sock: Socket) -> None:
        daemons.receive_exactly(sock, len(daemons.GREETING))
        sock.sendall(b"\x05\x00")
        sock.recv(100)
        sock.sendall(GRANTED)
        daemons.echo(sock)

    with Served(daemons.loopback(), grant) as upstream:
        url = f"socks5://127.0.0.1:{upstream.port}"
        async with running(tmp_path, url, most_per_destination=3) as proxy:

            async def works() -> trio.SocketStream:
                stream = await proxy.connect()
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                return stream

            streams = [await works() for _ in range(3)]
            assert await is_reset(proxy)
            assert (await proxy.recorded("loop refused"))["error"].startswith("3 connections to it are open")
            going_to(WEB_V6)
            streams.append(await works())  # others are not affected
            going_to(WEB)
            await streams.pop(0).aclose()
            await proxy.until(lambda: proxy.live == 3, "there is room again")
            streams.append(await works())
            for stream in streams:
                await stream.aclose()


# ---- the daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    config = 'listen = ["127.0.0.1:0", "[::1]:0"]\nproxy_url = "socks5://127.0.0.1:9"\n'
    with Daemon("transocks", config, tmp_path) as running:
        yield running.ready()


def test_a_connection_that_nobody_redirected_is_reset(daemon: Daemon) -> None:
    daemons.wait_until(lambda: len(daemon.records("listening")) == 2, "both addresses")
    for place in [record["address"] for record in daemon.records("listening")]:
        host, _, port = place.rpartition(":")
        with Socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as client:
            client.settimeout(daemons.PATIENCE)
            client.bind((host.strip("[]"), 0))
            own = client.getsockname()[1]
            with pytest.raises(ConnectionResetError):  # noqa: PT012  (whichever sees it first)
                client.connect((host.strip("[]"), int(port)))
                client.recv(1)
        assert daemon.record("not redirected", client_addr=f"{host}:{own}")["severity"] == "warning"


def test_it_stops_when_told(daemon: Daemon) -> None:
    daemon.signal(signal.SIGTERM)
    assert daemon.process.wait(daemons.PATIENCE) == 0
    assert [r["message"] for r in daemon.records()][-2:] == ["stopping", "stopped"]


def complaints(folder: Path, config: str) -> list[daemons.Record]:
    with (folder / "out").open("wb") as out:
        daemon = Daemon("transocks", config, folder, logfile=None, stderr=out)
        assert daemon.process.wait(daemons.PATIENCE) == 1
    daemon.log = folder / "out"
    return daemon.records()


def test_every_fault_of_a_bad_configuration_is_said_and_no_password(tmp_path: Path) -> None:
    config = 'listen = ["127.0.0.1"]\nproxy_url = "socks4://alice:secret@127.0.0.1"\nproxy = 1\n[log]\nlevel = "loud"\n'
    records = complaints(tmp_path, config)
    places = [record["error"].partition(":")[0] for record in records]
    assert sorted(places) == ["listen[0]", "log.level", "proxy", "proxy_url"]
    assert {(r["message"], r["severity"]) for r in records} == {("bad configuration", "critical")}
    assert "secret" not in str(records)


def test_a_port_in_use_is_a_clear_record(tmp_path: Path) -> None:
    with daemons.loopback() as taken:
        port = taken.getsockname()[1]
        (record,) = complaints(tmp_path, f'listen = "127.0.0.1:{port}"\nproxy_url = "socks5://127.0.0.1"\n')
    assert (record["message"], record["severity"]) == ("can't start", "critical")
    assert record["error"] == f"can't listen on 127.0.0.1:{port}: Address already in use"


def test_a_missing_configuration_is_a_clear_record(tmp_path: Path) -> None:
    done = Daemon("transocks", "", tmp_path, "-f", str(tmp_path / "no.toml"))
    assert done.process.wait(daemons.PATIENCE) == 1
    assert "no.toml" in (tmp_path / "transocks.stderr").read_text()

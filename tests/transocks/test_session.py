"""transocks from accept to access record: over loopback, with upstreams that behave and that do not.

No rule redirects anything here (tests/netns does that with the real ones), so in most tests the original destination
is put into the kernel's mouth. What the command line does is tested with the daemon as a subprocess.
"""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket as Socket
from typing import Any

import daemons
import pytest
import trio
from daemons import Daemon, Served
from inside import Proxy, transocks_inside

import transocks.session
import transocks.upstreams.upstream
from transocks.original_dst import NotRedirected
from usocksd.net.address import HostPort, join_port
from usocksd.net.dial import Dialer
from usocksd.net.endpoint import Endpoint

WEB = HostPort("203.0.113.80", 80)
WEB_V6 = HostPort("2001:db8:80::80", 443)
OTHER = HostPort("203.0.113.81", 80)


@asynccontextmanager
async def running(
    folder: Path, url: str, *, connections: int = 1000, more: str = "", host: str = "127.0.0.1"
) -> AsyncIterator[Proxy]:
    # Many clients here say nothing, on port 80.
    names = "" if "[names]" in more else "[names]\nlong_wait = 0.3\n"
    text = f'proxy_url = "{url}"\n{more}\n{names}'
    async with transocks_inside(folder, text, connections=connections, host=host) as proxy:
        yield proxy
        await proxy.over()
        assert proxy.failures == []


HASTY = "[timeouts]\nconnect = 0.1\nhandshake = 0.1\n"


def asking(dns: daemons.NameServer) -> str:
    return f'[dns]\nservers = ["{dns.address}"]\n'


@pytest.fixture(autouse=True)
def going_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[HostPort], None]:
    """Sets the original destination of all connections; by default WEB."""

    def say(destination: HostPort) -> None:
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
    """A script: receives the lines with an even index, sends those with an odd one, then does `then`. None: it stops."""

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


def socks5(destination: HostPort) -> bytes:
    return daemons.request(destination.host, destination.port)


GRANTED = b"\x05\x00\x00\x01\xc6\x33\x64\x0a\x12\x34"
CONNECT = b"CONNECT 203.0.113.80:80 HTTP/1.1\r\nHost: 203.0.113.80:80\r\n"


# (A client is of its destination's family: no rule changes that, and the kernel is asked who made the connection.)
@pytest.mark.parametrize(("destination", "host"), [(WEB, "127.0.0.1"), (WEB_V6, "::1")])
async def test_socks5(tmp_path: Path, going_to: Callable[[HostPort], None], destination: HostPort, host: str) -> None:
    going_to(destination)
    script = talk(daemons.GREETING, b"\x05\x00", socks5(destination), GRANTED)
    with Served(daemons.loopback(), script) as upstream:
        async with running(tmp_path, f"socks5://127.0.0.1:{upstream.port}", host=host) as proxy:
            stream = await proxy.connect()
            client = join_port(*stream.socket.getsockname()[:2])
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


@pytest.mark.parametrize(
    ("url", "conversation", "greeting"),
    [
        (
            "socks5://al%3Ace:p%40ss%2F1@",
            (b"\x05\x02\x00\x02", b"\x05\x02", b"\x01\x05al:ce\x06p@ss/1", b"\x01\x00", socks5(WEB), GRANTED),
            b"",
        ),
        (
            "http://alice:p%40ss%2F1@",
            (
                CONNECT + b"Proxy-Authorization: Basic " + base64.b64encode(b"alice:p@ss/1") + b"\r\n\r\n",
                b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 201 Fine\r\nContent-Length: 5\r\n\r\nwelcome",
            ),
            b"welcome",
        ),
    ],
)
async def test_user_and_password_which_no_record_shows(
    tmp_path: Path, url: str, conversation: tuple[bytes, ...], greeting: bytes
) -> None:
    with Served(daemons.loopback(), talk(*conversation)) as upstream:
        async with running(tmp_path, f"{url}127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            if greeting:
                assert await stream.receive_some() == greeting
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
            await proxy.recorded("proxy ends")
        assert "p@ss" not in proxy.log.read_text()


async def test_early_bytes_of_the_destination_come_first(tmp_path: Path) -> None:
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
        ("socks5", talk(daemons.GREETING, b"\x05\x00", socks5(WEB), b"\x05\x00\x00", then=Socket.close), "closed"),
        # (It may not have read what it was sent, and then its end is a reset.)
        ("socks5", talk(then=Socket.close), r"closed|ECONNRESET"),
        ("socks5", talk(daemons.GREETING, then=daemons.reset), "ECONNRESET"),
        ("http", talk(CONNECT + b"\r\n", b"HTTP/1.1 407 Who are you?\r\n\r\n"), r"Who are you\?"),
        ("http", talk(CONNECT + b"\r\n", b"HTTP/1.1 403 Forbidden\r\n\r\n"), "403"),
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
    # A denial is not an error of the daemon.
    assert (record["severity"], record["type"]) == ("warning" if error in ("not allowed", "403") else "error", "access")
    assert (record["dest_addr"], record["upstream"]) == (str(WEB), f"{scheme}://127.0.0.1:{upstream.port}")
    assert proxy.records("proxy starts") == []


async def test_the_client_is_reset_when_the_upstream_is_not_there(tmp_path: Path) -> None:
    port = daemons.free_port()
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
        for number, (url, error) in enumerate(
            {
                "socks5://upstream.test:1080": "upstream.test: timed out",
                f"socks5://127.0.0.1:{full}": f"connect 127.0.0.1:{full}: Conn",
                f"socks5://127.0.0.1:{mute.port}": "waiting for the answer of 127.0.0.1",
                f"http://127.0.0.1:{mute_http.port}": "waiting for the answer of 127.0.0.1",
            }.items()
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            async with running(folder, url, more=asking(dns) + HASTY) as proxy:
                assert await is_reset(proxy)
                assert (await proxy.recorded("failed to connect to proxy server"))["error"].startswith(error)


async def test_the_upstream_by_name(tmp_path: Path) -> None:
    script = talk(daemons.GREETING, b"\x05\x00", socks5(WEB), GRANTED)
    with (
        daemons.NameServer({"upstream.test": ["127.0.0.1"]}) as dns,
        Served(daemons.loopback(), script) as upstream,
    ):
        async with running(tmp_path, f"socks5://upstream.test:{upstream.port}", more=asking(dns)) as proxy:
            stream = await proxy.connect()
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.aclose()
        assert proxy.record("proxy starts")["upstream"] == f"socks5://upstream.test:{upstream.port}"


@pytest.mark.parametrize("where", ["connecting", "connected", "asking"])
async def test_a_client_that_goes_ends_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Also when the upstream is connected, and the session has not run yet."""
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def handle(sock: Socket) -> None:
        sock.recv(3)
        token.run_sync_soon(asked.set)
        sock.recv(1)

    dial = Dialer.dial

    async def dial_too_late(*arguments: Any, client: Endpoint | None = None, **more: Any) -> Any:
        found = await dial(*arguments, client=client, **more)
        if client is not None:  # it is no probe
            go()
            while not client.more:  # the reactor has not seen that
                await client.reactor.yield_turn()
        return found

    def go() -> None:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.socket.close()

    if where == "connected":
        monkeypatch.setattr(Dialer, "dial", dial_too_late)
    with daemons.blackhole() as full, Served(daemons.loopback(), handle) as mute:
        port = full if where == "connecting" else mute.port
        async with running(tmp_path, f"socks5://127.0.0.1:{port}") as proxy:
            stream = await proxy.connect()
            if where == "asking":
                await asked.wait()
            elif where == "connecting":
                await proxy.until(lambda: proxy.live == 1, "it is accepted")
            if where != "connected":
                go()
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
    def not_redirected(_: object) -> HostPort:
        raise NotRedirected("no")

    async with running(tmp_path, "socks5://127.0.0.1:9") as proxy:
        for number, (original, message, error) in enumerate((
            (lambda _: HostPort("127.0.0.1", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: HostPort("127.9.9.9", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: HostPort("::1", proxy.port), "loop refused", "its destination is this proxy's own port"),
            (lambda _: HostPort("127.0.0.1", 9), "loop refused", "its destination is the upstream"),
            (not_redirected, "not redirected", "no"),
        )):  # fmt: skip
            monkeypatch.setattr(transocks.session, "original_destination", original)
            assert await is_reset(proxy)
            await proxy.until(lambda: len(proxy.records()) > number, "it is recorded")
            record = proxy.records()[-1]
            assert (record["message"], record["type"]) == (message, "access")
            assert record["error"].startswith(error)


async def test_health_checks_are_logged_once_at_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_redirected(_: object) -> HostPort:
        raise NotRedirected("no")

    monkeypatch.setattr(transocks.session, "original_destination", not_redirected)
    async with running(tmp_path, "socks5://127.0.0.1:9") as proxy:
        for _ in range(3):
            assert await is_reset(proxy)
        await proxy.until(lambda: len(proxy.records("not redirected")) == 3, "each is recorded")
        assert [record["severity"] for record in proxy.records("not redirected")] == ["warning", "debug", "debug"]


async def test_no_destination_takes_it_all(tmp_path: Path, going_to: Callable[[HostPort], None]) -> None:
    """The last resort against a loop, if nothing distinguishes the proxies' connections from others."""

    def grant(sock: Socket) -> None:
        daemons.receive_exactly(sock, len(daemons.GREETING))
        sock.sendall(b"\x05\x00")
        sock.recv(100)
        sock.sendall(GRANTED)
        daemons.echo(sock)

    with Served(daemons.loopback(), grant) as upstream:
        url = f"socks5://127.0.0.1:{upstream.port}"
        async with running(tmp_path, url, connections=6) as proxy:

            async def works() -> trio.SocketStream:
                stream = await proxy.connect()
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                return stream

            streams = [await works() for _ in range(3)]
            assert await is_reset(proxy)
            assert (await proxy.recorded("loop refused"))["error"].startswith("3 connections to it are open")
            going_to(OTHER)
            streams.append(await works())  # others are not affected
            going_to(WEB)
            await streams.pop(0).aclose()
            await proxy.until(lambda: proxy.live == 3, "there is room again")
            streams.append(await works())
            for stream in streams:
                await stream.aclose()


# ---- names and routes

REQUEST = b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n"
CHROMIUM = bytes.fromhex((Path(__file__).parent / "data" / "chromium.hex").read_text())
NAMED = daemons.request("www.example.com", 80, as_name=True)


async def exchange(stream: trio.SocketStream, said: bytes) -> None:
    """The other side echoes exactly this."""
    await stream.send_all(said)
    heard = b""
    while len(heard) < len(said):
        heard += await stream.receive_some()
    assert heard == said


def granting(asked: list[bytes], *refusals: int) -> Callable[[Socket], None]:
    """A SOCKS5 server that answers the first requests with these refusals, grants the others, and then echoes."""
    replies = [*refusals]

    def handle(sock: Socket) -> None:
        daemons.receive_exactly(sock, len(daemons.GREETING))
        sock.sendall(b"\x05\x00")
        head = daemons.receive_exactly(sock, 5)
        asked.append(head + daemons.receive_exactly(sock, {1: 5, 3: head[4] + 2, 4: 17}[head[3]]))
        if replies:
            sock.sendall(bytes([5, replies.pop(0)]) + GRANTED[2:])
        else:
            sock.sendall(GRANTED)
            daemons.echo(sock)

    return handle


@pytest.mark.parametrize(
    ("scheme", "more", "said", "asked", "source"),
    [
        ("socks5h", "", REQUEST, NAMED, "http"),
        ("socks5", "", REQUEST, socks5(WEB), "http"),
        ("socks5h", "[names]\nsend = 'address'", REQUEST, socks5(WEB), "http"),
        ("socks5h", "[names]\nsniff = false", REQUEST, socks5(WEB), None),
        ("socks5h", "[names]\nskip_ports = ['1-80']", REQUEST, socks5(WEB), None),
        ("socks5h", "", CHROMIUM, socks5(WEB), "unverified"),
        ("socks5h", "[names]\nwhen_ech = 'name'", CHROMIUM, NAMED, "unverified"),
        ("socks5h", "[[route]]\nvia = 'default'\nsend = 'address'", REQUEST, socks5(WEB), "http"),
        ("socks5h", "[names]\nsend = 'address'\n[[route]]\nvia = 'default'\nsend = 'name'", REQUEST, NAMED, "http"),
        ("socks5h", "[names]\nlong_wait = 0.01", b"", socks5(WEB), None),
    ],
)
async def test_what_the_proxy_is_asked_for(
    tmp_path: Path, scheme: str, more: str, said: bytes, asked: bytes, source: str | None
) -> None:
    seen: list[bytes] = []
    with Served(daemons.loopback(), granting(seen)) as upstream:
        async with running(tmp_path, f"{scheme}://127.0.0.1:{upstream.port}", more=more) as proxy:
            stream = await proxy.connect()
            await exchange(stream, said or b"")
            await exchange(stream, b"and more")
            await stream.aclose()
            record = await proxy.recorded("proxy ends")
    assert seen == [asked]
    assert record["dest_addr"] == str(WEB)
    assert (record["name"], record["name_from"]) == ("www.example.com" if source else None, source)
    assert record["route"] == ("route 1" if "route" in more else "default")


@pytest.mark.parametrize("ends", ["before", "after"])
async def test_a_client_that_sends_everything_at_once(tmp_path: Path, ends: str) -> None:
    """The client's end comes while its first bytes are read, and is passed on."""
    seen: list[bytes] = []
    with Served(daemons.loopback(), granting(seen)) as upstream:
        async with running(tmp_path, f"socks5h://127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            if ends == "after":
                await stream.send_all(REQUEST)
            await stream.send_eof()
            assert b"".join([piece async for piece in stream]) == (REQUEST if ends == "after" else b"")
            await stream.aclose()
            end = await proxy.recorded("proxy ends")
    assert (end["reason"], end["ended_by"]) == ("closed", "client")


async def test_a_client_that_is_gone_before_it_has_spoken(tmp_path: Path) -> None:
    async with running(tmp_path, "socks5h://127.0.0.1:9", more="[names]\nwait = 600") as proxy:
        stream = await proxy.connect()
        await proxy.until(lambda: proxy.live == 1, "it is accepted")
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await stream.aclose()
        await proxy.recorded("client is gone")


async def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    """Then the address is asked for, over a new connection, by the route of the address."""
    seen: list[bytes] = []
    more = '[[route]]\nname = "by name"\nto = ["www.example.com"]\nvia = "default"\n'
    with Served(daemons.loopback(), granting(seen, 4)) as upstream:
        async with running(tmp_path, f"socks5h://127.0.0.1:{upstream.port}", more=more) as proxy:
            stream = await proxy.connect()
            await exchange(stream, REQUEST)
            await stream.aclose()
            event = await proxy.recorded("name leads nowhere")
            end = await proxy.recorded("proxy ends")
    assert seen == [NAMED, socks5(WEB)]
    assert len(upstream.peers) == 2
    assert (event["name"], event["route"]) == ("www.example.com", "by name")
    assert (end["name"], end["route"]) == ("www.example.com", "default")


@pytest.mark.parametrize(
    ("refusal", "more"),
    [(2, ""), (1, ""), (5, ""), (4, "[names]\nwhen_unresolved = 'refuse'"), (4, "[names]\nsend = 'address'")],
)
async def test_a_refused_name_is_not_retried_by_address(tmp_path: Path, refusal: int, more: str) -> None:
    seen: list[bytes] = []
    with Served(daemons.loopback(), granting(seen, refusal)) as upstream:
        async with running(tmp_path, f"socks5h://127.0.0.1:{upstream.port}", more=more) as proxy:
            stream = await proxy.connect()
            await stream.send_all(REQUEST)
            assert await is_reset(stream)
            await proxy.recorded("failed to connect to proxy server")
    assert len(seen) == 1


async def test_an_http_proxy_that_does_not_find_a_name(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def handle(sock: Socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1000)
        seen.append(head.split()[1])
        if len(seen) == 1:
            sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        else:
            sock.sendall(b"HTTP/1.1 200 Fine\r\n\r\n")
            daemons.echo(sock)

    with Served(daemons.loopback(), handle) as upstream:
        async with running(tmp_path, f"http://127.0.0.1:{upstream.port}") as proxy:
            stream = await proxy.connect()
            await exchange(stream, REQUEST)
            await stream.aclose()
    assert seen == [b"www.example.com:80", b"203.0.113.80:80"]


async def test_rejected(tmp_path: Path) -> None:
    more = '[[route]]\nname = "no"\nto = [".example.com"]\nvia = "reject"\n'
    async with running(tmp_path, "socks5h://127.0.0.1:9", more=more) as proxy:
        stream = await proxy.connect()
        await stream.send_all(REQUEST)
        assert await is_reset(stream)
        record = await proxy.recorded("rejected by route")
    assert (record["severity"], record["type"], record["route"]) == ("info", "access", "no")
    assert (record["name"], record["dest_addr"]) == ("www.example.com", str(WEB))
    assert "upstream" not in record


@pytest.mark.parametrize("by_name", [True, False])
async def test_past_the_proxy(tmp_path: Path, going_to: Callable[[HostPort], None], by_name: bool) -> None:
    """A route by name leads to the addresses of the name, a route by address to the original destination."""
    with (
        daemons.NameServer({"www.example.com": ["127.0.0.2"]}) as dns,
        Served(daemons.loopback(), daemons.echo) as here,
        Socket() as there,
    ):
        there.bind(("127.0.0.2", here.port))
        going_to(HostPort("127.0.0.1", here.port))
        to = ".example.com" if by_name else "127.0.0.0/8"
        more = f'[[route]]\nto = ["{to}"]\nvia = "direct"\n'
        async with running(tmp_path, "socks5h://127.0.0.1:9", more=asking(dns) + more) as proxy:
            stream = await proxy.connect()
            said = REQUEST.replace(b".com", b".com:%d" % here.port)
            if by_name:
                await stream.send_all(said)
                assert await is_reset(stream)  # it is an address of this host, where no name may lead
                record = await proxy.recorded("rejected by route")
                assert "www.example.com is 127.0.0.2" in record["error"]
            else:
                await exchange(stream, said)
                await stream.aclose()
                record = await proxy.recorded("proxy ends")
                assert (record["upstream"], record["upstream_addr"]) == ("direct", f"127.0.0.1:{here.port}")
    assert len(here.peers) == (0 if by_name else 1)


async def test_on_a_direct_route_an_unknown_name_falls_back_to_its_address(tmp_path: Path) -> None:
    """Otherwise a forged name would open the way to any address."""
    seen: list[bytes] = []
    more = '[[route]]\nto = [".example.com"]\nvia = "direct"\n'
    with daemons.NameServer({}) as dns, Served(daemons.loopback(), granting(seen)) as upstream:
        url = f"socks5h://127.0.0.1:{upstream.port}"
        async with running(tmp_path, url, more=asking(dns) + more) as proxy:
            stream = await proxy.connect()
            await exchange(stream, REQUEST)
            await stream.aclose()
            end = await proxy.recorded("proxy ends")
    assert seen == [socks5(WEB)]
    assert (end["route"], end["upstream"]) == ("default", url)


# ---- the daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    config = 'listen = ["127.0.0.1:0", "[::1]:0"]\nproxy_url = "socks5://127.0.0.1:9"\n'
    with Daemon("transocks", config, tmp_path) as running:
        yield running


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


def test_every_fault_of_a_bad_configuration_is_logged_and_no_password(tmp_path: Path) -> None:
    config = 'listen = ["127.0.0.1"]\nproxy_url = "socks4://alice:secret@127.0.0.1"\nproxy = 1\n[log]\nlevel = "loud"\n'
    with (tmp_path / "out").open("wb") as out:
        daemon = Daemon("transocks", config, tmp_path, logfile=None, stderr=out)
        assert daemon.process.wait(daemons.PATIENCE) == 1
    daemon.log = tmp_path / "out"
    places = [record["error"].partition(":")[0] for record in daemon.records()]
    assert sorted(places) == ["listen[0]", "log.level", "proxy", "proxy_url"]
    assert {(r["message"], r["severity"]) for r in daemon.records()} == {("bad configuration", "critical")}
    assert "secret" not in daemon.log.read_text()

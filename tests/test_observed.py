"""Reports about a connection: records that join, counters, and the answer to `connections`.

Both run in this process, over loopback. The original destination is faked, as if the kernel had told it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from socket import socket as Socket
from typing import Any
from unittest.mock import Mock

import bcrypt
import daemons
import pytest
import trio
from daemons import GRANTED, GREETING, NameServer, Served, receive_exactly, receive_reply, request, socks5
from inside import Proxy, transocks_inside, usocksd_inside

import transocks.access_log
import transocks.config
import transocks.session
from transocks.original_dst import NotRedirected
from usocksd.log.access import pair_member
from usocksd.net.address import HostPort
from usocksd.net.ending import Reason, Side
from usocksd.net.flow import Flow

WEB = HostPort("203.0.113.80", 80)


@asynccontextmanager
async def usocksd_running(folder: Path, incoming: str = "", more: str = "", **parts: Any) -> AsyncIterator[Proxy]:
    """It connects to loopback, and to every name; `incoming` and `more` go into its configuration."""
    sites = 'allow_sites = ["127.0.0.0/8", "::1", ".test", ""]\ndeny_sites = ["127.0.0.66"]'
    async with usocksd_inside(folder, f"[incoming]\n{incoming}\n[outgoing]\n{sites}\n{more}", **parts) as proxy:
        yield proxy


def dns_servers(server: NameServer) -> str:
    return f'[dns]\nservers = ["{server.address}"]\n'


def users_in(users: Path) -> str:
    return f'[auth]\nusers_file = "{users}"\n'


@pytest.fixture
def destination() -> Iterator[Served]:
    with Served(daemons.loopback(), daemons.echo) as server:
        yield server


def connected(proxy: Proxy, family: int = socket.AF_INET) -> Socket:
    sock = Socket(family)
    sock.settimeout(daemons.PATIENCE)
    sock.connect(("127.0.0.1" if family == socket.AF_INET else "::1", proxy.port))
    return sock


def name_of(address: tuple[Any, ...]) -> str:
    return pair_member(*address[:2])


# A blocking peer, as the tests of the daemons have it, in a thread.
talking = trio.to_thread.run_sync


# ---- usocksd


async def test_a_relay_is_counted_when_it_begins_and_when_it_ends(tmp_path: Path, destination: Served) -> None:
    async with usocksd_running(tmp_path) as proxy:
        with connected(proxy) as client:
            assert (await talking(socks5, client, "127.0.0.1", destination.port))[0] == GRANTED
            await proxy.recorded("proxy starts")
            assert proxy.counted("connections_total") == {("SOCKS5", "granted"): 1}
            assert proxy.counted("socks5_auth_negotiated_total") == {("no_auth", "ok"): 1}
            assert proxy.counted("socks5_address_read_total") == {("IPv4", "ok"): 1}
            assert proxy.count("proxy_inflight_requests") == 1
            client.sendall(b"x" * 100)
            assert await talking(receive_exactly, client, 100) == b"x" * 100
            client.shutdown(socket.SHUT_WR)
            assert await talking(client.recv, 1) == b""
        await proxy.over()
        assert proxy.count("proxy_inflight_requests") == 0
        assert proxy.counted("relay_ended_total") == {("closed", "client"): 1}
        assert proxy.observed("proxy_tx_bytes") == proxy.observed("proxy_rx_bytes") == 100
        assert proxy.count("proxy_elapsed_seconds", "success") == 1
        assert proxy.count("proxy_elapsed_seconds", "error") == 0
        assert 0 < proxy.observed("proxy_tx_seconds") <= proxy.observed("proxy_rx_seconds")
        assert proxy.counted("proxy_tx_errors_total") == proxy.counted("proxy_rx_errors_total") == {}


def slam(sock: Socket) -> None:
    """Resets the connection as soon as it hears something."""
    sock.recv(1)
    daemons.reset(sock)


@pytest.mark.parametrize(("side", "direction"), [("client", "tx"), ("upstream", "rx")])
async def test_a_reset_is_an_error_of_its_side(tmp_path: Path, side: str, direction: str) -> None:
    with Served(daemons.loopback(), slam if side == "upstream" else daemons.echo) as server:
        async with usocksd_running(tmp_path) as proxy:
            with connected(proxy) as client:
                assert (await talking(socks5, client, "127.0.0.1", server.port))[0] == GRANTED
                if side == "client":
                    daemons.reset(client)
                else:
                    client.sendall(b"x")
                await proxy.over()
            assert proxy.counted("relay_ended_total") == {("reset", side): 1}
            assert proxy.count("proxy_elapsed_seconds", "error") == 1
            errors = {name: proxy.count(f"proxy_{name}_errors_total") for name in ("tx", "rx")}
            assert errors == {"tx": 0, "rx": 0, direction: 1}


async def test_every_way_for_a_relay_to_end_is_there_from_the_start(tmp_path: Path) -> None:
    async with usocksd_running(tmp_path, more='addresses = ["127.0.0.1"]\ndnsbl_domain = "list.test"') as proxy:
        snapshot = proxy.metrics.snapshot()
        ways = {tuple(labels) for labels, _ in snapshot["usocksd_relay_ended_total"]["values"]}
        assert ways == {(reason.name.lower(), side.value) for reason in Reason for side in Side}
        for name, metric in snapshot.items():
            assert metric["values"], f"{name} has no child before the first event"


Handshake = Callable[[Socket], object]


def say(*pieces: bytes) -> Handshake:
    def talk(sock: Socket) -> None:
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        daemons.receive_all(sock)

    return talk


def ask(host: str, port: int | None = None, **options: Any) -> Handshake:
    return lambda sock: socks5(sock, host, daemons.free_port() if port is None else port, **options)


SOCKS4_REQUEST = b"\x04\x01\x00\x50\x7f\x00\x00\x01me\x00"


@pytest.mark.parametrize(
    ("handshake", "version", "status", "more"),
    [
        (ask("127.0.0.1"), "SOCKS5", "connection_refused", {"dial_errors_total": ("refused",)}),
        (ask("nobody.test", 80), "SOCKS5", "host_unreachable", {"dial_errors_total": ("unresolved",)}),
        (ask("::1", 80), "SOCKS5", "network_unreachable", {"dial_errors_total": ("no_egress",)}),
        (ask("127.0.0.66", 80), "SOCKS5", "not_allowed", {"denied_total": ('deny_sites "127.0.0.66"',)}),
        (ask("127.0.0.1", 80, command=2), "SOCKS5", "command_not_supported", {}),
        (say(b""), "unknown", "invalid_request", {}),
        (say(b"GET / HTTP/1.1\r\n\r\n"), "unknown", "unknown_version", {}),
        (say(b"\x05\x02"), "SOCKS5", "authentication_failure", {"socks5_auth_negotiated_total": ("unknown", "failed")}),
        (
            say(b"\x05\x01\x01"),
            "SOCKS5",
            "authentication_failure",
            {"socks5_auth_negotiated_total": ("unknown", "failed")},
        ),
        (
            say(b"\x05\x01\x02\x01\x02a"),
            "SOCKS5",
            "authentication_failure",
            {"socks5_auth_negotiated_total": ("basic", "failed")},
        ),
        (say(GREETING), "SOCKS5", "address_read_failure", {"socks5_address_read_total": ("unknown", "failed")}),
        (
            say(GREETING, b"\x05\x01\x00\x09" + bytes(6)),
            "SOCKS5",
            "address_type_not_supported",
            {"socks5_auth_negotiated_total": ("no_auth", "ok"), "socks5_address_read_total": ("unknown", "failed")},
        ),
        (
            say(b"\x05\x01\x02\x01\x01a\x00", b"\x05\x01\x00"),
            "SOCKS5",
            "address_read_failure",
            {"socks5_auth_negotiated_total": ("basic", "ok"), "socks5_address_read_total": ("unknown", "failed")},
        ),
        (say(SOCKS4_REQUEST[:4]), "SOCKS4_4a", "address_read_failure", {}),
        (say(b"\x04\x02" + SOCKS4_REQUEST[2:]), "SOCKS4_4a", "rejected", {}),
        (say(SOCKS4_REQUEST[:4] + b"\x7f\x00\x00\x42me\x00"), "SOCKS4_4a", "rejected", {}),
    ],
)
async def test_handshakes_and_their_records(
    tmp_path: Path, handshake: Handshake, version: str, status: str, more: dict[str, tuple[str, ...]]
) -> None:
    with NameServer({}) as dns:
        async with usocksd_running(tmp_path, more='addresses = ["127.0.0.1"]\n' + dns_servers(dns)) as proxy:
            with connected(proxy) as client:
                await talking(handshake, client)
            await proxy.over()
            assert proxy.counted("connections_total") == {(version, status): 1}
            assert proxy.failures == []
            for name, labels in more.items():
                assert proxy.counted(name) == {labels: 1}
            if "dial_errors_total" not in more:
                assert proxy.counted("dial_errors_total") == {}
            assert proxy.count("proxy_inflight_requests") == 0


async def test_clients_that_wait_too_long_or_go(tmp_path: Path) -> None:
    async with usocksd_running(tmp_path, more="[timeouts]\nhandshake = 0.1\n") as proxy:
        with connected(proxy) as client:
            assert await talking(client.recv, 1) == b""
        assert proxy.counted("connections_total") == {("unknown", "timed_out"): 1}
        client = connected(proxy)
        client.sendall(GREETING)
        assert await talking(client.recv, 2) == b"\x05\x00"
        daemons.reset(client)
        await proxy.over()
        assert proxy.counted("connections_total") == {("unknown", "timed_out"): 1, ("SOCKS5", "client_gone"): 1}


async def test_a_client_that_can_t_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """epoll has no room for one more socket: it is closed, and the log does not blame the client."""
    async with usocksd_running(tmp_path) as proxy:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(proxy.reactor, "register", Mock(side_effect=full))
        with connected(proxy) as client:
            assert await talking(client.recv, 1) == b""
        await proxy.over()
    (record,) = proxy.records("handshake failed")
    assert record["error"] == "no more sockets can be watched: No space left on device (epoll(7))"


async def test_a_denied_client(tmp_path: Path) -> None:
    async with usocksd_running(tmp_path, 'allow_from = ["192.0.2.0/24"]') as proxy:
        with pytest.raises(ConnectionResetError), connected(proxy) as client:
            await talking(client.recv, 1)
        await proxy.over()
        assert proxy.counted("denied_total") == {("allow_from",): 1}
        assert proxy.counted("connections_total") == {("unknown", "client_denied"): 1}


@pytest.mark.parametrize("behind", [b"", GREETING + request("127.0.0.1", 80)], ids=["alone", "with a request"])
async def test_a_probe_is_answered_and_counted_and_no_news(tmp_path: Path, behind: bytes) -> None:
    users = tmp_path / "users"
    users.write_text("")
    async with usocksd_running(tmp_path, more=users_in(users)) as proxy:
        with connected(proxy) as client:
            client.sendall(b"\x05\x02\xf5\x00" + behind)
            client.shutdown(socket.SHUT_WR)
            assert await talking(daemons.receive_all, client) == b"\x05\xf5"
        await proxy.over()
        assert proxy.count("probes_total") == 1
        assert proxy.counted("connections_total") == proxy.counted("socks5_auth_negotiated_total") == {}
        assert (await proxy.recorded("probed"))["severity"] == "debug"
        assert len(proxy.records(type="access")) == 1


async def test_the_credentials_of_a_probe_are_judged_as_any(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"alice:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    async with usocksd_running(tmp_path, more=users_in(users)) as proxy:
        for password, status in ((b"\x06secret", b"\x01\x00"), (b"\x05wrong", b"\x01\x01")):
            with connected(proxy) as client:
                client.sendall(b"\x05\x03\xf5\x00\x02\x01\x05alice" + password)
                client.shutdown(socket.SHUT_WR)
                assert await talking(daemons.receive_all, client) == b"\x05\xf5" + status
            await proxy.over()
        assert proxy.count("probes_total") == 1
        assert proxy.counted("socks5_auth_negotiated_total") == {("basic", "ok"): 1, ("basic", "failed"): 1}
        assert proxy.counted("connections_total") == {("SOCKS5", "authentication_failure"): 1}
        record = await proxy.recorded("handshake failed")
        assert (record["error"], record["tried_user"]) == ("wrong user or password", "alice")


async def test_names_are_looked_up_once(tmp_path: Path, destination: Served) -> None:
    with NameServer({"here.test": ["127.0.0.1"]}) as dns:
        async with usocksd_running(tmp_path, more=dns_servers(dns)) as proxy:
            for hits in range(3):
                with connected(proxy) as client:
                    assert (await talking(socks5, client, "here.test", destination.port))[0] == GRANTED
                assert proxy.count("dns_seconds", "ok") == 1
                assert proxy.count("dns_cache_hits_total") == hits
            for hits in range(2):
                with connected(proxy) as client:
                    assert (await talking(socks5, client, "nobody.test", 80))[0] != GRANTED
                assert proxy.count("dns_seconds", "no_such_name") == 1
                assert proxy.count("dns_cache_hits_total") == 2 + hits
            await proxy.over()


async def test_the_user_whose_password_was_wrong_is_named_and_the_password_is_not(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"alice:{bcrypt.hashpw(b'correct horse', bcrypt.gensalt(4)).decode()}\n")
    async with usocksd_running(tmp_path, more=users_in(users)) as proxy:
        with connected(proxy) as client:
            await talking(say(b"\x05\x01\x02", b"\x01\x05alice\x07battery"), client)
        record = await proxy.recorded("handshake failed")
        await proxy.over()
        assert (record["tried_user"], "user" in record) == ("alice", False)
        assert "battery" not in proxy.log.read_text()
        assert proxy.counted("socks5_auth_negotiated_total") == {("basic", "failed"): 1}
        assert proxy.counted("connections_total") == {("SOCKS5", "authentication_failure"): 1}


async def test_a_dual_stack_listener_shows_ipv4_as_ipv4(tmp_path: Path, destination: Served) -> None:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    listener.setblocking(False)
    async with usocksd_running(tmp_path, listener=listener) as proxy:
        for family in (socket.AF_INET, socket.AF_INET6):
            with connected(proxy, family) as client:
                assert (await talking(socks5, client, "127.0.0.1", destination.port))[0] == GRANTED
                ours, theirs = name_of(client.getsockname()), name_of(client.getpeername())
                assert (await proxy.recorded("proxy starts", client_addr=ours))["local_addr"] == theirs
        await proxy.over()


async def test_connections_tell_of_themselves(tmp_path: Path, destination: Served) -> None:
    users = tmp_path / "users"
    users.write_text(f"alice:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    async with usocksd_running(tmp_path, more=users_in(users)) as proxy:
        with connected(proxy) as client:
            await proxy.until(proxy.connections, "it is accepted")
            nothing = dict.fromkeys(("destination", "name", "user", "rule", "pool", "egress", "upstream", "peer"))
            (row,) = proxy.connections()
            assert row == {"id": row["id"], "client": name_of(client.getsockname()), **nothing, "age": row["age"]}
            client.sendall(b"\x05\x01\x02\x01\x05alice\x06secret" + request("127.1", destination.port, as_name=True))
            assert (await talking(receive_exactly, client, 4)) == b"\x05\x02\x01\x00"
            reply, bound, port = await talking(receive_reply, client)
            assert reply == GRANTED
            start = await proxy.recorded("proxy starts")
            (row,) = proxy.connections()
            assert 0 <= row.pop("age") < daemons.PATIENCE
            assert row == {
                "id": start["request_id"],
                "client": name_of(client.getsockname()),
                "destination": f"127.0.0.1:{destination.port}",
                "name": "127.1",
                "user": "alice",
                "rule": 'allow_sites "127.0.0.0/8"',
                "pool": "default",
                "egress": f"{bound}:{port}",
                "upstream": None,
                "peer": None,
            }
        await proxy.over()
        assert proxy.connections() == []


async def test_a_bug_in_a_relay_and_a_stopped_session_end_in_a_record(
    tmp_path: Path, destination: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bug(Exception):
        pass

    def broken(_: Flow) -> None:
        raise Bug

    async with usocksd_running(tmp_path) as proxy:
        for case, reason in (("bug", "error"), ("stopped", "stopped")):
            with connected(proxy) as client, monkeypatch.context() as patch:
                assert (await talking(socks5, client, "127.0.0.1", destination.port))[0] == GRANTED
                client.sendall(b"hello")
                assert await talking(receive_exactly, client, 5) == b"hello"
                start = await proxy.recorded("proxy starts", client_addr=name_of(client.getsockname()))
                if case == "bug":
                    patch.setattr(Flow, "step", broken)
                    client.sendall(b"more")
                else:
                    proxy.reactor.stop(proxy.sessions[-1])
                await proxy.over()
            message = "proxy ends with an error" if case == "bug" else "proxy ends"
            end = await proxy.recorded(message, request_id=start["request_id"])
            assert (end["reason"], end["ended_by"], end["tx_bytes"], end["rx_bytes"]) == (reason, "proxy", 5, 5)
            assert end["error"] == ("internal error" if case == "bug" else None)
        assert [type(error) for error in proxy.failures] == [Bug]
        assert proxy.counted("relay_ended_total") == {("error", "proxy"): 1, ("stopped", "proxy"): 1}
        assert proxy.count("proxy_inflight_requests") == 0


# ---- both


@pytest.fixture
async def chain(
    tmp_path: Path, destination: Served, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """transocks, and the usocksd that is its upstream."""
    monkeypatch.setattr(transocks.session, "original_destination", lambda _: HostPort("127.0.0.1", destination.port))
    async with AsyncExitStack() as stack:
        end = await stack.enter_async_context(usocksd_running(tmp_path))
        yield (
            await stack.enter_async_context(transocks_inside(tmp_path, f'proxy_url = "socks5://127.0.0.1:{end.port}"')),
            end,
        )


async def test_the_records_of_both_daemons_join_by_the_pair_of_sockets(chain: tuple[Proxy, Proxy]) -> None:
    near, far = chain
    clients = [connected(near) for _ in range(5)]
    for number, client in enumerate(clients, 1):
        client.sendall(b"x" * number)
        assert await talking(receive_exactly, client, number) == b"x" * number
    rows = near.connections()
    assert {row["client"] for row in rows} == {name_of(client.getsockname()) for client in clients}
    assert {row["upstream"] for row in rows} == {f"socks5://127.0.0.1:{far.port}"}
    for client in clients:
        client.close()
    await near.over()
    await far.over()
    for proxy in chain:
        await proxy.until(lambda: len(proxy.records("proxy ends")) == len(clients), "all records are written")
    ends = far.records("proxy ends")
    joined = [
        (mine["tx_bytes"], [end["tx_bytes"] for end in ends if pair(end) == (mine["src_addr"], mine["upstream_addr"])])
        for mine in near.records("proxy ends")
    ]
    assert sorted(joined) == [(number, [number]) for number in range(1, 6)]
    assert near.counted("connections_total") == {("SOCKS5", "granted"): 5}
    assert near.count("upstream_seconds", f"socks5://127.0.0.1:{far.port}", "ok") == 5


def pair(record: daemons.Record) -> tuple[str, str]:
    return record["client_addr"], record["local_addr"]


async def test_refusals_join_too(chain: tuple[Proxy, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = chain
    monkeypatch.setattr(transocks.session, "original_destination", lambda _: HostPort("127.0.0.66", 80))
    with pytest.raises(ConnectionResetError), connected(near) as client:
        await talking(client.recv, 1)
    mine = await near.recorded("failed to connect to proxy server")
    theirs = await far.recorded("ruleset mismatch")
    assert pair(theirs) == (mine["src_addr"], mine["upstream_addr"])
    await near.over()
    assert near.counted("connections_total") == {("SOCKS5", "upstream_refused"): 1}
    assert near.count("upstream_seconds", f"socks5://127.0.0.1:{far.port}", "refused") == 1
    assert near.counted("dial_errors_total") == {}


# ---- transocks


async def test_an_upstream_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transocks.session, "original_destination", lambda _: WEB)
    url = f"http://127.0.0.1:{daemons.free_port()}"
    async with transocks_inside(tmp_path, f'proxy_url = "{url}"') as proxy:
        with pytest.raises(ConnectionResetError), connected(proxy) as client:
            await talking(client.recv, 1)
        await proxy.over()
        assert proxy.counted("connections_total") == {("HTTP", "upstream_unreachable"): 1}
        assert proxy.counted("dial_errors_total") == {("refused",): 1}
        assert proxy.count("upstream_seconds", url, "failed") == 1


async def test_connections_that_are_not_redirected_or_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_redirected(_: object) -> HostPort:
        raise NotRedirected("nobody did")

    async with transocks_inside(tmp_path, 'proxy_url = "socks5://127.0.0.1:1"') as proxy:
        for found in (not_redirected, lambda _: HostPort("127.0.0.1", proxy.port)):
            monkeypatch.setattr(transocks.session, "original_destination", found)
            with pytest.raises(ConnectionResetError), connected(proxy) as client:
                await talking(client.recv, 1)
        await proxy.over()
        assert proxy.counted("connections_total") == {("unknown", "not_redirected"): 1, ("unknown", "loop"): 1}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("192.0.2.1", 80), "192.0.2.1:80"),
        (("::ffff:192.0.2.1", 80), "192.0.2.1:80"),
        (("2001:db8::1", 80), "[2001:db8::1]:80"),
        (("::1", 80), "[::1]:80"),
    ],
)
def test_both_ends_of_a_connection_have_one_name(address: tuple[str, int], text: str) -> None:
    assert pair_member(*address) == text

"""BIND over loopback: who may connect, what the two replies say, and how it ends."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket as Socket

import daemons
import pytest
from daemons import Daemon, NameServer, receive_exactly, receive_reply, request, wait_until

CONFIG = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
[[rule]]
action = "allow"
command = "bind"
to = ["0.0.0.0"]
from = ["127.0.0.2"]
egress = "fixed"
[[rule]]
action = "deny"
command = "bind"
to = ["127.0.0.66"]
[[rule]]
action = "allow"
to = ["127.0.0.0/8", "localhost", ".test"]
egress = "fixed"
[egress.fixed]
addresses = ["127.0.0.1"]
[dns]
servers = ["{dns}"]
[bind]
enabled = true
{more}
"""
PEER = "127.0.0.7"


@pytest.fixture(scope="module")
def dns() -> Iterator[NameServer]:
    with NameServer({"peer.test": ["127.0.0.66", PEER]}) as server:
        yield server


@pytest.fixture(scope="module")
def server(dns: NameServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon("usocksd", CONFIG.format(dns=dns.address, more=""), tmp_path_factory.mktemp("usocksd")) as daemon:
        yield daemon


@contextmanager
def bound(
    server: Daemon, host: str = PEER, *, client: str = "127.0.0.1", as_name: bool = False
) -> Iterator[tuple[Socket, tuple[str, int]]]:
    """A client whose BIND is waiting, and where for."""
    with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE, (client, 0)) as sock:
        sock.sendall(daemons.GREETING + request(host, 21, command=2, as_name=as_name))
        receive_exactly(sock, 2)
        reply, *place = receive_reply(sock)
        assert reply == 0
        yield sock, (place[0], place[1])


def connect(place: tuple[str, int], source: str = PEER) -> Socket:
    return socket.create_connection(place, daemons.PATIENCE, (source, 0))


def is_turned_away(place: tuple[str, int], source: str) -> bool:
    try:
        with connect(place, source) as sock:
            return daemons.is_reset(sock)
    except ConnectionResetError:  # as soon as that
        return True


@pytest.mark.parametrize(("host", "as_name"), [(PEER, False), ("peer.test", True)])
def test_the_peer_connects(server: Daemon, host: str, as_name: bool) -> None:
    with bound(server, host, as_name=as_name) as (client, place):
        assert place[0] == "127.0.0.1"
        with connect(place) as peer:
            assert receive_reply(client) == (0, *peer.getsockname())
            peer.sendall(b"data")
            assert receive_exactly(client, 4) == b"data"
            client.sendall(b"ack")
            assert receive_exactly(peer, 3) == b"ack"
        assert client.recv(1) == b""
        me = f"127.0.0.1:{client.getsockname()[1]}"
        start = server.record("proxy starts", client_addr=me)
        assert (start["command"], start["pool"], start["dest_addr"].partition(":")[0]) == ("bind", "fixed", PEER)
    with pytest.raises(ConnectionRefusedError):
        connect(place)


def test_socks4(server: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE) as client:
        client.sendall(b"\x04\x02\0\x15" + socket.inet_aton(PEER) + b"\0")
        first = receive_exactly(client, 8)
        assert first[:2] == b"\0\x5a"
        with connect((socket.inet_ntoa(first[4:]), int.from_bytes(first[2:4]))) as peer:
            second = receive_exactly(client, 8)
            assert second == b"\0\x5a" + peer.getsockname()[1].to_bytes(2) + socket.inet_aton(PEER)


def test_strangers_are_reset_and_do_not_end_it(server: Daemon) -> None:
    with bound(server) as (client, place):
        for stranger in ("127.0.0.1", "127.0.0.66"):
            assert is_turned_away(place, stranger)
        with connect(place):
            assert receive_reply(client)[0] == 0


def test_rules(server: Daemon) -> None:
    for host, reply in (("127.0.0.66", 2), ("0.0.0.0", 2)):
        with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE) as client:
            assert daemons.socks5(client, host, 21, command=2)[0] == reply


def test_any_peer_takes_a_rule_that_lists_0_0_0_0(server: Daemon) -> None:
    with bound(server, "0.0.0.0", client="127.0.0.2") as (client, place):
        assert place[0] == "127.0.0.1"
        assert is_turned_away(place, "127.0.0.66")  # the rules hold for the peer too
        with connect(place, "127.0.0.8"):
            assert receive_reply(client)[:2] == (0, "127.0.0.8")


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_client_that_goes_takes_its_port_with_it(server: Daemon, how: str) -> None:
    with bound(server) as (client, place):
        if how == "reset":
            daemons.reset(client)
        else:
            client.close()

        def is_refused() -> bool:
            try:
                connect(place, "127.0.0.1").close()
            except OSError as error:
                return error.errno == errno.ECONNREFUSED
            return False

        wait_until(is_refused, "the port is closed")


def test_it_does_not_wait_for_ever_and_ports_are_in_the_range(tmp_path: Path, dns: NameServer) -> None:
    config = CONFIG.format(dns=dns.address, more='wait = 1\nports = "30900-30901"')
    with Daemon("usocksd", config, tmp_path) as server, bound(server) as (one, place), bound(server) as (_, other):
        assert {place[1], other[1]} == {30900, 30901}
        with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE) as third:
            assert daemons.socks5(third, PEER, 21, command=2)[0] == 1
        assert receive_reply(one)[0] == 6
        assert one.recv(1) == b""
        server.expected.add("dial to destination failed")


def test_a_reload_and_a_stop_while_it_waits(tmp_path: Path, dns: NameServer) -> None:
    with Daemon("usocksd", CONFIG.format(dns=dns.address, more=""), tmp_path) as server:
        with bound(server) as (client, place), bound(server) as (_, other):
            before = server.worker
            server.signal(signal.SIGHUP)
            wait_until(lambda: before in server.workers() and len(server.workers()) == 2, "the old one drains")
            with connect(place) as peer:
                assert receive_reply(client)[0] == 0
                peer.sendall(b"still")
                assert receive_exactly(client, 5) == b"still"
            server.end()
            with pytest.raises(ConnectionRefusedError):
                connect(other)

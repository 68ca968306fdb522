"""usocksd over loopback: every course of a connection, with the client's answers and the records."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import socket as Socket

import bcrypt
import daemons
import pytest
from daemons import GRANTED, GREETING, Daemon, NameServer, Served, receive_exactly, receive_reply, request, socks5

NAMES = {
    "two.test": ["::1", "127.0.0.1"],  # nobody listens on ::1
    "metadata.test": ["169.254.169.254"],
    "denied-address.test": ["127.0.0.66"],
    "partly.test": ["127.0.0.66", "127.0.0.1"],
    "empty.test": [],
    "silent.test": None,
    "silent-too.test": None,  # (that the other did not answer is remembered for a second)
}
CONFIG = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
[outgoing]
allow_sites = ["127.0.0.0/8", ".test", "", "localhost"]
deny_sites = ["forbidden.test", "127.0.0.66"]
deny_ports = [25]
[dns]
servers = ["{dns}"]
[timeouts]
handshake = 1
connect = 1
idle = 600
half_closed = 600
stop = 60
"""


@pytest.fixture(scope="module")
def dns() -> Iterator[NameServer]:
    with NameServer(NAMES) as server:
        yield server


@pytest.fixture(scope="module")
def server(dns: NameServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon("usocksd", CONFIG.format(dns=dns.address), tmp_path_factory.mktemp("usocksd")) as daemon:
        yield daemon


@pytest.fixture
def client(server: Daemon) -> Iterator[Socket]:
    with connected(server) as sock:
        yield sock


def connected(server: Daemon) -> Socket:
    return socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE)


def name_of(sock: Socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def ends(sock: Socket) -> bool:
    """Whether the server closes, without another word and without a reset."""
    return sock.recv(1) == b""


# ---- the way through


def test_connects_and_records_both_ends(server: Daemon, client: Socket, destination: Served) -> None:
    reply, bound, port = socks5(client, "127.0.0.1", destination.port)
    assert reply == GRANTED
    client.sendall(b"hello")
    assert receive_exactly(client, 5) == b"hello"
    # BND.ADDR is the real local address of the outgoing socket.
    assert (bound, port) in destination.peers
    start = server.record("proxy starts", client_addr=name_of(client))
    assert start["type"] == "access"
    assert (start["protocol"], start["command"]) == ("SOCKS5", "connect")
    assert (start["dest_host"], start["dest_port"]) == ("127.0.0.1", destination.port)
    assert start["dest_addr"] == f"127.0.0.1:{destination.port}"
    assert start["src_addr"] == f"{bound}:{port}"
    assert start["rule"] == 'allow_sites "127.0.0.0/8"'
    client.shutdown(socket.SHUT_WR)
    assert ends(client)
    end = server.record("proxy ends", client_addr=name_of(client))
    assert end["request_id"] == start["request_id"]
    assert (end["tx_bytes"], end["rx_bytes"], end["reason"]) == (5, 5, "closed")
    assert end["elapsed"] > 0
    assert end["error"] is None


@pytest.mark.parametrize(("host", "as_name"), [("127.1", True), ("[::ffff:7f00:1]", True), ("::ffff:127.0.0.1", False)])
def test_every_form_of_an_address(
    server: Daemon, client: Socket, destination: Served, host: str, as_name: bool
) -> None:
    reply, bound, _ = socks5(client, host, destination.port, as_name=as_name)
    assert (reply, bound) == (GRANTED, "127.0.0.1")
    start = server.record("proxy starts", client_addr=name_of(client))
    assert (start["dest_host"], start["dest_addr"]) == (host, f"127.0.0.1:{destination.port}")


def test_the_next_address_of_a_name_serves(server: Daemon, client: Socket, destination: Served) -> None:
    assert socks5(client, "Two.TEST.", destination.port)[0] == GRANTED
    start = server.record("proxy starts", client_addr=name_of(client))
    assert (start["dest_host"], start["dest_addr"]) == ("Two.TEST.", f"127.0.0.1:{destination.port}")


def test_a_denied_address_of_a_name_is_left_out(server: Daemon, client: Socket, destination: Served) -> None:
    assert socks5(client, "partly.test", destination.port)[0] == GRANTED
    start = server.record("proxy starts", client_addr=name_of(client))
    assert start["dest_addr"].startswith("127.0.0.1:")
    # What a decision needs is in the first record of a connection.
    assert (start["dest_name"], start["pool"]) == ("partly.test", "default")
    assert sorted(start["candidates"]) == [
        '127.0.0.1 allowed allow_sites "127.0.0.0/8"',
        '127.0.0.66 denied deny_sites "127.0.0.66"',
    ]
    assert start["rule"] == 'allow_sites "127.0.0.0/8"'
    client.close()
    end = server.record("proxy ends", client_addr=start["client_addr"])
    assert end["pool"] == "default"
    assert "candidates" not in end


def test_records_of_names_that_are_not_connected(server: Daemon, client: Socket) -> None:
    assert socks5(client, "partly.test", daemons.free_port())[0] == 5
    record = server.record("dial to destination failed", client_addr=name_of(client))
    # The ruling on the address that was tried: the name's may be by another rule, with another pool.
    assert (record["rule"], record["pool"]) == ('allow_sites "127.0.0.0/8"', "default")
    with connected(server) as denied:
        assert socks5(denied, "Metadata.test", 80)[0] == 2
        record = server.record("ruleset mismatch", client_addr=name_of(denied))
    assert record["candidates"] == ["169.254.169.254 denied built-in: link-local"]
    assert (record["dest_host"], record["dest_name"]) == ("Metadata.test", "metadata.test")
    assert "pool" not in record


@pytest.mark.parametrize("pieces", ["one segment", "byte by byte"])
def test_an_optimistic_client_and_its_payload(client: Socket, destination: Served, pieces: str) -> None:
    everything = GREETING + request("127.0.0.1", destination.port) + b"payload"
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in [everything] if pieces == "one segment" else (everything[i : i + 1] for i in range(len(everything))):
        client.sendall(piece)
    assert receive_exactly(client, 2) == b"\x05\x00"
    assert receive_reply(client)[0] == GRANTED
    assert receive_exactly(client, 7) == b"payload"


def test_a_client_that_sends_everything_at_once_and_ends(client: Socket, destination: Served) -> None:
    client.sendall(GREETING + request("127.0.0.1", destination.port) + b"payload")
    client.shutdown(socket.SHUT_WR)
    answer = daemons.receive_all(client)
    assert answer[:4] == b"\x05\x00\x05\x00"
    assert answer[-7:] == b"payload"


@pytest.mark.parametrize("host", [None, "two.test"])
def test_socks4(server: Daemon, client: Socket, destination: Served, host: str | None) -> None:
    address = b"\x7f\x00\x00\x01" if host is None else b"\x00\x00\x00\x01"
    name = b"" if host is None else host.encode() + b"\x00"
    client.sendall(b"\x04\x01" + destination.port.to_bytes(2) + address + b"me\x00" + name + b"payload")
    reply = receive_exactly(client, 8)
    assert reply[:2] == b"\x00\x5a"
    assert receive_exactly(client, 7) == b"payload"
    assert ("127.0.0.1", int.from_bytes(reply[2:4])) in destination.peers
    assert server.record("proxy starts", client_addr=name_of(client))["protocol"] == "SOCKS4/4a"


# ---- refusals


def test_denied_by_rule(server: Daemon, dns: NameServer, destination: Served) -> None:
    for host, port, rule in (
        ("FORBIDDEN.test.", 80, 'deny_sites "forbidden.test"'),
        ("www.example.com", 80, "allow_sites"),
        ("127.66", 80, 'deny_sites "127.0.0.66"'),
        ("127.0.0.1", 25, "deny_ports 25"),
        ("0.0.0.0", 80, "built-in: unspecified"),
        # resolved, then denied by the address
        ("metadata.test", 80, "built-in: link-local"),
        ("denied-address.test", 80, 'deny_sites "127.0.0.66"'),
    ):
        with connected(server) as client:
            reply, bound, bound_port = socks5(client, host, port)
            assert (reply, bound, bound_port) == (2, "0.0.0.0", 0), host
            assert ends(client)
            record = server.record("ruleset mismatch", client_addr=name_of(client))
            assert (record["rule"], record["severity"], record["dest_host"]) == (rule, "warning", host)
            assert record["error"] == f"denied by {rule}"
    # A name that is denied is never resolved.
    assert not {"forbidden.test", "www.example.com"} & set(dns.asked)


def test_command_not_supported(server: Daemon, client: Socket) -> None:
    assert socks5(client, "127.0.0.1", 80, command=2) == (7, "0.0.0.0", 0)
    assert ends(client)
    assert server.record("command not supported", client_addr=name_of(client))["command"] == "bind"


@pytest.mark.parametrize("name", ["nobody.test", "empty.test", "not..a.name.test", "1.2.3.4.5"])
def test_unknown_name(server: Daemon, client: Socket, name: str) -> None:
    assert socks5(client, name, 80)[0] == 4
    assert ends(client)
    assert server.record("dial to destination failed", client_addr=name_of(client))["error"].startswith(name)


def test_refused(server: Daemon, client: Socket) -> None:
    port = daemons.free_port()
    assert socks5(client, "127.0.0.1", port)[0] == 5
    assert ends(client)
    record = server.record("dial to destination failed", client_addr=name_of(client))
    assert record["error"] == f"connect 127.0.0.1:{port}: Connection refused (ECONNREFUSED)"
    with connected(server) as other:
        other.sendall(b"\x04\x01" + port.to_bytes(2) + b"\x7f\x00\x00\x01\x00")
        assert daemons.receive_all(other) == b"\x00\x5b" + bytes(6)


def test_connect_timeout(server: Daemon, client: Socket) -> None:
    with daemons.blackhole() as port:
        before = time.monotonic()
        assert socks5(client, "127.0.0.1", port)[0] == 6
        assert 0.9 < time.monotonic() - before < 5
    assert ends(client)
    assert "ETIMEDOUT" in server.record("dial to destination failed", client_addr=name_of(client))["error"]


def test_a_dead_name_server_delays_only_the_client_that_asks(
    server: Daemon, client: Socket, destination: Served
) -> None:
    client.sendall(GREETING + request("silent.test", 80))
    others = []
    while not server.records("dial to destination failed", client_addr=name_of(client)):
        with connected(server) as other:
            assert socks5(other, "two.test", destination.port)[0] == GRANTED
            others.append(name_of(other))
    assert receive_exactly(client, 2) == b"\x05\x00"
    assert receive_reply(client)[0] == 4
    record = server.record("dial to destination failed", client_addr=name_of(client))
    assert record["error"] == "silent.test: timed out"
    order = [r.get("client_addr") for r in server.records()]
    assert order.index(others[0]) < order.index(name_of(client))


def test_a_client_that_goes_while_its_name_is_looked_up(server: Daemon) -> None:
    client = connected(server)
    client.sendall(GREETING)
    assert receive_exactly(client, 2) == b"\x05\x00"
    client.sendall(request("silent-too.test", 80))
    who = name_of(client)
    fds = server.fds()
    daemons.reset(client)
    assert server.record("handshake failed", client_addr=who)["error"] == "client is gone"
    server.wait_for_fds(fds - 1)


def test_a_client_that_goes_with_its_request_or_behind_it(server: Daemon) -> None:
    for together in (True, False):  # the request and the reset in one event, or not
        with daemons.blackhole() as port:
            client = connected(server)
            client.sendall(GREETING)
            assert receive_exactly(client, 2) == b"\x05\x00"
            before = syns_sent(port)  # by those who fill its queue
            if together:
                server.signal(signal.SIGSTOP)
            client.sendall(request("127.0.0.1", port))
            if not together:
                daemons.wait_until(lambda: syns_sent(port) > before, "it connects")
            who = name_of(client)
            daemons.reset(client)
            server.signal(signal.SIGCONT)
            assert server.record("handshake failed", client_addr=who)["error"] == "client is gone"


def syns_sent(port: int) -> int:
    """How many sockets of this host wait for an answer from 127.0.0.1, port `port` (proc(5))."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2:4] == [f"0100007F:{port:04X}", "02"] for row in rows)


def test_the_handshake_has_a_deadline(server: Daemon) -> None:
    before = time.monotonic()
    said = (b"", b"\x05", GREETING, GREETING + request("127.0.0.1", 80)[:-1], b"\x04\x01")
    clients = [connected(server) for _ in said]
    for client, data in zip(clients, said, strict=True):
        client.sendall(data)
    for client, data in zip(clients, said, strict=True):
        with client:
            if data.startswith(GREETING):
                assert receive_exactly(client, 2) == b"\x05\x00"
            assert ends(client)
            assert server.record("handshake failed", client_addr=name_of(client))["error"] == "timed out"
    assert 0.9 < time.monotonic() - before < 5


# ---- not SOCKS


@pytest.mark.parametrize("line", [b"GET http://example.com/ HTTP/1.1\r\n\r\n", b"CONNECT example.com:443 HTTP/1.1\r\n"])
def test_http_gets_an_answer_in_http(server: Daemon, client: Socket, line: bytes) -> None:
    client.sendall(line)
    answer = daemons.receive_all(client)
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"SOCKS" in answer
    record = server.record("handshake failed", client_addr=name_of(client))
    assert "HTTP" in record["error"]
    assert record["severity"] == "warning"


def test_tls_is_closed_and_logged_once_per_client(server: Daemon) -> None:
    hello = ssl.create_default_context()
    for _ in range(3):
        with connected(server) as client:
            out = ssl.MemoryBIO()
            tls = hello.wrap_bio(ssl.MemoryBIO(), out, server_hostname="example.com")
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            client.sendall(out.read())
            assert ends(client)
    with connected(server) as client:
        client.sendall(b"\x00")
        server.record("handshake failed", client_addr=name_of(client))  # records are in order
    assert len(server.records("handshake failed", error="spoke TLS to a SOCKS port")) == 1


@pytest.mark.parametrize(
    ("said", "answer", "error"),
    [
        (b"\x00garbage", b"", "first byte 0x00"),
        (GREETING + b"\x05\x01\x00\x09" + bytes(6), b"\x05\x00\x05\x08\x00\x01" + bytes(6), ""),
        (b"\x05\x01\x01", b"\x05\xff", ""),
    ],
)
def test_inputs_that_are_not_socks(server: Daemon, client: Socket, said: bytes, answer: bytes, error: str) -> None:
    client.sendall(said)
    assert daemons.receive_all(client) == answer
    assert error in server.record("handshake failed", client_addr=name_of(client))["error"]


def test_a_connection_closed_without_a_word_is_not_logged(server: Daemon) -> None:
    with connected(server) as client:
        who = name_of(client)
    with connected(server) as client:
        client.sendall(b"\x00")
        assert ends(client)
        server.record("handshake failed", client_addr=name_of(client))
    assert server.records(client_addr=who) == []


# ---- clients and users


def test_a_client_not_in_allow_from_is_reset_before_a_byte_is_read(tmp_path: Path) -> None:
    config = '[incoming]\nport = 0\naddresses = ["127.0.0.1"]\nallow_from = ["10.0.0.0/8", "127.0.0.2"]\n'
    with Daemon("usocksd", config, tmp_path) as server:
        with pytest.raises(ConnectionResetError), connected(server) as client:
            client.recv(1)  # it was refused without having said anything
        record = server.record("denied access")
        assert (record["type"], record["severity"]) == ("access", "warning")
        assert record["client_addr"].startswith("127.0.0.1:")
        with Socket() as client:
            client.bind(("127.0.0.2", 0))
            client.connect(("127.0.0.1", server.port))
            client.settimeout(daemons.PATIENCE)
            client.sendall(GREETING)
            assert receive_exactly(client, 2) == b"\x05\x00"


def credentials(user: str, password: str) -> bytes:
    return b"\x01" + bytes((len(user),)) + user.encode() + bytes((len(password),)) + password.encode()


def test_users(tmp_path: Path, destination: Served) -> None:
    hashed = bcrypt.hashpw(b"correct horse", bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"alice:{hashed}\n")
    config = CONFIG.format(dns="127.0.0.1:53") + f'[auth]\nusers_file = "{tmp_path / "users"}"\n'
    with Daemon("usocksd", config, tmp_path) as server:
        with connected(server) as client:
            client.sendall(b"\x05\x02\x00\x02")
            assert receive_exactly(client, 2) == b"\x05\x02"
            client.sendall(credentials("alice", "correct horse"))
            assert receive_exactly(client, 2) == b"\x01\x00"
            client.sendall(request("127.0.0.1", destination.port))
            assert receive_reply(client)[0] == GRANTED
            assert server.record("proxy starts", client_addr=name_of(client))["user"] == "alice"
        with connected(server) as client:  # an optimistic one
            client.sendall(
                b"\x05\x01\x02" + credentials("alice", "correct horse") + request("127.0.0.1", destination.port) + b"x"
            )
            assert receive_exactly(client, 4) == b"\x05\x02\x01\x00"
            assert receive_reply(client)[0] == GRANTED
            assert client.recv(1) == b"x"
        for user, password in (("alice", "wrong"), ("bob", "correct horse")):
            with connected(server) as client:
                client.sendall(b"\x05\x01\x02" + credentials(user, password))
                answer = daemons.receive_all(client)
                assert answer[:3] == b"\x05\x02\x01"
                assert answer[3:] not in (b"\x00", b"")
                record = server.record("handshake failed", client_addr=name_of(client))
                assert record["error"] == "wrong user or password"
        with connected(server) as client:
            client.sendall(GREETING)
            assert daemons.receive_all(client) == b"\x05\xff"
        with connected(server) as client:  # SOCKS4 can't authenticate
            client.sendall(b"\x04\x01" + destination.port.to_bytes(2) + b"\x7f\x00\x00\x01alice\x00")
            assert daemons.receive_all(client) == b"\x00\x5b" + bytes(6)
        text = "\n".join(server.lines())
        assert "correct horse" not in text
        assert "wrong user" in text


def test_a_password_check_is_part_of_the_handshake(tmp_path: Path) -> None:
    """A client that waits for the checks of others waits no longer than the handshake may take."""
    hashed = bcrypt.hashpw(b"correct horse", bcrypt.gensalt(13)).decode()
    (tmp_path / "users").write_text(f"alice:{hashed}\n")
    config = CONFIG.format(dns="127.0.0.1:53").replace("handshake = 1", "handshake = 0.5")
    with ExitStack() as stack:
        server = Daemon("usocksd", f'{config}[auth]\nusers_file = "{tmp_path / "users"}"\n', tmp_path)
        stack.enter_context(server)
        clients = [stack.enter_context(connected(server)) for _ in range(19)]
        for number, client in enumerate(clients):
            client.sendall(b"\x05\x01\x02" + credentials("alice", f"guess {number}"))
        for client in clients:
            daemons.receive_all(client)
        errors = [server.record("handshake failed", client_addr=name_of(each))["error"] for each in clients]
        assert "timed out" in errors
        assert set(errors) <= {"timed out", "wrong user or password"}


# ---- egress


def test_the_egress_address_is_bound_and_its_absence_is_fatal(tmp_path: Path, destination: Served) -> None:
    # 192.0.2.1 is on no host (RFC 5737): it must neither be tried nor replaced by the kernel's choice.
    for egress, expected in (
        ('["127.0.0.1", "192.0.2.1"]', GRANTED),
        ('["192.0.2.1"]', 3),
        ('["::1"]', 3),
    ):
        seen = len(destination.peers)
        config = CONFIG.format(dns="127.0.0.1:53").replace("[outgoing]", f"[outgoing]\naddresses = {egress}")
        with Daemon("usocksd", config, tmp_path) as server:
            for mapped in ("", "::ffff:"):
                with connected(server) as client:
                    assert socks5(client, f"{mapped}127.0.0.1", destination.port)[0] == expected, egress
                    if expected != GRANTED:
                        error = server.record("dial to destination failed", client_addr=name_of(client))["error"]
                        assert error.startswith('no usable egress address for IPv4 in pool "default": ')
            if expected != GRANTED:
                assert len(destination.peers) == seen
        server.log.unlink()


# ---- log and configuration (tests/usocksd/serve has starts and stops)


def test_log_rotation_under_load_loses_no_record(tmp_path: Path, dns: NameServer, destination: Served) -> None:
    connections = 240
    with Daemon("usocksd", CONFIG.format(dns=dns.address), tmp_path) as server:
        port = server.ready().port

        def load() -> None:
            for _ in range(connections // 4):
                with socket.create_connection(("127.0.0.1", port), daemons.PATIENCE) as client:
                    assert socks5(client, "127.0.0.1", destination.port)[0] == GRANTED

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        rotated = [tmp_path / f"rotated.{number}" for number in range(10)]
        for path in rotated:
            server.log.rename(path)
            server.signal(signal.SIGUSR1)
            daemons.wait_until(server.log.exists, "the log file is there again")
        for thread in threads:
            thread.join()
        server.signal(signal.SIGTERM)
        assert server.process.wait(daemons.PATIENCE) == 0
        lines = [line for path in (*rotated, server.log) for line in path.read_text().splitlines()]
    for message in ("proxy starts", "proxy ends"):
        assert sum(f'"message":"{message}"' in line for line in lines) == connections


def run_to_the_end(folder: Path, config: str) -> list[daemons.Record]:
    """Start it with a configuration that it refuses. Returns what it writes to stderr."""
    with (folder / "out").open("wb") as out:
        daemon = Daemon("usocksd", config, folder, logfile=None, stderr=out)
        assert daemon.process.wait(daemons.PATIENCE) == 1
    daemon.log = folder / "out"
    return daemon.records()


def test_every_fault_of_a_bad_configuration_is_logged(tmp_path: Path) -> None:
    config = """
[incoming]
port = 70000
allow_from = ["10.0.0.0/8", "nonsense"]
colour = "red"
[timeouts]
connect = 0
"""
    records = run_to_the_end(tmp_path, config)
    assert {(r["message"], r["severity"]) for r in records} == {("bad configuration", "critical")}
    places = {r["error"].partition(":")[0] for r in records}
    assert places == {"incoming.port", "incoming.allow_from[1]", "incoming.colour", "timeouts.connect"}
    assert {r["file"] for r in records} == {str(tmp_path / "usocksd.toml")}
    (tmp_path / "users").write_text("alice:secret\nbob:$1$md5$\n")
    records = run_to_the_end(tmp_path, f'[auth]\nusers_file = "{tmp_path / "users"}"\n')
    assert [r["message"] for r in records] == ["bad configuration"] * 2
    assert "secret" not in str(records)

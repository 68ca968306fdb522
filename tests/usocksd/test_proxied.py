"""The listener where a PROXY header is required, over loopback: which clients a proxy may name, and what goes by that client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket

import bcrypt
import daemons
import pytest
from daemons import (
    GRANTED,
    GREETING,
    Daemon,
    Served,
    is_reset,
    receive_all,
    receive_exactly,
    receive_reply,
    request,
    socks5,
)

from usocksd.commands.serve import make_policy
from usocksd.config import UsocksdConfig
from usocksd.net.proxy_protocol import LOCAL_HEADER, SIGNATURE, header
from usocksd.replay import Replay
from usocksd.settings import loader as configuration
from usocksd.socks import Reply

CONFIG = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
allow_from = ["127.0.0.9", "192.0.2.0/24", "2001:db8::/32"]
[incoming.proxy_protocol]
port = {port}
trusted = ["127.0.0.2", "127.0.0.3"]
[[rule]]
name = "not this one"
action = "deny"
from = ["192.0.2.66"]
[[rule]]
name = "echo"
action = "allow"
to = ["127.0.0.0/8"]
[timeouts]
handshake = 1
[limits]
per_client = 3
"""
GATEWAY, STRANGER = "127.0.0.2", "127.0.0.9"
CLIENT = ("192.0.2.1", 4000)


@pytest.fixture(scope="module")
def port() -> int:
    return daemons.free_port()


@pytest.fixture(scope="module")
def server(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon("usocksd", CONFIG.format(port=port), tmp_path_factory.mktemp("usocksd")) as daemon:
        daemon.ready().record("listening", address=f"127.0.0.1:{port}")
        yield daemon


def connected(port: int, peer: str = GATEWAY) -> Socket:
    sock = socket.create_connection(("127.0.0.1", port), daemons.PATIENCE, (peer, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def name_of(sock: Socket) -> str:
    return "{}:{}".format(*sock.getsockname())


def claim(client: tuple[str, int], destination: Served) -> bytes:
    return header(client, ("203.0.113.80", 443)) + GREETING + request("127.0.0.1", destination.port)


def granted(sock: Socket) -> bool:
    assert receive_exactly(sock, 2) == b"\x05\x00"
    return receive_reply(sock)[0] == GRANTED


@pytest.mark.parametrize("client", [CLIENT, ("2001:db8::1", 4001), ("::ffff:192.0.2.1", 4002)])
@pytest.mark.parametrize("pieces", ["one segment", "byte by byte"])
def test_records_have_the_client_and_the_peer(
    server: Daemon, port: int, destination: Served, client: tuple[str, int], pieces: str
) -> None:
    everything = claim(client, destination) + b"payload"
    with connected(port) as sock:
        for piece in (
            [everything] if pieces == "one segment" else (everything[i : i + 1] for i in range(len(everything)))
        ):
            sock.sendall(piece)
        assert granted(sock)
        assert receive_exactly(sock, 7) == b"payload"
        peer = name_of(sock)
    client_addr = ("[{}]:{}" if client[0].startswith("2") else "{}:{}").format(
        client[0].removeprefix("::ffff:"), client[1]
    )
    for message in ("proxy starts", "proxy ends"):
        record = server.record(message, peer_addr=peer)
        assert (record["client_addr"], record["rule"]) == (client_addr, "echo")
        assert record["local_addr"] == f"127.0.0.1:{port}"


def test_the_other_listener_takes_no_header(server: Daemon, port: int, destination: Served) -> None:
    plain = next(at for at in (int(r["address"].rpartition(":")[2]) for r in server.records("listening")) if at != port)
    with connected(plain, STRANGER) as sock:
        assert socks5(sock, "127.0.0.1", destination.port)[0] == GRANTED
        assert server.record("proxy starts", client_addr=name_of(sock))["peer_addr"] is None
    with connected(plain, STRANGER) as sock:
        sock.sendall(claim(CLIENT, destination))
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b""
        assert "0x0d is no version of SOCKS" in server.record("handshake failed", client_addr=name_of(sock))["error"]


def test_a_stranger_is_reset_before_a_byte_is_read(server: Daemon, port: int) -> None:
    with socket.socket() as sock:
        sock.settimeout(daemons.PATIENCE)
        sock.bind((STRANGER, 0))
        name = name_of(sock)
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionResetError:  # by the time connect(2) is looked at
            pass
        else:
            assert is_reset(sock)  # and has said nothing
    record = server.record("peer is not trusted", client_addr=name)
    assert record["error"] == "not in incoming.proxy_protocol.trusted"
    assert "peer_addr" not in record


def test_the_named_client_is_judged(server: Daemon, port: int, destination: Served) -> None:
    with connected(port) as sock:  # by allow_from
        sock.sendall(claim(("198.51.100.1", 1), destination) + b"payload")
        assert receive_exactly(sock, 2) == b"\x05\x00"
        assert receive_reply(sock)[0] == Reply.NOT_ALLOWED
        assert receive_all(sock) == b""
        denied = server.record("ruleset mismatch", client_addr="198.51.100.1:1")
        assert (denied["peer_addr"], denied["rule"], denied["dest_host"]) == (name_of(sock), "allow_from", "127.0.0.1")
    with connected(port) as sock:  # by a rule
        sock.sendall(claim(("192.0.2.66", 2), destination))
        assert not granted(sock)
        assert server.record("ruleset mismatch", client_addr="192.0.2.66:2")["rule"] == "not this one"


def test_local_is_the_peer_itself(server: Daemon, port: int, destination: Served) -> None:
    """Load balancers begin health checks with LOCAL: trusted is enough, allow_from is for clients."""
    with connected(port) as sock:
        sock.sendall(LOCAL_HEADER + GREETING + request("127.0.0.1", destination.port))
        assert granted(sock)
        assert server.record("proxy starts", client_addr=name_of(sock))["peer_addr"] == name_of(sock)


@pytest.mark.parametrize(
    ("said", "error", "answer"),
    [
        (GREETING, "spoke SOCKS with no PROXY header in front", b""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "spoke TLS where a PROXY header is expected", b""),
        (b"GET / HTTP/1.1\r\nHost: proxy\r\n\r\n", "spoke HTTP where a PROXY header is expected", b"HTTP/1.1 501 "),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "PROXY header of version 1, the text: expected version 2", b""),
        (SIGNATURE + b"\x21\x11\xff\xff", "PROXY header of 65535 bytes, at most 4096 are taken", b""),
        (header(("0.0.0.0", 1), CLIENT), "claimed to come from 0.0.0.0", b""),
    ],
)
def test_bytes_that_are_no_header(server: Daemon, port: int, said: bytes, error: str, answer: bytes) -> None:
    """The answer comes at once, and then an end rather than a reset, so that the peer can read it."""
    with connected(port) as sock:
        sock.sendall(said)
        assert receive_all(sock)[: len(answer) or None] == answer
        assert server.record("handshake failed", client_addr=name_of(sock))["error"] == error


def test_a_header_that_never_comes_or_never_ends(server: Daemon, port: int) -> None:
    before = server.fds()
    with connected(port) as silent, connected(port) as slow:
        slow.sendall(SIGNATURE)
        for sock in (silent, slow):
            assert receive_all(sock) == b""
            assert server.record("handshake failed", client_addr=name_of(sock))["error"] == "timed out"
    server.wait_for_fds(before)


def test_peers_that_are_gone(server: Daemon, port: int) -> None:
    before = server.fds()
    accepted = server.records("handshake failed")
    for said in (b"", SIGNATURE):
        with connected(port) as sock:
            sock.sendall(said)
            name = name_of(sock)
        with connected(port) as sock:
            sock.sendall(said)
            daemons.reset(sock)
    # A connection that ends without a word is what many health checks are: no news at this level.
    assert not server.records("handshake failed", client_addr=name)
    server.wait_for_fds(before)
    assert all("timed" not in r["error"] for r in server.records("handshake failed")[len(accepted) :])


def test_limits_go_by_the_named_client(server: Daemon, port: int, destination: Served) -> None:
    """Three connections of each client, through any gateway; any number of each gateway."""
    open_now: list[Socket] = []

    def add(client: str, peer: str = GATEWAY) -> Socket:
        sock = connected(port, peer)
        open_now.append(sock)
        sock.sendall(claim((client, 1), destination))
        return sock

    try:
        for client in ("192.0.2.31", "192.0.2.32", "192.0.2.33"):
            for peer in (GATEWAY, "127.0.0.3", GATEWAY):
                assert granted(add(client, peer))
        assert is_reset(add("192.0.2.31"))
        assert is_reset(add("192.0.2.32", "127.0.0.3"))
        assert granted(add("192.0.2.34"))
        # One of them ends: there is room for one again, and for no more.
        open_now[0].close()
        server.record("proxy ends", client_addr="192.0.2.31:1")
        daemons.wait_until(lambda: granted_or_reset(add("192.0.2.31")), "there is room")
        assert is_reset(add("192.0.2.31"))
    finally:
        for sock in open_now:
            sock.close()


def granted_or_reset(sock: Socket) -> bool:
    try:
        return granted(sock)
    except (ConnectionResetError, AssertionError):
        return False


def test_records_are_decided_alike_again(server: Daemon, port: int) -> None:
    """`usocksd diff` decides every record of the tests above as the daemon did."""
    config = configuration.parse(UsocksdConfig, CONFIG.format(port=port), "test")
    policy = make_policy(config, None, lambda _: False)
    replay = Replay(policy, policy)
    replay.read(line.encode() for line in server.lines())
    assert replay.requests > 3
    assert (replay.disagreement, replay.disagreeing) == (None, 0)


def test_failed_passwords_count_for_the_named_client(tmp_path: Path, port: int, destination: Served) -> None:
    """After 20 failures a client is refused unseen, and other clients of the same gateway are not."""
    users = tmp_path / "users"
    users.write_bytes(b"me:" + bcrypt.hashpw(b"secret", bcrypt.gensalt(4)) + b"\n")
    own = daemons.free_port()
    config = CONFIG.format(port=own).replace("per_client = 3", "").replace("handshake = 1", "handshake = 20")
    with Daemon("usocksd", f'{config}[auth]\nusers_file = "{users}"\n', tmp_path) as server:
        server.ready().record("listening", address=f"127.0.0.1:{own}")

        def login(client: str, password: bytes) -> Socket:
            sock = connected(own)
            credentials = b"\x01\x02me" + bytes((len(password),)) + password
            sock.sendall(header((client, 1), CLIENT) + b"\x05\x01\x02" + credentials)
            return sock

        tries = [login("192.0.2.51", b"%d" % number) for number in range(20)]
        for sock in tries:
            with sock:
                assert receive_exactly(sock, 4) == b"\x05\x02\x01\x01"
        with login("192.0.2.51", b"secret") as sock:
            assert receive_exactly(sock, 4) == b"\x05\x02\x01\x01"
        with login("192.0.2.52", b"secret") as sock:
            assert receive_exactly(sock, 4) == b"\x05\x02\x01\x00"
        assert server.record("too many failed logins")["client_addr"] == "192.0.2.51"

"""Situations that break proxies: impatient, slow and silent clients, no descriptors left, dead DNS, a log that nobody
reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket

import daemons
import lab
import pytest
import test_redirect
from daemons import GREETING, Daemon, NameServer, Served, lives, receive_exactly, receive_reply, request, reset, socks5

CONFIG = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
[outgoing]
allow_sites = ["127.0.0.0/8", ".test"]
[timeouts]
handshake = {handshake}
connect = {connect}
"""
# The long form is that of test_service.py.
IMPATIENT = 10_000 if "TRANSOCKS_HEAVY_SECONDS" in os.environ else 1_500


@contextlib.contextmanager
def usocksd(
    folder: Path, more: str = "", handshake: float = 30, connect: float = 5, **options: object
) -> Iterator[Daemon]:
    config = CONFIG.format(handshake=handshake, connect=connect) + more
    with Daemon("usocksd", config, folder, **options) as daemon:  # type: ignore[arg-type]
        yield daemon


@pytest.fixture
def destination() -> Iterator[Served]:
    with Served(daemons.loopback(backlog=1024), daemons.echo) as server:
        yield server


def connected(server: Daemon) -> Socket:
    return socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE)


def carried(server: Daemon, port: int) -> Socket:
    """A connection through the server, after its handshake."""
    sock = connected(server)
    assert socks5(sock, "127.0.0.1", port)[0] == daemons.GRANTED
    return sock


def test_impatient_clients(tmp_path: Path, destination: Served) -> None:
    """Cut off behind every byte of the handshake, by FIN and by RST, with and without waiting for answers."""
    with usocksd(tmp_path) as server:
        port = server.port
        with carried(server, destination.port) as sock:  # whatever is opened once is open now
            assert lives(sock)
        server.record("proxy ends")
        before = server.fds()
        said = GREETING + request("127.0.0.1", destination.port) + b"payload"
        for number in range(IMPATIENT):
            cut = number // 4 % (len(said) + 1)
            sock = socket.create_connection(("127.0.0.1", port), daemons.PATIENCE)
            if number & 2 and cut > len(GREETING):
                sock.sendall(GREETING)
                receive_exactly(sock, 2)
                sock.sendall(said[len(GREETING) : cut])
            elif cut:
                sock.sendall(said[:cut])
            if number & 1:
                reset(sock)
            else:
                sock.close()
        # The queue is in order: when this one is served, all before it were accepted.
        with carried(server, destination.port) as sock:
            assert lives(sock, b"still there")
        server.wait_for_fds(before)
        # They came as far as they should have: those cut behind the request were connected.
        daemons.wait_until(lambda: len(server.records("proxy ends")) > IMPATIENT // 50, "some were carried")
        daemons.wait_until(
            lambda: len(server.records("proxy starts")) == len(server.records("proxy ends")), "each start has its end"
        )


def test_impatient_clients_of_transocks(host_net: lab.Net, tmp_path: Path) -> None:
    with test_redirect.both(host_net, tmp_path) as (client, server):
        with Served(host_net.outside.listen(lab.WEB_V4, backlog=512), daemons.echo) as web:
            with test_redirect.connect(host_net, 4, web.port) as sock:
                assert lives(sock)
            server.record("proxy ends")
            before = client.fds(), server.fds()
            for number in range(IMPATIENT):
                sock = test_redirect.connect(host_net, 4, web.port)
                if number & 2:
                    sock.sendall(b"impatient")
                if number & 1:
                    reset(sock)
                else:
                    sock.close()
            with test_redirect.connect(host_net, 4, web.port) as sock:  # behind all of them in the queue
                assert lives(sock)
            client.wait_for_fds(before[0])
            server.wait_for_fds(before[1])


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_an_impatient_upstream(host_net: lab.Net, tmp_path: Path, scheme: str) -> None:
    """The proxy of transocks ends after each byte of its answer, by FIN and by RST: the client is reset."""
    said = b"HTTP/1.1 200 OK\r\nVia: 1.1 x\r\n\r\n" if scheme == "http" else b"\x05\x00\x05\x00\x00\x01" + bytes(6)
    cuts = iter([(cut, how) for cut in range(len(said)) for how in (Socket.close, reset)] * 8)

    def leave(sock: Socket) -> None:
        if sock.recv(1000).startswith((b"\x05\x02\xf5", b"CONNECT 255.255.255.255:1 ")):
            sock.sendall(said[:2])  # a probe
            return
        cut, how = next(cuts)
        sock.sendall(said[: min(cut, 2)] if scheme == "socks5" else said[:cut])
        if scheme == "socks5" and cut > 2:
            sock.recv(1000)
            sock.sendall(said[2:cut])
        how(sock)

    with Served(host_net.proxy.listen("127.0.0.1"), leave) as upstream:
        # The clients send nothing, so there must be no wait for first bytes.
        more = "[names]\nsniff = false\n"
        url = f"{scheme}://127.0.0.1:{upstream.port}"
        with test_redirect.transocks(host_net, tmp_path, url, more=more) as client:
            test_redirect.load(host_net, "nft")
            before = client.fds()
            for _ in range(2 * len(said) * 8):
                assert test_redirect.is_refused(host_net, 4, 80)
            client.wait_for_fds(before)
            daemons.wait_until(
                lambda: len(client.records("failed to connect to proxy server")) == 2 * len(said) * 8,
                "all are recorded",
            )
            assert client.records("proxy starts") == []


def test_one_byte_and_silence(tmp_path: Path) -> None:
    with usocksd(tmp_path, handshake=0.3) as server:
        before = server.fds()
        with connected(server) as sock:
            sock.sendall(GREETING[:1])
            assert sock.recv(1) == b""  # gone, after the handshake timeout
        assert server.record("handshake failed")["error"] == "timed out"
        server.wait_for_fds(before)


def test_a_slow_reader_keeps_memory_flat_and_blocks_the_sender(tmp_path: Path) -> None:
    sent = 0
    stalled = threading.Event()

    def pour(sock: Socket) -> None:
        nonlocal sent
        sock.settimeout(1.0)
        try:
            while sent < 1 << 30:
                sent += sock.send(bytes(1 << 18))
        except TimeoutError:
            stalled.set()
        sock.settimeout(daemons.PATIENCE)

    with (
        Served(daemons.loopback(), pour) as source,
        usocksd(tmp_path) as server,
        carried(server, source.port) as sock,
    ):
        before = server.rss()
        assert stalled.wait(daemons.PATIENCE)
        assert sent < 64 << 20  # what the kernel's buffers take; a reader would have had it all
        assert server.rss() - before < 8 << 20
        read = 0
        while read < sent:
            read += len(sock.recv(1 << 20))
        assert read == sent


def test_the_descriptor_limit(tmp_path: Path, destination: Served) -> None:
    limit = 100
    with usocksd(tmp_path, prefix=["prlimit", f"--nofile={limit}:{limit}"]) as server:
        port = server.port
        kept: list[Socket] = []
        with contextlib.ExitStack() as stack:
            established = stack.enter_context(carried(server, destination.port))
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), daemons.PATIENCE))
                for _ in range(limit)
            ]
            for sock in waiting:
                sock.sendall(GREETING + request("127.0.0.1", destination.port))
            paused = server.record("accepting is paused")
            assert "descriptors" in paused["error"]
            assert server.fds() <= limit
            # Existing connections go on.
            assert lives(established, b"alive")
            kept = waiting
        # And when they are gone it accepts again: those that waited, and new ones.
        assert kept
        with carried(server, destination.port) as sock:
            assert lives(sock, b"recovered")
        assert len(server.records("accepting is paused")) == 1  # logged once, not for every connection


def test_those_that_waited_for_a_descriptor_are_served(tmp_path: Path, destination: Served) -> None:
    with usocksd(tmp_path, prefix=["prlimit", "--nofile=80:80"]) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(server)) for _ in range(60)]
        for sock in socks:
            sock.sendall(GREETING + request("127.0.0.1", destination.port))
        server.record("accepting is paused")
        for sock in socks:  # in the order in which they came; each makes room for another
            assert receive_exactly(sock, 2) == b"\x05\x00"
            assert receive_reply(sock)[0] == daemons.GRANTED
            sock.close()


def test_dead_dns_costs_a_client_its_deadline_and_nothing_else(tmp_path: Path, destination: Served) -> None:
    with NameServer({"silent.test": None}) as dns:
        with usocksd(tmp_path, f'[dns]\nservers = ["{dns.address}"]\n', connect=1.5) as server:
            with connected(server) as victim:
                # (Both at once, so that the method selection comes with the reply, at the end.)
                victim.sendall(GREETING + request("silent.test", 80))
                daemons.wait_until(lambda: dns.asked, "the name is asked for")
                while not server.records("dial to destination failed"):  # others go on all the time
                    with carried(server, destination.port) as other:
                        assert lives(other)
                assert receive_exactly(victim, 2) == b"\x05\x00"
                assert receive_reply(victim)[0] == 4  # host unreachable
            assert "timed out" in server.record("dial to destination failed")["error"]
            messages = [record["message"] for record in server.records()]
            assert messages.index("proxy ends") < messages.index("dial to destination failed")


def test_a_client_that_waits_for_a_name_ends_with_the_daemon_and_with_no_error(tmp_path: Path) -> None:
    with NameServer({"silent.test": None}) as dns:
        more = f'stop = 0.2\n[dns]\nservers = ["{dns.address}"]\n'
        with usocksd(tmp_path, more) as server, connected(server) as client:
            client.sendall(GREETING + request("silent.test", 80))
            daemons.wait_until(lambda: dns.asked, "the name is asked for")
            server.signal(signal.SIGTERM)
            assert client.recv(1) == b""
            assert server.ended() == 0
            assert not server.records(severity="error")


def test_a_stopped_destination_is_no_trouble_to_others(tmp_path: Path, destination: Served) -> None:
    with daemons.blackhole() as nowhere, usocksd(tmp_path, connect=1) as server:
        with connected(server) as victim:
            victim.sendall(GREETING + request("127.0.0.1", nowhere))
            with carried(server, destination.port) as other:
                assert lives(other)
            assert receive_exactly(victim, 2) == b"\x05\x00"
            assert receive_reply(victim)[0] == 6  # TTL expired: the nearest there is to a timeout


def test_a_destination_that_is_stopped_midway(tmp_path: Path, destination: Served) -> None:
    """kill -STOP: its kernel still accepts, and takes what its buffers hold. The idle timeout ends it."""
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); s.accept()[0].recv(1); s.accept()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as frozen:
        assert frozen.stdout is not None
        port = int(frozen.stdout.readline())
        with contextlib.ExitStack() as stack:
            stack.callback(frozen.kill)
            server = stack.enter_context(usocksd(tmp_path, "idle = 1\n"))
            before = server.fds()
            midway = stack.enter_context(carried(server, port))
            frozen.send_signal(signal.SIGSTOP)
            late = stack.enter_context(carried(server, port))
            for victim in (midway, late):
                victim.sendall(bytes(100_000))
            while True:  # others go on, until the victims are cut off
                with carried(server, destination.port) as other:
                    assert lives(other)
                if len(server.records("proxy ends", reason="idle timeout")) == 2:
                    break
            for victim in (midway, late):
                with pytest.raises(ConnectionResetError):
                    victim.recv(1)
            server.wait_for_fds(before)


def test_a_full_disk_does_not_stall_the_relay(tmp_path: Path, destination: Served) -> None:
    """/dev/full takes nothing: records are lost, connections are not."""
    port = daemons.free_port()
    config = CONFIG.format(handshake=30, connect=5).replace("port = 0", f"port = {port}")
    with Daemon("usocksd", config, tmp_path, "-logfile", "/dev/full", logfile=None) as server:
        daemons.wait_until(lambda: is_open(port), "it listens")
        carry(50, port, destination)
        server.process.terminate()
        assert server.process.wait(daemons.PATIENCE) == 0


def test_a_pipe_that_nobody_reads_does_not_stall_the_relay(tmp_path: Path, destination: Served) -> None:
    port = daemons.free_port()
    config = CONFIG.format(handshake=30, connect=5).replace("port = 0", f"port = {port}")
    with Daemon("usocksd", config, tmp_path, logfile=None, stderr=subprocess.PIPE) as server:
        daemons.wait_until(lambda: is_open(port), "it listens")
        carry(400, port, destination)  # each with two records of several hundred bytes: more than a pipe holds
        server.process.terminate()
        assert server.process.wait(daemons.PATIENCE) == 0
        assert server.process.stderr is not None
        text = server.process.stderr.read()
    assert len(text) >= 4096  # it was filled
    assert all(line.startswith(b'{"topic"') and line.endswith(b"}") for line in text.splitlines()), "no torn lines"


def carry(times: int, port: int, destination: Served) -> None:
    """This many connections through the server on `port`, one after the other."""
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port), daemons.PATIENCE) as sock:
            assert socks5(sock, "127.0.0.1", destination.port)[0] == daemons.GRANTED
            assert lives(sock)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_client_that_sends_a_byte_at_a_time(tmp_path: Path, destination: Served) -> None:
    with usocksd(tmp_path) as server, connected(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in GREETING + request("127.0.0.1", destination.port) + b"payload":
            sock.sendall(bytes((byte,)))
        assert receive_exactly(sock, 2) == b"\x05\x00"
        assert receive_reply(sock)[0] == daemons.GRANTED
        assert receive_exactly(sock, 7) == b"payload"


def test_garbage_is_answered_and_forgotten(tmp_path: Path) -> None:
    with usocksd(tmp_path) as server:
        before = server.fds()
        for seed in range(300):
            with connected(server) as sock:
                sock.sendall(os.urandom(1 + seed % 40))
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):
                        pass
        server.wait_for_fds(before)

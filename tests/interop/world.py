"""The fixtures of every test here: usocksd as a process, destinations, and names.

    client (curl, ssh, ...) ---> Daemon ---> FarEnd        all of it on loopback, every port the kernel's choice

A test drives a real client, then asks both ends what they saw: the far end, which says who connected to it, and the
daemon's access record of the same connection. Waiting is always for a record, a line or an exit, never for time;
PATIENCE only bounds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bcrypt
import daemons
import pytest
from daemons import PATIENCE, Record

USER, PASSWORD = "alice", "a:b@c/d%41"  # what URLs must encode
OTHER_USER, OTHER_PASSWORD = "björn", "ein Paßwort mit 漢字"

DENIED = "127.0.0.2"  # on no list
# Names and what they lead to; all that end in .test are allowed, so is loopback as far as 127.0.0.1 and ::1.
HOSTS = {
    "inside.test": ("127.0.0.1",),
    "six.test": ("::1",),
    "both.test": ("127.0.0.1", "::1"),
    "xn--bcher-kva.test": ("127.0.0.1",),
    "trap.test": ("127.0.0.9",),  # an allowed name, an address that is not
    "forbidden.test": ("127.0.0.1",),
}
UNKNOWN = "unknown.test"

_CONFIG = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
[outgoing]
allow_sites = ["127.0.0.1", "::1", "localhost", ".test"]
deny_sites = ["forbidden.test"]
[dns]
servers = ["{dns}"]
[timeouts]
stop = 0
"""

# Records of the daemon that a test may cause; any other is a failure.
_KNOWN = {
    "allow_from is not set: only clients on loopback, private and link-local networks are admitted",
    "association ends",
    "association starts",
    "command not supported",
    "dial to destination failed",
    "handshake failed",
    "a worker has drained",
    "listening",
    "proxy ends",
    "proxy starts",
    "ruleset mismatch",
    "stopped",
    "stopping",
    "udp flow",
}


def need(command: str, package: str) -> str:
    """The path of a command, which the Debian package has; skips the test where it is missing."""
    path = shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{command} is not installed (Debian package {package})")
    return path


class Clients:
    """Runs clients, each with an environment and a home that have nothing of the user's in them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {"HOME": str(home), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

    def run(
        self, *command: str | Path, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a client to its end. A non-zero exit status is for the test to judge."""
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            env=self.environment | (environment or {}),
            cwd=self.home,
            timeout=PATIENCE,
            check=False,
        )


class Daemon(daemons.Daemon):
    """A usocksd that serves all tests of a run, each of which reads its own records."""

    def __init__(self, folder: Path, dns: str, auth: str = "") -> None:
        folder.mkdir()
        super().__init__("usocksd", _CONFIG.format(dns=dns) + auth, folder)
        self._seen = 0
        self.address = self.ready().expect("listening")["address"]
        self.host = "127.0.0.1"

    def expect(self, message: str, **fields: object) -> Record:
        """Wait for the next record that says this, with these fields, and return it."""

        def following() -> Record | None:
            for number, record in enumerate(self.records()[self._seen :], self._seen + 1):
                if record.items() >= fields.items() and record["message"] == message:
                    self._seen = number
                    return record
            return None

        record = daemons.wait_until(following, lambda: f"{message!r} {fields}, but: " + "\n".join(self.lines()[-5:]))
        assert record is not None
        return record

    def relayed(self, far: FarEnd, peer: str, **fields: object) -> Record:
        """The record of the connection that the far end saw come from `peer`, when it is over, with these fields.

        The record must agree with the far end about the bytes, and with the record of the connection's start.
        """
        end = self.expect("proxy ends", src_addr=peer)
        (start,) = self.records("proxy starts", request_id=end["request_id"])
        same = {key: end[key] for key in start if key not in {"message", "logged_at", "dest_name", "candidates"}}
        assert start.items() >= same.items()
        received, sent = far.traffic(peer)
        fields |= {"type": "access", "command": "connect", "tx_bytes": received, "rx_bytes": sent, "error": None}
        assert {key: end[key] for key in fields} == fields
        return end

    def end(self) -> None:
        """Output that no test expects is a failure."""
        super().end()
        assert self.stderr() == ""
        assert {record["message"] for record in self.records()} <= _KNOWN


def htpasswd(path: Path) -> Path:
    """A file with the users, at a cost that takes no time."""
    users = {USER: PASSWORD, OTHER_USER: OTHER_PASSWORD}
    lines = [f"{user}:{bcrypt.hashpw(word.encode(), bcrypt.gensalt(4)).decode()}\n" for user, word in users.items()]
    path.touch(mode=0o600)  # the daemon warns of a file that others may read
    path.write_text("".join(lines))
    return path


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
    far: FarEnd

    def __init__(
        self, family: socket.AddressFamily, port: int, handler: type[socketserver.StreamRequestHandler]
    ) -> None:
        self.address_family = family
        super().__init__(("127.0.0.1" if family == socket.AF_INET else "::1", port), handler)


class _Conversation(socketserver.StreamRequestHandler):
    """One connection; counts what it carried."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        host, port = self.client_address[:2]
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.received = self.sent = 0

    def handle(self) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                self.talk()
        finally:
            self.server.far.note(self.peer, self.received, self.sent)

    def talk(self) -> None:
        raise NotImplementedError

    def say(self, data: bytes) -> None:
        self.sent += len(data)
        self.request.sendall(data)

    def heard(self, data: bytes) -> bytes:
        self.received += len(data)
        return data


class _Web(_Conversation):
    """Answers a GET with a page that names the client and the path, a POST with its body."""

    def talk(self) -> None:
        request, length = self.heard(self.rfile.readline()), 0
        while (line := self.heard(self.rfile.readline())).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        body = self.heard(self.rfile.read(length)) or self.server.far.page(request.split()[1].decode()).encode()
        head = f"HTTP/1.1 200 OK\r\nPeer: {self.peer}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.say(head.encode() + body)


class _Echo(_Conversation):
    """Sends a line with the client's address, then echoes."""

    def talk(self) -> None:
        self.say(f"{self.peer}\n".encode())
        while data := self.heard(self.request.recv(65536)):
            self.say(data)


class FarEnd:
    """The destinations: a web page and an echo, on 127.0.0.1 and ::1, and a port on which nobody listens."""

    def __init__(self) -> None:
        self._traffic: dict[str, tuple[int, int]] = {}
        self._noted = threading.Condition()
        self._servers: list[_Server] = []
        self.web = self._serve(_Web)
        self.echo = self._serve(_Echo)
        self._nobody = socket.socket()
        self._nobody.bind(("127.0.0.1", 0))  # taken, but not listening
        self.refused: int = self._nobody.getsockname()[1]

    def _serve(self, handler: type[_Conversation]) -> int:
        while True:
            servers = [_Server(socket.AF_INET, 0, handler)]
            port: int = servers[0].server_address[1]
            try:
                if has_ipv6():
                    servers.append(_Server(socket.AF_INET6, port, handler))
                break
            except OSError:  # the other family's port is taken
                servers[0].server_close()
        for server in servers:
            server.far = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers += servers
        return port

    @staticmethod
    def page(path: str) -> str:
        """The page at this path."""
        return f"You asked for {path}, here it is.\n"

    def note(self, peer: str, received: int, sent: int) -> None:
        """The bytes of a connection by its end."""
        with self._noted:
            self._traffic[peer] = (received, sent)
            self._noted.notify_all()

    def traffic(self, peer: str) -> tuple[int, int]:
        """The bytes received from and sent to a peer, when it has gone."""
        with self._noted:
            assert self._noted.wait_for(lambda: peer in self._traffic, PATIENCE), f"{peer} never came"
            return self._traffic.pop(peer)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._nobody.close()


def has_ipv6() -> bool:
    """Whether ::1 works here."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@contextlib.contextmanager
def dnsmasq(command: str) -> Iterator[str]:
    """A name server that knows HOSTS and nothing else, as "address:port"."""
    records = [f"--host-record={name},{','.join(addresses)}" for name, addresses in HOSTS.items()]
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind(("127.0.0.1", 0))
            port = udp.getsockname()[1]
            try:
                tcp.bind(("127.0.0.1", port))
            except OSError:
                continue
        # fmt: off
        options = [
            "--conf-file=/dev/null", "--keep-in-foreground", "--log-facility=-", "--pid-file=", f"--port={port}",
            "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts", "--address=/#/",
        ]
        # fmt: on
        process = subprocess.Popen([command, *options, *records], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        with process.stderr as lines:
            said = list(until(lambda line: "started" in line, lines))
            try:
                if "started" in said[-1]:
                    yield f"127.0.0.1:{port}"
                    return
                # Otherwise another process has taken the port: try the next one.
                assert "Address already in use" in "".join(said), said
            finally:
                process.terminate()
                process.wait(PATIENCE)


def until(last: Callable[[str], bool], lines: Iterator[str] | Any) -> Iterator[str]:
    """Lines up to and including the first that is `last`, or all lines."""
    for line in lines:
        yield line
        if last(line):
            return


def split_page(answer: bytes) -> tuple[str, str]:
    """An HTTP answer of the far end, as (client that it saw, body)."""
    head, _, body = answer.decode().partition("\r\n\r\n")
    peer = next(line.removeprefix("Peer: ") for line in head.splitlines() if line.startswith("Peer: "))
    return peer, body


def talk(sock: socket.socket, data: bytes) -> str:
    """Sends this to the far end's echo, ends its own direction, and checks the echo; returns the client that the far
    end saw.
    """
    writer = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
    writer.start()
    heard = b""
    while some := sock.recv(65536):
        heard += some
    writer.join()
    peer, _, echoed = heard.partition(b"\n")
    assert echoed == data
    return peer.decode()

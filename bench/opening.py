"""Opening connections through a proxy, many at once: connect, SOCKS5 handshake, one echo.

Each step of the handshake waits for its answer, as ordinary clients do.
"""

import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PAYLOAD = b"e" * 64
GREETING = b"\x05\x01\x00"  # RFC 1928 section 3: version 5, one method, no authentication


@dataclass(frozen=True)
class Plan:
    """The task of the load generator. Without `proxy` it connects to the target, straight or redirected.

    The measured part ends after `seconds`, or `count` connections or echoes, whichever comes first. `patience` is how
    many seconds a proxy may take to start serving, or to answer.
    `size` and `rate` are of datagrams: bytes, and how many are sent a second.
    `target` and `proxy` are IPv4 addresses with ports; `mark` is the socket mark that is redirected.
    """

    measure: Literal["connect", "echo", "bulk", "idle", "udp"]
    connections: int
    seconds: float
    target: tuple[str, int]
    proxy: tuple[str, int] | None = None
    mark: int = 0
    count: int = sys.maxsize
    patience: float = 15.0
    size: int = 0
    rate: float = 0.0


@dataclass(slots=True)
class Opening:
    """A connection on its way through handshake and first exchange: `steps` sent and answered one by one."""

    sock: socket.socket
    step: int = 0
    received: bytes = b""
    waiting_to_send: bool = False


class Failed(Exception):
    """The measure can't be done; the text says why."""


class Opener:
    """Opens connections: connect, handshake, and one small echo that proves the whole path."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.address = plan.proxy or plan.target
        host, port = plan.target
        request = b"\x05\x01\x00\x01" + socket.inet_aton(host) + struct.pack("!H", port)
        self.steps = [GREETING, request, PAYLOAD] if plan.proxy else [PAYLOAD]
        self.epoll = select.epoll()
        self.openings: dict[int, Opening] = {}
        self.errors = 0

    def start(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.plan.mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.plan.mark)
        opening = Opening(sock)
        self.openings[sock.fileno()] = opening
        sock.connect_ex(self.address)  # an error shows at the first send
        self.epoll.register(sock.fileno(), select.EPOLLIN)
        try:
            self.send(opening)  # over loopback the connection is up already
        except OSError:
            self.fail(opening)

    def send(self, opening: Opening) -> None:
        waited, opening.waiting_to_send = opening.waiting_to_send, False
        try:
            opening.sock.send(self.steps[opening.step])
        except BlockingIOError:
            opening.waiting_to_send = True
            self.epoll.modify(opening.sock.fileno(), select.EPOLLOUT)
        else:
            if waited:
                self.epoll.modify(opening.sock.fileno(), select.EPOLLIN)

    def fail(self, opening: Opening) -> None:
        self.errors += 1
        del self.openings[opening.sock.fileno()]
        opening.sock.close()

    def advance(self, opening: Opening) -> bool:
        """Take what came and send the next step; True when the last step has been answered."""
        if opening.waiting_to_send:
            self.send(opening)
            return False
        data = opening.sock.recv(512)
        if not data:
            raise ConnectionResetError
        opening.received = received = opening.received + data
        if len(received) < self.expected(opening):
            return False
        opening.received = b""
        opening.step += 1
        if opening.step == len(self.steps):
            return True
        self.send(opening)
        return False

    def expected(self, opening: Opening) -> int:
        """Length of the answer to the step under way; raises ConnectionError when it is a refusal."""
        step, received = self.steps[opening.step], opening.received
        if step is PAYLOAD:
            return len(PAYLOAD)
        if received[1:2] not in (b"", b"\x00"):
            raise ConnectionRefusedError
        if step is GREETING:
            return 2
        return 22 if received[3:4] == b"\x04" else 10

    def run(self, at_once: int, more: Callable[[], bool], done: Callable[[socket.socket], None]) -> None:
        """Keep `at_once` openings under way while `more()`; give each finished connection to `done`."""
        openings = self.openings
        while True:
            while len(openings) < at_once and more():
                self.start()
            if not openings:
                return
            ready = self.epoll.poll(self.plan.patience)
            if not ready:
                raise Failed(f"{len(openings)} connections got no answer for {self.plan.patience:.0f} s")
            for fd, _events in ready:
                opening = openings[fd]
                try:
                    if self.advance(opening):
                        del openings[fd]
                        self.epoll.unregister(fd)
                        done(opening.sock)
                except BlockingIOError:
                    pass
                except OSError:
                    self.fail(opening)

    def open(self, count: int, at_once: int = 50) -> list[socket.socket]:
        """Open `count` connections that stay open; raises Failed when the proxy keeps refusing."""
        kept: list[socket.socket] = []

        def more() -> bool:
            if self.errors > 100:
                raise Failed(f"refused after {len(kept)} of {count} connections")
            return len(kept) + len(self.openings) < count

        self.run(at_once, more, kept.append)
        return kept

    def wait_until_served(self) -> None:
        deadline = time.monotonic() + self.plan.patience
        while True:
            done: list[socket.socket] = []
            tries = iter([True])
            self.run(1, lambda: next(tries, False), done.append)  # noqa: B023 - used before the next turn
            for sock in done:
                sock.close()
                self.errors = 0
                return
            if time.monotonic() > deadline:
                raise Failed(f"did not serve within {self.plan.patience:.0f} s")
            time.sleep(0.01)

    def turn_over(self, more: Callable[[], bool]) -> int:
        """Open and close connections while `more()`; returns how many went well."""
        count = 0

        def done(sock: socket.socket) -> None:
            nonlocal count
            count += 1
            sock.close()

        self.run(self.plan.connections if self.plan.measure == "connect" else 10, more, done)
        return count

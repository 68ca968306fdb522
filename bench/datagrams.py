"""The load of the measure `udp`: datagrams to the far end and back, through UDP associations, at a fixed rate.

A fixed rate, since a closed loop would stop with the first datagram that is lost; what is lost is counted. The sender
gives each flow one datagram in turn, and reads what has come back now and then, so it costs little.
"""

import contextlib
import socket
import struct
import time

from .opening import Failed, Plan

HEADER = b"\0\0\0\x01"
_RCVBUFFORCE, _BUFFER = 33, 8 << 20  # asm-generic/socket.h; without CAP_NET_ADMIN the kernel's default stays
_TURN = 64  # datagrams between two looks at the clock


class Flows:
    """The sockets of as many associations; without a proxy, plain ones to the target."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.controls: list[socket.socket] = []
        self.socks: list[socket.socket] = []
        host, port = plan.target
        header = HEADER + socket.inet_aton(host) + struct.pack("!H", port) if plan.proxy else b""
        self.message = header + b"d" * plan.size
        for _ in range(plan.connections):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            sock.bind(("127.0.0.1", 0))
            sock.connect(plan.target if plan.proxy is None else self._associate(plan.proxy, sock))
            sock.setblocking(False)
            self.socks.append(sock)

    def _associate(self, proxy: tuple[str, int], sock: socket.socket) -> tuple[str, int]:
        """Where the proxy takes the datagrams of this socket."""
        control = self._connect(proxy)
        self.controls.append(control)
        host, port = sock.getsockname()
        control.sendall(b"\x05\x01\x00")
        if control.recv(2) != b"\x05\x00":
            raise Failed("the proxy wants a password")
        control.sendall(b"\x05\x03\x00\x01" + socket.inet_aton(host) + struct.pack("!H", port))
        reply = control.recv(10, socket.MSG_WAITALL)
        if len(reply) < 10 or reply[1]:
            raise Failed(f"the proxy refuses UDP ASSOCIATE: {reply[1:2].hex()}")
        return socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:10])

    def _connect(self, proxy: tuple[str, int]) -> socket.socket:
        end = time.monotonic() + self.plan.patience
        while True:
            try:
                return socket.create_connection(proxy, self.plan.patience)
            except ConnectionRefusedError:  # it has not started yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def wait_until_served(self) -> None:
        """Until a datagram comes back on each."""
        end = time.monotonic() + self.plan.patience
        for sock in self.socks:
            while not self._comes_back(sock):
                if time.monotonic() > end:
                    raise Failed("no datagram comes back")

    def _comes_back(self, sock: socket.socket) -> bool:
        sock.settimeout(0.2)
        try:
            sock.send(self.message)
            return bool(sock.recv(65536))
        except OSError:
            return False
        finally:
            sock.setblocking(False)

    def drain(self) -> int:
        """Read all that has come back, and count it."""
        count = 0
        for sock in self.socks:
            try:
                while True:
                    sock.recv(65536)
                    count += 1
            except OSError:
                continue
        return count

    def run(self) -> dict[str, float]:
        """Send for `seconds`, or `count` datagrams, at `rate`; count them, those that come back, and those that do not.

        `count` of the result is of datagrams that the proxy has relayed: both ways.
        """
        plan, socks, message = self.plan, self.socks, self.message
        self.drain()
        sent = received = at = 0
        every = 1 if len(socks) < _TURN else 8
        turn = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < plan.seconds and sent < plan.count:
            due = min(int(elapsed * plan.rate) - sent, _TURN, plan.count - sent)
            for _ in range(due):
                with contextlib.suppress(OSError):  # full: it is lost
                    socks[at].send(message)
                at = at + 1 if at + 1 < len(socks) else 0
                sent += 1
            turn += 1
            if turn % every == 0:
                received += self.drain()
            if due <= 0:
                time.sleep(0.0005)
        elapsed = time.perf_counter() - start
        time.sleep(0.2)
        received += self.drain()
        return {"count": sent + received, "seconds": elapsed, "lost": 1 - received / sent}

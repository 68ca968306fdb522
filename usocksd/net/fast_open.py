"""TCP Fast Open (RFC 7413): the first bytes of a connection travel with its SYN, where the server has agreed to that.

The kernel does it. It asks a server for a cookie with the first connection and keeps one for each address; without one
it connects as ever. What is left to us:

- With a cookie, connect(2) returns at once and has sent nothing: the SYN goes out with the first send, and whether
  anybody is there shows when the answer comes. `UnprovenEndpoint` is such an endpoint.
- A SYN may arrive twice, and its bytes with it, as two connections. So it may carry only bytes that do no harm when
  they arrive twice: a proxy's handshake, a TLS hello.
- Some firewalls drop a SYN that has the option, or data. The kernel sends it again without, after a second, but does
  not remember that (net.ipv4.tcp_fastopen_blackhole_timeout_sec is 0 by default). So we do: for a minute, since any
  SYN may get lost, and twice as long each time that the next one is lost too, up to an hour.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import NamedTuple

from usocksd.errors import DialError
from usocksd.net import tcp_info
from usocksd.net.endpoint import DeadlineExpired, Endpoint
from usocksd.net.reactor import OUT, Reactor

# tcp(7): since Linux 4.11. Python has no name for it.
_TCP_FASTOPEN_CONNECT = 30
_NOT_CONNECTED = (tcp_info.SYN_SENT, tcp_info.CLOSE)
# How many connections that began with data may wait for the rest of their handshake. Past that, the kernel ignores a
# SYN's data.
_QUEUE = 1024
# The kernel repeats a SYN after a second (RFC 6298, section 2.1). A connect that took nearly as long may have lost one.
_LOST_AFTER = 0.9
_AVOID_FOR, _AVOID_FOR_AT_MOST = 60.0, 3600.0
_MOST_BLAMED = 4096


class _Blame(NamedTuple):
    """A SYN with Fast Open was lost on the way to a host."""

    until: float
    """on the reactor's clock: no Fast Open to that host before"""
    seconds: float
    """how long that was"""


class LostSyns:
    """Hosts to which SYNs with Fast Open get lost."""

    def __init__(self) -> None:
        self._blamed: dict[str, _Blame] = {}

    def ask(self, sock: socket.SocketType, host: str, now: float) -> bool:
        """Have the connect(2) that follows use Fast Open. False if it will not: such SYNs have been lost on the way to
        `host`, or the kernel knows no Fast Open.
        """
        if self._blamed and host in self._blamed and self._blamed[host].until > now:
            return False
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN_CONNECT, 1)
        except OSError:
            return False
        return True

    def answered(self, sock: socket.SocketType, host: str, took: float, now: float) -> None:
        """A SYN with Fast Open to `host` got its answer after `took` seconds."""
        blame = self._blamed.get(host) if self._blamed else None
        if blame is not None and blame.until > now:
            return  # sent without Fast Open, or begun before the block
        # (A late answer without a loss: the host is far away, or this process did not run.)
        if took < _LOST_AFTER or not tcp_info.retransmitted(sock):
            if blame is not None:
                del self._blamed[host]
            return
        if len(self._blamed) >= _MOST_BLAMED:
            self._blamed.clear()
        seconds = _AVOID_FOR if blame is None else min(2 * blame.seconds, _AVOID_FOR_AT_MOST)
        self._blamed[host] = _Blame(now + seconds, seconds)


def accept_fast_open(listener: socket.socket) -> None:
    """Allow data in the SYN of accepted connections, if net.ipv4.tcp_fastopen does (2; not by default)."""
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, _QUEUE)


class UnprovenEndpoint(Endpoint):
    """An endpoint whose connect(2) has returned without an answer: its SYN goes out with the first `send_all`.

    Nothing happens before that. Until the peer has answered (`unproven`), any failure is a failed connect: every wait
    here raises DialError, also for the deadline.
    """

    __slots__ = ("_address", "_host", "_lost_syns", "_since", "unproven")

    def __init__(self, reactor: Reactor, sock: socket.SocketType, host: str, address: str, lost_syns: LostSyns) -> None:
        self.unproven = True
        self._lost_syns = lost_syns
        self._host = host
        self._address = address
        self._since: float | None = None
        super().__init__(reactor, sock, connecting=True)
        self.writable = True

    async def send_all(self, data: bytes) -> None:
        """As `Endpoint.send_all`. The first bytes may arrive twice. What does not fit into the SYN follows after its
        answer.
        """
        if self._since is None:
            self._since = self.reactor.clock()
        try:
            await super().send_all(data)
        except (OSError, DeadlineExpired) as error:
            raise self._cause(error) from None

    async def receive(self) -> bytes:
        """As Endpoint's."""
        try:
            data = await super().receive()
        except (OSError, DeadlineExpired) as error:
            raise self._cause(error) from None
        self.unproven = False
        return data

    async def proven(self) -> None:
        """Wait for the answer to the SYN, that is after a first `send_all`."""
        try:
            while self.unproven:
                await self.wait()
                if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "")
        except (OSError, DeadlineExpired) as error:
            raise self._cause(error) from None

    def on_event(self, flags: int) -> None:
        since = self._since if flags & OUT else None
        # (The event of a socket that has not connected yet says too that it is writable.)
        if self.unproven and since is not None and tcp_info.state(self.sock) not in _NOT_CONNECTED:
            self.unproven = False
            now = self.reactor.now
            self._lost_syns.answered(self.sock, self._host, now - since, now)
        super().on_event(flags)

    def _cause(self, error: OSError | DeadlineExpired) -> Exception:
        if not self.unproven:
            return error
        number = errno.ETIMEDOUT if isinstance(error, DeadlineExpired) else error.errno or errno.EIO
        return DialError(number, self._address)

"""One socket of a session, before and after its relay: connect, receive and send, each waiting through the reactor."""

from __future__ import annotations

import socket
from collections.abc import Callable
from math import inf

# The C base class of socket.socket: the same system calls without the Python layer, which costs 3 us per accept.
from socket import SocketType
from typing import Any, Protocol

from usocksd.errors import Error
from usocksd.net.reactor import BROKEN, MORE, OUT, Reactor, Waitable

# Enough for a handshake. Further bytes stay in the socket.
_RECEIVE_SIZE = 16 * 1024
# struct linger { on, 0 seconds }, see socket(7)
_LINGER_ZERO = b"\x01\x00\x00\x00\x00\x00\x00\x00"


def set_options(sock: socket.SocketType) -> None:
    """The options of every proxied connection, on either side; accepted sockets inherit them from their listener.

    TCP_NODELAY: a proxy that waits for more to send only adds delay. SO_OOBINLINE: the urgent byte is not lost.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


class DeadlineExpired(Exception):
    """The deadline of an endpoint has passed while a session waited on it."""


class PeerReset(Exception):
    """The client is gone (reset) while its session was busy elsewhere."""


class OutOfWatches(Error):
    """The kernel refuses to report events of this socket (fs.epoll.max_user_watches, or memory)."""


class About(Protocol):
    """A session's description of its connection."""

    def describe(self) -> dict[str, Any]:
        """The present values, for JSON."""


class Interruptible(Waitable):
    """What a session waits for, if that may be the work of others; see bridge.py."""

    __slots__ = ("on_interrupt",)

    def __init__(self, reactor: Reactor) -> None:
        super().__init__(reactor)
        self.on_interrupt: Callable[[BaseException], None] | None = None
        """Ends what its session waits for instead: the peer is gone, or the process stops."""

    def check_peer(self) -> None:
        """Raise PeerReset if nobody needs the work any more."""

    def interrupt(self, reason: BaseException) -> None:
        """Raise `reason` in the session, if it waits here or where `on_interrupt` reaches it."""
        if self.on_interrupt is not None:
            self.on_interrupt(reason)
        else:
            self.wake(reason)


class Endpoint(Interruptible):
    """A connected (or connecting) non-blocking TCP socket of one session: its bytes before and after the relay.

    Only its session waits on an endpoint. Events that arrive while it does not are remembered.
    `deadline` (on the reactor's clock) bounds every wait; past it the wait raises DeadlineExpired.
    """

    unproven: bool = False
    """connect(2) has returned, and the peer has not answered yet; see fast_open.py."""
    transparent: bool = False
    """Its listener has IP_TRANSPARENT (ip(7)): our end of the connection is where the client was going."""

    __slots__ = (
        "_watched",
        "about",
        "bound",
        "deadline",
        "fd",
        "more",
        "readable",
        "sock",
        "writable",
    )

    def __init__(self, reactor: Reactor, sock: SocketType, *, connecting: bool = False, watched: bool = True) -> None:
        """`watched`: events are reported from now on; else from the first `receive` or `watch` on."""
        super().__init__(reactor)
        self.sock = sock
        self.fd = sock.fileno()
        self.deadline = inf
        self.readable = not watched
        self.more = False
        """An event reported an end, an error or urgent data: read on until recv(2) would block."""
        self.writable = not connecting
        self.bound: tuple[str, int] | None = None
        """Our end of an accepted connection, where its listener has but one address."""
        self.about: About | None = None
        """The session's description of the connection, on a client's endpoint."""
        self._watched = watched
        if watched:
            reactor.register(self.fd, self, connecting=connecting)
        else:
            reactor.handlers[self.fd] = self  # for its deadline

    def local_address(self) -> tuple[str, int]:
        """Our end of the connection, as getsockname(2) tells it."""
        return self.bound or self.sock.getsockname()[:2]

    async def receive(self) -> bytes:
        """Up to 16 KiB as soon as there is any; b"" at the end of the stream.

        Raises OSError as recv(2) does, DeadlineExpired, OutOfWatches, and whatever `interrupt` was given.
        """
        while True:
            if not self.readable:
                await self.wait()
                continue
            data = self.receive_now()
            if data is not None:
                return data

    def receive_now(self) -> bytes | None:
        """What `receive` would return without waiting, whatever events have come so far; None if there is nothing.

        Raises OSError as recv(2) does, and OutOfWatches.
        """
        try:
            data = self.sock.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            self.readable = self.more = False
            self.watch()
            return None
        # Not before recv: these bytes no longer need an event.
        self.watch()
        self.readable = self.more or len(data) == _RECEIVE_SIZE
        return data

    def watch(self) -> None:
        """Have events reported from now on. Accepted connections begin without: most clients have sent something when
        their session begins, and reading it directly costs less than an event.

        Raises OutOfWatches.
        """
        if not self._watched:
            self._watched = True
            try:
                self.reactor.register(self.fd, self)
            except OSError as error:
                raise OutOfWatches(f"no more sockets can be watched: {error.strerror} (epoll(7))") from None

    async def send_all(self, data: bytes) -> None:
        """Write all of `data`. Raises as `receive` does."""
        sent = self._send_some(data)
        while sent < len(data):
            self.reactor.watch_writable(self.fd)
            while not self.writable:
                await self.wait()
            sent += self._send_some(data[sent:])

    async def connected(self) -> int:
        """Wait for a connect(2) in progress. Returns 0 or the errno it failed with."""
        while not self.writable:
            await self.wait()
        return self.connect_error()

    def connect_error(self) -> int:
        """0 or the errno that connect(2) failed with. Only once it is `writable`."""
        # (The event of a failed connect sets `more`.)
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self.more else 0

    async def proven(self) -> None:
        """Wait until the peer has answered connect(2): it has, unless `unproven`."""

    async def finish(self, data: bytes, within: float) -> None:
        """Send a last message and let the peer read it: send, end our side, wait `within` seconds for its end, close.

        A close with unread input would reset the connection, and the peer might lose `data`.
        """
        self.deadline = self.reactor.clock() + within
        try:
            await self.send_all(data)
            self.sock.shutdown(socket.SHUT_WR)
            # If the peer sends without a pause, receive never waits, so check the deadline and let others run.
            while self.reactor.clock() < self.deadline and await self.receive():
                await self.reactor.yield_turn()
        except (OSError, DeadlineExpired):
            pass
        finally:
            self.close()

    def check_peer(self) -> None:
        """Raise PeerReset if the peer's reset came in one event with its last bytes, since no other event will report
        it.
        """
        if self.more and self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise PeerReset

    def close(self) -> None:
        """Close the socket: FIN, after what was sent. Only its session calls this; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.reactor.forget(fd)
            self.sock.close()

    def reset(self) -> None:
        """Close the socket with RST: data that the peer has not acknowledged may be lost."""
        if self.fd >= 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self.close()

    def on_event(self, flags: int) -> None:
        if flags & (OUT | BROKEN):
            self.writable = True
        if flags & ~OUT:
            self.readable = True
            if flags & MORE:
                self.more = True
        if self._waiting is not None:
            self.wake()
        elif flags & BROKEN and self.on_interrupt is not None:
            # Behind the sessions of this turn: an event may just have woken the one that is to be told, and what it
            # is told only counts while it waits.
            self.reactor.call_soon(self._tell_of_reset)

    def on_deadline(self, now: float) -> None:
        self.wake(DeadlineExpired())

    def _tell_of_reset(self) -> None:
        if self.on_interrupt is not None:
            self.on_interrupt(PeerReset())

    def _send_some(self, data: bytes) -> int:
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self.writable = sent == len(data)
        return sent


class TransparentEndpoint(Endpoint):
    """A connection from a listener with IP_TRANSPARENT."""

    __slots__ = ()
    transparent = True

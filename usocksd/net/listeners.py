"""Listening sockets: opens them with the options that accepted connections inherit, and accepts in batches."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from math import inf
from socket import SocketType

from usocksd.errors import Error
from usocksd.net.address import join_port, socket_address, unmapped
from usocksd.net.endpoint import Endpoint, TransparentEndpoint, set_options
from usocksd.net.fast_open import accept_fast_open
from usocksd.net.keepalive import KeepAlive, KeepAliveTiming, keep_alive
from usocksd.net.reactor import Reactor, Timer
from usocksd.net.tcp_info import accept_queue

log = logging.getLogger(__name__)

# The kernel caps it at net.core.somaxconn.
_BACKLOG = 4096
# How many connections are accepted before the established ones get their turn again.
_BATCH = 64

# As trio's documentation of serve_listeners argues: without descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM) the
# connection stays in the queue, so wait a little and go on, with a record now and then. The same after an unforeseen
# error: an exception here would end every connection of the process.
#
# accept(2) reports errors that one connection had in the queue, or that a firewall forbids it: go on with the next.
_CONNECTION_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)
_PAUSE = 0.1
# For how long a process that has taken its share of the waiting connections leaves the rest to the others.
_GIVE_WAY = 0.001
# linux/in.h; Python has no name for it. This option sets the socket's flag for IPv6 too.
_IP_TRANSPARENT = 19
_RECORD_AGAIN_AFTER = 10.0
_ANY = ("0.0.0.0", "::")

Accepted = Callable[[Endpoint, str, int], None]
"""Called for each connection with its endpoint, and the peer's numeric address and port."""


class ListenError(Error):
    """A listening socket could not be opened; `transparent`: one with IP_TRANSPARENT."""

    def __init__(self, place: str, number: int, *, transparent: bool = False) -> None:
        problem = os.strerror(number)
        if transparent and number == errno.EPERM:
            # (To bind to a port below 1024 is EACCES.)
            problem = (
                "a socket with IP_TRANSPARENT needs CAP_NET_ADMIN: give it to the service"
                " (AmbientCapabilities= of the unit), or let systemd open the socket (Transparent= of a .socket unit)"
            )
        super().__init__(f"can't listen on {place}: {problem}")
        self.errno = number


NO_SUCH_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""The errno values of a ListenError on a host that lacks the address's family, or the address."""


def listen(host: str, port: int, *, reuse_port: bool = False, transparent: bool = False) -> socket.socket:
    """Open a listening TCP socket on the numeric address `host`; `reuse_port`: one of several on the same port;
    `transparent`: with IP_TRANSPARENT of ip(7), for connections that TPROXY rules bring here.

    Raises ListenError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        set_listener_options(sock)
        if transparent:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        accept_fast_open(sock)
        sock.bind(socket_address(host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ListenError(join_port(host, port), error.errno or errno.EIO, transparent=transparent) from None
    return sock


def may_be_transparent() -> bool:
    """Whether this process may open sockets with IP_TRANSPARENT."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        except OSError:
            return False
    return True


def is_transparent(sock: socket.SocketType) -> bool:
    """Whether this socket has IP_TRANSPARENT; accepted sockets inherit it, in both families."""
    return bool(sock.getsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT))


def set_listener_options(sock: socket.SocketType) -> None:
    """Set the options that accepted connections inherit."""
    set_options(sock)
    keep_alive(sock, KeepAlive().open)  # a worker sets the values of its configuration


class Listener:
    """Accepts from one listening socket, as a handler of the reactor. `processes`: how many share the socket.

    The kernel wakes the first of those processes in its list that waits for events. For all to get their share, a
    process that accepts goes to the end of the list. When several connections wait, others have been woken, but may not
    run yet: so it takes a share, and looks again a moment later.

    `room` tells whether the process has descriptors for one more connection. If not, connections wait in the kernel's
    queue, and are not accepted to be refused.
    """

    # Has each sweep look at the queue: a process that was woken for a connection may end or hang before it accepts, and
    # the kernel wakes no other.
    deadline = -inf

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        accepted: Accepted,
        *,
        room: Callable[[], bool],
        processes: int = 1,
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._accept = sock._accept  # type: ignore[attr-defined]  # accept() without the Python layer over it
        self._kind = (int(sock.family), int(sock.type), sock.proto)
        self._accepted = accepted
        self._room = room
        self._processes = processes
        self._endpoint = TransparentEndpoint if is_transparent(sock) else Endpoint
        self._bound = _one_address(sock)
        self._recorded = -inf
        self._return: Timer | None = None
        self.paused = False
        self._fd = sock.fileno()
        self._watch()

    def on_event(self, flags: int) -> None:
        waiting = accept_queue(self._sock)[0]
        if self._processes > 1 and waiting:
            self._reactor.unregister(self._fd)
            if waiting == 1:
                self._watch()
            else:
                waiting = -(-waiting // self._processes)
                self._watch_in(_GIVE_WAY)
        self._take(waiting)

    def on_deadline(self, now: float) -> None:
        self.on_event(0)

    def _take(self, waiting: int) -> None:
        family, kind, protocol = self._kind
        for _ in range(min(waiting, _BATCH)):
            if not self._room():
                self._pause("too few file descriptors left")
                return
            try:
                fd, address = self._accept()
            except OSError as error:
                if error.errno in _CONNECTION_ERRNOS:
                    continue
                if error.errno != errno.EAGAIN:
                    self._pause(os.strerror(error.errno or errno.EIO))
                return
            sock = SocketType(family, kind, protocol, fd)
            sock.setblocking(False)
            endpoint = self._endpoint(self._reactor, sock, watched=False)
            endpoint.bound = self._bound
            host = address[0]
            if host[:7] == "::ffff:":  # of a socket for both families, which systemd may have opened
                host = unmapped(host)
            self._accepted(endpoint, host, address[1])

    def close(self) -> None:
        """Accept the connections that wait now, and no more."""
        self._reactor.unregister(self._fd)
        # The kernel resets connections that wait when the last process closes the socket. So look again for those that
        # have come while others were accepted: a few times, since clients may come faster than they are accepted.
        for _ in range(accept_queue(self._sock)[0] // _BATCH + 4):
            if not self.paused:
                self._take(accept_queue(self._sock)[0])
        self._sock.close()
        if self._return is not None:
            self._return.cancel()

    def keep_alive(self, timing: KeepAliveTiming) -> None:
        """How the kernel probes connections that are accepted from now on."""
        keep_alive(self._sock, timing)

    def interrupt(self, reason: BaseException) -> None:
        """Nothing waits here: a listener is closed, not interrupted."""

    def _watch(self) -> None:
        self._return = None
        self.paused = False
        try:
            self._reactor.register_listener(self._fd, self)
        except OSError as error:  # no more sockets can be watched
            self._pause(os.strerror(error.errno or errno.EIO))

    def _watch_in(self, seconds: float) -> None:
        if self._return is not None:
            self._return.cancel()
        self._return = self._reactor.call_at(self._reactor.now + seconds, self._watch)

    def _pause(self, cause: str) -> None:
        now = self._reactor.now
        self.paused = True
        self._reactor.unregister(self._fd)
        self._watch_in(_PAUSE)
        if now - self._recorded > _RECORD_AGAIN_AFTER:
            self._recorded = now
            log.error(
                "accepting is paused",
                extra={"fields": {"error": cause, "waiting": accept_queue(self._sock)[0]}},
            )


def _one_address(sock: socket.socket) -> tuple[str, int] | None:
    """Our address of all connections to this listener; None if it differs."""
    host, port = sock.getsockname()[:2]
    return None if is_transparent(sock) or host in _ANY else (host, port)

"""UDP sockets: opens them, and reads them in turns of the reactor. And what all UDP associations have in common.

A socket is registered level-triggered, and a step reads as many datagrams as usually wait: so the common single
datagram costs one recv, not a second one that finds nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from math import inf
from socket import SocketType

from usocksd.errors import DialError
from usocksd.net.address import bound_to, join_port, socket_address
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import About, Interruptible
from usocksd.net.reactor import Reactor

_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
# linux/in6.h, since Linux 4.15: bind to an address that no interface has. (For IPv4 a local route is enough.)
_IPV6_FREEBIND = 78
# The kernel counts some 770 bytes for a small datagram, so its default (208 KiB) is full after 5 ms at 50,000 a second.
# It grants at most net.core.rmem_max.
_RECEIVE_BUFFER = 1 << 20
# Datagrams of one socket in one turn: then others get theirs.
_BATCH = 64
_SO_MEMINFO, _MEMINFO = 55, struct.Struct("9I")  # linux/sock_diag.h: the last one is of dropped datagrams


def open_socket(
    *,
    v6: bool,
    host: str | None = None,
    port: int = 0,
    iface: str | None = None,
    mark: int | None = None,
    routed: bool = False,
) -> SocketType:
    """A non-blocking UDP socket, bound to this numeric address (None: not bound) and port (0: the kernel chooses).

    The others are as in `Target` of dial.py. Raises DialError with the errno and the step that failed.
    """
    place = join_port(host or ("::" if v6 else "0.0.0.0"), port)
    step = "socket for"
    sock = None
    try:
        sock = SocketType(socket.AF_INET6 if v6 else socket.AF_INET, _DATAGRAM)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        if mark is not None:
            step = f"mark {mark:#x} for"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if iface is not None:
            step = f"interface {iface} for"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, iface.encode() + b"\0")
        if host is not None:
            step = "bind"
            if routed and v6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            sock.bind(socket_address(host, port))
    except OSError as error:
        if sock is not None:
            sock.close()
        raise DialError(error.errno or errno.EIO, f"{place} (UDP)", step) from None
    return sock


def source_towards(host: str, port: int, *, iface: str | None = None, mark: int | None = None) -> str | None:
    """The address that the kernel chooses for what is sent to this numeric address; None if there is no route."""
    try:
        sock = open_socket(v6=":" in host, iface=iface, mark=mark)
    except DialError:
        return None
    try:
        sock.connect(socket_address(host, port))
        return bound_to(sock).host
    except OSError:
        return None
    finally:
        sock.close()


class DatagramSocket:
    """A UDP socket as a handler of the reactor; a subclass receives from it."""

    __slots__ = ("_budget", "_turn", "deadline", "fd", "reactor", "sock")

    def __init__(self, reactor: Reactor, sock: SocketType) -> None:
        """Raises OSError if the kernel watches no more sockets (fs.epoll.max_user_watches)."""
        self.reactor = reactor
        self.sock = sock
        self.fd = sock.fileno()
        self.deadline = inf
        self._budget = 1
        self._turn = 0
        reactor.register_datagrams(self.fd, self)

    def receive(self) -> bool:
        """Receive one datagram, and do what is to be done with it. False if there is none."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """`receive` has raised this, which is a bug."""
        raise NotImplementedError

    def on_event(self, flags: int) -> None:
        turn = self.reactor.turns
        budget = self._budget
        if turn == self._turn + 1 and budget < _BATCH:
            budget *= 2  # the last step left some, or more come now
        try:
            for number in range(budget):
                if not self.receive():
                    self._budget = number or 1
                    return
        except Exception as error:
            self.failed(error)
        self._budget = budget
        self._turn = turn

    def on_deadline(self, now: float) -> None:
        """Nothing has a deadline here, unless a subclass sets one."""

    def interrupt(self, reason: BaseException) -> None:
        """The association's connection is interrupted, and ends this too."""

    def overflowed(self) -> int:
        """How many datagrams the kernel has dropped because the socket's buffer was full."""
        found = self.sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        return int(_MEMINFO.unpack(found)[8]) if len(found) == _MEMINFO.size else 0

    def close(self) -> None:
        """Close it. Only behind the events of a turn (see reactor.py); a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.reactor.forget(fd)
            self.sock.close()


class Ended(Exception):
    """Raised where the session of an association waits: it has been ended by `Association.end`."""


class Association:
    """A client's UDP, which lives as long as the TCP connection `control`: what the worker needs to know of it."""

    __slots__ = ("about", "active", "control", "result")

    def __init__(self, control: Interruptible, about: About) -> None:
        self.control = control
        self.about = about
        self.active = control.reactor.now
        """When the client last sent a datagram."""
        self.result: tuple[Reason, Side] | None = None

    def moved(self) -> tuple[int, int]:
        """Bytes so far, to destinations and from there."""
        raise NotImplementedError

    def end(self, reason: Reason, by: Side) -> None:
        """End it, unless it ends already."""
        if self.result is None:
            self.result = reason, by
            self.control.interrupt(Ended())

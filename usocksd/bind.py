"""BIND: takes one connection for a client, from a host that the client has named (RFC 1928 sections 4 and 6, SOCKS4).

    request -> rules on the peer, as for CONNECT -> egress address -> listen there -> first reply: address and port
            -> the peer connects -> second reply: the peer -> relay

An FTP client in active mode, for example, tells the server that address and port. The listening socket is on the
egress address that the client's connections to that peer leave from, so that the server sees one host.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from itertools import chain
from math import inf
from random import randrange
from socket import SocketType
from typing import Final

from usocksd.decision import Decision
from usocksd.egress import Source
from usocksd.errors import DialError
from usocksd.log.metrics import Counter
from usocksd.net.address import HostPort, join_port, numeric_address, socket_address, unmapped
from usocksd.net.datagrams import source_towards
from usocksd.net.endpoint import Endpoint, PeerReset, set_options
from usocksd.net.reactor import Waitable

_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_IPV6_FREEBIND: Final = 78  # linux/in6.h
_BACKLOG: Final = 8
_LINGER_ZERO: Final = b"\x01\0\0\0\0\0\0\0"
_UNSPECIFIED: Final = ("0.0.0.0", "::")


class Binder:
    """What [bind] says."""

    def __init__(self, *, ports: tuple[int, int] | None, wait: float, strangers: Counter) -> None:
        """`ports`: first and last; None leaves the choice to the kernel. `wait`: seconds for the peer to connect.
        `strangers` counts connections from others, which are reset.
        """
        self._ports = ports
        self._wait = wait
        self._strangers = strangers

    def listen(
        self, client: Endpoint, decision: Decision, found: list[tuple[str, Source]], judge: Callable[[str], bool]
    ) -> Rendezvous:
        """Listen for one of the peers in `found`, at the egress address for the first. If that is 0.0.0.0 or ::, which
        a rule has to list, `judge` tells which peers the rules allow.

        Raises DialError if that can't be.
        """
        host, source = found[0]
        address = source.address
        if host in _UNSPECIFIED:
            if address is None:
                raise DialError(errno.EADDRNOTAVAIL, f"{host}: its pool has no addresses", "bind for")
        else:
            peers = {numeric_address(one) for one, _ in found}
            judge = lambda peer: numeric_address(peer) in peers  # noqa: E731
            address = address or source_towards(host, decision.port or 1, iface=source.iface, mark=source.mark)
        if address is None:
            raise DialError(errno.ENETUNREACH, host, "bind for")
        sock = self._open(address, host, source)
        return Rendezvous(client, sock, judge, self._strangers, client.reactor.clock() + self._wait)

    def _open(self, address: str, host: str, source: Source) -> SocketType:
        v6 = ":" in address
        failure = DialError(errno.EADDRINUSE, f"a port of {self._ports} (bind.ports)", "bind")
        first, last = self._ports or (0, 0)
        begin = randrange(first, last + 1)
        for port in chain(range(begin, last + 1), range(first, begin)):
            sock = SocketType(socket.AF_INET6 if v6 else socket.AF_INET, _STREAM)
            try:
                set_options(sock)
                if source.mark is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, source.mark)
                if source.iface is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, source.iface.encode() + b"\0")
                if source.routed and v6:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
                sock.bind(socket_address(address, port))
                sock.listen(_BACKLOG)
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRINUSE:
                    raise DialError(error.errno or errno.EIO, join_port(host, 0), f"bind {address} for") from None
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise failure


class Rendezvous(Waitable):
    """A listening socket that takes one connection, of a peer that may."""

    # Has each sweep look whether the client still waits.
    deadline = -inf

    def __init__(
        self, client: Endpoint, sock: SocketType, judge: Callable[[str], bool], strangers: Counter, until: float
    ) -> None:
        super().__init__(client.reactor)
        self._client = client
        self._sock = sock
        self._fd = sock.fileno()
        self._judge = judge
        self._strangers = strangers
        self._until = until
        self._taken: tuple[SocketType, HostPort] | None = None
        host, port = sock.getsockname()[:2]
        self.address = HostPort(host, port)
        """Where it listens."""
        self.reactor.register_datagrams(self._fd, self)

    async def peer(self) -> tuple[Endpoint, HostPort]:
        """The connection of the peer, and its address. Raises DialError if none comes in time, and PeerReset if the
        client is gone.
        """
        self._client.check_peer()
        self._client.on_interrupt = self.interrupt
        try:
            if self._taken is None:
                await self.wait()
        finally:
            self._client.on_interrupt = None
        assert self._taken is not None
        sock, place = self._taken
        self._taken = None
        return Endpoint(self.reactor, sock), place

    def close(self) -> None:
        """Listen no more. Only its session calls this."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.reactor.forget(fd)
            self._sock.close()
        if self._taken is not None:
            self._taken[0].close()
            self._taken = None

    def on_event(self, flags: int) -> None:
        if self._taken is not None:
            return
        try:
            fd, address = self._sock._accept()  # type: ignore[attr-defined]  # accept() without the Python layer
        except OSError:  # the peer has gone again
            return
        sock = SocketType(self._sock.family, self._sock.type, self._sock.proto, fd)
        sock.setblocking(False)
        host = unmapped(address[0])
        if self._judge(host):
            self._taken = sock, HostPort(host, address[1])
            self.reactor.unregister(self._fd)  # one is enough
            self.wake()
        else:
            self._strangers.value += 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            sock.close()

    def on_deadline(self, now: float) -> None:
        if now >= self._until:
            self.wake(DialError(errno.ETIMEDOUT, str(self.address), "wait at"))
        elif self._client_has_ended():
            self.wake(PeerReset())

    def interrupt(self, reason: BaseException) -> None:
        """Raise `reason` in the session that waits."""
        self.wake(reason)

    def _client_has_ended(self) -> bool:
        try:
            return not self._client.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

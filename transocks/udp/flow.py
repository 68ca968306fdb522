"""A flow: what one port of a client and one destination send each other. This is the client's side of it."""

from __future__ import annotations

import errno
from socket import SocketType
from typing import TYPE_CHECKING, Any, Final

from usocksd.net.address import HostPort
from usocksd.net.datagrams import DatagramSocket
from usocksd.net.ending import Reason, Side
from usocksd.socks.datagram import header

if TYPE_CHECKING:
    from transocks.udp.association import UdpAssociation

ROOM: Final = 22
"""A client's datagram is received behind room for the longest header that it may get, that of an IPv6 address."""
_DNS_PORT: Final = 53
# Seconds, as RFC 4787 REQ-5 a) allows for port 53: stub resolvers have given up by then.
_DNS_IDLE: Final = 17.0
# A stub resolver asks for A and AAAA through one socket.
_DNS_QUERIES: Final = 2


class ClientFlow(DatagramSocket):
    """A socket with the destination's address, connected to the client's port."""

    __slots__ = (
        "_client",
        "address",
        "association",
        "header",
        "key",
        "place",
        "queries",
        "route",
        "rx_bytes",
        "rx_packets",
        "since",
        "start",
        "tx_bytes",
        "tx_packets",
        "used",
    )

    def __init__(
        self,
        association: UdpAssociation,
        sock: SocketType,
        key: tuple[tuple[Any, ...], tuple[Any, ...]],
        place: HostPort,
        route: str,
    ) -> None:
        """`key`: the client's address and the destination's, which is also `place`, as sockets give them."""
        super().__init__(association.reactor, sock)
        now = association.reactor.now
        self.association = association
        self.key = key
        self._client: tuple[Any, ...] = key[0]
        self.address: tuple[Any, ...] = key[1]
        self.place = place
        self.route = route
        self.header = header(place.host.partition("%")[0], place.port)
        self.start = ROOM - len(self.header)
        """Where the header begins in the reactor's buffer."""
        self.since = now
        self.used = now
        """When a datagram last came or went."""
        self.queries = place.port == _DNS_PORT
        self.tx_packets = 0
        self.rx_packets = 0
        self.tx_bytes = 0
        self.rx_bytes = 0
        self.deadline = now + self._idle()

    # ---- from the client

    def receive(self) -> bool:
        try:
            size, sender = self.sock.recvfrom_into(self.association.space)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                self.association.client_left(self)
                return False
            return True  # another answer of ICMP, which says nothing of the next datagram
        if sender == self._client:
            self.arrived(size)
        else:
            # While connect(2) was under way, the kernel took this socket for one that is connected to this client.
            self.association.belongs_to(sender, self.address, size)
        return True

    def arrived(self, size: int) -> None:
        """A datagram of the client, of `size` bytes, is in the reactor's buffer at ROOM."""
        association = self.association
        self.used = association.active = self.reactor.now
        outlet = association.outlet
        if outlet is None:
            association.keep(self, size)
        else:
            outlet.send(self, size)

    def sent(self, size: int) -> None:
        """A datagram of the client has left for the destination."""
        self.tx_packets += 1
        self.tx_bytes += size
        counters = self.association.counters
        counters.tx_packets.value += 1
        counters.tx_bytes.value += size

    # ---- to the client

    def deliver(self, payload: memoryview, size: int) -> None:
        """Give the client a datagram of the destination."""
        try:
            self.sock.send(payload)
        except OSError as error:
            self._not_delivered(payload, error)
            return
        self.used = self.reactor.now
        self.rx_packets += 1
        self.rx_bytes += size
        counters = self.association.counters
        counters.rx_packets.value += 1
        counters.rx_bytes.value += size
        if self.queries and self.is_answered():
            self.association.answered(self)

    def is_answered(self) -> bool:
        """Whether it was a query, or two, to a name server that has answered all of them."""
        return self.rx_packets >= self.tx_packets <= _DNS_QUERIES

    def _not_delivered(self, payload: memoryview, error: OSError) -> None:
        association = self.association
        if error.errno == errno.ECONNREFUSED:  # an earlier datagram has found the port closed
            association.client_left(self)
            association.dropped("client_gone")
        elif error.errno in (errno.EAGAIN, errno.ENOBUFS):
            association.dropped("send_buffer_full")
        else:
            association.dropped("too_long" if error.errno == errno.EMSGSIZE else "no_route")

    # ---- its end

    def failed(self, error: Exception) -> None:
        self.association.failed(error)

    def on_deadline(self, now: float) -> None:
        if self.fd < 0:
            return
        self.deadline = self.used + self._idle()
        if self.deadline <= now:
            self.association.forget(self, Reason.IDLE, Side.PROXY)

    def interrupt(self, reason: BaseException) -> None:
        self.association.stop()

    def _idle(self) -> float:
        idle = self.association.means.udp.idle
        return min(idle, _DNS_IDLE) if self.queries else idle

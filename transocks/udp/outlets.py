"""Where the datagrams of a client's port leave: to the relay of a proxy, or directly to their destinations."""

from __future__ import annotations

import errno
from socket import SocketType
from typing import TYPE_CHECKING, Final

from transocks.udp.flow import ROOM, ClientFlow
from transocks.upstreams.state import UpstreamState
from usocksd.log.access import pair_member
from usocksd.net.datagrams import DatagramSocket
from usocksd.net.endpoint import Endpoint, PeerReset

if TYPE_CHECKING:
    from transocks.udp.association import UdpAssociation

# ATYP of RFC 1928 section 7, and the length of the header with such an address
_IPV4: Final = 1
_IPV6: Final = 4
_V4_HEADER: Final = 10
_V6_HEADER: Final = 22
# How often, in seconds, the state of the proxy is looked at.
_LOOK_EVERY: Final = 2.0


class Outlet(DatagramSocket):
    """The socket on the far side of an association."""

    __slots__ = ("association", "port")

    def __init__(self, association: UdpAssociation, sock: SocketType) -> None:
        super().__init__(association.reactor, sock)
        self.association = association
        self.port = int(sock.getsockname()[1])

    def send(self, flow: ClientFlow, size: int) -> None:
        """Send the client's datagram of this many bytes, which is in the reactor's buffer at ROOM."""
        raise NotImplementedError

    def peer(self) -> str | None:
        """Where it sends to, if that is one place."""
        return None

    def send_kept(self, flow: ClientFlow, payload: bytes) -> None:
        """Send a datagram that has waited."""
        size = len(payload)
        self.reactor.buffer[ROOM : ROOM + size] = payload
        self.send(flow, size)

    def failed(self, error: Exception) -> None:
        self.association.failed(error)

    def interrupt(self, reason: BaseException) -> None:
        self.association.stop()


class RelayOutlet(Outlet):
    """Connected to the relay of a proxy, for as long as the connection `control` to that proxy lives."""

    __slots__ = ("_control", "_state", "heard")

    def __init__(self, association: UdpAssociation, sock: SocketType, control: Endpoint, state: UpstreamState) -> None:
        super().__init__(association, sock)
        self._control = control
        self._state = state
        self.heard = association.reactor.now
        """When the proxy last sent something."""
        self.deadline = self.heard + _LOOK_EVERY

    def peer(self) -> str | None:
        return pair_member(*self.sock.getpeername()[:2])

    def send(self, flow: ClientFlow, size: int) -> None:
        reactor = self.reactor
        start = flow.start
        reactor.buffer[start:ROOM] = flow.header
        datagram = reactor.view[start : ROOM + size]
        try:
            self.sock.send(datagram)
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                self.association.not_sent(error)
                return
            # ICMP's answer to an earlier datagram. Whether the proxy is gone, its connection will say.
            try:
                self.sock.send(datagram)
            except OSError as again:
                self.association.not_sent(again)
                return
        flow.sent(size)

    def receive(self) -> bool:
        reactor = self.reactor
        view = reactor.view
        try:
            size = self.sock.recv_into(view)
        except BlockingIOError:
            return False
        except OSError:
            return True
        self.heard = reactor.now
        if size < _V4_HEADER:
            self.association.dropped("short")
            return True
        kind = reactor.buffer[3]
        if kind == _IPV4:
            at = _V4_HEADER
        elif kind == _IPV6:
            at = _V6_HEADER
        else:  # the sender of a reply is always given as an address
            self.association.dropped("address_type")
            return True
        flow = self.association.flows.get(bytes(view[:at]))
        if flow is None:
            flow = self.association.unknown_sender(size)
            if flow is None:
                return True
        flow.deliver(view[at:size], size - at)
        return True

    def on_deadline(self, now: float) -> None:
        self.deadline = now + _LOOK_EVERY
        if self._state.silent_since(self.heard):
            self._control.interrupt(PeerReset())


class DirectOutlet(Outlet):
    """Sends to the destinations themselves, and takes datagrams from addresses that were asked."""

    __slots__ = ()

    def send(self, flow: ClientFlow, size: int) -> None:
        datagram = self.reactor.view[ROOM : ROOM + size]
        try:
            self.sock.sendto(datagram, flow.address)
        except OSError as error:
            self.association.not_sent(error)
            return
        flow.sent(size)

    def receive(self) -> bool:
        view = self.reactor.view
        try:
            size, sender = self.sock.recvfrom_into(view)
        except BlockingIOError:
            return False
        except OSError:
            return True
        flow = self.association.flow_of(sender)
        if flow is not None:
            flow.deliver(view[:size], size)
        return True

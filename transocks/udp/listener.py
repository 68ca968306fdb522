"""The sockets to which TPROXY rules bring datagrams: they get the first ones of each flow, with their destination."""

from __future__ import annotations

import logging
import socket
from socket import SocketType
from typing import TYPE_CHECKING

from transocks.udp.flow import ROOM
from transocks.udp.sockets import ANCILLARY_SIZE, original_destination
from usocksd.net.datagrams import DatagramSocket
from usocksd.net.reactor import Reactor

if TYPE_CHECKING:
    from transocks.udp.transparent import TransparentUdp

log = logging.getLogger(__name__)


class DatagramListener(DatagramSocket):
    """One of them; what it gets goes to `owner`."""

    __slots__ = ("_owner", "_space", "_v6")

    def __init__(self, owner: TransparentUdp, reactor: Reactor, sock: SocketType) -> None:
        super().__init__(reactor, sock)
        self._owner = owner
        self._v6 = sock.family == socket.AF_INET6
        self._space = [reactor.view[ROOM:]]

    def receive(self) -> bool:
        try:
            size, ancillary, flags, client = self.sock.recvmsg_into(self._space, ANCILLARY_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            return True
        destination = original_destination(ancillary, v6=self._v6)
        if destination is None or flags & socket.MSG_TRUNC:
            self._owner.means.counters.dropped("too_long" if destination else "not_redirected")
        else:
            self._owner.first(client, destination, size)
        return True

    def failed(self, error: Exception) -> None:
        log.error("internal error", exc_info=error)

    def close(self) -> None:
        """Take what waits, and no more."""
        if self.fd >= 0:
            while self.receive():
                pass
            self._owner.means.counters.dropped("receive_buffer_full", self.overflowed())
        super().close()

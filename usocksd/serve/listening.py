"""The listening sockets that the master owns, one for each address. All workers accept from duplicates of them.

So a connection in an accept queue outlives a worker: the next one that is awake takes it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any

from usocksd.errors import Error
from usocksd.net.address import HostPort, bound_to
from usocksd.net.fast_open import accept_fast_open
from usocksd.net.listeners import NO_SUCH_FAMILY, ListenError, is_transparent, listen, set_listener_options
from usocksd.net.tcp_info import accept_queue
from usocksd.serve.channel import restore_socket
from usocksd.settings.types import ListenAddress


class ListeningSockets:
    """The sockets by address; or those that systemd passed on, whatever the addresses are."""

    def __init__(self, inherited: Sequence[socket.socket] = ()) -> None:
        self.inherited = list(inherited)
        self._own: dict[HostPort, socket.socket] = {}
        """By configured address, whose port may be 0."""
        self._opened: list[HostPort] = []

    def open(self, addresses: Iterable[ListenAddress]) -> None:
        """Open what is missing at these addresses; `restore` takes that back.

        Raises ListenError, or Error for an address whose present socket differs in IP_TRANSPARENT; then all is as
        before.
        """
        self._opened = []
        if self.inherited:
            return
        missing: ListenError | None = None
        usable = False
        try:
            for address in addresses:
                try:
                    self._open(address)
                    usable = True
                except ListenError as error:
                    if not (address.optional and error.errno in NO_SUCH_FAMILY):
                        raise
                    missing = error
            if missing is not None and not usable:
                raise missing
        except Error:
            self.restore()
            raise

    def restore(self) -> None:
        """Undo the last `open`."""
        for place in self._opened:
            self._own.pop(place).close()
        self._opened = []

    def keep(self, addresses: Iterable[ListenAddress]) -> list[socket.socket]:
        """Give up all but the sockets of these addresses. Returns the others, for the caller to close: before the
        workers do, since the last to close a socket must have emptied its queue.
        """
        self._opened = []
        return [self._own.pop(place) for place in self._own.keys() - set(map(_place, addresses))]

    def at(self, addresses: Iterable[ListenAddress]) -> list[socket.socket]:
        """The sockets of these addresses, or the inherited ones."""
        found = (self._own.get(_place(address)) for address in addresses)
        return self.inherited or [sock for sock in found if sock is not None]

    def names(self, *, opened: bool = True) -> list[HostPort]:
        """Address and port of each, with the port that the kernel chose; those of the last `open` if `opened`."""
        hidden = () if opened else self._opened
        own = [sock for place, sock in self._own.items() if place not in hidden]
        return list(map(bound_to, self.inherited or own))

    def listening(self, *, opened: bool = True) -> list[str]:
        """The same as ADDRESS:PORT"""
        return list(map(str, self.names(opened=opened)))

    def queues(self) -> tuple[int, int]:
        """How many connections wait to be accepted, and how many could, over all sockets."""
        lengths = [accept_queue(sock) for sock in self._all()]
        return sum(length for length, _ in lengths), sum(limit for _, limit in lengths)

    def close(self) -> None:
        """Close all sockets. The service manager still has the inherited ones."""
        for sock in self._all():
            sock.close()
        self._own.clear()
        self.inherited.clear()

    def filenos(self) -> list[int]:
        """Every descriptor."""
        return [sock.fileno() for sock in self._all()]

    def hand_over(self) -> dict[str, Any]:
        """The state for `take_over` in this process's next program, as JSON values."""
        return {
            "inherited": [sock.fileno() for sock in self.inherited],
            "own": [[*place, sock.fileno()] for place, sock in self._own.items()],
        }

    @classmethod
    def take_over(cls, state: dict[str, Any]) -> ListeningSockets:
        """The sockets of this process's previous program."""
        sockets = cls([restore_socket(fd) for fd in state["inherited"]])
        sockets._own = {HostPort(host, port): restore_socket(fd) for host, port, fd in state["own"]}
        return sockets

    def _all(self) -> list[socket.socket]:
        return [*self.inherited, *self._own.values()]

    def _open(self, address: ListenAddress) -> None:
        place = _place(address)
        present = self._own.get(place)
        if present is None:
            if place.port and all(ours.port != place.port for ours in self._own):
                # A socket with SO_REUSEPORT would share the port with another instance, unnoticed. With it, an address
                # can replace a wider or narrower one (0.0.0.0 and 127.0.0.1) at the same port.
                listen(*place, transparent=address.transparent).close()
            self._own[place] = listen(*place, reuse_port=True, transparent=address.transparent)
            self._opened.append(place)
        elif is_transparent(present) != address.transparent:
            # Draining workers still treat it as the other kind.
            raise Error(
                f"{place} is listened on already, {'without' if address.transparent else 'with'}"
                " IP_TRANSPARENT (listen_tproxy): expected another port, or a restart"
            )


def check_inherited(sockets: Sequence[socket.socket]) -> None:
    """Prepare the service manager's sockets for accepting. Raises Error for one that is no TCP listener."""
    for sock in sockets:
        internet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        if not internet or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Error("socket activation (LISTEN_FDS): expected listening TCP sockets (ListenStream=ADDRESS:PORT)")
        set_listener_options(sock)
        accept_fast_open(sock)


def _place(address: ListenAddress) -> HostPort:
    return HostPort(str(address.address), address.port)

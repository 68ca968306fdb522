"""The listening sockets that the master owns: for each address a SO_REUSEPORT group, with a socket for each worker.

The master keeps every socket open and hands duplicates to workers, so that a connection in an accept queue outlives the
worker that should accept it. Closing a socket resets the connections that wait in it (unless tcp_migrate_req is 1,
ip-sysctl), and in a socket without a worker connections wait. So while a group grows or shrinks, a small program in the
kernel sends new connections to the first n of its sockets only, in the order in which they were opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from usocksd.errors import Error
from usocksd.net.address import HostPort, bound_to
from usocksd.net.fast_open import accept_fast_open
from usocksd.net.listeners import NO_SUCH_FAMILY, ListenError, is_transparent, listen, set_listener_options
from usocksd.net.tcp_info import accept_queue
from usocksd.serve.channel import restore_socket
from usocksd.settings.types import ListenAddress

# asm-generic/socket.h; Python has no names for these.
_SO_ATTACH_FILTER = 26
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

# struct sock_filter of linux/filter.h
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_HASH = _INSTRUCTION.pack(0x20, 0, 0, 0xFFFFF000 + 32)  # A = hash of the packet (SKF_AD_RXHASH)
_MODULO = 0x94  # A = A mod n
_RETURN = _INSTRUCTION.pack(0x16, 0, 0, 0)  # return A
# Reads the TCP header: drops packets that have SYN but not ACK, and passes all others.
_REFUSE_SYN = b"".join(
    (
        _INSTRUCTION.pack(0x30, 0, 0, 13),
        _INSTRUCTION.pack(0x54, 0, 0, 0x12),
        _INSTRUCTION.pack(0x15, 0, 1, 0x02),
        _INSTRUCTION.pack(0x06, 0, 0, 0),
        _INSTRUCTION.pack(0x06, 0, 0, 0xFFFFFFFF),
    )
)


class Slots:
    """The sockets by address and slot; or those that systemd passed on, which all workers share: REUSEPORT groups need
    one owner, and systemd's sockets are root's.
    """

    def __init__(self, inherited: Sequence[socket.socket] = ()) -> None:
        self.inherited = list(inherited)
        self._groups: dict[HostPort, list[socket.socket]] = {}
        """By configured address, whose port may be 0."""
        self._opened: list[tuple[HostPort, socket.socket]] = []

    def open(self, addresses: Iterable[ListenAddress], count: int) -> None:
        """Open what is missing for `count` sockets at each address; `restore` takes that back.

        Until `release`, no new connections go to sockets that were added to a group. Raises ListenError, or Error for
        an address whose present sockets differ in IP_TRANSPARENT; then all is as before.
        """
        self._opened = []
        if self.inherited:
            return
        missing: ListenError | None = None
        usable = False
        try:
            for address in addresses:
                try:
                    self._fill(address, count)
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
        for place, sock in reversed(self._opened):
            group = self._groups[place]
            group.remove(sock)
            sock.close()
            if not group:
                del self._groups[place]
        self._opened = []
        self.settle()

    def of(self, slot: int, addresses: Iterable[ListenAddress]) -> list[int]:
        """The descriptors of one slot's sockets at these addresses."""
        if self.inherited:
            return [sock.fileno() for sock in self.inherited]
        groups = (self._groups.get(_place(address), ()) for address in addresses)
        return [group[slot].fileno() for group in groups if slot < len(group)]

    def release(self, addresses: Iterable[ListenAddress], count: int) -> list[socket.socket]:
        """Have new connections go to the first `count` sockets of each address, and to no other address.

        Returns the surplus sockets. Connections may wait in them: accept those, close the sockets, then `settle`.
        """
        self._opened = []
        wanted = set(map(_place, addresses))
        surplus: list[socket.socket] = []
        for place, group in list(self._groups.items()):
            if place not in wanted:
                for sock in group:
                    _refuse(sock)
                surplus += self._groups.pop(place)
            elif len(group) > count:
                _steer(group[0], count)
                # The last one first: the kernel fills the hole of a closed socket with the last one.
                surplus += reversed(group[count:])
                self._groups[place] = group[:count]
            else:
                _let_go(group[0])
        return surplus

    def settle(self) -> None:
        """Have the kernel choose among all sockets again."""
        for group in self._groups.values():
            _let_go(group[0])

    def refuse(self) -> bool:
        """For a stop: let handshakes under way complete, and no new ones begin. False if the kernel does not allow it.
        Connections in inherited sockets wait there for the next start.
        """
        refused = [_refuse(sock) for group in self._groups.values() for sock in group]
        return all(refused)

    def ports(self, addresses: Iterable[ListenAddress]) -> list[int]:
        """The ports at these addresses, or of inherited sockets."""
        groups = (self._groups.get(_place(address), ()) for address in addresses)
        first = self.inherited or [group[0] for group in groups if group]
        return sorted({sock.getsockname()[1] for sock in first})

    def names(self, *, opened: bool = True) -> list[HostPort]:
        """Address and port of each group, with the port that the kernel chose; those of the last `open` if `opened`."""
        fresh = set() if opened else {sock for _, sock in self._opened}
        first = self.inherited or [group[0] for group in self._groups.values()]
        return [bound_to(sock) for sock in first if sock not in fresh]

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
        self._groups.clear()
        self.inherited.clear()

    def filenos(self) -> list[int]:
        """Every descriptor."""
        return [sock.fileno() for sock in self._all()]

    def hand_over(self) -> dict[str, Any]:
        """The state for `take_over` in this process's next program, as JSON values."""
        return {
            "inherited": [sock.fileno() for sock in self.inherited],
            "groups": [[*place, [sock.fileno() for sock in group]] for place, group in self._groups.items()],
        }

    @classmethod
    def take_over(cls, state: dict[str, Any]) -> Slots:
        """The sockets of this process's previous program."""
        slots = cls([restore_socket(fd) for fd in state["inherited"]])
        slots._groups = {
            HostPort(host, port): [restore_socket(fd) for fd in fds] for host, port, fds in state["groups"]
        }
        return slots

    def _all(self) -> Iterator[socket.socket]:
        yield from self.inherited
        for group in self._groups.values():
            yield from group

    def _fill(self, address: ListenAddress, count: int) -> None:
        host, port = place = _place(address)
        group = self._groups.get(place, [])
        if group and is_transparent(group[0]) != address.transparent:
            # Draining workers still treat it as the other kind.
            raise Error(
                f"{place} is listened on already, {'without' if address.transparent else 'with'}"
                " IP_TRANSPARENT (listen_tproxy): expected another port, or a restart"
            )
        if group:
            port = group[0].getsockname()[1]  # if the kernel chooses the port, it chooses for the first
            if len(group) < count:
                _steer(group[0], len(group))
        elif port and all(ours != port for _, ours in self._groups):
            # Sockets with SO_REUSEPORT would share the port with another instance, unnoticed.
            listen(host, port, transparent=address.transparent).close()
        while len(group) < count:
            sock = listen(host, port, reuse_port=True, transparent=address.transparent)
            port = sock.getsockname()[1]
            group = self._groups.setdefault(place, group)
            group.append(sock)
            self._opened.append((place, sock))


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


def _steer(member: socket.socket, count: int) -> None:
    """Have new connections of the member's group go to its first `count` sockets; without the permission, to all."""
    with contextlib.suppress(OSError):
        _attach(member, _SO_ATTACH_REUSEPORT_CBPF, _LOAD_HASH + _INSTRUCTION.pack(_MODULO, 0, 0, count) + _RETURN)


def _refuse(sock: socket.socket) -> bool:
    """Drop SYNs. False without the permission: newer kernels want CAP_NET_ADMIN for a filter on one's own socket."""
    try:
        _attach(sock, _SO_ATTACH_FILTER, _REFUSE_SYN)
    except OSError:
        return False
    return True


def _attach(sock: socket.socket, option: int, instructions: bytes) -> None:
    program = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: a count, and a pointer aligned for this machine.
    fprog = struct.pack("@HP", len(instructions) // _INSTRUCTION.size, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, option, fprog)


def _let_go(member: socket.socket) -> None:
    with contextlib.suppress(OSError):  # ENOENT: nothing was attached
        member.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)

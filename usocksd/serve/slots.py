"""The listening sockets that the master owns: one in a SO_REUSEPORT group for each worker slot and address.

The master keeps every one open and hands duplicates to workers, so that a connection waiting in an accept queue
outlives the worker that was to accept it. Closing a socket resets what waits in it (unless tcp_migrate_req is 1,
ip-sysctl), and a socket without a worker lets connections wait; so while a group grows or shrinks, a small program in
the kernel says which of its sockets new connections may go to: the first so many, in the order in which they were
opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from usocksd.errors import Error
from usocksd.net.address import bound_to, join_port
from usocksd.net.fast_open import accept_fast_open
from usocksd.net.listeners import (
    NO_SUCH_FAMILY,
    ListenError,
    is_transparent,
    listen,
    queue,
    set_listener_options,
)
from usocksd.serve.plan import Address

Place = tuple[str, int]

# asm-generic/socket.h; Python has no names for these.
_SO_ATTACH_FILTER = 26
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

# struct sock_filter of linux/filter.h
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_HASH = _INSTRUCTION.pack(0x20, 0, 0, 0xFFFFF000 + 32)  # A = hash of the packet (SKF_AD_RXHASH)
_MODULO = 0x94  # A = A mod n
_RETURN = _INSTRUCTION.pack(0x16, 0, 0, 0)  # return A
# Of the TCP header: of the flags SYN and ACK only SYN is set, so drop it; let everything else pass.
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
    """The sockets by address and slot, and those that systemd handed over, which all workers share.

    REUSEPORT groups want one owner, and systemd's sockets are root's: so no slots there.
    """

    def __init__(self, inherited: Sequence[socket.socket] = ()) -> None:
        self.inherited = list(inherited)
        self._groups: dict[Place, list[socket.socket]] = {}
        self._opened: list[tuple[Place, socket.socket]] = []

    def open(self, addresses: Iterable[Address], count: int) -> None:
        """Have `count` sockets for each address, opening what is missing; `restore` takes that back.

        Until `release`, new connections don't go to sockets that were added to others. Raises ListenError, or Error
        for an address that there are sockets of the other kind for; then all is as before.
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
        """As before the last `open`."""
        for place, sock in reversed(self._opened):
            group = self._groups[place]
            group.remove(sock)
            sock.close()
            if not group:
                del self._groups[place]
        self._opened = []
        self.settle()

    def of(self, slot: int, addresses: Iterable[Address]) -> list[int]:
        """The descriptors of one slot's sockets at these addresses."""
        if self.inherited:
            return [sock.fileno() for sock in self.inherited]
        groups = (self._groups.get((address.host, address.port), ()) for address in addresses)
        return [group[slot].fileno() for group in groups if slot < len(group)]

    def release(self, addresses: Iterable[Address], count: int) -> list[socket.socket]:
        """New connections go to the first `count` sockets of each address, and to no other address.

        Returns the sockets that nobody wants now. They may have connections waiting: accept those, close them, then
        `settle`.
        """
        self._opened = []
        wanted = {(address.host, address.port) for address in addresses}
        surplus: list[socket.socket] = []
        for place, group in list(self._groups.items()):
            if place not in wanted:
                for sock in group:
                    _refuse(sock)
                surplus += self._groups.pop(place)
            elif len(group) > count:
                _steer(group[0], count)
                # The last one first: the kernel fills the hole that a closed one leaves with its last.
                surplus += reversed(group[count:])
                self._groups[place] = group[:count]
            else:
                _let_go(group[0])
        return surplus

    def settle(self) -> None:
        """The kernel may choose by itself again."""
        for group in self._groups.values():
            _let_go(group[0])

    def refuse(self) -> bool:
        """The daemon stops: handshakes under way may end, but no new ones begin. False if that can't be had.

        What waits in inherited sockets stays there for the next start.
        """
        refused = [_refuse(sock) for group in self._groups.values() for sock in group]
        return all(refused)

    def ports(self, addresses: Iterable[Address]) -> list[int]:
        """The ports at these addresses, or of what is inherited."""
        groups = (self._groups.get((address.host, address.port), ()) for address in addresses)
        first = self.inherited or [group[0] for group in groups if group]
        return sorted({sock.getsockname()[1] for sock in first})

    def names(self, *, opened: bool = True) -> list[tuple[str, int]]:
        """The addresses that are listened on, with the ports that the kernel chose; see `place_names`."""
        fresh = set() if opened else {sock for _, sock in self._opened}
        first = self.inherited or [group[0] for group in self._groups.values()]
        return [bound_to(sock) for sock in first if sock not in fresh]

    def queues(self) -> tuple[int, int]:
        """How many connections wait to be accepted, and how many could, over all sockets."""
        lengths = [queue(sock) for sock in self._all()]
        return sum(length for length, _ in lengths), sum(limit for _, limit in lengths)

    def close(self) -> None:
        """Close all: nobody listens any more. (Inherited ones stay open with whoever opened them.)"""
        for sock in self._all():
            sock.close()
        self._groups.clear()
        self.inherited.clear()

    def filenos(self) -> list[int]:
        """Every descriptor."""
        return [sock.fileno() for sock in self._all()]

    def hand_over(self) -> dict[str, Any]:
        """What `take_over` needs in the program that this process is about to become; as JSON values."""
        return {
            "inherited": [sock.fileno() for sock in self.inherited],
            "groups": [[*place, [sock.fileno() for sock in group]] for place, group in self._groups.items()],
        }

    @classmethod
    def take_over(cls, state: dict[str, Any]) -> Slots:
        """The slots of the program that this process was."""
        slots = cls([restore_socket(fd) for fd in state["inherited"]])
        slots._groups = {(host, port): [restore_socket(fd) for fd in fds] for host, port, fds in state["groups"]}
        return slots

    def _all(self) -> Iterator[socket.socket]:
        yield from self.inherited
        for group in self._groups.values():
            yield from group

    def _fill(self, address: Address, count: int) -> None:
        host, port = place = address.host, address.port
        group = self._groups.get(place, [])
        if group and is_transparent(group[0]) != address.transparent:
            # Changed under way, it would be one thing to the workers that drain and another to those that come.
            raise Error(
                f"{join_port(host, port)} is listened on already, {'without' if address.transparent else 'with'}"
                " IP_TRANSPARENT (listen_tproxy): expected another port, or a restart"
            )
        if group:
            port = group[0].getsockname()[1]  # the first decides where the kernel may choose
            if len(group) < count:
                _steer(group[0], len(group))
        elif port and all(ours != port for _, ours in self._groups):
            # Sockets with SO_REUSEPORT share a port with whoever has it too: another instance, unnoticed.
            listen(host, port, transparent=address.transparent).close()
        while len(group) < count:
            sock = listen(host, port, reuse_port=True, transparent=address.transparent)
            port = sock.getsockname()[1]
            group = self._groups.setdefault(place, group)
            group.append(sock)
            self._opened.append((place, sock))


def check_inherited(sockets: Sequence[socket.socket]) -> None:
    """Make sockets of the service manager's ready to be accepted from. Raises Error for what is no TCP listener."""
    for sock in sockets:
        internet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        if not internet or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Error("socket activation (LISTEN_FDS): expected listening TCP sockets (ListenStream=ADDRESS:PORT)")
        set_listener_options(sock)
        accept_fast_open(sock)


def place_names(slots: Slots, *, opened: bool = True) -> list[str]:
    """The addresses that are listened on, as text; those of the last `open`, which may be taken back, if `opened`."""
    return [join_port(host, port) for host, port in slots.names(opened=opened)]


def restore_socket(fd: int) -> socket.socket:
    """The socket of a descriptor that was passed on."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _steer(member: socket.socket, count: int) -> None:
    """New connections of the member's group go to its first `count` sockets; where that can't be had, to all."""
    with contextlib.suppress(OSError):
        _attach(member, _SO_ATTACH_REUSEPORT_CBPF, _LOAD_HASH + _INSTRUCTION.pack(_MODULO, 0, 0, count) + _RETURN)


def _refuse(sock: socket.socket) -> bool:
    """Drop SYNs. False if that can't be had: newer kernels want CAP_NET_ADMIN for a filter on one's own socket."""
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

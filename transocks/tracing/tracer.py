"""Makes the kernel report the trace of some packets, and keeps our own samples on this host.

A table of our own marks packets of the watched ports for tracing. At each hook it has empty chains between those of
others (connection tracking, iptables's tables). The kernel reports when a packet reaches one of them, and its contents
at that point. So the last place of a packet is known, even if iptables-legacy, connection tracking, routing or a BPF
program dropped it, and not a rule of nft. The last chains of all drop our samples, so that they are not sent, and that
no socket gets a datagram. (TCP's samples are no connection yet.) The table belongs to this process, and is gone when
the process is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import cached_property

from transocks.rules.guard import OwnTables
from transocks.tools import FirewallError
from transocks.tracing.reports import MESSAGE, TCP, UDP, Report, parse
from transocks.tracing.trace import FIRST, HOOKS, LAST, PLACES, TABLE, Trace, trace_of
from usocksd.host.netlink import NETFILTER, RECEIVE_SIZE, connect, messages
from usocksd.net.address import IPAddress

_NAMES = {TCP: "tcp", UDP: "udp"}
_NFNLGRP_NFTRACE = 9
_BUFFER = 1 << 23
_SO_RCVBUFFORCE = 33
_FRAME = 0x88B5  # an EtherType for local experiments: IEEE 802
_PATIENCE = 0.25  # seconds for the kernel to handle a packet, where nothing tells that it has
_SOL_NETLINK, _NO_ENOBUFS = 270, 5
_WATCH = " ".join(f"meta l4proto . th {end} @watched meta nftrace set 1;" for end in ("sport", "dport"))
_KEEP = " ".join(f'meta l4proto . th {end} @kept oifname != "lo" drop;' for end in ("sport", "dport"))
_KEEP_FROM_SOCKETS = "meta l4proto udp meta l4proto . th sport @kept drop;"


class Tracer:
    """Of the network namespace of this process; takes CAP_NET_ADMIN and libnftables. Raises FirewallError without."""

    def __init__(self, client: IPAddress | None = None) -> None:
        """`client`: its new connections are watched, besides ports."""
        self._reports: list[Report] = []
        self._since: dict[tuple[int, int], int] = {}
        self._sets = [("inet", "watched")]
        self._stack = contextlib.ExitStack()
        try:
            self._nft = OwnTables()
            self._stack.callback(self._nft.close)
            self._socket = self._stack.enter_context(connect(NETFILTER))
            self._socket.setblocking(False)
            self._socket.setsockopt(_SOL_NETLINK, _NO_ENOBUFS, 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:  # root of a user namespace gets what net.core.rmem_max allows
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 1 << _NFNLGRP_NFTRACE - 1))
            table = _table(client)
            try:
                self._nft.load(table + _devices())
                self._sets.append(("netdev", "watched"))
            except FirewallError:  # a kernel without hooks of devices
                self._nft.load(table)
        except (OSError, FirewallError) as error:
            self._stack.close()
            why = error.strerror if isinstance(error, OSError) else error
            raise FirewallError(f"packets can't be traced: {why}") from None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def watching(self, protocol: int, port: int, *, keep: bool) -> Iterator[None]:
        """Have packets from and to this port reported; `keep`: they don't leave this host."""
        self._read()
        self._since[protocol, port] = len(self._reports)  # earlier reports belong to another socket with this port
        sets = [*self._sets, ("inet", "kept")] if keep else self._sets
        elements = [f"element {family} {TABLE} {name} {{ {_NAMES[protocol]} . {port} }}\n" for family, name in sets]
        self._nft.load("".join(f"add {element}" for element in elements))
        try:
            yield
        finally:
            self._nft.load("".join(f"delete {element}" for element in elements))

    def emit(self, send: Callable[[], None]) -> None:
        """Send a packet, and return when the kernel has done all that it does with it and with its answer.

        A CPU handles received packets in order, those of lo included. So a frame of our own is sent through lo from the
        same CPU: when it is back, the packet has gone its way. A second one follows the answer. Raises what `send`
        raises.
        """
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        try:
            send()
            try:
                for token in (os.urandom(16), os.urandom(16)):
                    self._lo.sendto(token, ("lo", _FRAME, 0, 0, bytes(6)))
                    while self._lo.recv(64) != token:
                        pass  # another process's
            except OSError:  # lo is down, or somebody drops what it receives
                time.sleep(_PATIENCE)
        finally:
            os.sched_setaffinity(0, cpus)

    @cached_property
    def _lo(self) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_FRAME)))
        sock.bind(("lo", _FRAME))
        sock.settimeout(_PATIENCE)
        return sock

    def trace(self, protocol: int, port: int, *, back: bool = False) -> Trace | None:
        """The trace of the first packet from this port, as far as reported; with `back`, of the first to it."""
        self._read()
        return trace_of(self._reports[self._since.get((protocol, port), 0) :], protocol, port, back=back)

    def wait_for(self, client: IPAddress, within: float, settle: float) -> int | None:
        """Wait for the next new connection of this client, and until its first packet has been traced. Returns
        its port, or None if there is no connection within this many seconds.
        """
        deadline = time.monotonic() + within
        while (port := self.port_of(client)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return None
        with self.watching(TCP, port, keep=False):  # its answer, too
            time.sleep(settle)
            self._read()
        del self._since[TCP, port]
        return port

    def port_of(self, client: IPAddress) -> int | None:
        """The port of the first connection of this client that was reported."""
        self._read()
        packets = (report.packet for report in self._reports if report.packet is not None)
        return next((packet.sport for packet in packets if packet.source == client), None)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                for kind, _, message in messages(self._socket.recv(RECEIVE_SIZE)):
                    if kind == MESSAGE and (report := parse(message)) is not None:
                        self._reports.append(report)


def _table(client: IPAddress | None) -> str:
    watch = _WATCH
    if client is not None:
        family = "ip" if client.version == 4 else "ip6"
        watch += f" {family} saddr {client} tcp flags & (fin | syn | rst | ack) == syn meta nftrace set 1;"
    rules = {(hook, FIRST): watch for hook in HOOKS}
    rules |= {("postrouting", LAST): _KEEP, ("input", LAST): _KEEP_FROM_SOCKETS}
    rules |= {(hook, -199): "ct state untracked jump untracked;" for hook in ("prerouting", "output")}
    chains = "".join(
        f"chain {hook}_{'m' if place < 0 else 'p'}{abs(place)} {{ type filter hook {hook} priority {place};"
        # The kernel sends one report for a rule that accepts, and two for a chain that ends.
        f" {rules.get((hook, place), '')} accept; }}\n"
        for hook in HOOKS
        for place in PLACES
    )
    sets = "".join(f"set {name} {{ type inet_proto . inet_service; }}\n" for name in ("watched", "kept"))
    return f"table inet {TABLE} {{\nflags owner\n{sets}chain untracked {{ }}\n{chains}}}\n"


def _devices() -> str:
    """Packets are marked as soon as a device receives them, since chains of devices may drop them."""
    names = ", ".join(f'"{name}"' for _, name in socket.if_nameindex())
    chain = f"chain ingress {{ type filter hook ingress devices = {{ {names} }} priority {FIRST}; {_WATCH} }}\n"
    return f"table netdev {TABLE} {{\nflags owner\nset watched {{ type inet_proto . inet_service; }}\n{chain}}}\n"

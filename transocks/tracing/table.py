"""Makes the kernel report the way of some packets, and keeps our own samples on this host.

A table of our own marks packets of the watched ports for tracing. At each hook it has empty chains between those of
others (connection tracking, iptables's tables). The kernel reports when a packet reaches one of them, and its contents
at that point. So the last place of a packet is known, even if iptables-legacy, connection tracking, routing or a BPF
program dropped it, and not a rule of nft. The last chain of all drops our samples, so that they are not sent. The table
belongs to this process, and is gone when the process is killed.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType

from transocks.rules.guard import Guard
from transocks.tools import FirewallError
from transocks.tracing.events import MESSAGE, Event, of_port, parse
from usocksd.host.netlink import NETFILTER, connect, messages
from usocksd.net.address import IPAddress

TABLE = "transocks_trace"
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
FIRST, LAST = -2_000_000_000, 2_000_000_000
"""Priorities before and behind all others that anybody sets."""
PLACES = (FIRST, -299, -201, -199, -151, -149, -101, -89, -1, 1, 99, 101, LAST)
"""Between them are iptables's tables and the kernel's own: see linux/netfilter_ipv4.h, enum nf_ip_hook_priorities."""

_TCP = 6
_NAMES = {_TCP: "tcp", 17: "udp"}
_NFNLGRP_NFTRACE = 9
_RECEIVE_SIZE, _BUFFER = 1 << 16, 1 << 23
_SO_RCVBUFFORCE = 33
_SOL_NETLINK, _NO_ENOBUFS = 270, 5


class Tracer:
    """Of the network namespace of this process; takes CAP_NET_ADMIN and libnftables. Raises FirewallError without."""

    def __init__(self, clients: tuple[IPAddress, ...] = ()) -> None:
        """`clients`: whose new connections are watched, besides ports."""
        self._events: list[Event] = []
        self._since: dict[tuple[int, int], int] = {}
        self._socket = connect(NETFILTER)
        self._socket.setblocking(False)
        self._nft: Guard | None = None
        self._watching = [("inet", "watched")]
        try:
            self._nft = Guard()
            self._socket.setsockopt(_SOL_NETLINK, _NO_ENOBUFS, 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            except PermissionError:  # root of a user namespace gets what net.core.rmem_max allows
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, 1 << _NFNLGRP_NFTRACE - 1))
            self._load(clients)
        except OSError as error:
            self.close()
            raise FirewallError(f"packets can't be traced: {error.strerror}") from None
        except FirewallError as error:
            self.close()
            raise FirewallError(f"packets can't be traced: {error}") from None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is traced any more."""
        self._socket.close()
        if self._nft is not None:
            self._nft.close()

    def _load(self, clients: tuple[IPAddress, ...]) -> None:
        assert self._nft is not None
        table = _table(clients)
        try:
            self._nft.load(table + _devices())
        except FirewallError:  # a kernel without hooks of devices
            self._nft.load(table)
        else:
            self._watching.append(("netdev", "watched"))

    @contextlib.contextmanager
    def watching(self, protocol: int, port: int, *, keep: bool) -> Iterator[None]:
        """Tell what becomes of packets from and to this port; `keep`: they don't leave this host, nor does a connection
        come about.
        """
        assert self._nft is not None
        sets = [*self._watching, ("inet", "kept")] if keep else self._watching
        self._read()
        self._since[protocol, port] = len(self._events)  # what was told before was of another socket with this port
        elements = [f"element {family} {TABLE} {name} {{ {_NAMES[protocol]} . {port} }}\n" for family, name in sets]
        self._nft.load("".join(f"add {element}" for element in elements))
        try:
            yield
        finally:
            self._nft.load("".join(f"delete {element}" for element in elements))

    def events(self, protocol: int, port: int) -> list[Event]:
        """What was told so far of packets from or to this port."""
        self._read()
        return list(of_port(self._events[self._since.get((protocol, port), 0) :], protocol, port))

    def first_of(self, client: IPAddress, within: float, settle: float) -> int | None:
        """Wait for the next new connection of this client, and then for its first packet to get where it gets. Its
        port, or None within so many seconds.
        """
        deadline = time.monotonic() + within
        while (port := self.port_of(client)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return None
        with self.watching(_TCP, port, keep=False):  # its answer, too
            time.sleep(settle)
            self._read()
        del self._since[_TCP, port]
        return port

    def port_of(self, client: IPAddress) -> int | None:
        """Of the first connection of this client that was told of."""
        self._read()
        packets = (event.packet for event in self._events if event.packet is not None)
        return next((packet.sport for packet in packets if packet.source == client), None)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                for kind, _, message in messages(self._socket.recv(_RECEIVE_SIZE)):
                    if kind == MESSAGE and (event := parse(message)) is not None:
                        self._events.append(event)


def place_of(event: Event) -> tuple[str, int] | None:
    """The hook and priority of one of our own chains."""
    found = re.fullmatch(r"([a-z]+)_([mp])(\d+)", event.chain) if event.table == TABLE else None
    return None if found is None else (found[1], int(found[3]) * (-1 if found[2] == "m" else 1))


def _chain(hook: str, priority: int, rules: list[str]) -> str:
    name = f"{hook}_{'m' if priority < 0 else 'p'}{abs(priority)}"
    rules = [*rules, "accept;"]  # of a rule that says so the kernel tells once, of a chain that ends twice
    return f"chain {name} {{ type filter hook {hook} priority {priority}; policy accept; {' '.join(rules)} }}\n"


def _table(clients: tuple[IPAddress, ...]) -> str:
    watch = [f"meta l4proto . th {end} @watched meta nftrace set 1;" for end in ("sport", "dport")]
    for client in clients:
        family = "ip" if client.version == 4 else "ip6"
        watch.append(f"{family} saddr {client} tcp flags & (fin | syn | rst | ack) == syn meta nftrace set 1;")
    leaves = [f'meta l4proto . th {end} @kept oifname != "lo" drop;' for end in ("sport", "dport")]
    opens = "tcp flags & (syn | rst) == 0x0 meta l4proto . tcp sport @kept drop;"
    chains = []
    for hook in HOOKS:
        for place in PLACES:
            rules = []
            if place == FIRST:
                rules += watch
            elif place == -199 and hook in {"prerouting", "output"}:
                rules.append("ct state untracked jump untracked;")
            elif place == LAST and hook == "output":
                rules.append(opens)
            elif place == LAST and hook == "postrouting":
                rules += leaves
            chains.append(_chain(hook, place, rules))
    sets = "".join(f"set {name} {{ type inet_proto . inet_service; }}\n" for name in ("watched", "kept"))
    return f"table inet {TABLE} {{\nflags owner\n{sets}chain untracked {{ }}\n{''.join(chains)}}}\n"


def _devices() -> str:
    """What a device receives is marked before anybody has it: chains of devices may drop it, too."""
    watch = " ".join(f"meta l4proto . th {end} @watched meta nftrace set 1;" for end in ("sport", "dport"))
    names = [f'"{name}"' for _, name in socket.if_nameindex()]
    sets = "set watched { type inet_proto . inet_service; }\n"
    chain = (
        f"chain ingress {{ type filter hook ingress devices = {{ {', '.join(names)} }} priority {FIRST}; {watch} }}\n"
    )
    return f"table netdev {TABLE} {{\nflags owner\n{sets}{chain}}}\n"

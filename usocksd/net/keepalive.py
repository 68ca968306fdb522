"""Decides when keepalive probes the peers of a relay: often enough that nothing on the way forgets the connection.

Connection tracking forgets silent connections, here and in every NAT on the way: an open one after days (or minutes), a
half-closed one after a minute. A redirected connection that is forgotten is lost; worse, the next packets of its client
are no longer redirected.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

KEEPALIVE = 180
"""Seconds of silence after which a peer is probed. NATs and clouds forget connections after 240."""

_FOLDER = Path("/proc/sys/net/netfilter")

CONNTRACK_TIMERS: Mapping[str, int] = MappingProxyType(
    {
        "established": 432_000,
        "unacknowledged": 300,
        "max_retrans": 300,
        "fin_wait": 120,
        "time_wait": 120,
        "close_wait": 60,
        "last_ack": 30,
        "close": 10,
    }
)
"""How long connection tracking remembers a silent TCP connection: the kernel's defaults in seconds, by the NAME in
net.netfilter.nf_conntrack_tcp_timeout_NAME (Documentation/networking/nf_conntrack-sysctl.rst)."""


_OPEN, _HALF = ("established",), ("fin_wait", "close_wait")
_TRIES = 4  # probes within the shortest timer, so that one may get lost
_GIVE_UP_AFTER = 60  # seconds without an answer; no less than six probes
_LONGEST_AFTER = 60.0
_HALF_AFTER = 1.0
_TCP_RTO_MAX_MS = 44  # linux/tcp.h, Linux 6.15; Python has no name for it
_RTO_MAX = 120  # TCP_RTO_MAX, seconds


def tcp_timers(names: Iterable[str] = CONNTRACK_TIMERS, folder: Path = _FOLDER) -> dict[str, int]:
    """The timers of this network namespace, in seconds. Those that can't be read are missing: all of them where nothing
    is tracked, or in a container that may not see it.
    """
    found = {}
    for name in names:
        try:
            with open(f"{folder}/nf_conntrack_tcp_timeout_{name}", "rb", buffering=0) as file:
                found[name] = int(file.read())
        except (OSError, ValueError):
            continue
    return found


class KeepAliveTiming(NamedTuple):
    """How the kernel probes a peer, see tcp(7); in whole seconds."""

    idle: int
    """of silence before the first probe"""
    interval: int
    probes: int
    """without an answer, after which the connection is reset"""
    longest: int = _RTO_MAX
    """between retransmissions, and probes of a closed window: keepalive does not work meanwhile"""


class KeepAlive:
    """The timings for the connections of one worker. Until `look` is called, they suit the kernel's default timers."""

    def __init__(
        self, seconds: int = KEEPALIVE, *, timers: Callable[[tuple[str, ...]], Mapping[str, int]] = tcp_timers
    ) -> None:
        """`seconds`: the longest silence allowed. `timers` reads the timers of these names."""
        self._seconds = seconds
        self._timers = timers
        self._set({})

    def look(self) -> bool:
        """Read the timers, which may have changed. Returns whether the timings change."""
        before = self.open, self.half
        self._set(self._timers(_OPEN + _HALF))
        return before != (self.open, self.half)

    def _set(self, timers: Mapping[str, int]) -> None:
        self.open = self._timing(min(timers.get(name, CONNTRACK_TIMERS[name]) for name in _OPEN))
        """While both directions are open."""
        # The timers of other hosts on the way are not known: so no longer than the kernel's default.
        self.half = self._timing(
            min(min(timers.get(name, CONNTRACK_TIMERS[name]), CONNTRACK_TIMERS[name]) for name in _HALF)
        )
        """Once one direction has ended."""
        self.after = min(_LONGEST_AFTER, float(self.open.idle))
        """The age in seconds after which setting keepalive for a relay is worth the system calls."""
        self.half_after = min(_HALF_AFTER, float(self.half.idle))
        """The same after one direction has ended: usually the other one ends at once."""

    def _timing(self, forgotten_after: int) -> KeepAliveTiming:
        idle = max(1, min(self._seconds, forgotten_after // _TRIES))
        interval = min(10, idle)
        probes = min(127, max(6, _GIVE_UP_AFTER // interval))
        return KeepAliveTiming(idle, interval, probes, max(1, min(_RTO_MAX, forgotten_after // 2)))


def keep_alive(sock: socket.SocketType, timing: KeepAliveTiming) -> None:
    """SO_KEEPALIVE with these times, from now on. A listening socket's are inherited by what it accepts.

    Not TCP_USER_TIMEOUT: it would also end connections to a live peer that has closed its window.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, timing.idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, timing.interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, timing.probes)
    if timing.longest < _RTO_MAX:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, timing.longest * 1000)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:  # an older kernel
                raise

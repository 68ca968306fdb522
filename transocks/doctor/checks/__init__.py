"""The checks, one file per subject: this host in, findings out. A new one goes into CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from transocks.doctor.checks import kernel, loops, names, network, redirection, upstreams
from transocks.doctor.finding import Finding
from transocks.doctor.host import Host

Check: TypeAlias = Callable[[Host], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    network.loopback, redirection.rules, redirection.applied, redirection.both_families, redirection.listeners,
    network.bridges, loops.loops, upstreams.upstreams, names.resolver, network.way_out, network.reverse_path,
    network.forwarding, network.route_localnet, redirection.old_connections, redirection.quic, kernel.conntrack,
    kernel.conntrack_timers, kernel.tools, kernel.descriptors, kernel.ports_in_time_wait, kernel.port_range,
    kernel.fast_open, kernel.nonlocal_bind,
)  # fmt: skip
"""Findings of equal severity are shown in this order."""

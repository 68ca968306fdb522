"""The checks, one file per subject: this host in, findings out. A new one goes into CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from transocks.doctor.checks.kernel import (
    conntrack,
    conntrack_timers,
    descriptors,
    fast_open,
    nonlocal_bind,
    port_range,
    ports_in_time_wait,
    tools,
)  # fmt: skip
from transocks.doctor.checks.loops import loops
from transocks.doctor.checks.names import resolver
from transocks.doctor.checks.network import bridges, forwarding, loopback, reverse_path, route_localnet, way_out
from transocks.doctor.checks.redirection import applied, both_families, listeners, old_connections, quic, rules
from transocks.doctor.checks.upstreams import upstreams
from transocks.doctor.finding import Finding
from transocks.doctor.host import Host

Check: TypeAlias = Callable[[Host], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    loopback, rules, applied, both_families, listeners, bridges, loops, upstreams, resolver, way_out, reverse_path,
    forwarding, route_localnet, old_connections, quic, conntrack, conntrack_timers, tools, descriptors,
    ports_in_time_wait, port_range, fast_open, nonlocal_bind,
)  # fmt: skip
"""In the order in which they are told, if they are equally bad."""

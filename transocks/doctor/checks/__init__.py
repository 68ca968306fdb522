"""The checks, each by itself: what was seen in, findings out."""

from transocks.doctor.checks.applied import applied
from transocks.doctor.checks.greeting import upstreams
from transocks.doctor.checks.installed import tools
from transocks.doctor.checks.limits import descriptors
from transocks.doctor.checks.listening import listeners
from transocks.doctor.checks.loops import loops
from transocks.doctor.checks.names import resolver
from transocks.doctor.checks.paths import bridges, forwarding, loopback, reverse_path, route_localnet
from transocks.doctor.checks.redirection import answers, both_families, old_connections, quic, rules, way_out
from transocks.doctor.checks.settings import fast_open, nonlocal_bind, port_range, ports_in_time_wait
from transocks.doctor.checks.tracking import conntrack, conntrack_timers
from transocks.doctor.finding import Check

CHECKS: tuple[Check, ...] = (
    loopback,
    rules,
    applied,
    both_families,
    listeners,
    answers,
    bridges,
    loops,
    upstreams,
    resolver,
    way_out,
    reverse_path,
    forwarding,
    route_localnet,
    old_connections,
    quic,
    conntrack,
    conntrack_timers,
    tools,
    descriptors,
    ports_in_time_wait,
    port_range,
    fast_open,
    nonlocal_bind,
)
"""In the order in which they are told, if they are equally bad."""

__all__ = ["CHECKS"]

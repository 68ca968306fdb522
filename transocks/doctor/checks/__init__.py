"""The checks, each by itself: what was seen in, findings out."""

from transocks.doctor.checks.applied import applied
from transocks.doctor.checks.greeting import upstreams
from transocks.doctor.checks.kernel import original_destination, targets, tools
from transocks.doctor.checks.limits import descriptors
from transocks.doctor.checks.listening import listeners
from transocks.doctor.checks.loops import loops
from transocks.doctor.checks.names import resolver
from transocks.doctor.checks.paths import dnat_to_loopback, forwarding, policy_routing, reverse_path, way_out
from transocks.doctor.checks.redirection import both_families, input_chain, old_connections, quic, rules
from transocks.doctor.checks.settings import fast_open, nonlocal_bind, port_range, ports_in_time_wait
from transocks.doctor.checks.tracking import conntrack
from transocks.doctor.finding import Check

CHECKS: tuple[Check, ...] = (
    rules,
    applied,
    both_families,
    listeners,
    loops,
    upstreams,
    input_chain,
    resolver,
    way_out,
    policy_routing,
    reverse_path,
    forwarding,
    dnat_to_loopback,
    old_connections,
    quic,
    conntrack,
    original_destination,
    targets,
    tools,
    descriptors,
    ports_in_time_wait,
    port_range,
    fast_open,
    nonlocal_bind,
)
"""In the order in which they are told, if they are equally bad."""

__all__ = ["CHECKS"]

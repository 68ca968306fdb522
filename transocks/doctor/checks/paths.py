"""Settings of the kernel and of interfaces by which packets get lost, with or without rules."""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.seen import Seen, setting_of
from transocks.doctor.tried import Trials
from transocks.rules.config import Mode
from transocks.tracing.links import is_up

_INSIDE = (Mode.GATEWAY, Mode.TPROXY)


def loopback(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """What is redirected to this host itself goes by way of lo."""
    if not is_up("lo"):
        yield fault("lo", "the interface lo is down: nothing gets to 127.0.0.1 and ::1", "ip link set lo up")


def bridges(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """br_netfilter runs the rules too early for TPROXY: what it finds out about a socket is lost on the way up."""
    interfaces = {one.sample.iif for one in trials.results if one.wanted.mode is Mode.TPROXY}
    for version in (4, 6) if seen.ipv6 else (4,):
        for iif in sorted(filter(None, interfaces)):
            if (setting := seen.bridges.get((iif, version))) is not None:
                yield fault(
                    "bridge", f"IPv{version}: {iif} is a bridge and {setting}=1: TPROXY gets no connection from there",
                    f'sysctl {setting}=0; or, where Docker or Kubernetes need it, mode = "gateway"',
                )  # fmt: skip


def reverse_path(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """A strict filter drops clients whose way back is another one, after the rules have counted them."""
    dropped = seen.since("IPReversePathFilter")
    inside = {one.sample.iif for one in trials.results if one.wanted.mode in _INSIDE and one.sample.iif is not None}
    strict = sorted(
        iif for iif in inside if max(seen.interface_number("ipv4", name, "rp_filter") for name in ("all", iif)) == 1
    )
    if strict and dropped:
        yield fault(
            "reverse path",
            f"the filter is strict on {', '.join(strict)} and drops packets ({dropped} while this looked)",
            f"sysctl {setting_of(strict[0], 'rp_filter')}=2, or route the clients' networks back the way they come",
        )  # fmt: skip
    elif strict:
        yield fine("reverse path", f"strict on {', '.join(strict)}, and dropped nothing while this looked")
    elif inside:
        yield fine("reverse path", "not strict where clients come in")


def forwarding(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """A gateway that does not forward lets nothing through but the TCP that is redirected: no DNS, no ICMP."""
    for version, name in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
        if not any(one.wanted.mode in _INSIDE and one.sample.version == version for one in trials.arrived):
            continue
        if seen.number(name) == 0:
            yield fault(
                "forwarding", f"IPv{version} is not forwarded ({name}=0): nothing but redirected TCP gets through",
                f"sysctl {name}=1",
            )  # fmt: skip
        else:
            yield fine("forwarding", f"IPv{version}: {name}={seen.sysctl(name)}")


def route_localnet(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """DNAT to 127.0.0.1 needs it, and it lets neighbours in."""
    for one in trials.arrived:
        if one.wanted.mode is Mode.GATEWAY and one.end[0].is_loopback:
            yield warning(
                "route_localnet", "it is 1, so neighbours can reach what listens on loopback only",
                f'use REDIRECT and listen = ":{one.wanted.port}", and set it to 0',
            )  # fmt: skip

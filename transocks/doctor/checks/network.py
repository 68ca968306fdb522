"""Routes, and settings of the kernel and of interfaces that lose packets, with or without rules."""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.host import Host
from transocks.rules.config import Mode
from transocks.rules.routing import Routing
from transocks.tracing.fate import Fate

_INSIDE = (Mode.GATEWAY, Mode.TPROXY)


def loopback(host: Host) -> Iterator[Finding]:
    """Connections that are redirected to this host go through lo."""
    if not host.links.lo_is_up:
        yield fault("lo", "the interface lo is down: nothing gets to 127.0.0.1 and ::1", "ip link set lo up")


def bridges(host: Host) -> Iterator[Finding]:
    """br_netfilter runs the rules too early for TPROXY: the socket that it chooses is lost on the way up."""
    tproxy = {(f.sample.iif, f.sample.version) for f in host.fates if f.redirection.mode is Mode.TPROXY}
    for (bridge, version), setting in host.bridges.items():
        if (bridge, version) in tproxy:
            yield fault(
                "bridge", f"IPv{version}: {bridge} is a bridge and {setting}=1: TPROXY gets no connection from there",
                f'sysctl {setting}=0; or, where Docker or Kubernetes need it, mode = "gateway"',
            )  # fmt: skip


def reverse_path(host: Host) -> Iterator[Finding]:
    """A strict reverse path filter drops clients whose route leads out of another interface, after the rules have
    counted them.
    """
    dropped = host.since("IPReversePathFilter")
    inside = {fate.sample.iif for fate in host.fates if fate.redirection.mode in _INSIDE and fate.sample.iif}
    strict = sorted(iif for iif in inside if _setting(host, iif, "rp_filter") == 1)
    if strict and dropped:
        yield fault(
            "reverse path",
            f"the filter is strict on {', '.join(strict)} and drops packets ({dropped} while this looked)",
            f"sysctl {_name(strict[0], 'rp_filter')}=2, or route the clients' networks back the way they come",
        )  # fmt: skip
    elif strict:
        yield fine("reverse path", f"strict on {', '.join(strict)}, and dropped nothing while this looked")
    elif inside:
        yield fine("reverse path", "not strict where clients come in")


def _setting(host: Host, interface: str, name: str) -> int:
    """A setting for IPv4 as it is in force."""
    return max(host.of_interface(interface, name), host.of_interface("all", name))


def _name(interface: str, name: str) -> str:
    """The setting of an interface for IPv4, as sysctl(8) takes it: with / for each dot in the name of a VLAN."""
    return f"net.ipv4.conf.{interface.replace('.', '/')}.{name}"


def forwarding(host: Host) -> Iterator[Finding]:
    """A gateway without forwarding passes nothing but redirected TCP: no DNS, no ICMP."""
    for version, name in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
        if any(fate.redirection.mode in _INSIDE and fate.sample.version == version for fate in host.arrived):
            if host.number(name) == 0:
                text = f"IPv{version} is not forwarded ({name}=0): nothing but redirected TCP gets through"
                yield fault("forwarding", text, f"sysctl {name}=1")
            else:
                yield fine("forwarding", f"IPv{version}: {name}={host.sysctl(name)}")


def route_localnet(host: Host) -> Iterator[Finding]:
    """DNAT to 127.0.0.1 needs route_localnet=1, which lets neighbours reach services that listen on loopback."""
    for fate in host.arrived:
        if fate.redirection.mode is Mode.GATEWAY and fate.end[0].is_loopback:
            do = f'use REDIRECT and listen = ":{fate.redirection.port}", and set it to 0'
            yield warning("route_localnet", "it is 1, so neighbours can reach what listens on loopback only", do)


def way_out(host: Host) -> Iterator[Finding]:
    """Without a route to its destination, the kernel refuses a connection before any rule is asked, although redirected
    connections do not take that route. Hosts that reach only their proxy often have none.
    """
    devices: dict[int, str] = {}
    for name, networks in host.links.networks.items():
        devices = {network.version: name for network in networks} | devices
    mine = [f for f in host.fates if f.redirection.mode is Mode.HOST and f.sample.version in devices]
    missing: dict[int, str] = {}
    for fate in mine:
        if fate.result.no_route:
            text = f"no route to {fate.sample.destination}, so no rule is asked ({fate.result.why})"
            missing[fate.sample.version] = text
    versions = {fate.sample.version for fate in mine}
    if missing and (4 in missing or set(missing) == versions):  # without IPv6, applications use IPv4
        version = min(missing)
        say = fault if set(missing) == versions else warning
        do = f"ip -{version} route add default dev {devices[version]}: what is redirected does not go there"
        yield say("routes", f"IPv{version}: {missing[version]}", do)
    elif mine and not missing:
        yield fine("routes", "there is one to where the redirected connections of this host mean to go")


def routing(fate: Fate, host: Host) -> Finding:
    """Why routing dropped a packet that our rule selected, or sent it elsewhere."""
    trace, iif, mode = fate.result.trace, fate.sample.iif or "lo", fate.redirection.mode
    assert trace is not None
    if mode is Mode.GATEWAY and trace.destination[0].is_loopback:
        text = f"DNAT to {trace.destination[0]} from {iif}, and route_localnet is 0: dropped"
        return fault("route_localnet", text, f'use REDIRECT and listen = ":{fate.redirection.port}"')
    mark, filtered = fate.redirection.tproxy_mark, fate.sample.version == 4 and not trace.left
    if filtered and fate.redirection.by_tproxy and _setting(host, iif, "src_valid_mark"):
        text = f"src_valid_mark=1: what has mark {mark:#x} is dropped, its source is looked up with it"
        do = f"sysctl {_name('all', 'src_valid_mark')}=0 {_name(iif, 'src_valid_mark')}=0"
        return fault("reverse path", text, do)
    if filtered and _setting(host, iif, "rp_filter") == 1:
        text = f"clients behind {iif} are dropped, their source is not believed (rp_filter=1)"
        do = f"sysctl {_name(iif, 'rp_filter')}=2, or route the clients' network back through {iif}"
        return fault("reverse path", text, do)
    if not fate.redirection.by_tproxy:
        return fault("routes", f"{fate.name}: redirected, and then {fate.text}", "look at ip route and ip rule")
    by_hand = "; ".join(map(Routing(mark, fate.sample.version).by_hand, ("rule", "route")))
    text = f"{fate.name}: what TPROXY takes (mark {mark:#x}) is not routed to this host"
    return fault("routes", text, f"transocks rules apply, or by hand: {by_hand}" if host.stated else by_hand)

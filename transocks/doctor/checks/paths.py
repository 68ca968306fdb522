"""Routing: what has to be so that packets get to the rules, and from there to transocks."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import Flow, Flows, Mode
from transocks.doctor.seen import Seen
from transocks.netfilter.ruleset import UNKNOWN, Kind


def way_out(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """Where an application wants to go there has to be a route, or no rule is asked, though what they redirect does not
    take it. A host that reaches nothing but its proxy often has none.
    """
    used = {network.version for link in seen.links for network in link.networks if not network.is_link_local}
    mine = [flow for flow in flows.best if flow.mode is Mode.HOST and flow.version in used]
    missing: dict[int, str] = {}
    for flow in mine:
        try:
            seen.route(flow.packet.destination)
        except OSError as error:
            missing[flow.version] = f"no route to {flow.packet.destination}, so no rule is asked ({error.strerror})"
    if 4 in missing or len(missing) == len(mine) > 0:  # without IPv6 applications take IPv4
        version = min(missing)
        say = fault if len(missing) == len(mine) else warning
        yield say(
            "routes", f"IPv{version}: {missing[version]}",
            f"ip -{version} route add default via any address of a network here: what is redirected does not go there",
        )  # fmt: skip
    elif mine:
        yield fine("routes", "there is one to where the redirected connections of this host mean to go")


def policy_routing(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """What TPROXY has taken has to be routed to this host itself: asked of the kernel, with the mark and all."""
    for flow in flows.arriving:
        if flow.mode is not Mode.TPROXY:
            continue
        name, mark = f"IPv{flow.version}", flow.way.packet.mark
        source, iif = flow.packet.source, flow.packet.iif
        if mark is UNKNOWN or source is UNKNOWN or not isinstance(iif, str) or not isinstance(mark, int):
            yield unchecked("routes", f"{name}: which mark the rules set, or where clients are")
            continue
        try:
            route = seen.route(flow.packet.destination, source=source, iif=iif, mark=mark)
        except OSError as error:
            yield _refused(seen, flow, error, mark)
            continue
        if route.local:
            yield fine("routes", f"{name}: what has mark {mark:#x} is delivered here")
        else:
            yield fault(
                "routes", f"{name}: what TPROXY takes (mark {mark:#x}) is routed to {route.device}, not to this host",
                f"ip -{flow.version} rule add fwmark {mark:#x} lookup 100; ip -{flow.version} route add local default"
                " dev lo table 100",
            )  # fmt: skip


def _refused(seen: Seen, flow: Flow, error: OSError, mark: int) -> Finding:
    iif = str(flow.packet.iif)
    # With this the way back to the client is looked up with the mark too, and that way leads to lo.
    if flow.version == 4 and _any(seen, iif, "src_valid_mark"):
        return fault(
            "reverse path", f"src_valid_mark=1: what has mark {mark:#x} is dropped, its source is looked up with it",
            f"sysctl net.ipv4.conf.all.src_valid_mark=0 (wg-quick sets it), and of {iif}",
        )  # fmt: skip
    if error.errno in {errno.EXDEV, errno.EINVAL} and flow.version == 4:
        return fault(
            "reverse path",
            f"clients behind {iif} are dropped, their source is not believed (rp_filter={_strict(seen, iif)})",
            f"sysctl net.ipv4.conf.{iif}.rp_filter=2, or route the clients' network back through {iif}",
        )  # fmt: skip
    return fault(
        "routes", f"IPv{flow.version}: what TPROXY takes (mark {mark:#x}) goes nowhere: {error.strerror}",
        f"ip -{flow.version} rule add fwmark {mark:#x} lookup 100; ip -{flow.version} route add local default dev lo"
        " table 100",
    )  # fmt: skip


def reverse_path(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """A strict filter drops clients whose way back is another one, after the rules have counted them."""
    strict = sorted({
        flow.packet.iif for flow in flows.arriving
        if flow.mode is not Mode.HOST and flow.version == 4 and isinstance(flow.packet.iif, str)
        and _strict(seen, flow.packet.iif) == 1
    })  # fmt: skip
    dropped = _netstat(seen, "IPReversePathFilter")
    if not flows.has(Mode.GATEWAY, Mode.TPROXY):
        return
    if strict and dropped:
        yield fault(
            "reverse path",
            f"the filter is strict on {', '.join(strict)} and has dropped {dropped} packets (IPReversePathFilter)",
            f"sysctl net.ipv4.conf.{strict[0]}.rp_filter=2, or route the clients' networks back the way they come",
        )  # fmt: skip
    elif strict:
        yield fine("reverse path", f"strict on {', '.join(strict)}, and nothing was dropped so far")
    else:
        yield fine("reverse path", f"not strict where clients come in ({dropped or 0} packets dropped in all)")


def _any(seen: Seen, iif: str, name: str) -> bool:
    return any(seen.interface_number("ipv4", interface, name) for interface in ("all", iif))


def _strict(seen: Seen, iif: str) -> int:
    """The larger of the two is in force: ip-sysctl, rp_filter."""
    return max(seen.interface_number("ipv4", interface, "rp_filter") for interface in ("all", iif))


def _netstat(seen: Seen, name: str) -> int | None:
    """A counter of /proc/net/netstat: a line of names, a line of values."""
    lines = (seen.read("net/netstat") or "").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        found = dict(zip(names.split(), values.split(), strict=False))
        if name in found:
            return int(found[name])
    return None


def forwarding(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """A gateway that does not forward lets nothing through but the TCP that is redirected: no DNS, no ICMP."""
    for version, name in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
        if not any(f.mode is not Mode.HOST and f.version == version for f in flows.best):
            continue
        if seen.number(name) == 0:
            yield fault(
                "forwarding", f"IPv{version} is not forwarded ({name}=0): nothing but redirected TCP gets through",
                f"sysctl {name}=1",
            )  # fmt: skip
        else:
            yield fine("forwarding", f"IPv{version}: {name}={seen.sysctl(name)}")


def dnat_to_loopback(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """Packets from outside for 127.0.0.0/8 are dropped, DNAT or not, unless route_localnet is set."""
    for target in flows.targets:
        address = target.action.address
        if target.action.kind is not Kind.DNAT or target.chain.hook != "prerouting" or address is None:
            continue
        if not address.is_loopback:
            continue
        inside = sorted({str(f.packet.iif) for f in flows.best if f.target == target})
        if address.version == 6:
            yield fault("route_localnet", f"IPv6 knows no DNAT to {address} from outside", "use REDIRECT")
        elif not all(_any(seen, iif, "route_localnet") for iif in inside):
            yield fault(
                "route_localnet", f"DNAT to {address} from {', '.join(inside)}, and route_localnet is 0: dropped",
                f'use REDIRECT and listen = ":{target.action.port}"',
            )  # fmt: skip
        else:
            yield warning(
                "route_localnet", "it is 1, so neighbours can reach what listens on loopback only",
                f'use REDIRECT and listen = ":{target.action.port}", and set it to 0',
            )  # fmt: skip

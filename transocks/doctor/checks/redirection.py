"""Do connections get from the rules to transocks, and does nothing go past?"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import EXAMPLES, Flow, Flows, Mode, comes_back, local_ends, ports
from transocks.doctor.seen import Seen
from transocks.netfilter.ruleset import TCP_FLAGS, UNKNOWN, Hook, Kind, Packet, Version
from transocks.netfilter.walk import Way, walk


def rules(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """There are rules that lead to our ports, and their connections get there."""
    if seen.ruleset is None:
        yield unchecked("rules", seen.ruleset_unread, "run it as root")
        return
    if not flows.targets:
        yield from _missing(seen, flows)
        return
    for flow in flows.best:
        name = f"{flow.mode.value}, IPv{flow.version}"
        turned, blocked = flow.way.turned, flow.way.blocked
        if blocked is not None and not (flow.arrives and flow.mode is Mode.TPROXY):
            yield fault("rules", f"{name}: dropped on the way: {blocked}", "let it pass there, or remove that rule")
        elif flow.arrives:
            yield fine("rules", f"{name}: {flow.target.text}")
        elif turned is not None:
            yield fault(
                "rules", f"{name}: others' rules take it before ours: {turned}",
                "remove that rule, or load ours at an earlier place (nft: a lower priority)",
            )  # fmt: skip
        elif (untracked := flow.way.may(Kind.NOTRACK)) is not None and untracked.certain:
            yield fault(
                "rules", f"{name}: not tracked, and so never redirected: {untracked}", "take such traffic out of there"
            )  # fmt: skip
        elif (doubtful := next((s for s in flow.way.steps if not s.certain), None)) is not None:
            yield unchecked("rules", f"{name}: depends on what can't be told from the rules: {doubtful}")
        else:
            yield unchecked("rules", f"{name}: nothing found that gets to {flow.target.text}")


def _missing(seen: Seen, flows: Flows) -> Iterator[Finding]:
    everywhere = ports(seen, Kind.REDIRECT) | ports(seen, Kind.TPROXY)
    ours = [t for t in flows.leading if t.chain.table.startswith("transocks") or "TRANSOCKS" in t.rule.text]
    for target in ours[:2]:
        kind, port = target.action.kind, target.action.port
        setting = "listen_tproxy" if kind is Kind.TPROXY else "listen"
        other_kind = port in everywhere
        yield fault(
            "rules",
            f"they send to port {port}, and transocks has {_texts(ports(seen, kind))} for {kind.value}: {target.text}",
            f"TPROXY is for a port of listen_tproxy, REDIRECT for one of listen: see {setting}" if other_kind
            else f"put the port of the rule and {setting} together",
        )  # fmt: skip
    if not ours:
        yield fault(
            "rules", f"none sends connections to transocks (port {_texts(everywhere)})",
            "transocks rules apply, or load those of iptables/",
        )  # fmt: skip


def _texts(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers))) or "no port"


def old_connections(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """What is in the middle of a connection that the rules know nothing of must be none of theirs."""
    for flow in flows.arriving:
        tproxy = flow.mode is Mode.TPROXY
        if not tproxy and seen.number("net.netfilter.nf_conntrack_tcp_loose") == 0:
            continue  # it is not tracked then, and so not redirected
        assert seen.ruleset is not None
        middle = attrs.evolve(flow.packet, flags=TCP_FLAGS["ack"])
        way = walk(seen.ruleset, "output" if flow.mode is Mode.HOST else "prerouting", middle)
        if comes_back(way, seen):
            which = "all" if tproxy else "those that nothing tracked before"
            yield warning(
                "old connections",
                f"{flow.mode.value}, IPv{flow.version}: to load these rules ends old connections ({which}),"
                f" since they take the middle of one too: {way.turned}",
                "limit them to first segments: tcp flags & (fin | syn | rst | ack) == syn (iptables: --syn)",
            )  # fmt: skip


def input_chain(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """What was redirected comes through INPUT like anything that is for this host itself."""
    for flow in flows.arriving:
        for packet in _delivered(flow, seen):
            assert seen.ruleset is not None
            way = walk(seen.ruleset, "input", packet)
            name = f"{flow.mode.value}, IPv{flow.version}"
            to = f"port {packet.dport} of {packet.destination}"
            if way.blocked is not None:
                yield fault(
                    "input", f"{name}: redirected connections to {to} are dropped: {way.blocked}",
                    _let_in(flow),
                )  # fmt: skip
                break
            if not way.certain:
                yield unchecked("input", f"{name}: may be dropped at {to}: {way.steps[0]}")
                break
        else:
            yield fine("input", f"{name}: redirected connections may come in")


def _let_in(flow: Flow) -> str:
    if flow.mode is Mode.TPROXY:
        return "accept what has the mark of the TPROXY rule there, before it is dropped"
    on = "lo" if flow.mode is Mode.HOST else flow.packet.iif
    return f"accept TCP to port {flow.target.action.port} from {on} there, before it is dropped"


def _delivered(flow: Flow, seen: Seen) -> Iterator[Packet]:
    """The packet as INPUT sees it."""
    packet = attrs.evolve(flow.way.packet, oif="", uid=None, gid=None)
    if flow.mode is Mode.TPROXY:
        yield packet
        return
    for address in local_ends(flow, seen):
        yield attrs.evolve(
            packet, destination=address, dport=flow.way.packet.dport, destination_type="local",
            iif="lo" if flow.mode is Mode.HOST else packet.iif,
        )  # fmt: skip


def both_families(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """Rules for one family only let the other pass by, if this host has it."""
    version: Version
    for version in (4, 6):
        for mode in {flow.mode for flow in flows.arriving if flow.version != version}:
            if flows.has(mode, version=version):
                continue  # and whether they get there is what `rules` tells
            device = _way_out(seen, version)
            if device is None:
                yield fine("families", f"{mode.value}: IPv{version} has no rules, and no way out either")
                continue
            example = next(flow for flow in flows.arriving if flow.mode is mode)
            way = _unruled(seen, example, version, device)
            if way.blocked is not None:
                yield fine("families", f"{mode.value}: IPv{version} has no rules, and is dropped: {way.blocked}")
            else:
                yield fault(
                    "families",
                    f"{mode.value}: no rules for IPv{version}, and IPv{version} goes out by {device}, past transocks",
                    f"load the rules for IPv{version} too, or take its default route away",
                )  # fmt: skip


def _way_out(seen: Seen, version: Version) -> str | None:
    """The interface to the Internet; a VPN's may be known to a routing table of its own only."""
    if version in seen.uplinks:
        return seen.uplinks[version]
    try:
        route = seen.route(EXAMPLES[version][0])
    except OSError:
        return None
    return None if route.local else route.device


def _unruled(seen: Seen, flow: Flow, version: Version, device: str) -> Way:
    """The way out of the other family."""
    assert seen.ruleset is not None
    hook: Hook = "output" if flow.mode is Mode.HOST else "forward"
    packet = attrs.evolve(
        flow.packet, version=version, destination=EXAMPLES[version][0], oif=device, source=UNKNOWN,
    )  # fmt: skip
    return walk(seen.ruleset, hook, packet)


def quic(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """Browsers prefer HTTP/3, which is UDP and is not proxied."""
    for flow in flows.arriving:
        if flow.packet.dport != 443:
            continue
        assert seen.ruleset is not None
        packet = attrs.evolve(flow.packet, protocol="udp")
        if flow.mode is not Mode.HOST:
            if _closed(seen, flow.version):
                continue
            packet = attrs.evolve(packet, oif=seen.uplinks.get(flow.version, UNKNOWN))
        before: Hook = "output" if flow.mode is Mode.HOST else "prerouting"
        way = walk(seen.ruleset, before, packet)
        if way.blocked is None and flow.mode is not Mode.HOST:
            way = walk(seen.ruleset, "forward", way.packet)
        if way.blocked is not None:
            yield fine("quic", f"{flow.mode.value}, IPv{flow.version}: refused: {way.blocked}")
        elif way.may(Kind.DROP, Kind.REJECT, Kind.REDIRECT, Kind.DNAT, Kind.TPROXY) is None:
            yield warning(
                "quic", f"{flow.mode.value}, IPv{flow.version}: UDP to port 443 (HTTP/3) goes out past transocks",
                "reject it where TCP is redirected, as the rule files do, so that browsers take TCP",
            )  # fmt: skip


def _closed(seen: Seen, version: Version) -> bool:
    name = "net.ipv4.ip_forward" if version == 4 else "net.ipv6.conf.all.forwarding"
    return seen.number(name) == 0

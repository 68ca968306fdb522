"""Which rules of others take connections before ours see them. Pure.

What takes a connection depends on the place. In NAT the first mapping stands, so a dnat or redirect in a chain with an
earlier priority decides; an accept there only ends that chain. In one and the same chain, as in iptables's, whatever
ends it before our jump takes the connection. Rules that are for what ours leave alone (this host's own addresses, as
Docker's published ports; private networks, as kube-proxy's services) take nothing from us. Conditions that can't be
told hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_network

import attrs

from transocks.firewall.config import Mode, Tool
from transocks.firewall.render import excluded
from transocks.firewall.wanted import MARK, Wanted
from transocks.netfilter.ruleset import Chain, Kind, Match, Range, Ruleset, network_range
from transocks.netfilter.walk import targets

# Of <linux/netfilter_ipv4.h>: NF_IP_PRI_CONNTRACK, _MANGLE and _NAT_DST; and our nft chain, just behind that one.
_TRACKED, _MANGLE, _NAT, _NFT_NAT = -200, -150, -100, -90


@attrs.frozen
class Taken:
    """A finding: `some`, if only connections to some destinations are meant."""

    text: str
    some: bool


def taken(wanted: Wanted, tool: Tool, loaded: Ruleset) -> Iterator[Taken]:
    """What others take from the rules of one mode, loaded by this tool."""
    ruleset = Ruleset(tuple(chain for chain in loaded.chains if not _apart(chain)))
    alone = tuple(_left_alone(wanted))
    for chain in ruleset.chains:
        if chain.hook != ("output" if wanted.mode is Mode.HOST else "prerouting"):
            continue
        before, kinds = _before_ours(wanted, tool, chain)
        for found in targets(ruleset, before, kinds):
            inside = found.inside is not before
            if inside and found.action.kind in {Kind.RETURN, Kind.GOTO}:
                continue  # it comes back
            if any(match.implies(other) for match in found.matches for other in alone):
                continue
            some = any(map(_for_some_destinations, found.matches))
            place = f"{table_of(chain)}, chain {chain.name}"
            place += f" (priority {chain.priority})" if chain.tool == "nft" else ""
            place += f", by way of {found.inside.name}" if inside else ""
            what = "those to some destinations" if some else "connections"
            yield Taken(f'{place}: "{found.rule.text}" takes {what} before our rules do', some)


def table_of(chain: Chain) -> str:
    """A chain's table in words."""
    if chain.tool == "nft":
        return f"table {chain.family} {chain.table}"
    return f"{'IPv6' if chain.family == 'ip6' else 'IPv4'} table {chain.table}"


def _apart(chain: Chain) -> bool:
    """Our own tables of nft, and what `transocks exec` has for one command."""
    if chain.tool == "nft":
        return chain.family == "inet" and chain.table.startswith("transocks")
    return chain.name.startswith("TRANSOCKS-EXEC")


def _before_ours(wanted: Wanted, tool: Tool, chain: Chain) -> tuple[Chain, set[Kind]]:
    """Of a hooked chain the rules that come before ours, and what takes a connection in there."""
    kinds = _takers(wanted.mode, tool, chain)
    if tool is Tool.IPTABLES and chain.tool == "iptables":
        for at, rule in enumerate(chain.rules):
            if any(action.chain == wanted.chain for action in rule.actions):
                ends = {Kind.ACCEPT, Kind.DROP, Kind.REJECT, Kind.RETURN, Kind.GOTO}
                return attrs.evolve(chain, rules=chain.rules[:at]), kinds | ends
    return chain, kinds


def _takers(mode: Mode, tool: Tool, chain: Chain) -> set[Kind]:
    if mode is Mode.TPROXY:
        before = chain.type != "nat" and chain.priority <= _MANGLE
        return {Kind.TPROXY, Kind.DROP, Kind.REJECT} if before else set()
    if chain.type == "nat":
        return {Kind.REDIRECT, Kind.DNAT} if chain.priority <= (_NFT_NAT if tool is Tool.NFT else _NAT) else set()
    return {Kind.NOTRACK, Kind.DROP, Kind.REJECT} if chain.priority < _TRACKED else set()


def _left_alone(wanted: Wanted) -> Iterator[Match]:
    """What connections meet, each of these, that our rules are not for."""
    yield Match("protocol", ("tcp",), negate=True)
    yield Match("destination_type", ("local", "broadcast", "multicast"))
    mark = MARK if wanted.mark is None else wanted.mark
    yield Match("mark", (Range(mark, mark),))
    yield Match("dport", (Range(53, 53), Range(853, 853)))
    if wanted.selection.ports:
        yield Match("dport", tuple(Range(*ports) for ports in wanted.selection.ports), negate=True)
    networks = [ip_network(network) for network in excluded(wanted)]
    for version in (4, 6):
        ranges = tuple(network_range(network) for network in networks if network.version == version)
        yield Match("destination", ranges, version=version)


def _for_some_destinations(match: Match) -> bool:
    """Whether it is for some destinations alone, be it not known which."""
    if match.field == "unknown":
        return re.search(r"^(?!.*!).*\b(dst|daddr)\b", str(match.values[0])) is not None
    return match.field == "destination" and not match.negate

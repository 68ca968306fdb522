"""Which rules of others take connections before ours see them. Pure.

What takes a connection depends on the place. In NAT the first mapping stands, so a dnat or redirect in a chain with an
earlier priority decides; an accept there only ends that chain. In one and the same chain, as in iptables's, whatever
ends it before our jump takes the connection. Rules that are for destinations that ours leave alone (this host's own
addresses, as those of Docker's published ports; private networks, as kube-proxy's services) take nothing from us.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

import attrs

from transocks.firewall.config import Mode
from transocks.firewall.saved import Rule, Table
from transocks.firewall.verify import rule_texts
from usocksd.match import IPNetwork

_NAT_PRIORITY, _TRACKED = -100, -200  # NF_IP_PRI_NAT_DST, NF_IP_PRI_CONNTRACK of <linux/netfilter_ipv4.h>
_DEEPEST = 16  # chains that jump to chains: the kernel has the same limit


@attrs.frozen(kw_only=True)
class Ours:
    """What there is to be taken: the mode, the place of our chain, and what our rules are not about."""

    mode: Mode
    chains: tuple[str, ...]
    """of iptables"""
    priority: int | None
    """of our nft chain; None: the rules are iptables's"""
    excluded: tuple[IPNetwork, ...]
    mark: int
    ports: tuple[tuple[int, int], ...]
    """empty: all"""

    @property
    def hook(self) -> str:
        return "output" if self.mode is Mode.HOST else "prerouting"


@attrs.frozen
class Limits:
    """To what a rule is limited, as far as it matters: by its own matches and those of the rules that led to it."""

    other_protocol: bool = False
    local: bool = False
    marked: frozenset[int] = frozenset()
    networks: tuple[IPNetwork, ...] | None = None
    """destinations; None: all; empty: some that are not known here"""
    ports: tuple[tuple[int, int], ...] | None = None

    def __or__(self, more: Limits) -> Limits:
        return Limits(
            self.other_protocol or more.other_protocol,
            self.local or more.local,
            self.marked | more.marked,
            more.networks if self.networks is None else self.networks,
            more.ports if self.ports is None else self.ports,
        )


@attrs.frozen
class Taken:
    """A finding: `some`, if only connections to some destinations are meant."""

    text: str
    some: bool


def taken(ours: Ours, where: str, rule: str, verdict: str, limits: Limits) -> Iterator[Taken]:
    """What to say of one rule that takes connections, if anything."""
    if limits.other_protocol or limits.local or ours.mark in limits.marked:
        return
    if limits.networks and all(_within(network, ours.excluded) for network in limits.networks):
        return
    if limits.ports is not None:
        left = [p for p in limits.ports if not (p[0] == p[1] and p[0] in (53, 853))]  # never ours
        if not any(not ours.ports or any(a <= d and c <= b for a, b in ours.ports) for c, d in left):
            return
    some = limits.networks is not None
    what = "those to some destinations" if some else "connections"
    yield Taken(f'{where}: "{rule}" ({verdict}) takes {what} before our rules do', some)


def _within(network: IPNetwork, others: Iterable[IPNetwork]) -> bool:
    return any(network.version == o.version and network.subnet_of(o) for o in others)  # type: ignore[arg-type]


# ---- iptables


def in_saved(ours: Ours, tables: Iterable[Table], family: str) -> Iterator[Taken]:
    """Of what iptables-save says of one family."""
    for table in tables:
        chain = ours.hook.upper()
        rules = [rule for rule in table.of(chain) if not rule.target or not rule.target.startswith("TRANSOCKS-EXEC")]
        jump = next((at for at, rule in enumerate(rules) if rule.target in ours.chains), None)
        here = ours.priority is None and jump is not None
        match ours.mode, table.name:
            case (Mode.TPROXY, "mangle"):
                verdicts = {"TPROXY", "DROP"} | ({"ACCEPT", "RETURN"} if here else set())
            case (Mode.HOST | Mode.GATEWAY, "nat"):
                verdicts = {"DNAT", "REDIRECT", "NETMAP"} | ({"ACCEPT", "RETURN", "DROP"} if here else set())
            case (Mode.HOST | Mode.GATEWAY, "raw"):
                verdicts = {"NOTRACK", "CT", "DROP"}
            case _:
                continue
        where = f"{family} table {table.name}, chain {chain}"
        by_chain: dict[str, list[Rule]] = {}
        for rule in table.rules:
            by_chain.setdefault(rule.chain, []).append(rule)
        for rule, limits in _walk(rules[:jump] if here else rules, by_chain, Limits(), 0):
            verdict = rule.target or ""
            inside = rule.chain != chain
            if verdict not in verdicts or rule.target in ours.chains or (verdict == "RETURN" and inside):
                continue
            if verdict == "CT" and "--notrack" not in rule.rest:
                continue
            yield from taken(ours, where + (f", by way of {rule.chain}" if inside else ""), rule.rest, verdict, limits)


def _walk(
    rules: Iterable[Rule], by_chain: Mapping[str, Sequence[Rule]], limits: Limits, depth: int
) -> Iterator[tuple[Rule, Limits]]:
    for rule in rules:
        here = limits | _limits_saved(rule.rest)
        inside = by_chain.get(rule.target or "")
        if inside is not None and depth < _DEEPEST:
            yield from _walk(inside, by_chain, here, depth + 1)
        else:
            yield rule, here


def _limits_saved(rest: str) -> Limits:
    matches = re.sub(r"(^| )-[jg] .*", "", rest)
    protocol = re.search(r"(! )?-p (\S+)", matches)
    destination = re.search(r"(! )?-d (\S+)", matches)
    networks: tuple[IPNetwork, ...] | None = None
    if destination and not destination[1]:
        networks = (ip_network(destination[2], strict=False),)
    elif re.search(r"(?<!! )--match-set \S+ (?:\w+,)*dst\b", matches):
        networks = ()
    ports = re.search(r"(?<!! )--dports? (\S+)", matches)
    mark = re.search(r"(?<!! )--mark (0x[0-9a-f]+)(?:/0xffffffff)?(?: |$)", matches)
    return Limits(
        bool(protocol and not protocol[1] and protocol[2] not in ("tcp", "all")),
        re.search(r"(?<!! )--dst-type LOCAL\b", matches) is not None,
        frozenset({int(mark[1], 16)}) if mark else frozenset(),
        networks,
        tuple(_range(word, ":") for word in ports[1].split(",")) if ports else None,
    )


def _range(word: str, between: str) -> tuple[int, int]:
    low, _, high = word.partition(between)
    return int(low or 0), int(high or (65535 if between in word else low))


# ---- nft


def in_nft(
    ours: Ours, entries: Sequence[Mapping[str, Any]], listing: str, skip: Iterable[tuple[str, str]]
) -> Iterator[Taken]:
    """Of `nft -j list ruleset` and `nft -a list ruleset`. skip: tables (family, name) that are ours, or iptables's."""
    left = set(skip)
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    for base in chains:
        place = (base["family"], base["table"])
        if base.get("hook") != ours.hook or base["family"] not in ("ip", "ip6", "inet") or place in left:
            continue
        verdicts = _verdicts(ours, base["type"], base["prio"])
        if not verdicts:
            continue
        table = _NftTable(entries, *place)
        texts = rule_texts(listing, *place)
        for rule, verdict, limits in table.walk(base["name"], Limits(), 0):
            if verdict in verdicts:
                where = f"table {base['family']} {base['table']}, chain {base['name']} (priority {base['prio']})"
                text = texts.get(rule["handle"], verdict)
                inside = f", by way of {rule['chain']}" if rule["chain"] != base["name"] else ""
                yield from taken(ours, where + inside, text, verdict, limits)


def _verdicts(ours: Ours, kind: str, priority: int) -> set[str]:
    if ours.mode is Mode.TPROXY:
        before = priority <= (-150 if ours.priority is None else ours.priority)
        return {"tproxy", "drop", "reject"} if before and kind == "filter" else set()
    if kind == "nat":
        before = priority <= (_NAT_PRIORITY if ours.priority is None else ours.priority)
        return {"dnat", "redirect"} if before else set()
    return {"notrack", "drop"} if priority < _TRACKED else set()


class _NftTable:
    def __init__(self, entries: Sequence[Mapping[str, Any]], family: str, name: str) -> None:
        self._rules: dict[str, list[Mapping[str, Any]]] = {}
        self._sets: dict[str, Sequence[Any]] = {}
        for entry in entries:
            ((kind, found),) = entry.items()
            if (found.get("family"), found.get("table")) == (family, name):
                if kind == "rule":
                    self._rules.setdefault(found["chain"], []).append(found)
                elif kind in ("set", "map"):
                    self._sets[found["name"]] = found.get("elem", ())

    def walk(self, chain: str, limits: Limits, depth: int) -> Iterator[tuple[Mapping[str, Any], str, Limits]]:
        """Every rule that has a verdict, with that, and what it is limited to; jumps are followed."""
        for rule in self._rules.get(chain, ()):
            here = limits
            for part in rule["expr"]:
                ((kind, value),) = part.items()
                if kind == "match":
                    here |= self._limits(value["op"], value["left"], value["right"])
                elif kind == "vmap":
                    here |= self._limits("==", value["key"], None)
                    data = value["data"]
                    found = self._sets.get(data[1:], ()) if isinstance(data, str) else data
                    for target in set(_targets(found)):
                        if depth < _DEEPEST:
                            yield from self.walk(target, here, depth + 1)
                elif kind in ("jump", "goto") and depth < _DEEPEST:
                    yield from self.walk(value["target"], here, depth + 1)
                elif kind in ("accept", "drop", "reject", "dnat", "redirect", "tproxy", "notrack"):
                    yield rule, kind, here

    def _limits(self, op: str, left: Any, right: Any) -> Limits:
        if op not in ("==", "in") or not isinstance(left, dict):
            return Limits()
        match left:
            case {"meta": {"key": "l4proto"}} if right is not None:
                return Limits(other_protocol="tcp" not in self._elements(right))
            case {"payload": {"protocol": "udp" | "sctp" | "icmp" | "icmpv6"}}:
                return Limits(other_protocol=True)
            case {"fib": {"result": "type", "flags": flags}} if "daddr" in flags and right == "local":
                return Limits(local=True)
            case {"meta": {"key": "mark"}} if isinstance(right, int):
                return Limits(marked=frozenset({right}))
            case {"payload": {"field": "daddr"}}:
                elements = self._elements(right)
                networks = [_network(element) for element in elements]
                return Limits(networks=tuple(n for n in networks if n) if all(networks) else ())
            case {"concat": parts} if any("daddr" in str(part) for part in parts):
                return Limits(networks=())
            case {"payload": {"field": "dport"}} if right is not None:
                return Limits(ports=tuple(p for e in self._elements(right) if (p := _nft_ports(e))) or None)
        return Limits()

    def _elements(self, right: Any) -> Sequence[Any]:
        if isinstance(right, str) and right.startswith("@"):
            return self._sets.get(right[1:], ())
        if isinstance(right, dict) and "set" in right:
            return list(right["set"])
        return [] if right is None else [right]


def _targets(data: Any) -> Iterator[str]:
    """Chains that a verdict map, or anything inside of it, jumps to."""
    if isinstance(data, dict):
        for kind, value in data.items():
            if kind in ("jump", "goto"):
                yield value["target"]
            else:
                yield from _targets(value)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _targets(item)


def _network(element: Any) -> IPNetwork | None:
    match element:
        case {"elem": {"val": value}}:
            return _network(value)
        case {"prefix": {"addr": address, "len": length}}:
            return ip_network(f"{address}/{length}", strict=False)
        case str():
            try:
                return ip_network(element)
            except ValueError:
                return None
    return None


def _nft_ports(element: Any) -> tuple[int, int] | None:
    match element:
        case {"elem": {"val": value}}:
            return _nft_ports(value)
        case {"range": [int(low), int(high)]}:
            return low, high
        case int():
            return element, element
    return None

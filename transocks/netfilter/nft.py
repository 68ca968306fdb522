"""What `nft --json list ruleset` says, read: libnftables-json(5)."""

from __future__ import annotations

import functools
import json
import operator
import pwd
from collections.abc import Collection, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

from transocks.netfilter.nft_text import text_of
from transocks.netfilter.ruleset import (
    NEVER,
    TCP_FLAGS,
    Action,
    Chain,
    Kind,
    Match,
    Range,
    Rule,
    Ruleset,
    network_range,
    unknown,
)

IPTABLES_TABLES = ("raw", "mangle", "nat", "filter", "security")
_VERDICTS = {kind.value: kind for kind in (Kind.ACCEPT, Kind.DROP, Kind.RETURN)}
_META = {
    "mark": "mark", "skuid": "uid", "skgid": "gid", "iif": "iif", "iifname": "iif", "oif": "oif", "oifname": "oif",
    "l4proto": "protocol",
}  # fmt: skip
_PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp", 58: "ipv6-icmp", 132: "sctp"}
_FAMILIES = {"ipv4": 4, "ipv6": 6, "ip": 4, "ip6": 6}
_TCP_FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
_ALL = 0xFFFFFFFF


class _Unread(Exception):
    """Something that this reader does not know: a condition that may hold or not."""


def read_nft(text: str, *, without: Collection[tuple[str, str]] = ()) -> Ruleset:
    """The chains of all tables but those `without`, (family, name), which belong to iptables.

    Raises ValueError for what is not nft's JSON.
    """
    sets: dict[tuple[str, str], dict[str, Any]] = {}
    chains: dict[tuple[Any, str, str], dict[str, Any]] = {}
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    objects: list[Mapping[str, Any]] = json.loads(text)["nftables"]
    for entry in objects:
        kind, item = next(iter(entry.items()))
        if kind in {"set", "map"}:
            sets.setdefault((item["family"], item["table"]), {})[item["name"]] = item.get("elem", [])
        elif kind == "chain":
            chains[item["family"], item["table"], item["name"]] = item
    for entry in objects:
        if (item := entry.get("rule")) is not None:
            key = item["family"], item["table"], item["chain"]
            rules.setdefault(key, []).extend(_Reader(sets.get(key[:2], {})).rules(item["expr"]))
    return Ruleset(
        tuple(
            Chain(
                family=family, table=table, name=name, tool="nft", rules=tuple(rules.get((family, table, name), ())),
                hook=item.get("hook"), type=item.get("type", "filter"), priority=item.get("prio", 0),
                drops=item.get("policy") == "drop",
            )
            for (family, table, name), item in chains.items()
            if family in {"ip", "ip6", "inet"} and (family, table) not in without
        )
    )  # fmt: skip


def iptables_tables(text: str) -> set[tuple[str, str]]:
    """The tables in this JSON, (family, name), that look like those of iptables-nft."""
    tables = (entry["table"] for entry in json.loads(text)["nftables"] if "table" in entry)
    return {
        (t["family"], t["name"]) for t in tables if t["family"] in {"ip", "ip6"} and t["name"] in IPTABLES_TABLES
    }  # fmt: skip


class _Reader:
    """Rules of one table, whose sets and maps are `sets`."""

    def __init__(self, sets: Mapping[str, Any]) -> None:
        self._sets = sets

    def rules(self, statements: list[Any]) -> Iterator[Rule]:
        """The rule; a verdict map makes several of one, of which at most one matches."""
        matches: list[Match] = []
        actions: list[Action] = []
        text = text_of(statements)
        for statement in statements:
            kind, value = next(iter(statement.items())) if isinstance(statement, dict) else (statement, None)
            if kind == "match":
                try:
                    matches += self._match(value)
                except _Unread:
                    matches.append(unknown(text_of(statement)))
            elif kind in {"limit", "xt", "quota"}:
                matches.append(unknown(text_of(statement)))
            elif kind == "vmap":
                for condition, verdict in self._verdicts(value):
                    yield Rule((*matches, *condition), (*actions, verdict), text)
                return
            else:
                actions += self._action(kind, value)
        yield Rule(tuple(matches), tuple(actions), text)

    def _action(self, kind: str, value: Any) -> Iterator[Action]:
        if kind in _VERDICTS:
            yield Action(_VERDICTS[kind])
        elif kind == "reject":
            yield Action(Kind.REJECT)
        elif kind in {"jump", "goto"}:
            yield Action(Kind(kind), chain=value["target"])
        elif kind == "redirect":
            yield Action(Kind.REDIRECT, port=_port(value))
        elif kind in {"dnat", "tproxy"}:
            yield Action(Kind(kind), address=_address(value), port=_port(value))
        elif kind == "queue":
            yield Action(Kind.QUEUE)
        elif kind == "notrack":
            yield Action(Kind.NOTRACK)
        elif kind == "mangle" and value.get("key") == {"meta": {"key": "mark"}}:
            mark = value["value"]
            yield Action(Kind.MARK, mark=Range(mark, _ALL) if isinstance(mark, int) else None)

    def _match(self, value: Any) -> list[Match]:
        left, right, op = value["left"], value["right"], value["op"]
        if op not in {"==", "!=", "in"}:
            return self._compare(left, op, right)
        mask = None
        if isinstance(left, dict) and "&" in left:
            left, mask = left["&"]
        if isinstance(left, dict) and "concat" in left:
            raise _Unread
        if left == _TCP_FLAGS:
            return [Match("protocol", ("tcp",)), self._flags(op, mask, right)]
        return self._condition(left, self._values(right), op == "!=", mask)

    def _compare(self, left: Any, op: str, right: Any) -> list[Match]:
        if not isinstance(right, int):
            raise _Unread
        bounds = {"<": (0, right - 1), "<=": (0, right), ">": (right + 1, _ALL), ">=": (right, _ALL)}
        return self._condition(left, [Range(*bounds[op])], False, None)

    def _condition(self, left: Any, values: list[Any], negate: bool, mask: int | None) -> list[Match]:
        if not isinstance(left, dict):
            raise _Unread
        kind, what = next(iter(left.items()))
        if kind == "meta":
            return self._meta(what["key"], values, negate, mask)
        if kind == "payload" and "field" in what:
            return self._payload(what["protocol"], what["field"], values, negate, mask)
        if kind == "fib" and what["result"] == "type" and {"daddr", "saddr"} & set(what["flags"]):
            field = "destination_type" if "daddr" in what["flags"] else "source_type"
            return [Match(field, tuple(map(str, values)), negate)]
        if kind == "ct" and what["key"] in {"state", "status"} and not mask:
            return [Match("state", tuple(map(str, values)), negate)]
        if kind == "socket" and what["key"] in {"transparent", "mark", "wildcard"}:
            return [NEVER]  # of a connection that is there already
        raise _Unread

    def _flags(self, op: str, mask: Any, right: Any) -> Match:
        """A condition on TCP's flags; "in" is: has any of them."""
        if op == "in":
            return Match(
                "flags", (Range(1, _ALL),), mask=_flags(right) if mask is None else _flags(mask) & _flags(right)
            )
        wanted = tuple(Range(flags, flags) for flags in map(_flags, self._values(right)))
        return Match("flags", wanted, op == "!=", mask=None if mask is None else _flags(mask))

    @staticmethod
    def _meta(key: str, values: list[Any], negate: bool, mask: int | None) -> list[Match]:
        if key in {"nfproto", "protocol"} and all(value in _FAMILIES for value in values):
            return [Match("version", tuple(Range(_FAMILIES[v], _FAMILIES[v]) for v in values), negate)]
        field = _META.get(key)
        if field is None:
            raise _Unread
        if field == "protocol":
            return [Match(field, tuple(_protocol(value) for value in values), negate)]
        if field in {"iif", "oif"}:
            return [Match(field, tuple(map(str, values)), negate)]
        if field in {"uid", "gid"}:
            values = [_uid(value) if isinstance(value, str) and field == "uid" else value for value in values]
        return [Match(field, tuple(_numbers(value) for value in values), negate, mask=mask)]

    @staticmethod
    def _payload(protocol: str, field: str, values: list[Any], negate: bool, mask: int | None) -> list[Match]:
        version = {"ip": 4, "ip6": 6}.get(protocol)
        if version and field in {"daddr", "saddr"} and mask is None:
            name = "destination" if field == "daddr" else "source"
            return [Match(name, tuple(_addresses(value) for value in values), negate, version=version)]  # type: ignore[arg-type]
        if version and field in {"protocol", "nexthdr"}:
            return [Match("protocol", tuple(_protocol(v) for v in values), negate, version=version)]  # type: ignore[arg-type]
        if protocol in {"tcp", "udp", "th"} and field in {"dport", "sport"}:
            own = [] if protocol == "th" else [Match("protocol", (protocol,))]
            return [*own, Match(field, tuple(_numbers(value) for value in values), negate)]
        if protocol in {"icmp", "icmpv6", "sctp", "dccp", "esp", "ah"}:
            return [Match("protocol", (protocol,))]
        raise _Unread

    def _values(self, right: Any) -> list[Any]:
        """The alternatives on the right of a match, sets resolved."""
        if isinstance(right, str) and right.startswith("@"):
            right = self._sets.get(right[1:])
            if right is None:
                raise _Unread
        elif isinstance(right, dict) and "set" in right:
            right = right["set"]
            if isinstance(right, str):
                return self._values(right)
        values = right if isinstance(right, list) else [right]
        return [_element(value) for value in values]

    def _verdicts(self, value: Any) -> Iterator[tuple[list[Match], Action]]:
        data = value["data"]
        pairs = self._sets.get(data[1:], []) if isinstance(data, str) else data.get("set", [])
        for key, verdict in pairs:
            kind, target = next(iter(verdict.items()))
            for action in self._action(kind, target):
                yield self._key(value["key"], _element(key)), action

    def _key(self, left: Any, key: Any) -> list[Match]:
        """The conditions that say: this entry of a verdict map is the one."""
        try:
            if isinstance(left, dict) and "concat" in left:
                pairs = zip(left["concat"], key["concat"], strict=True)
                return [match for part, one in pairs for match in self._condition(part, [_element(one)], False, None)]
            return self._condition(left, [key], False, None)
        except (_Unread, TypeError, KeyError, ValueError):
            return [unknown(f"{text_of(left)} {text_of(key)}")]


def _flags(value: Any) -> int:
    """The bits of TCP's flags, by name or number, or several of them."""
    match value:
        case int():
            return value
        case str() if value in TCP_FLAGS:
            return TCP_FLAGS[value]
        case {"|": parts} | {"set": parts}:
            return _flags(parts)
        case list():
            return functools.reduce(operator.or_, map(_flags, value), 0)
    raise _Unread


def _element(value: Any) -> Any:
    """An element of a set without its timeout, counter or comment."""
    return value["elem"]["val"] if isinstance(value, dict) and "elem" in value else value


def _numbers(value: Any) -> Range:
    if isinstance(value, Range):
        return value
    if isinstance(value, dict) and "range" in value:
        low, high = value["range"]
        return Range(int(low), int(high))
    try:
        return Range(int(value), int(value))
    except (TypeError, ValueError):
        raise _Unread from None


def _addresses(value: Any) -> Range:
    try:
        match value:
            case {"prefix": {"addr": address, "len": length}}:
                return network_range(ip_network(f"{address}/{length}"))
            case {"range": [low, high]}:
                return Range(int(ip_address(low)), int(ip_address(high)))
            case str():
                return Range(int(ip_address(value)), int(ip_address(value)))
    except ValueError:
        pass
    raise _Unread


def _protocol(value: Any) -> str:
    return _PROTOCOLS.get(value, str(value)) if isinstance(value, int) else str(value)


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise _Unread from None


def _port(value: Any) -> int | None:
    port = value.get("port") if isinstance(value, dict) else None
    return port if isinstance(port, int) else None


def _address(value: Any) -> Any:
    address = value.get("addr") if isinstance(value, dict) else None
    try:
        return ip_address(address) if isinstance(address, str) else None
    except ValueError:
        return None

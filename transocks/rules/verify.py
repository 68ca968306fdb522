"""What differs between the rules that are live and those that should be, in plain words. Pure.

Neither side is compared as somebody wrote it: both are what the tool says of rules that the kernel has, since the
tools write one and the same rule in many ways. What should be has been loaded in a network namespace of its own
(live.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from transocks.rules.saved import Table

ACTIVE = "active"
"""The set of our nft tables that says for which protocols, and how long, the rules are in force."""

HELD = "held"
"""The comment at these elements while somebody prolongs them: not a trial that is to be confirmed."""

_GUARD = re.compile(r"-m time --datestart (\S+)")


@attrs.frozen
class Line:
    """A rule: what it is compared by, and as the tool prints it."""

    key: str
    text: str = attrs.field(eq=False)


@attrs.frozen
class Chain:
    """hook: the place of a base chain, in words; "" for others."""

    hook: str
    lines: tuple[Line, ...]


@attrs.frozen
class Loaded:
    """The rules of one table, of one family if that is iptables's."""

    name: str
    chains: Mapping[str, Chain]
    sets: Mapping[str, frozenset[str]]


def from_nft(ruleset: Iterable[Mapping[str, Any]], listing: str, table: str) -> Loaded | None:
    """An inet table of `nft -j list ruleset` (the list in it), or None; `listing` is `nft -a list ruleset`."""
    texts = rule_texts(listing, "inet", table)
    hooks: dict[str, str] = {}
    lines: dict[str, list[Line]] = {}
    sets: dict[str, frozenset[str]] = {}
    there = False
    for entry in ruleset:
        ((kind, found),) = entry.items()
        if kind == "table":
            there = there or (found["family"], found["name"]) == ("inet", table)
        elif (found.get("family"), found.get("table")) != ("inet", table):
            continue
        elif kind == "chain":
            hooks[found["name"]] = base_of(found) if "hook" in found else ""
            lines.setdefault(found["name"], [])
        elif kind == "rule":
            key = json.dumps([part for part in found["expr"] if "counter" not in part], sort_keys=True)
            lines.setdefault(found["chain"], []).append(Line(key, texts.get(found["handle"], key)))
        elif kind == "set" and found["name"] != ACTIVE:
            sets[found["name"]] = frozenset(json.dumps(e, sort_keys=True) for e in found.get("elem", ()))
    if not there:
        return None
    chains = {name: Chain(hook, tuple(lines[name])) for name, hook in hooks.items()}
    return Loaded(f"table inet {table}", chains, sets)


def base_of(chain: Mapping[str, Any]) -> str:
    """The place of a base chain in words."""
    return f"type {chain['type']}, hook {chain['hook']}, priority {chain['prio']}, policy {chain.get('policy')}"


def dormant(listing: str) -> list[str]:
    """The tables of ours in what `nft list ruleset` says that are switched off: inet ones."""
    return re.findall(r"^table inet (transocks\S*) \{[^\n]*\n\tflags [^\n]*\bdormant\b", listing, re.MULTILINE)


def rule_texts(listing: str, family: str, table: str) -> dict[int, str]:
    """The rules of a table in `nft -a list ruleset`, by handle."""
    block = re.search(rf"^table {family} {re.escape(table)} \{{.*?^\}}", listing, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^\t\t(\S.*) # handle (\d+)$", block[0] if block else "", re.MULTILINE)
    return {int(handle): text for text, handle in found}


def from_saved(table: Table, own: Iterable[str], family: str) -> Loaded | None:
    """Our chains of one of iptables's tables, and of the others those rules that jump to ours; None without any."""
    chains = [chain for chain in table.chains if chain in set(own)]
    if not chains:
        return None
    found = {
        chain: Chain("", tuple(Line(r.rest, r.rest) for r in table.of(chain) if not _GUARD.search(r.rest)))
        for chain in chains
    }
    for rule in table.hooks(*chains):
        before = found.get(rule.chain, Chain("", ()))
        found[rule.chain] = Chain("", (*before.lines, Line(rule.rest, rule.rest)))
    return Loaded(f"{family} table {table.name}", found, {})


def compare(wanted: Loaded, live: Loaded | None) -> Iterator[str]:
    """A line for each difference."""
    if live is None:
        yield f"missing: {wanted.name}: nothing of it is loaded"
        return
    for name, chain in wanted.chains.items():
        where = f"{wanted.name}, chain {name}"
        there = live.chains.get(name)
        if there is None:
            yield f"missing: {where}"
            continue
        if there.hook != chain.hook:
            yield f"changed: {where}: is {there.hook or 'hooked in nowhere'}, should be {chain.hook or 'nowhere'}"
        yield from _compare_lines(where, chain.lines, there.lines)
    for name in live.chains.keys() - wanted.chains.keys():
        yield f"not ours: {live.name}, chain {name}"
    for name, elements in wanted.sets.items():
        there_elements = live.sets.get(name, frozenset())
        for element in sorted(elements - there_elements):
            yield f"missing: {wanted.name}, set {name}: {_element(element)}"
        for element in sorted(there_elements - elements):
            yield f"not ours: {wanted.name}, set {name}: {_element(element)}"
    for name in live.sets.keys() - wanted.sets.keys():
        yield f"not ours: {live.name}, set {name}"


def _compare_lines(where: str, wanted: tuple[Line, ...], live: tuple[Line, ...]) -> Iterator[str]:
    missing = Counter(wanted) - Counter(live)
    extra = Counter(live) - Counter(wanted)
    if not missing and not extra:
        for should, line in zip(wanted, live, strict=True):
            if should != line:
                yield f'reordered: {where}: "{line.text}" stands where "{should.text}" should'
                return
        return
    if len(wanted) == len(live):
        # One in the place of another has been changed; say it in one line.
        for should, line in zip(wanted, live, strict=True):
            if missing[should] and extra[line]:
                yield f'changed: {where}: "{line.text}", should be "{should.text}"'
                missing[should] -= 1
                extra[line] -= 1
    for line in missing.elements():
        yield f'missing: {where}: "{line.text}"'
    for line in extra.elements():
        often = " once more" if line in wanted else ""
        yield f'not ours: {where}: "{line.text}" is there{often}'


def _element(text: str) -> str:
    match json.loads(text):
        case {"prefix": {"addr": address, "len": length}}:
            return f"{address}/{length}"
        case {"range": [first, last]}:
            return f"{first}-{last}"
        case str() | int() as plain:
            return str(plain)
    return text


@attrs.frozen
class Force:
    """Whether loaded rules do anything: for good (both None and False), for `seconds` more, or not any more."""

    seconds: float | None = None
    over: bool = False
    held: bool = False
    """Somebody prolongs that."""


def force_nft(ruleset: Iterable[Mapping[str, Any]], table: str) -> Force:
    """Of an inet table that is loaded."""
    for entry in ruleset:
        found = entry.get("set", {})
        if (found.get("family"), found.get("table"), found.get("name")) == ("inet", table, ACTIVE):
            for element in found.get("elem", ()):
                if element == "tcp":
                    return Force()
                timed = element.get("elem") if isinstance(element, dict) else None
                if isinstance(timed, dict) and timed.get("val") == "tcp":
                    seconds = timed.get("expires", timed.get("timeout", 0))
                    seconds = float(seconds) if isinstance(seconds, int) else 0.0
                    return Force(seconds=seconds, held=timed.get("comment") == HELD)
            return Force(over=True)
    return Force()  # somebody took the set out, which is said elsewhere


def guards(tables: Iterable[Table]) -> list[tuple[str, str, str]]:
    """Of iptables's tables with our chains alone: table, rule and time (UTC) of what ends them by themselves."""
    return [
        (table.name, f"{rule.chain} {rule.rest}", match[1])
        for table in tables
        for rule in table.of(*table.chains)
        if (match := _GUARD.search(rule.rest))
    ]

"""Loaded rules of nft and iptables-save in one model: parsed, compared, and as iptables-restore takes them. Pure.

A rule can be written in many ways, so only rules that a kernel has loaded are compared, as the tool prints them
(live.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import attrs

ACTIVE = "active"
"""The set in our nft tables with the protocols for which the rules are in force, and for how long."""
HELD = "held"
"""The comment of its elements while `transocks rules hold` prolongs them: so they are not on trial."""

_TERM = re.compile(r"-m time --datestart (\S+)")
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}


@attrs.frozen
class Table:
    """A table of nft ("inet transocks"), or of one family of iptables ("nat"); rules and elements as the tool prints
    them, without counters.
    """

    name: str
    chains: Mapping[str, tuple[str, ...]]
    """the rules of each; with nft, the first line of a base chain is its place"""
    sets: Mapping[str, tuple[str, ...]] = {}
    """the elements of each, sorted, and its other lines"""
    dormant: bool = False

    @property
    def rules(self) -> list[str]:
        """The rules of all chains."""
        return [rule for rules in self.chains.values() for rule in rules]


def parse_nft(listing: str) -> list[Table]:
    """Parse the output of `nft list ruleset` or `nft list table`."""
    found = []
    for name, body in re.findall(r"^table (\S+ \S+) \{[^\n]*\n(.*?)^\}", listing, re.MULTILINE | re.DOTALL):
        parts: dict[str, dict[str, tuple[str, ...]]] = {"chain": {}, "set": {}}
        blocks = re.findall(r"^\t(chain|set) (\S+) \{[^\n]*\n(.*?)^\t\}", body, re.MULTILINE | re.DOTALL)
        for kind, part, text in blocks:
            head, _, elements = re.sub(r"counter packets \d+ bytes \d+ ?", "", text).partition("elements = {")
            lines = [*head.split("\n"), *re.split(r",\s", elements.rpartition("}")[0])]
            lines = [stripped for line in lines if (stripped := line.strip())]
            parts[kind][part] = tuple(sorted(lines) if kind == "set" else lines)
        dormant = re.search(r"^\tflags .*\bdormant\b", body, re.MULTILINE) is not None
        found.append(Table(name, parts["chain"], parts["set"], dormant))
    return found


def parse_save(text: str, own: Collection[str] | None = None) -> list[Table]:
    """Parse the output of iptables-save or the input of iptables-restore; tables of the same name are merged.

    own: only these chains, and from other chains the rules that jump to them; tables with neither are left out.
    """
    tables: dict[str, dict[str, list[str]]] = {}
    for name, body in re.findall(r"^\*(\S+)\n(.*?)^COMMIT", text, re.MULTILINE | re.DOTALL):
        chains = tables.setdefault(name, {})
        for chain in re.findall(r"^(?:-N |:)(\S+)(?: .*)?$", body, re.MULTILINE):
            if own is None or chain in own:
                chains.setdefault(chain, [])
        for verb, chain, rule in re.findall(r"^(?:\[\d+:\d+\] )?-([AI]) (\S+) (.*)$", body, re.MULTILINE):
            if own is None or chain in own or _target(rule) in own:
                rules = chains.setdefault(chain, [])
                rules.insert(0 if verb == "I" else len(rules), rule)
    return [
        Table(name, {chain: tuple(rules) for chain, rules in chains.items()})
        for name, chains in tables.items()
        if chains or own is None
    ]


def _target(rule: str) -> str | None:
    match = re.search(r"(?:^| )-[jg] (\S+)", re.sub(r'"(?:[^"\\]|\\.)*"', '""', rule))
    return match[1] if match else None


def replacement(old: Iterable[Table], new: Iterable[Table], own: Collection[str]) -> str:
    """Text for iptables-restore --noflush that replaces the chains `own`, and the jumps to them, by those of `new`;
    others stay.

    Each table is one transaction. Jumps come first in the filter tables, and last in others.
    """
    before, after = ({table.name: table.chains for table in tables} for tables in (old, new))
    text = ""
    for name in dict.fromkeys([*after, *before]):
        there, chains = before.get(name, {}), after.get(name, {})
        gone = [chain for chain in there if chain in own and chain not in chains]
        lines = [f"-D {chain} {rule}" for chain in there if chain not in own for rule in there[chain]]
        lines += [f":{chain} - [0:0]" for chain in chains if chain in own]
        for chain, rules in chains.items():
            if name == "filter" and chain not in own:
                lines += [f"-I {chain} {rule}" for rule in reversed(rules)]
            else:
                lines += [f"-A {chain} {rule}" for rule in rules]
        lines += [f"-F {chain}" for chain in gone] + [f"-X {chain}" for chain in gone]
        text += transaction(name, lines)
    return text


def transaction(table: str, lines: Sequence[str]) -> str:
    """One table as iptables-restore takes it; "" for no lines."""
    return "\n".join([f"*{table}", *lines, "COMMIT", ""]) if lines else ""


def seconds_left(table: Table, now: datetime) -> float | None:
    """The seconds for which the rules are still in force; 0: no longer in force; None: in force for good."""
    if ACTIVE in table.sets:
        element = next((element for element in table.sets[ACTIVE] if element.split()[0] == "tcp"), None)
        if element is None:
            return 0
        times = re.findall(r"(?:timeout|expires) (\w+)", element)
        parts = re.findall(r"(\d+)(d|h|ms|m|s)", times[-1]) if times else []
        return sum(int(number) * _SECONDS[unit] for number, unit in parts) if times else None
    ends = [match[1] for rule in table.rules if (match := _TERM.search(rule))]
    return max(0, (datetime.fromisoformat(min(ends)).replace(tzinfo=UTC) - now).total_seconds()) if ends else None


def without_term(table: Table) -> str:
    """Text for iptables-restore that keeps these rules in force for good."""
    rules = [f"-D {chain} {rule}" for chain in table.chains for rule in table.chains[chain] if _TERM.search(rule)]
    return transaction(table.name, rules)


def compare(where: str, should: Table, live: Table | None) -> Iterator[str]:
    """A line for each difference, except in how long the rules are in force."""
    if live is None:
        yield f"missing: {where}: nothing of it is loaded"
        return
    for kind, expected, there in (("chain", should.chains, live.chains), ("set", should.sets, live.sets)):
        for name in [name for name in expected if name != ACTIVE]:
            place = f"{where}, {kind} {name}"
            if name in there:
                yield from _compare_lines(place, _for_good(expected[name]), _for_good(there[name]))
            else:
                yield f"missing: {place}"
        for name in [name for name in there if name not in expected]:
            yield f"not ours: {where}, {kind} {name}"


def _for_good(rules: Iterable[str]) -> list[str]:
    return [rule for rule in rules if not _TERM.search(rule)]


def _compare_lines(place: str, should: Sequence[str], live: Sequence[str]) -> Iterator[str]:
    missing, extra = Counter(should) - Counter(live), Counter(live) - Counter(should)
    if len(should) == len(live):
        for expected, line in zip(should, live, strict=True):
            if missing[expected] and extra[line]:
                yield f'changed: {place}: "{line}", should be "{expected}"'
                missing[expected] -= 1
                extra[line] -= 1
            elif expected != line and not missing and not extra:
                yield f'reordered: {place}: "{line}" stands where "{expected}" should'
                return
    for line in missing.elements():
        yield f'missing: {place}: "{line}"'
    for line in extra.elements():
        yield f'not ours: {place}: "{line}" is there{" once more" if line in should else ""}'

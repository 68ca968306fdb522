"""What iptables-save prints and iptables-restore takes, as tables, chains and rules; and the changes between two. Pure.

Chains of ours are those of the templates' names. They are filled first and hooked in last; a table is one transaction
for iptables-restore, several tables are not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import attrs


@attrs.frozen
class Rule:
    """One line that appends or inserts: the chain that it is in, and all that stands behind it."""

    chain: str
    rest: str
    insert: bool = False

    def __str__(self) -> str:
        return f"-{'I' if self.insert else 'A'} {self.chain} {self.rest}"

    @property
    def target(self) -> str | None:
        """What it jumps to, or what it says; None for a rule that only counts."""
        match = re.search(r"(?:^| )-[jg] (\S+)", re.sub(r'"(?:[^"\\]|\\.)*"', '""', self.rest))
        return match[1] if match else None


@attrs.frozen
class Table:
    """One table of one family: the chains that somebody has made, and the rules of all chains, in order."""

    name: str
    chains: tuple[str, ...]
    rules: tuple[Rule, ...]

    def of(self, *chains: str) -> list[Rule]:
        """The rules of these chains."""
        return [rule for rule in self.rules if rule.chain in chains]

    def hooks(self, *chains: str) -> list[Rule]:
        """The rules of other chains that jump to these."""
        return [rule for rule in self.rules if rule.target in chains and rule.chain not in chains]


def parse_save(text: str) -> list[Table]:
    """The tables of an iptables-save, or of what iptables-restore takes. Counters and comments are left out."""
    tables = []
    for name, body in re.findall(r"^\*(\S+)\n(.*?)^COMMIT", text, re.MULTILINE | re.DOTALL):
        chains = re.findall(r"^(?:-N |:)(\S+)(?: - .*)?$", body, re.MULTILINE)
        rules = re.findall(r"^(?:\[\d+:\d+\] )?-([AI]) (\S+) (.*)$", body, re.MULTILINE)
        tables.append(Table(name, tuple(chains), tuple(Rule(chain, rest, how == "I") for how, chain, rest in rules)))
    return tables


def select(tables: Iterable[Table], names: Collection[str]) -> list[Table]:
    """Of each table, the chains of these names and the jumps to them, in order; tables with none are left out."""
    found = []
    for table in tables:
        chains = tuple(chain for chain in table.chains if chain in names)
        rules = tuple(rule for rule in table.rules if rule.chain in chains or rule.target in chains)
        if chains:
            found.append(Table(table.name, chains, rules))
    return found


def merge(tables: Iterable[Table]) -> list[Table]:
    """Tables of the same name made one: what two files have for it."""
    found: dict[str, Table] = {}
    for table in tables:
        before = found.get(table.name, Table(table.name, (), ()))
        found[table.name] = Table(table.name, before.chains + table.chains, before.rules + table.rules)
    return list(found.values())


@attrs.frozen
class Changes:
    """From one state to another, in this order: each is for iptables-restore --noflush, or empty."""

    fill: str
    """chains, emptied if they are there, and their rules; no jumps to them"""
    hook: str
    """the jumps: those there once too often, or not wanted, go; those that are missing come"""
    drop: str
    """chains that are not wanted any more, and the jumps to them"""


def changes(wanted: Iterable[Table], live: Iterable[Table]) -> Changes:
    """What makes `wanted` (one table of a name) of what is live; both with chains of ours alone, see `select`."""
    wanted, there = list(wanted), {table.name: table for table in live}
    fill, hook, drop = [], [], []
    for table in wanted:
        declared = [f":{chain} - [0:0]" for chain in table.chains]
        fill.append(write(table.name, [*declared, *map(str, table.of(*table.chains))]))
        if lines := _hook(table, there.get(table.name)):
            hook.append(write(table.name, lines))
    needed = {table.name: table.chains for table in wanted}
    for table in there.values():
        extra = tuple(chain for chain in table.chains if chain not in needed.get(table.name, ()))
        if extra:
            drop.append(delete(Table(table.name, extra, table.rules)))
    return Changes("".join(fill), "".join(hook), "".join(drop))


def _hook(table: Table, live: Table | None) -> list[str]:
    wanted = {(rule.chain, plain(rule.rest)): rule for rule in table.hooks(*table.chains)}
    kept = set()
    lines = []
    for rule in live.hooks(*table.chains) if live else ():
        key = (rule.chain, plain(rule.rest))
        if key in kept or key not in wanted:
            lines.append(f"-D {rule.chain} {rule.rest}")
        kept.add(key)
    return lines + [str(rule) for key, rule in wanted.items() if key not in kept]


def plain(rest: str) -> str:
    """A jump as iptables-save prints it: what a protocol's match is written by itself."""
    return re.sub(r"^-p (tcp|udp) (?=--)", r"-p \1 -m \1 ", rest)


def delete(table: Table) -> str:
    """The chains of a table and the jumps to them, gone. Duplicate jumps are deleted as often as they are there."""
    lines = [f"-D {rule.chain} {rule.rest}" for rule in table.hooks(*table.chains)]
    lines += [f"-F {chain}" for chain in table.chains] + [f"-X {chain}" for chain in table.chains]
    return write(table.name, lines)


def write(name: str, lines: Sequence[str]) -> str:
    """One table, as iptables-restore takes it."""
    return "\n".join([f"*{name}", *lines, "COMMIT", ""])

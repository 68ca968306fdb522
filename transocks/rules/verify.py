"""Compares the rules of this host with [rules]: for `transocks rules verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from transocks.rules import live, routing
from transocks.rules.config import Tool
from transocks.rules.live import CHAINS
from transocks.rules.loaded import ACTIVE, HELD, Table, compare, seconds_left
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_all_nft, render_iptables
from transocks.tools import which
from transocks.tracing.fate import shadows

_ROLLED_BACK = (
    "rolled back: {} is loaded but has no effect, since nobody confirmed it in time, or it was removed with"
    " --keep-connections. New connections go directly. Apply or remove it"
)
Remark = tuple[str, bool]
"""A finding, and whether it is a fault."""


def verify(redirections: Sequence[Redirection], tool: Tool) -> list[Remark]:
    """See `differences`; also test who listens, and with samples whether connections reach the rules."""
    found = differences(redirections, tool)
    for each in redirections:
        for where in live.missing_listeners(each):
            what = "datagrams" if each.udp else "connections"
            found.append((f"nobody listens on {where}, where {each.title} rules send {what}", True))
    well = not any(is_fault for _, is_fault in found)
    for text, is_fault in shadows(redirections, tool, well=well):
        found.append((f"shadowed: {text}" if is_fault else text, is_fault))
    return list(dict.fromkeys(found))


def differences(redirections: Sequence[Redirection], tool: Tool) -> list[Remark]:
    """Compare the loaded rules and routing with these. Takes CAP_NET_ADMIN and CAP_SYS_ADMIN. Raises FirewallError."""
    tables, now = live.loaded(), datetime.now(UTC)
    found = _check_nft(redirections, tables, now) if tool is Tool.NFT else _check_iptables(redirections, now)
    return list(dict.fromkeys([*found, *_leftovers(redirections, tool, tables), *_check_routing(redirections)]))


def _check_nft(redirections: Sequence[Redirection], tables: Sequence[Table], now: datetime) -> Iterator[Remark]:
    there = {table.name: table for table in tables}
    for should in live.as_loaded(render_all_nft(redirections)):
        where, table = f"table {should.name}", there.get(should.name)
        if table is not None and table.dormant:
            yield f"dormant: {where} is loaded and switched off (flags dormant)", True
            continue
        yield from ((difference, True) for difference in compare(where, should, table))
        if table is not None and not any(HELD in element for element in table.sets.get(ACTIVE, ())):
            yield from _check_term(where, where, table, now)


def _check_iptables(redirections: Sequence[Redirection], now: datetime) -> Iterator[Remark]:
    for version in live.versions():
        there = {table.name: table for table in live.saved(version, own=CHAINS)}
        texts = [render_iptables(each, version=version) for each in redirections]
        for should in live.saved_as_loaded(texts, version):
            differences = compare(f"IPv{version} table {should.name}", should, there.get(should.name))
            yield from ((difference, True) for difference in differences)
        for table in there.values():
            yield from _check_term(f"IPv{version}", f"what is in the IPv{version} tables", table, now)


def _check_term(where: str, what: str, table: Table, now: datetime) -> Iterator[Remark]:
    left = seconds_left(table, now)
    if left == 0:
        yield _ROLLED_BACK.format(what), True
    elif left is not None:
        yield f"{where}: in force for {left:.0f} s more, unless confirmed", False


def _leftovers(redirections: Sequence[Redirection], tool: Tool, tables: Sequence[Table]) -> Iterator[Remark]:
    """Rules of ours that should not be there: of another mode, another tool, or another variant of iptables."""
    needed = [f"inet {each.table}" for each in redirections] if tool is Tool.NFT else []
    for table in tables:
        if table.name not in needed:
            yield f"not wanted: table {table.name} is loaded: apply or remove takes it away", True
    chains = {
        name
        for each in redirections if tool is Tool.IPTABLES
        for name in (each.chains if each.closed else each.chains[:2])
    }  # fmt: skip
    for version in live.versions():
        for variant in live.variants(version):
            other = "-" in variant  # beside the one that `tool` means
            for table in live.saved(version, variant, set(CHAINS) - (set() if other else chains)):
                where = f"IPv{version} table {table.name}{f' of {variant}' if other else ''}"
                yield f"not wanted: {where} has {', '.join(name for name in table.chains if name in CHAINS)}", True


def _check_routing(redirections: Sequence[Redirection]) -> Iterator[Remark]:
    should = routing.needed(redirections)
    for version in live.versions() if should or which("ip") else ():
        now = routing.current(version)
        for each in [each for each in should if each.version == version]:
            for kind, there in (("rule", now.rules), ("route", now.routes)):
                if each not in there:
                    name = "routing rule" if kind == "rule" else kind
                    yield f"missing: IPv{version} {name}: {each.by_hand(kind)}", True
            if others := now.others.get(each.mark):
                yield f"not ours: IPv{version} routing table {each.mark}: {', '.join(others)}", True
        for rule in now.rules:
            if rule not in should:
                yield f"not wanted: IPv{version} routing rule: {' '.join(rule.command('rule', 'add')[4:])}", True

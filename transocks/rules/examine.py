"""Looks at this host and says what is not as it should be: for `transocks rules verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import attrs

from transocks.rules import live
from transocks.rules.config import Mode, Tool
from transocks.rules.live import CHAINS, KINDS, TABLES, Routes, Routing
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_all_nft, render_iptables
from transocks.rules.saved import Table, merge, select
from transocks.rules.verify import compare, dormant, force_nft, from_nft, from_saved, guards
from transocks.tracing.shadows import shadows

_FAMILIES = {False: "IPv4", True: "IPv6"}
_OVER = (
    "rolled back: {} is loaded and of no effect, since nobody confirmed it in time, or it was removed but for its"
    " connections; new ones go directly. Apply or remove it"
)


@attrs.frozen
class Report:
    """What is wrong, and what is worth knowing and not wrong."""

    faults: tuple[str, ...]
    notes: tuple[str, ...]


def examine(wanted: Sequence[Redirection], tool: Tool, *, ipv6: bool = True, trying: bool = True) -> Report:
    """Compare what is loaded with what should be. Takes CAP_NET_ADMIN and CAP_SYS_ADMIN. Raises FirewallError.

    trying: also try out whether connections get to the rules.
    """
    families = (False, True) if ipv6 else (False,)
    ruleset = live.ruleset() if live.has("nft") else live.Ruleset()
    check = _check_nft(wanted, ruleset) if tool is Tool.NFT else _check_iptables(wanted, families)
    faults: list[str] = []
    notes: list[str] = []
    for said, fault in (*check, *_leftovers(wanted, tool, ruleset, families), *_check_routing(wanted, families)):
        (faults if fault else notes).append(said)
    for w in wanted:
        unheard = live.unheard(w, ipv6)
        faults += [f"nobody listens on {where}, where {w.mode.value} rules send connections" for where in unheard]
    for said, fault in shadows(wanted, tool, well=not faults) if trying else ():
        faults += [f"shadowed: {said}"] if fault else []
        notes += [] if fault else [said]
    return Report(tuple(dict.fromkeys(faults)), tuple(dict.fromkeys(notes)))


def _check_nft(wanted: Sequence[Redirection], ruleset: live.Ruleset) -> Iterator[tuple[str, bool]]:
    reference = live.as_loaded(render_all_nft(wanted))
    for w in wanted:
        should = from_nft(reference.entries, reference.listing, w.table)
        assert should is not None
        if w.table in dormant(ruleset.listing):
            yield f"dormant: table inet {w.table} is loaded and switched off (flags dormant)", True
            continue
        there = from_nft(ruleset.entries, ruleset.listing, w.table)
        for difference in compare(should, there):
            yield difference, True
        if there is not None:
            force = force_nft(ruleset.entries, w.table)
            if force.over:
                yield _OVER.format(there.name), True
            elif force.seconds is not None and not force.held:
                yield f"{there.name} is in force for {force.seconds:.0f} s more, unless confirmed", False


def _check_iptables(wanted: Sequence[Redirection], families: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    now = datetime.now(UTC)
    for six in families:
        family = _FAMILIES[six]
        texts = [render_iptables(w, six=six) for w in wanted]
        there = {table.name: table for table in select(live.saved(six), CHAINS)}
        for table in merge(live.saved_as_loaded(texts, six)):
            should = from_saved(table, CHAINS, family)
            if should is not None:
                found = there.get(table.name, Table(table.name, (), ()))
                for difference in compare(should, from_saved(found, CHAINS, family)):
                    yield difference, True
        for until in sorted({until for _, _, until in guards(there.values())}):
            left = (datetime.fromisoformat(until).replace(tzinfo=UTC) - now).total_seconds()
            if left <= 0:
                yield _OVER.format(f"what is in the {family} tables"), True
            else:
                yield f"{family}: in force for {left:.0f} s more, unless confirmed", False


def _leftovers(
    wanted: Sequence[Redirection], tool: Tool, ruleset: live.Ruleset, families: Sequence[bool]
) -> Iterator[tuple[str, bool]]:
    """What is ours and not wanted: of another mode, of the other tool, or of the other variant of iptables."""
    needed = {w.table for w in wanted} if tool is Tool.NFT else set()
    for name in TABLES:
        if ("inet", name) in ruleset.tables() and name not in needed:
            yield f"not wanted: table inet {name} is loaded: apply or remove takes it away", True
    chains = (
        {f"{w.chain}{kind}" for w in wanted for kind in KINDS if w.closed or kind != "-TCP"}
        if tool is Tool.IPTABLES
        else set()
    )
    for six in families:
        for variant in live.variants(six):
            other = "-" in variant  # beside the one that `tool` means
            for table in select(live.saved(six, variant), set(CHAINS) - (set() if other else chains)):
                where = f"{_FAMILIES[six]} table {table.name}{f' of {variant}' if other else ''}"
                yield f"not wanted: {where} has {', '.join(table.chains)}", True


def _check_routing(wanted: Sequence[Redirection], families: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    routed = [six for six in families if not six or live.uses_ipv6()]
    should = [Routing(w.tproxy_mark, six) for w in wanted if w.mode is Mode.TPROXY for six in routed]
    if not should and not live.has("ip"):
        return
    there = [routing for six in families for routing in live.routing_rules(six)]
    for routing in should:
        routes = Routes.here(routing.six)
        if routing not in there:
            yield f"missing: {_FAMILIES[routing.six]} routing rule: {routing.by_hand('rule')}", True
        if not routes.has(routing):
            yield f"missing: {_FAMILIES[routing.six]} route: {routing.by_hand('route')}", True
        if others := routes.others(routing):
            yield f"not ours: {_FAMILIES[routing.six]} routing table {routing.mark}: {', '.join(others)}", True
    for routing in there:
        if routing not in should:
            yield f"not wanted: {_FAMILIES[routing.six]} routing rule: {' '.join(routing.rule)}", True

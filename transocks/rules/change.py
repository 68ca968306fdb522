"""Applies rules, confirms or prolongs them, and removes them, on this host.

What the kernel can do at once is one step: a transaction of nft for all modes and both families, a table of one family
for iptables-restore. A change that fails half way is undone. All that is ours is found by its name or shape and not by
what the configuration says now, so that what another one has left is found too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta

from transocks.rules import live
from transocks.rules.config import Mode, Tool
from transocks.rules.cut import cut
from transocks.rules.known import make_known
from transocks.rules.live import CHAINS, GUARDS, TABLES, Routes, Routing, has
from transocks.rules.lock import alone
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_all_nft, render_iptables
from transocks.rules.saved import Changes, Table, changes, merge, parse_save, select, write
from transocks.rules.verify import ACTIVE, HELD, force_nft, guards
from transocks.tools import FirewallError, complaint, run, unbroken

KEEP = "transocks_nat"
"""An nft table that does nothing but need connection tracking: see `remove`."""

_TPROXY = Redirection(mode=Mode.TPROXY, port=0).table
_HOST = Redirection(mode=Mode.HOST, port=0)

_KEEP = f"""table inet {KEEP} {{ chain stays {{ type nat hook output priority -90; }}; }}
flush chain inet {KEEP} stays
add rule inet {KEEP} stays ct state new accept
"""


@alone()
@unbroken()
def apply(wanted: Sequence[Redirection], tool: Tool, *, seconds: int | None = None, ipv6: bool = True) -> None:
    """Make these rules the ones that are loaded, whatever was before. Raises FirewallError, and then that is as it was.

    seconds: after which the rules are of no effect any more, unless `confirm` or `prolong` comes; None: never. ipv6:
    whether this kernel has it.
    """
    families = (False, True) if ipv6 else (False,)
    tproxy = [w for w in wanted if w.mode is Mode.TPROXY]
    routing = [Routing(w.tproxy_mark, six) for w in tproxy for six in families if not six or live.uses_ipv6()]
    know_others(wanted, tool, ipv6=ipv6)
    added = _add_routing(routing)
    try:
        if tool is Tool.NFT:
            _apply_nft(wanted, seconds)
        else:
            _apply_iptables(wanted, seconds, families)
    except FirewallError:
        _run_all(added)
        raise
    # What another configuration has left: the other tool's rules, a routing mark that is not needed any more.
    complaints = _remove_iptables() if tool is Tool.NFT else [*_remove_nft(keep=False), *_remove_iptables(keep=True)]
    complaints += [said for six in families for said in _remove_routing(six, routing)]
    if complaints:
        raise FirewallError("applied, but what was there before is not all gone: " + "; ".join(complaints))


def know_others(wanted: Sequence[Redirection], tool: Tool, *, ipv6: bool) -> None:
    """Before packets without a connection are refused for the first time: enter existing connections in connection
    tracking.

    Not if they are refused already: then an unknown connection may be a redirected one that was forgotten. Raises
    FirewallError.
    """
    if not any(w.closed and w.mode is Mode.HOST for w in wanted):
        return
    if tool is Tool.NFT:
        tables = [name for name in (_HOST.table, _HOST.guard) if ("inet", name) in live.tables()]
        refused = any("jump refuse_unknown" in run("nft", "list", "table", "inet", name) for name in tables)
    else:
        saved = [table for six in ((False, True) if ipv6 else (False,)) for table in live.saved(six)]
        refused = any(f"{_HOST.chain}-TCP" in table.chains for table in saved)
    if not refused:
        make_known({w.port for w in wanted})


def _apply_nft(wanted: Sequence[Redirection], seconds: int | None) -> None:
    needed = {w.table for w in wanted}
    gone = [f"delete table inet {name}\n" for name in _our_tables() if name not in needed]
    run("nft", "-f", "-", stdin="".join([render_all_nft(wanted, seconds=seconds), *gone]))


def _apply_iptables(wanted: Sequence[Redirection], seconds: int | None, families: Iterable[bool]) -> None:
    until = None
    if seconds is not None:
        # In whole seconds, and not less than what was asked for.
        until = (datetime.now(UTC) + timedelta(seconds=seconds + 1)).strftime("%Y-%m-%dT%H:%M:%S")
    before = {six: select(live.saved(six), CHAINS) for six in families}
    after = {
        six: merge(table for w in wanted for table in parse_save(render_iptables(w, six=six, until=until)))
        for six in families
    }
    try:
        _restore({six: changes(after[six], before[six]) for six in families})
    except FirewallError as error:
        try:
            _restore({six: changes(before[six], select(live.saved(six), CHAINS)) for six in families})
        except FirewallError as again:
            raise FirewallError(f"{error}; and it could not be undone: {again}") from None
        raise


def _restore(todo: dict[bool, Changes]) -> None:
    """Fill the chains of all families, then hook them in, then drop what is not needed any more."""
    for part in ("fill", "hook", "drop"):
        for six, found in todo.items():
            if text := getattr(found, part):
                _restoring(live.iptables(six), text)


def _restoring(variant: str, text: str) -> None:
    run(f"{variant}-restore", "--noflush", stdin=text)


@alone()
@unbroken()
def confirm(*, ipv6: bool = True) -> bool:
    """Make what is in force for a time be in force for good; False if it was already.

    Raises FirewallError when there are no rules, or when it is too late.
    """
    late = FirewallError("too late: the time is over, and the rules are of no effect any more; apply them again")
    timed = False
    loaded = False
    if has("nft"):
        entries = live.ruleset().entries
        for name in _our_tables():
            loaded = True
            force = force_nft(entries, name)
            if force.over:
                raise late
            timed = timed or force.seconds is not None
        if timed:
            # What has run out in between can't be deleted, and then nothing of this happens.
            lines = [
                f"{verb} element inet {name} {ACTIVE} {{ tcp, udp }}\n"
                for name in _our_tables()
                for verb in ("delete", "add")
            ]
            try:
                run("nft", "-f", "-", stdin="".join(lines))
            except FirewallError:
                raise late from None
    if has("iptables-save"):
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        for six in (False, True) if ipv6 else (False,):
            tables = select(live.saved(six), CHAINS)
            loaded = loaded or bool(tables)
            found = guards(tables)
            if any(until <= now for _, _, until in found):
                raise late
            timed = timed or bool(found)
            for table in {name for name, _, _ in found}:
                lines = [f"-D {rule}" for name, rule, _ in found if name == table]
                _restoring(live.iptables(six), write(table, lines))
    if not loaded:
        raise FirewallError("there are no rules to confirm")
    return timed


@alone()
def prolong(wanted: Sequence[Redirection], seconds: int) -> None:
    """Rules loaded by nft: in force for so many seconds from now, even if they were not any more; 0 ends that.

    Raises FirewallError when they are not loaded.
    """
    lines = []
    for w in wanted:
        lines.append(f"flush set inet {w.table} {ACTIVE}\n")
        if seconds:
            timed = ", ".join(f'{protocol} timeout {seconds}s comment "{HELD}"' for protocol in ("tcp", "udp"))
            lines.append(f"add element inet {w.table} {ACTIVE} {{ {timed} }}\n")
    run("nft", "-f", "-", stdin="".join(lines))


def in_force(wanted: Sequence[Redirection]) -> bool:
    """Whether these are loaded by nft, and in force; what somebody has changed inside of a chain is for verify."""
    text = "".join(f"get element inet {w.table} {ACTIVE} {{ tcp, udp }}\n" for w in wanted)
    return complaint("nft", "-f", "-", stdin=text) is None


def held() -> bool:
    """Whether `transocks rules hold` runs, and loads again what is removed. Raises FirewallError."""
    if not has("nft"):
        return False
    if any(("inet", name) in live.tables() for name in GUARDS):
        return True
    sets = (run("nft", "list", "set", "inet", name, ACTIVE) for name in _our_tables())
    return any(f'comment "{HELD}"' in text for text in sets)


@alone()
@unbroken()
def remove(*, keep: bool = False) -> list[str]:
    """Remove everything that is ours, and reset the clients that it has redirected; returns complaints.

    keep: leave what connections need that nft's rules have redirected. With the last rule that needs connection
    tracking the kernel ends that in a network namespace, and with it the translation of addresses: so a table stays
    that does nothing else. TPROXY's stay connected by its own rules and routing, which then take no new ones.
    """
    complaints = [] if keep else cut()
    complaints += _remove_nft(keep=keep) + _remove_iptables()
    kept = keep and has("nft") and _TPROXY in _our_tables()
    if not kept:
        for six in (False, True) if live.has_ipv6() else (False,):
            complaints += _remove_routing(six, [])
    return complaints


def _remove_routing(six: bool, but: Collection[Routing]) -> list[str]:
    if not has("ip"):
        return []  # then nobody has added any
    try:
        rules, routes = live.routing_rules(six), Routes.here(six)
    except FirewallError as error:
        return [str(error)]
    steps = [rule.step("rule", "del") for rule in rules if rule not in but]
    gone = dict.fromkeys([*(rule for rule in rules if routes.has(rule)), *routes.orphans()])
    return _run_all([*steps, *(route.step("route", "del") for route in gone if route not in but)])


def _remove_nft(*, keep: bool) -> list[str]:
    if not has("nft"):
        return []
    try:
        tables = _our_tables()
        text = ""
        if not keep:
            tables += [KEEP] if ("inet", KEEP) in live.tables() else []
        elif tables:
            if _TPROXY in tables:
                tables.remove(_TPROXY)
                text += f"flush set inet {_TPROXY} {ACTIVE}\n"
            text += _KEEP if tables else ""
        text += "".join(f"delete table inet {name}\n" for name in tables)
        if text:
            run("nft", "-f", "-", stdin=text)
    except FirewallError as error:
        return [str(error)]
    return []


def _our_tables() -> list[str]:
    there = live.tables()
    return [name for name in TABLES if ("inet", name) in there]


def _remove_iptables(*, keep: bool = False) -> list[str]:
    """Of each variant, since an iptables of legacy shows nothing of nft's, nor the other way round.

    keep: all but what goes by the name iptables itself.
    """
    complaints: list[str] = []
    for six in (False, True):
        for variant in live.variants(six):
            if keep and "-" not in variant:
                continue
            try:
                found: list[Table] = select(live.saved(six, variant), CHAINS)
                for table in found:  # each by itself, so that one that fails keeps nothing of the others
                    text = changes([], [table]).drop
                    if said := complaint(f"{variant}-restore", "--noflush", stdin=text):
                        complaints.append(said)
            except FirewallError as error:
                if not six or live.has_ipv6():
                    complaints.append(str(error))
    return complaints


def _add_routing(wanted: Iterable[Routing]) -> list[tuple[str, ...]]:
    """Add what is not there; returns how to undo that. Raises FirewallError, with that done."""
    undo: list[tuple[str, ...]] = []
    try:
        for routing in wanted:
            routes = Routes.here(routing.six)
            if others := routes.others(routing):
                raise FirewallError(
                    f"routing table {routing.mark} has routes of others ({', '.join(others)}):"
                    " set rules.tproxy_mark, which is its number, to another"
                )
            if not routes.has(routing):
                run(*routing.step("route", "add"))
                undo.insert(0, routing.step("route", "del"))
            if routing not in live.routing_rules(routing.six):
                run(*routing.step("rule", "add"))
                undo.insert(0, routing.step("rule", "del"))
    except FirewallError:
        _run_all(undo)
        raise
    return undo


def _run_all(steps: Iterable[tuple[str, ...]]) -> list[str]:
    return [said for step in steps if (said := complaint(*step))]

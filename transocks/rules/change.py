"""Applies rules, confirms or prolongs them, and removes them, on this host.

Each change is as atomic as the kernel allows: with nft one transaction for all modes and both families, with iptables
one for each table of each family. A change that fails half way is undone. Our rules are found by name or shape, not by
the present configuration, so those of an earlier configuration are found too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain

from transocks.rules import live, routing
from transocks.rules.config import Mode, Tool
from transocks.rules.conntrack import enter
from transocks.rules.live import CHAINS, GUARDS, TABLES
from transocks.rules.loaded import (
    ACTIVE,
    HELD,
    Table,
    parse_save,
    replacement,
    seconds_left,
    without_term,
)
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_all_nft, render_iptables
from transocks.tools import FirewallError, complaint, one_change, run, which
from usocksd.host.sockets import end_accepted

KEEP = "transocks_nat"
"""An nft table that only keeps connection tracking active: see `remove`."""

_TPROXY = Redirection(mode=Mode.TPROXY, port=0).table
_HOST = Redirection(mode=Mode.HOST, port=0)
_KEEP = f"""table inet {KEEP} {{ chain stays {{ type nat hook output priority -90; }}; }}
flush chain inet {KEEP} stays
add rule inet {KEEP} stays ct state new accept
"""
_PORT = re.compile(r"redirect to :(\d+)|tproxy ip6? to \S+:(\d+)|--to-ports (\d+)|--on-port (\d+)")


@one_change()
def apply(redirections: Sequence[Redirection], tool: Tool, *, seconds: int | None = None) -> None:
    """Load these rules in place of any others of ours. Raises FirewallError, and then nothing has changed.

    seconds: after which the rules have no effect, unless `confirm` or `prolong` is called; None: never.
    """
    track_others(redirections)
    undo = routing.add(redirections)
    try:
        if tool is Tool.NFT:
            needed = [each.table for each in redirections]
            gone = [f"delete table inet {name}\n" for name in _our_tables() if name not in needed]
            run("nft", "-f", "-", stdin="".join([render_all_nft(redirections, seconds=seconds), *gone]))
        else:
            _apply_iptables(redirections, seconds)
    except FirewallError:
        undo()
        raise
    # Remains of another configuration: the other tool's rules, a routing mark that is no longer needed.
    complaints = _remove_iptables() if tool is Tool.NFT else [*_remove_nft(keep=False), *_remove_iptables(others=True)]
    complaints += routing.remove(but=routing.needed(redirections))
    if complaints:
        raise FirewallError("applied, but what was there before is not all gone: " + "; ".join(complaints))


def _apply_iptables(redirections: Sequence[Redirection], seconds: int | None) -> None:
    until = None
    if seconds is not None:
        # Whole seconds, rounded up.
        until = (datetime.now(UTC) + timedelta(seconds=seconds + 1)).strftime("%Y-%m-%dT%H:%M:%S")
    before = {version: live.saved(version, own=CHAINS) for version in live.versions()}
    try:
        for version, old in before.items():
            text = "".join(render_iptables(each, version=version, until=until) for each in redirections)
            _restore(live.iptables(version), replacement(old, parse_save(text, CHAINS), CHAINS))
    except FirewallError as error:
        try:
            for version, old in before.items():
                now = live.saved(version, own=CHAINS)
                _restore(live.iptables(version), replacement(now, old, CHAINS) if now != old else "")
        except FirewallError as again:
            raise FirewallError(f"{error}; and it could not be undone: {again}") from None
        raise


def _restore(variant: str, text: str) -> None:
    if text:
        run(f"{variant}-restore", "--noflush", stdin=text)


def track_others(redirections: Sequence[Redirection]) -> None:
    """Enter existing connections in connection tracking, before packets without a connection are refused for the first
    time. Not if they are refused already: then an unknown connection may be a forgotten redirected one. Raises
    FirewallError.
    """
    if any(each.closed and each.mode is Mode.HOST and not each.udp for each in redirections):
        nft = live.loaded((_HOST.table, _HOST.guard))
        refused = any("jump refuse_unknown" in rule for table in nft for rule in table.rules)
        if not refused and not any(_HOST.chains[2] in table.chains for table in _saved()):
            enter(ports={each.port for each in redirections})


def _saved() -> list[Table]:
    """Our chains in the tables of all variants of iptables. Raises FirewallError."""
    found = [live.saved(version, each, CHAINS) for version in live.versions() for each in live.variants(version)]
    return list(chain.from_iterable(found))


@one_change()
def confirm() -> bool:
    """Keep rules on trial in force for good; False if they were already.

    Raises FirewallError when there are no rules, or when it is too late.
    """
    late = FirewallError("too late: the time is over, and the rules no longer have any effect; apply them again")
    nft, now = live.loaded(), datetime.now(UTC)
    saved = {
        version: live.saved(version, own=CHAINS)
        for version in live.versions()
        if which(f"{live.iptables(version)}-save")
    }
    terms = [seconds_left(table, now) for table in (*nft, *chain.from_iterable(saved.values()))]
    if not terms:
        raise FirewallError("there are no rules to confirm")
    if 0 in terms:
        raise late
    lines = [
        f"{verb} element {table.name} {ACTIVE} {{ tcp, udp }}\n"
        for table in nft if any(terms)
        for verb in ("delete", "add")
    ]  # fmt: skip
    # An element that has expired meanwhile can't be deleted, and then nothing of this happens.
    if lines and complaint("nft", "-f", "-", stdin="".join(lines)):
        raise late
    for version, tables in saved.items():
        _restore(live.iptables(version), "".join(map(without_term, tables)))
    return any(terms)


def is_for_good() -> bool:
    """Whether there are rules, in force and not on trial. Raises FirewallError."""
    now = datetime.now(UTC)
    terms = [seconds_left(table, now) for table in (*live.loaded(), *_saved())]
    return bool(terms) and all(term is None for term in terms)


def prolong(redirections: Sequence[Redirection], seconds: int) -> bool:
    """Rules loaded by nft: keep them in force for `seconds` from now, also if their time was over; 0 ends it now.

    False if they are not loaded.
    """
    lines = []
    for each in redirections:
        lines.append(f"flush set inet {each.table} {ACTIVE}\n")
        if seconds:
            timed = ", ".join(f'{protocol} timeout {seconds}s comment "{HELD}"' for protocol in ("tcp", "udp"))
            lines.append(f"add element inet {each.table} {ACTIVE} {{ {timed} }}\n")
    with one_change():
        return complaint("nft", "-f", "-", stdin="".join(lines)) is None


def in_force(redirections: Sequence[Redirection]) -> bool:
    """Whether nft has these rules loaded and in force. Changes inside a chain are not noticed; `verify` finds those."""
    text = "".join(f"get element inet {each.table} {ACTIVE} {{ tcp, udp }}\n" for each in redirections)
    # Three attempts, since a change by others at the same moment makes one fail.
    return any(complaint("nft", "-f", "-", stdin=text) is None for _ in range(3))


def is_held() -> bool:
    """Whether `transocks rules hold` runs, and loads again what is removed. Raises FirewallError."""
    tables = live.loaded()
    held = any(f'comment "{HELD}"' in element for table in tables for element in table.sets.get(ACTIVE, ()))
    return held or any(name in live.tables() for name in GUARDS)


@one_change()
def remove(*, keep: bool = False) -> list[str]:
    """Remove all our rules, and reset the clients that they have redirected; returns complaints.

    keep: let connections that nft's rules have redirected go on. When the last rule that needs connection tracking
    goes, the kernel ends connection tracking in the network namespace, and with it address translation; so an otherwise
    empty table stays. TPROXY's connections need its rules and routing, which stay and take no new ones.
    """
    complaints = [] if keep else _reset_clients()
    complaints += _remove_nft(keep=keep) + _remove_iptables()
    if not (keep and _TPROXY in live.tables()):
        complaints += routing.remove()
    return complaints


def _reset_clients() -> list[str]:
    """Reset all clients that loaded rules have redirected, since their next packets would leave in clear. The kernel
    does it, as for `ss --kill`, while the translation still exists. nft's rules have no effect after this.
    """
    try:
        nft = live.loaded()
        for table in nft:
            complaint("nft", "flush", "set", *table.name.split(), ACTIVE)  # no new ones are redirected
        rules = [rule for table in (*nft, *_saved()) for rule in table.rules]
        end_accepted({int(port) for rule in rules for found in _PORT.findall(rule) for port in found if port})
    except FirewallError as error:
        return [str(error)]
    except OSError as error:
        return [f"what transocks still has for its clients could not be ended ({error.strerror}): stop transocks"]
    return []


def _remove_nft(*, keep: bool) -> list[str]:
    try:
        tables = _our_tables()
        text = ""
        if not keep:
            tables += [KEEP] if KEEP in live.tables() else []
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
    return [name for name in TABLES if name in there]


def _remove_iptables(*, others: bool = False) -> list[str]:
    """Remove our chains from each variant, since iptables-legacy and iptables-nft do not see each other's. others: only
    from variants other than the one called iptables.
    """
    complaints = []
    for version in live.versions():
        for variant in live.variants(version):
            if not others or "-" in variant:
                try:
                    complaints += remove_chains(variant, live.saved(version, variant, CHAINS), CHAINS)
                except FirewallError as error:
                    complaints.append(str(error))
    return complaints


def remove_chains(variant: str, tables: Sequence[Table], own: Collection[str]) -> list[str]:
    """Remove the chains `own` from these tables, and the jumps to them; returns complaints."""
    # One table at a time, so that a failure in one does not affect the others.
    texts = [replacement([table], [], own) for table in tables]
    return [words for text in texts if (words := complaint(f"{variant}-restore", "--noflush", stdin=text))]

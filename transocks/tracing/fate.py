"""What became of a connection that rules are for, in one word, and which rule was it."""

from __future__ import annotations

from enum import Enum, auto

import attrs

from transocks.rules.config import Mode
from transocks.rules.live import CHAINS, GUARDS, TABLES
from transocks.rules.redirection import Redirection
from transocks.tracing.events import Event, Verdict
from transocks.tracing.names import RuleNames
from transocks.tracing.samples import Outcome
from transocks.tracing.way import Way

_IPTABLES_PLACE = {
    Mode.HOST: ("output", "nat"),
    Mode.GATEWAY: ("prerouting", "nat"),
    Mode.TPROXY: ("prerouting", "mangle"),
}
_NOTRACK = ("notrack", "NOTRACK")


class What(Enum):
    """Where it got."""

    ARRIVED = auto()
    """at the port it is for, and past all rules"""
    STOPPED = auto()
    """by a rule behind that which has it for us, or lost there"""
    DROPPED = auto()
    """before"""
    ELSEWHERE = auto()
    """something gave it another destination, or another mark"""
    UNTRACKED = auto()
    """connection tracking does not know it, so no NAT"""
    ENDED = auto()
    """something accepted it where ours would have been asked next"""
    PASSED = auto()
    """nothing took it"""
    NOWHERE = auto()
    """the kernel did not take it: there is no route, say"""


@attrs.frozen
class Fate:
    """`text`: by which rule, or where."""

    what: What
    text: str = ""
    rule: Event | None = None
    """of that text, where nft knows of one"""


def fate_of(outcome: Outcome, wanted: Redirection, names: RuleNames) -> Fate:
    """Of a sample of these rules."""
    way = outcome.way
    if way is None:
        return Fate(What.NOWHERE, outcome.why or "nothing is told of it")
    if wanted.mode is Mode.TPROXY:
        return _of_tproxy(way, wanted, names)
    turn = way.turn
    if turn is not None and turn.to is not None:
        text = names.change(turn, way)
        if turn.to[1] != wanted.port:
            return Fate(What.ELSEWHERE, f"{text} sends it to port {turn.to[1]} of {turn.to[0]}", turn.rule)
        return _behind(way, names) or Fate(What.ARRIVED, text, turn.rule)
    if way.untracked:
        rule = next((rule for rule in way.rules if any(word in names.text(rule) for word in _NOTRACK)), None)
        return Fate(What.UNTRACKED, names.rule(rule) if rule else names.gap(way.at[0], "raw", way), rule)
    return _before(way, wanted, names)


def _of_tproxy(way: Way, wanted: Redirection, names: RuleNames) -> Fate:
    taken = next((mark for mark in way.marks if mark.after == wanted.tproxy_mark), None)
    if taken is None:
        turn = way.turn
        if turn is not None and turn.to is not None and way.dropped is None:
            text = names.change(turn, way)
            return Fate(What.ELSEWHERE, f"{text} sends it to port {turn.to[1]} of {turn.to[0]}", turn.rule)
        return _before(way, wanted, names)
    later = next((mark for mark in way.marks if mark.before == wanted.tproxy_mark), None)
    if later is not None and not way.delivered:
        text = f"{names.change(later, way)} makes mark {later.before:#x}, which routes it here, {later.after:#x}"
        return Fate(What.ELSEWHERE, text, later.rule)
    return _behind(way, names) or Fate(What.ARRIVED, names.change(taken, way), taken.rule)


def _behind(way: Way, names: RuleNames) -> Fate | None:
    """What keeps the packet from its socket, once it was redirected."""
    if way.dropped is not None:
        return Fate(What.STOPPED, names.does(way.dropped), way.dropped)
    if way.delivered:
        return None
    if way.left:
        return Fate(What.STOPPED, "it is routed out of this host")
    return Fate(What.STOPPED, _lost(way, names))


def _before(way: Way, wanted: Redirection, names: RuleNames) -> Fate:
    """What kept the packet from our rules."""
    if way.dropped is not None:
        return Fate(What.DROPPED, names.does(way.dropped), way.dropped)
    if not way.delivered and not way.left:
        return Fate(What.DROPPED, f"it is lost {_lost(way, names)}")
    hook, table = _IPTABLES_PLACE[wanted.mode]
    chains = {("ip", table, hook.upper()), ("ip6", table, hook.upper())}
    for rule in way.rules:
        ends = rule.verdict in {Verdict.ACCEPT, Verdict.RETURN, Verdict.GOTO}
        if ends and (rule.family, rule.table, rule.chain) in chains and not is_ours(rule, names, wanted):
            return Fate(What.ENDED, names.rule(rule), rule)
    last = next((rule for rule in reversed(way.rules) if is_ours(rule, names, wanted)), None)
    return Fate(What.PASSED, names.rule(last) if last else "", last)


def _lost(way: Way, names: RuleNames) -> str:
    hook, _ = way.at
    place = way.lost_in
    return f"by {names.gap(hook, place, way)}" if place is not None else way.lost or f"behind {hook.upper()}"


def is_guard(rule: Event | None) -> bool:
    """Whether it is a rule of `transocks rules hold`: it refuses what ours should have and do not, so look at ours."""
    return rule is not None and rule.family == "inet" and rule.table in GUARDS


def is_ours(rule: Event, names: RuleNames, wanted: Redirection | None = None) -> bool:
    """Whether it is a rule of ours, or of this mode alone: of its table or chains, or one that leads there."""
    tables = TABLES if wanted is None else (wanted.table,)
    chains = CHAINS if wanted is None else (wanted.chain,)
    if rule.family == "inet" and rule.table in tables:
        return True
    return rule.chain in chains or any(f"-j {chain}" in names.text(rule).split('"')[-1] for chain in chains)

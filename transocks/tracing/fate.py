"""What became of a sample that rules of transocks should redirect, in one word, and which rule or setting caused it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from enum import Enum, auto

import attrs

from transocks.rules.config import Mode, Tool
from transocks.rules.live import CHAINS, GUARDS, TABLES, has_legacy, routed_versions
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError
from transocks.tracing.links import links
from transocks.tracing.names import RuleNames
from transocks.tracing.reports import Report, Verdict
from transocks.tracing.samples import Result, Sample, samples, try_out
from transocks.tracing.trace import Cause, Rewrite, Trace
from transocks.tracing.tracer import Tracer
from usocksd.net.address import IPAddress

_UNKNOWN = "whether others take connections first can't be tried out"
_ENDS = {Verdict.ACCEPT, Verdict.RETURN, Verdict.GOTO}


class Reach(Enum):
    """How far a sample got."""

    ARRIVED = auto()
    """at the port it is for, past all rules"""
    STOPPED = auto()
    """behind our rule"""
    DROPPED = auto()
    """before our rule"""
    TAKEN = auto()
    """by a rule that gave it another destination, or accepted it where ours would have been asked next"""
    UNMARKED = auto()
    """TPROXY's mark was changed, so it was not routed here"""
    UNTRACKED = auto()
    """connection tracking does not know it, so no NAT"""
    PASSED = auto()
    """no rule took it"""
    NOWHERE = auto()
    """the kernel did not take it: there is no route, for example"""


_BEFORE_OURS = {Reach.DROPPED, Reach.TAKEN, Reach.UNMARKED, Reach.UNTRACKED}


@attrs.frozen
class Fate:
    """The fate of one sample under the rules of one mode."""

    redirection: Redirection
    result: Result
    reach: Reach
    text: str = ""
    """the cause, for messages; "" if the sample met no rule of ours"""
    rule: Report | None = None
    """the rule that caused it, if nft knows one"""
    by_ours: bool = False
    """`rule` is one of ours"""

    @property
    def by_guard(self) -> bool:
        """`rule` belongs to the guard of `transocks rules hold`, which refuses connections that our other rules should
        have redirected.
        """
        return self.rule is not None and self.rule.family == "inet" and self.rule.table in GUARDS

    @property
    def sample(self) -> Sample:
        """The sample that was tried."""
        return self.result.sample

    @property
    def name(self) -> str:
        """Mode, protocol and family, for messages."""
        return f"{self.redirection.title}, IPv{self.sample.version}"

    @property
    def end(self) -> tuple[IPAddress, int]:
        """Where it is sent; TPROXY leaves the destination as it is."""
        if self.redirection.by_tproxy:
            return self.redirection.destination(self.sample.version), self.redirection.port
        assert self.result.trace is not None
        return self.result.trace.destination


def fate_of(result: Result, redirection: Redirection, names: RuleNames) -> Fate:
    """The fate of a sample of these rules."""
    if result.trace is None:
        return Fate(redirection, result, Reach.NOWHERE, result.why or "nothing was reported of it")
    reach, text, cause = _follow(result.trace, redirection, names)
    rule = cause.rule if cause is not None else None
    return Fate(redirection, result, reach, text, rule, rule is not None and _is_ours(rule, names, TABLES, CHAINS))


_End = tuple[Reach, str, Cause | None]


def _follow(trace: Trace, redirection: Redirection, names: RuleNames) -> _End:
    """How far it got, the same in words, and the cause."""
    turn = trace.turn
    if redirection.by_tproxy:
        mark = redirection.tproxy_mark
        taken = next((change for change in trace.marks if change.after == mark), None)
        later = next((change for change in trace.marks if change.before == mark), None)
        if taken is not None and later is not None and not trace.delivered:
            text = f"{names.of(later.cause)} changes mark {mark:#x}, which routes it here, to {later.after:#x}"
            return Reach.UNMARKED, text, later.cause
        if taken is None and turn is not None and (trace.stop is None or trace.stop.rule is None):
            return _elsewhere(turn, names)
    else:
        taken = turn
        if turn is not None and turn.to is not None and turn.to[1] != redirection.port:
            return _elsewhere(turn, names)
    if taken is not None:
        if trace.left:
            return Reach.STOPPED, "it is routed out of this host", None
        if trace.stop is not None:
            return Reach.STOPPED, names.stop(trace.stop), trace.stop
        return Reach.ARRIVED, names.of(taken.cause), taken.cause
    if trace.untracked and not redirection.by_tproxy:
        rule = next((rule for rule in trace.rules if "notrack" in names.text(rule).lower()), None)
        hook = "output" if redirection.mode is Mode.HOST else "prerouting"
        cause = Cause(rule, trace.packet.source.version, hook, "raw")
        return Reach.UNTRACKED, names.of(cause), cause
    if trace.stop is not None:
        return Reach.DROPPED, names.stop(trace.stop), trace.stop
    return _untaken(trace, redirection, names)


def _place(redirection: Redirection) -> tuple[str, str]:
    """The hook and the table of our rules."""
    hook = "output" if redirection.mode is Mode.HOST else "prerouting"
    return hook, "mangle" if redirection.by_tproxy else "nat"


def _elsewhere(turn: Rewrite, names: RuleNames) -> _End:
    assert turn.to is not None
    return Reach.TAKEN, f"{names.of(turn.cause)} sends it to port {turn.to[1]} of {turn.to[0]}", turn.cause


def _untaken(trace: Trace, redirection: Redirection, names: RuleNames) -> _End:
    """No rule redirected it or stopped it."""
    hook, table = _place(redirection)
    chains = {("ip", table, hook.upper()), ("ip6", table, hook.upper())}
    ours = [rule for rule in trace.rules if _is_ours(rule, names, (redirection.table,), (redirection.chain,))]
    theirs = (rule for rule in trace.rules if rule not in ours and rule.verdict in _ENDS)
    before = next((rule for rule in theirs if (rule.family, rule.table, rule.chain) in chains), None)
    reach, rule = (Reach.TAKEN, before) if before else (Reach.PASSED, ours[-1] if ours else None)
    cause = Cause(rule, trace.packet.source.version, hook, table)
    return reach, names.of(cause) if rule is not None else "", cause


def _is_ours(rule: Report, names: RuleNames, tables: Container[str], chains: Collection[str]) -> bool:
    """Whether the rule is in one of these tables or chains, or jumps there."""
    if rule.family == "inet" and rule.table in tables:
        return True
    return rule.chain in chains or any(f"-j {chain}" in names.text(rule).split('"')[-1] for chain in chains)


def shadows(redirections: Sequence[Redirection], tool: Tool, *, well: bool) -> Iterator[tuple[str, bool]]:
    """What takes connections or datagrams before our rules: a line for each, and whether it is a fault. `well`: there
    is no other fault that might explain what happens.

    Something that can't be tried is reported, but is no fault.
    """
    names = RuleNames()
    try:
        with Tracer() as tracer:
            here = links()
            for redirection in redirections:
                tried = samples(redirection, here, routed_versions())
                fates = [fate_of(try_out(tracer, sample), redirection, names) for sample in tried]
                for fate in fates:
                    what, legacy = "datagrams" if redirection.udp else "connections", has_legacy(fate.sample.version)
                    to = f"{what} to port {fate.sample.port}"
                    if fate.reach in _BEFORE_OURS and not fate.by_ours and not fate.by_guard:
                        yield f"{fate.text}: it has {to} before our rules do", True
                    elif fate.reach is Reach.PASSED and not fate.text and well and tool is Tool.IPTABLES and legacy:
                        cause = Cause(None, fate.sample.version, *_place(redirection))
                        yield f"{names.of(cause)}: {to} do not get to our rules", True
                if fates and all(fate.reach is Reach.NOWHERE for fate in fates):
                    yield f"{_UNKNOWN} ({redirection.title}): {fates[0].text}", False
    except FirewallError as error:
        yield f"{_UNKNOWN}: {error}", False

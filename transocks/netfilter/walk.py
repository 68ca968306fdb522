"""The way of a connection's first packet through the rules of one hook; and what these may do to any packet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import Enum

import attrs

from transocks.netfilter.ruleset import UNKNOWN, Action, Chain, Hook, Kind, Match, Packet, Rule, Ruleset

_DEEPEST = 16  # jumps that the kernel allows
_ENDS = frozenset({Kind.DROP, Kind.REJECT, Kind.REDIRECT, Kind.DNAT})


@attrs.frozen
class Step:
    """Something that a rule does, or may do, to the packet. `rule` is None where it is the policy of `chain`."""

    action: Action
    chain: Chain
    rule: Rule | None
    certain: bool

    @property
    def kind(self) -> Kind:
        return self.action.kind

    def __str__(self) -> str:
        return f"{self.chain}: {self.rule.text if self.rule else 'policy drop'}"


@attrs.frozen
class Way:
    """What happened, in order, and the packet as it came out."""

    steps: tuple[Step, ...]
    packet: Packet

    @property
    def blocked(self) -> Step | None:
        """What certainly drops or rejects it."""
        ends = (step for step in self.steps if step.certain and step.kind in {Kind.DROP, Kind.REJECT})
        return next(ends, None)

    @property
    def turned(self) -> Step | None:
        """What certainly sends it elsewhere: REDIRECT, DNAT or TPROXY."""
        turns = {Kind.REDIRECT, Kind.DNAT, Kind.TPROXY}
        return next((step for step in self.steps if step.certain and step.kind in turns), None)

    @property
    def certain(self) -> bool:
        """Whether all of it is known."""
        return all(step.certain for step in self.steps)

    def may(self, *kinds: Kind) -> Step | None:
        """The first step that does, or may do, one of these."""
        return next((step for step in self.steps if step.kind in kinds), None)


class _End(Enum):
    FELL_THROUGH = "fell through"
    ACCEPTED = "accepted"
    STOPPED = "stopped"


class _Walk:
    def __init__(self, ruleset: Ruleset, packet: Packet) -> None:
        self.ruleset = ruleset
        self.packet = packet
        self.steps: list[Step] = []
        self.certain = True
        """whether it is known that the packet is here, and what it looks like"""
        self.lost = False
        """whether it may have left the present hooked chain already, other than by returning to the caller"""
        self.turned = False
        """whether NAT is set up already: no other chain of type nat is asked then"""

    def base(self, chain: Chain) -> bool:
        """Through a hooked chain; False if the packet ends there."""
        if chain.type == "nat" and (self.turned or "untracked" in self.packet.state):
            return True
        self.lost = False
        end = self._rules(chain, 0)
        if end is _End.FELL_THROUGH and chain.drops:
            self._note(Action(Kind.DROP), chain, None)
            if self.certain:
                return False
        # In whatever way this chain lets it pass, it is at the next one.
        self.certain = not any(not step.certain and step.kind in _ENDS for step in self.steps)
        return end is not _End.STOPPED

    def _rules(self, chain: Chain, depth: int) -> _End:
        """Through the rules of one chain. Another end than FELL_THROUGH is certain."""
        entered = self.certain
        for rule in chain.rules:
            held = [match.holds(self.packet) for match in rule.matches]
            if False in held:
                continue
            sure, here = None not in held, self.certain
            self.certain = here and sure
            end = self._actions(chain, rule, depth)
            if end is None:
                self.certain = here and not self.lost
            elif here and sure:
                return end
            else:
                self.lost |= end is not _End.FELL_THROUGH
                self.certain = False
                if sure:
                    break  # whoever gets here gets no further in this chain
        self.certain = entered and not self.lost
        return _End.FELL_THROUGH

    def _actions(self, chain: Chain, rule: Rule, depth: int) -> _End | None:
        """None: on to the next rule."""
        for action in rule.actions:
            end = self._action(action, chain, rule, depth)
            if end is not None:
                return end
        return None

    def _action(self, action: Action, chain: Chain, rule: Rule, depth: int) -> _End | None:
        match action.kind:
            case Kind.ACCEPT:
                return _End.ACCEPTED
            case Kind.RETURN:
                return _End.FELL_THROUGH
            case Kind.DROP | Kind.REJECT:
                self._note(action, chain, rule)
                return _End.STOPPED
            case Kind.QUEUE:
                self.certain = False
                self._note(Action(Kind.DROP), chain, rule)
                return _End.STOPPED
            case Kind.UNKNOWN:
                self.certain = False
                self._note(Action(Kind.DROP), chain, rule)
                self.lost = True
            case Kind.JUMP | Kind.GOTO:
                target = self.ruleset.beside(chain, action.chain)
                if target is None or depth == _DEEPEST:
                    return None
                end = self._rules(target, depth + 1)
                return None if end is _End.FELL_THROUGH and action.kind is Kind.JUMP else end
            case Kind.REDIRECT | Kind.DNAT:
                self._note(action, chain, rule)
                self._turn(action)
                return _End.ACCEPTED
            case Kind.TPROXY:
                self._note(action, chain, rule)
                # In nft a statement without a verdict, in iptables a target.
                return _End.ACCEPTED if chain.tool == "iptables" else None
            case Kind.MARK:
                self._mark(action)
            case Kind.NOTRACK if self.certain:
                self._note(action, chain, rule)
                self.packet = attrs.evolve(self.packet, state=frozenset({"untracked"}))
        return None

    def _mark(self, action: Action) -> None:
        old = self.packet.mark
        new = UNKNOWN if old is UNKNOWN or action.mark is None or not self.certain else (
            old & ~action.mark.high | action.mark.low
        )  # fmt: skip
        self.packet = attrs.evolve(self.packet, mark=new)

    def _turn(self, action: Action) -> None:
        if not self.certain:
            return
        self.turned = True
        self.packet = attrs.evolve(
            self.packet,
            destination=action.address or self.packet.destination,
            dport=action.port or self.packet.dport,
            destination_type="local" if action.kind is Kind.REDIRECT else UNKNOWN,
            state=self.packet.state | {"dnat"},
        )

    def _note(self, action: Action, chain: Chain, rule: Rule | None) -> None:
        self.steps.append(Step(action, chain, rule, self.certain))


def walk(ruleset: Ruleset, hook: Hook, packet: Packet) -> Way:
    """Take a packet through all chains of a hook."""
    state = _Walk(ruleset, packet)
    for chain in ruleset.hooked(hook, packet.version):
        if not state.base(chain):
            break
    return Way(tuple(state.steps), state.packet)


@attrs.frozen
class Target:
    """Something that a rule may do to packets of a hook, and what has to hold on the way to it."""

    chain: Chain
    """the hooked one"""
    inside: Chain
    """the one that the rule is in"""
    rule: Rule
    action: Action
    matches: tuple[Match, ...]

    @property
    def text(self) -> str:
        return f"{self.inside}: {self.rule.text}"


def targets(ruleset: Ruleset, base: Chain, kinds: Collection[Kind]) -> Iterator[Target]:
    """What the rules of a hooked chain may do of these kinds, and those of the chains that it leads to."""
    barren: set[int] = set()  # chains that lead nowhere: seen once is enough, of the thousands that others may have

    def look(chain: Chain, matches: tuple[Match, ...], depth: int) -> Iterator[Target]:
        found = False
        for rule in chain.rules:
            conditions = (*matches, *rule.matches)
            for action in rule.actions:
                if action.kind in kinds:
                    found = True
                    yield Target(base, chain, rule, action, conditions)
                if action.kind in {Kind.JUMP, Kind.GOTO} and depth < _DEEPEST:
                    target = ruleset.beside(chain, action.chain)
                    if target is not None and id(target) not in barren:
                        yield from look(target, conditions, depth + 1)
                        found = found or id(target) not in barren
        if not found:
            barren.add(id(chain))

    yield from look(base, (), 0)

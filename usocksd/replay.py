"""Decides recorded requests again by the rules of two configurations, for `usocksd diff`. Pure. A record has the
client, the request and the addresses of the name. Rules depend on nothing else, so other rules can judge the same
request. If a record lacks something, the outcome is unknown, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Final, TypeAlias

from attrs import define, evolve, field, frozen

from usocksd.acl import Ruling
from usocksd.clients import Client
from usocksd.decision import REQUIRED, Decision, Policy
from usocksd.errors import ResolveError
from usocksd.names.match import canonical_host
from usocksd.net.address import numeric_address
from usocksd.records import AccessRecord, RecordedRequest, Skipped, read_record

NEVER_ASKED: Final = "the destination of the client is not known"
UNRESOLVED: Final = "its name was not resolved"
NO_USER: Final = "the user of the client is not known"

_OTHERS: Final = "other rules"


@frozen
class Outcome:
    """The outcome of a recorded request under a policy."""

    allowed: bool | None
    """None: unknown."""
    rule: str
    """The rule that decides; if the outcome is unknown, the rule that decides as far as can be told, or ""."""
    why: str = ""
    """What is not known, if the outcome is unknown."""
    pool: str = ""
    """The egress pool of an allowed request: that of the address that was dialled, or is tried first."""
    addresses: tuple[tuple[str, Ruling], ...] = ()
    """The ruling on each address of its name."""

    @property
    def reach(self) -> tuple[str, ...]:
        """The allowed addresses of its name."""
        return tuple(address for address, ruling in self.addresses if ruling.allowed)


def judge(policy: Policy, request: RecordedRequest) -> Outcome:
    """Decide a recorded request again."""
    user = request.user if policy.users is not None else None
    proxy = None if request.proxy is None else numeric_address(request.proxy)
    client = Client(request.client, 0, numeric_address(request.client), user, proxy, request.local)
    refusal = policy.refusal(client)
    if refusal is not None and refusal != REQUIRED:
        return Outcome(False, refusal)
    if request.host is None:
        return Outcome(None, "", NEVER_ASKED)
    if refusal is not None:
        return Outcome(None, "", NO_USER)
    try:
        decision = Decision(policy.rules, client, request.host, request.port, request.command)
        name = str(canonical_host(request.name)) if request.name else decision.sent
    except (ResolveError, ValueError):
        return Outcome(True, "")  # no rule applies, and it can't be connected
    ruling = decision.ruling or decision.judge_name(name)
    if not ruling.allowed:
        return Outcome(False, ruling.rule)
    if decision.unresolved and request.candidates is None:
        return Outcome(None, ruling.rule, UNRESOLVED)
    if not decision.unresolved or not request.candidates:
        return Outcome(True, ruling.rule, pool=ruling.pool)
    decision.resolved(map(numeric_address, request.candidates))
    rulings = tuple((text, one.ruling) for text, one in zip(request.candidates, decision.candidates or (), strict=True))
    allowed = {text: ruling for text, ruling in rulings if ruling.allowed}
    if not allowed:
        return Outcome(False, rulings[0][1].rule, addresses=rulings)
    chosen = allowed.get(request.dialled or "") or next(iter(allowed.values()))
    return Outcome(True, chosen.rule, pool=chosen.pool, addresses=rulings)


class Change(Enum):
    """How the decision on a request differs."""

    DENIED = "denied"
    ALLOWED = "allowed"
    POOL = "pool"
    ADDRESSES = "addresses"
    UNKNOWN = "unknown"


def compare(old: Outcome, new: Outcome) -> tuple[Change, Outcome, Outcome] | None:
    """How two outcomes of one request differ, with the rules and pools that make the difference; None if they don't."""
    if old.allowed is None or new.allowed is None:
        return Change.UNKNOWN, old, new
    if old.allowed != new.allowed:
        return Change.ALLOWED if new.allowed else Change.DENIED, old, new
    if not old.allowed:
        return None
    moved = None
    for (_, before), (_, after) in zip(old.addresses, new.addresses, strict=False):
        if before.allowed != after.allowed:
            return Change.ADDRESSES, evolve(old, rule=before.rule), evolve(new, rule=after.rule)
        if before.allowed and before.pool != after.pool and moved is None:
            moved = evolve(old, rule=before.rule, pool=before.pool), evolve(new, rule=after.rule, pool=after.pool)
    if moved is None and old.pool != new.pool:
        moved = old, new
    return None if moved is None else (Change.POOL, *moved)


@define(eq=False)
class Group:
    """Requests that change in the same way, by the same rules."""

    change: Change
    old: Outcome
    """Of the example, like `new`."""
    new: Outcome
    example: AccessRecord
    count: int = 0


_Known: TypeAlias = tuple[Group | None, bool | None, str, str]
"""The group of a request, whether the old policy allows it, its pool under the new one, and the rule there that denies
it."""


@define(eq=False)
class Replay:
    """Compares two policies over recorded requests, in bounded memory."""

    old: Policy
    new: Policy
    most_remembered: int = 50_000
    most_groups: int = 10_000
    requests: int = 0
    same: int = 0
    disagreeing: int = 0
    """Requests that `old` decides differently from the record."""
    disagreement: AccessRecord | None = None
    """The first of these requests."""
    leaving: dict[str, int] = field(factory=dict)
    """Requests that `new` allows, by the pool that they leave from."""
    denials: Counter[str] = field(factory=Counter)
    """Requests that the record has as allowed and `new` denies, by rule."""
    skipped: dict[Skipped, int] = field(factory=lambda: dict.fromkeys(Skipped, 0))
    first: str = ""
    """When the earliest request was recorded."""
    last: str = ""
    _groups: dict[tuple[object, ...], Group] = field(factory=dict, init=False)
    _known: dict[RecordedRequest, _Known] = field(factory=dict, init=False)

    def read(self, lines: Iterable[bytes], *, since: str = "") -> None:
        """Take the requests of a log; those before `since` (as in `AccessRecord.at`) are left out."""
        for line in lines:
            record = read_record(line)
            if isinstance(record, Skipped):
                self.skipped[record] += 1
            elif record.at >= since:
                self.add(record)

    def add(self, record: AccessRecord) -> None:
        """Take one request."""
        self.requests += 1
        self.first = min(self.first or record.at, record.at)
        self.last = max(self.last, record.at)
        known = self._known.get(record.request)
        if known is None:
            if len(self._known) >= self.most_remembered:
                self._known.clear()
            known = self._known[record.request] = self._decide(record)
        group, allowed, pool, denied_by = known
        if pool:
            self.leaving[pool] = self.leaving.get(pool, 0) + 1
        if group is None:
            self.same += 1
        else:
            group.count += 1
        if denied_by and record.allowed:
            self.denials[denied_by] += 1
        if allowed is not None and allowed != record.allowed:
            self.disagreeing += 1
            self.disagreement = self.disagreement or record

    def _decide(self, record: AccessRecord) -> _Known:
        old, new = judge(self.old, record.request), judge(self.new, record.request)
        facts = old.allowed, new.pool, new.rule if new.allowed is False else ""
        difference = compare(old, new)
        if difference is None:
            return None, *facts
        group = Group(*difference, record)
        key = self._key(group)
        if key not in self._groups and len(self._groups) >= self.most_groups:
            group.old, group.new = Outcome(old.allowed, _OTHERS), Outcome(new.allowed, _OTHERS)
            key = self._key(group)
        return self._groups.setdefault(key, group), *facts

    def _key(self, group: Group) -> tuple[object, ...]:
        pools = (group.old.pool, group.new.pool) if group.change is Change.POOL else ()
        return group.change, group.old.rule, group.new.rule, group.old.why, group.new.why, *pools

    def groups(self, change: Change) -> list[Group]:
        """The groups of this change, the largest first."""
        found = [group for group in self._groups.values() if group.change is change]
        return sorted(found, key=lambda group: -group.count)

    def count(self, change: Change) -> int:
        """How many requests change in this way."""
        return sum(group.count for group in self._groups.values() if group.change is change)

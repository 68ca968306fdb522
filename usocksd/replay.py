"""Recorded requests decided again, under other rules: what `usocksd diff` is made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from attrs import define, field

from usocksd.policy import Outcome, Policy
from usocksd.records import Asked, Record, Skipped, read_record

_MOST_REMEMBERED: Final = 50_000
_MOST_GROUPS: Final = 10_000

_OTHERS: Final = "other rules"


class Change(Enum):
    """How a request would be decided differently."""

    DENIED = "denied"
    ALLOWED = "allowed"
    POOL = "pool"
    ADDRESSES = "addresses"
    UNKNOWN = "unknown"


class Difference(NamedTuple):
    """How two outcomes of one request differ: the rules that make the difference, and the pools."""

    change: Change
    old: str
    new: str
    old_pool: str = ""
    new_pool: str = ""


def compare(old: Outcome, new: Outcome) -> Difference | None:
    """The difference between two outcomes of one request; None if there is none."""
    if old.allowed is None or new.allowed is None:
        return Difference(Change.UNKNOWN, old.rule, new.rule)
    if old.allowed != new.allowed:
        return Difference(Change.ALLOWED if new.allowed else Change.DENIED, old.rule, new.rule)
    if not old.allowed:
        return None
    moved = None
    for (_, before), (_, after) in zip(old.addresses, new.addresses, strict=False):
        if before.allowed != after.allowed:
            return Difference(Change.ADDRESSES, before.rule, after.rule)
        if before.allowed and before.egress != after.egress:
            moved = moved or Difference(Change.POOL, before.rule, after.rule, before.egress, after.egress)
    if moved is None and old.pool != new.pool:
        moved = Difference(Change.POOL, old.rule, new.rule, old.pool, new.pool)
    return moved


@define(eq=False)
class Group:
    """Requests that change in the same way, by the same rules."""

    difference: Difference
    old: Outcome
    """Of the example, as is `new`."""
    new: Outcome
    example: Record
    count: int = 0


_Key: TypeAlias = tuple[Difference, str, str]


@define(eq=False)
class Replay:
    """Compares two policies over recorded requests, in bounded memory however many there are."""

    old: Policy
    new: Policy
    requests: int = 0
    same: int = 0
    disagreeing: int = 0
    """Requests that `old` decides otherwise than is recorded, and the first of them."""
    disagreement: Record | None = None
    leaving: dict[str, int] = field(factory=dict)
    """Requests that `new` allows, by the pool that they leave from."""
    skipped: dict[Skipped, int] = field(factory=lambda: dict.fromkeys(Skipped, 0))
    first: str = ""
    """When the earliest request was recorded, and the latest."""
    last: str = ""
    _groups: dict[_Key, Group] = field(factory=dict, init=False)
    # Requests repeat: what came of equal ones, and what the old policy said.
    _known: dict[Asked, tuple[Group | None, bool | None, str]] = field(factory=dict, init=False)

    def read(self, lines: Iterable[bytes], *, since: str = "") -> None:
        """Take the requests of a log; those before `since` (as in `Record.at`) are left out."""
        for line in lines:
            record = read_record(line)
            if isinstance(record, Skipped):
                self.skipped[record] += 1
            elif record.at >= since:
                self.add(record)

    def add(self, record: Record) -> None:
        """Take one request."""
        self.requests += 1
        self.first = min(self.first or record.at, record.at)
        self.last = max(self.last, record.at)
        known = self._known.get(record.asked)
        if known is None:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            known = self._known[record.asked] = self._decide(record)
        group, allowed, pool = known
        if pool:
            self.leaving[pool] = self.leaving.get(pool, 0) + 1
        if group is None:
            self.same += 1
        else:
            group.count += 1
        if allowed is not None and allowed != record.allowed:
            self.disagreeing += 1
            self.disagreement = self.disagreement or record

    def _decide(self, record: Record) -> tuple[Group | None, bool | None, str]:
        """Where this request belongs, what the old policy says to it, and the pool it leaves from under the new."""
        old, new = self.old.judge(record.asked), self.new.judge(record.asked)
        difference = compare(old, new)
        if difference is None:
            return None, old.allowed, new.pool
        key = (difference, old.why, new.why)
        if key not in self._groups and len(self._groups) >= _MOST_GROUPS:
            difference = Difference(difference.change, _OTHERS, _OTHERS)
            old_, new_ = Outcome(old.allowed, _OTHERS), Outcome(new.allowed, _OTHERS)
            others = Group(difference, old_, new_, record)
            return self._groups.setdefault((difference, "", ""), others), old.allowed, new.pool
        return self._groups.setdefault(key, Group(difference, old, new, record)), old.allowed, new.pool

    def groups(self, change: Change) -> list[Group]:
        """The groups of this change, the largest first."""
        found = [group for group in self._groups.values() if group.difference.change is change]
        return sorted(found, key=lambda group: -group.count)

    def count(self, change: Change) -> int:
        """How many requests change so."""
        return sum(group.count for group in self._groups.values() if group.difference.change is change)

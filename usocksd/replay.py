"""Recorded requests decided again, under other rules: what `usocksd diff` is made of. Pure.

A record (see docs/explain.md) says who asked for what, and which addresses its name had. That is all that rules look
at, so the same request can be put to any rules. Where a record does not say enough, the outcome is unknown: nothing
is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

from attrs import define, field, frozen

from usocksd.acl import AccessRules, ClientRules, Decision
from usocksd.match import IPAddress, canonical_host, numeric_address

_MOST_REMEMBERED: Final = 50_000
_MOST_GROUPS: Final = 10_000

CLIENTS: Final = "allow_from"
USERS: Final = "users_file"
_OTHERS: Final = "other rules"

NEVER_ASKED: Final = "where the client wanted to go is not known"
UNRESOLVED: Final = "its name was not resolved"
NO_USER: Final = "as whom the client would come is not known"


@frozen
class Asked:
    """A request as it was recorded: texts, so that equal ones are quickly found to be equal."""

    client: str
    user: str | None
    host: str | None
    """As the client wrote it; None if it did not get so far."""
    port: int
    name: str | None
    """The name that was judged, if it is known: as written, in canonical form, perhaps with a search domain."""
    candidates: tuple[str, ...] | None
    """The addresses that the name had, none if there was no answer; None if it was denied before it was resolved."""
    dialled: str | None
    """Which of them the connection went to."""


@frozen
class Record:
    """One line of the log that says what became of a request."""

    at: str
    """RFC 3339 in UTC, as the log has it."""
    asked: Asked
    allowed: bool


class Skipped(Enum):
    """Lines that say nothing about a request."""

    OTHER = "other"
    """no access record, or the second one of a connection"""
    NO_REQUEST = "no_request"
    """an access record of a connection that came to no request"""
    UNREADABLE = "unreadable"
    """not a record in JSON"""


def read_record(line: bytes) -> Record | Skipped:
    """What a line of the log says about a request. The first record of each connection counts."""
    # Half of a busy log: not worth parsing. (Inside of a string the quotes would be escaped.)
    if b'"message":"proxy ends' in line:
        return Skipped.OTHER
    if not line.strip():
        return Skipped.OTHER
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Skipped.UNREADABLE
    if not isinstance(record, dict):
        return Skipped.UNREADABLE
    if record.get("type") != "access" or "client_addr" not in record:
        return Skipped.OTHER
    try:
        return _parse(record)
    except (ValueError, TypeError, AttributeError, KeyError):
        return Skipped.UNREADABLE


def _parse(record: Mapping[str, Any]) -> Record | Skipped:
    message = record["message"]
    if message in ("proxy ends", "proxy ends with an error"):
        return Skipped.OTHER
    client = _host_of(record["client_addr"])
    at, user = _text(record["logged_at"]), record.get("user")
    if message == "denied access":
        return Record(at, Asked(client, None, None, 0, None, None, None), allowed=False)
    if message == "command not supported" or "dest_host" not in record:
        return Skipped.NO_REQUEST
    host, port = _text(record["dest_host"]), record["dest_port"]
    if type(port) is not int or not (user is None or isinstance(user, str)):
        raise ValueError("not a port or a user")
    dialled = None if record.get("dest_addr") is None else _host_of(record["dest_addr"])
    allowed = message != "ruleset mismatch"
    candidates: tuple[str, ...] | None
    if (said := record.get("candidates")) is not None:
        if not isinstance(said, list):
            raise ValueError("not a list")
        candidates = tuple(_address(_text(each).partition(" ")[0]) for each in said)
    elif dialled is not None:
        candidates = (dialled,)  # by a version that did not record the others
    else:
        candidates = () if allowed else None
    name = None if record.get("dest_name") is None else _text(record["dest_name"])
    return Record(at, Asked(client, user, host, port, name, candidates, dialled), allowed)


def _host_of(address: str) -> str:
    """The host of "host:port" or "[host]:port"; raises ValueError if it is no address."""
    return _address(_text(address).rpartition(":")[0].removeprefix("[").removesuffix("]"))


def _address(text: str) -> str:
    numeric_address(text)
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


@frozen
class Outcome:
    """What becomes of a request under some rules."""

    allowed: bool | None
    """None: unknown."""
    rule: str
    """The rule that decides; of an unknown outcome the one that decides as far as can be told, or ""."""
    why: str = ""
    """Of an unknown outcome: what is not known."""
    pool: str = ""
    """Of an allowed request: the pool of the address that was dialled, or is the first to be."""
    addresses: tuple[tuple[str, Decision], ...] = ()
    """What is decided on each address of its name."""

    @property
    def reach(self) -> tuple[str, ...]:
        """The addresses of its name that may be dialled."""
        return tuple(address for address, decision in self.addresses if decision.allowed)


@frozen
class Policy:
    """All of a configuration that decides whether a request is served, and from where."""

    clients: ClientRules
    rules: AccessRules
    users: frozenset[str] | None = None
    """Who can authenticate; None: nobody is asked to."""
    required: bool = False
    """Whether everybody has to."""

    def judge(self, asked: Asked) -> Outcome:
        """Decide a recorded request."""
        client = numeric_address(asked.client)
        if not self.clients.admits(asked.client):
            return Outcome(False, CLIENTS)
        if asked.host is None:
            return Outcome(None, "", NEVER_ASKED)
        user = asked.user if self.users is not None else None
        if user is not None and self.users is not None and user not in self.users:
            return Outcome(False, USERS)
        if user is None and self.required:
            return Outcome(None, "", NO_USER)
        try:
            host = canonical_host(asked.name or asked.host)
            sent = None if asked.name is None or host == (called := canonical_host(asked.host)) else str(called)
        except ValueError:
            return Outcome(True, "")  # by no rule, and it can't be connected
        decision = self.rules.decide_name(client, user, host, asked.port, sent=sent)
        if not decision.allowed:
            return Outcome(False, decision.rule)
        if not isinstance(host, str):
            return Outcome(True, decision.rule, pool=decision.egress)
        if asked.candidates is None:
            return Outcome(None, decision.rule, UNRESOLVED)
        if not asked.candidates:
            return Outcome(True, decision.rule, pool=decision.egress)
        return self._judge_addresses(client, user, host, sent, asked)

    def _judge_addresses(
        self, client: IPAddress, user: str | None, name: str, sent: str | None, asked: Asked
    ) -> Outcome:
        candidates = asked.candidates or ()
        decisions = tuple(
            (text, self.rules.decide_address(client, user, name, numeric_address(text), asked.port, sent=sent))
            for text in candidates
        )
        allowed = {text: decision for text, decision in decisions if decision.allowed}
        if not allowed:
            return Outcome(False, decisions[0][1].rule, addresses=decisions)
        chosen = allowed.get(asked.dialled or "") or next(iter(allowed.values()))
        return Outcome(True, chosen.rule, pool=chosen.egress, addresses=decisions)


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


def lines_of(readline: Callable[[int], bytes], longest: int = 1 << 21) -> Iterator[bytes]:
    """The lines of a file, by its `readline`; of more than `longest` bytes, they come in pieces and are no records."""
    return iter(lambda: readline(longest), b"")

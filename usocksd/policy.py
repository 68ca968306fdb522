"""All of a configuration that decides whether a request is served, and a recorded request decided by it. Pure.

A record says who asked for what, and which addresses its name had. That is all that rules look at, so the same
request can be put to any rules. Where a record does not say enough, the outcome is unknown: nothing is guessed.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from usocksd.acl import AccessRules, Decision
from usocksd.clients import ALLOW_FROM, TRUSTED, ClientRules
from usocksd.names.match import canonical_host
from usocksd.net.address import IPAddress, numeric_address
from usocksd.records import Asked

USERS: Final = "users_file"

NEVER_ASKED: Final = "where the client wanted to go is not known"
UNRESOLVED: Final = "its name was not resolved"
NO_USER: Final = "as whom the client would come is not known"


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
    trusted: ClientRules | None = None
    """Which proxies may say whose connection it is; None: none."""

    def judge(self, asked: Asked) -> Outcome:
        """Decide a recorded request."""
        client = numeric_address(asked.client)
        if asked.peer is not None and (self.trusted is None or not self.trusted.admits(asked.peer)):
            return Outcome(False, TRUSTED)
        if not asked.own and not self.clients.admits(asked.client):
            return Outcome(False, ALLOW_FROM)
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

"""Decides a request: a session acts on the decision, `explain` shows it, and `diff` compares two. Pure.

    client admitted, user known? -> rules on each name that the host may stand for -> (the caller resolves it)
        -> rules on each of its addresses -> the egress address for each

Values go in, values come out; the caller does the I/O:

    decision = Decision(policy.rules, client, host, port)
    if decision.unresolved:
        await decision.resolve(resolver.full_names(host), resolver.resolve)
    sources = decision.choose_egress(pick)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import lru_cache
from typing import Final, TypeAlias

from attrs import define, frozen

from usocksd.acl import CONNECT, UDP_ASSOCIATE, AccessRules, RuleAnswer, Ruling
from usocksd.clients import ALLOW_FROM, TRUSTED, Client, ClientRules
from usocksd.egress import Source, sites_of
from usocksd.errors import Denied, NoEgress, ResolveError
from usocksd.names.match import canonical_host
from usocksd.net.address import IPAddress, address_text

USERS: Final = "users_file"
REQUIRED: Final = "auth.required"

Pick: TypeAlias = Callable[[str, Client, str, IPAddress], Source]
"""EgressPools.pick: takes pool, client, site and destination."""


@frozen
class Policy:
    """Everything in a configuration that decides whether a request is served."""

    clients: ClientRules
    rules: AccessRules
    users: frozenset[str] | None = None
    """The users. None: no authentication."""
    required: bool = False
    """Whether every client has to authenticate."""
    trusted: ClientRules | None = None
    """Which proxies may name their clients. None: none."""

    def refusal(self, client: Client) -> str | None:
        """The setting that refuses this client before any rule is asked; None if it may come in."""
        if client.proxy is not None and (self.trusted is None or not self.trusted.admits(client.proxy)):
            return TRUSTED
        if not client.local and not self.clients.admits(client.address):
            return ALLOW_FROM
        if client.user is None:
            return REQUIRED if self.required else None
        return USERS if self.users is not None and client.user not in self.users else None


@define(eq=False)
class Candidate:
    """An address to connect to."""

    address: IPAddress
    host: str
    """The address as text."""
    ruling: Ruling
    source: Source | None = None
    """The source of a connection to it, once it is chosen."""
    error: NoEgress | None = None
    """Why there is no source for it."""


@lru_cache(maxsize=8192)
def _canonical(host: str) -> tuple[IPAddress | None, str]:
    """The host as an address (None if it is a name), and its canonical text."""
    found = canonical_host(host)
    return (None, found) if isinstance(found, str) else (found, str(found))


class Decision:
    """The decision on one request: on its name, if it has one, and after that is resolved, on its addresses."""

    __slots__ = ("_rules", "absent", "candidates", "client", "command", "name", "port", "ruling", "sent")

    def __init__(self, rules: AccessRules, client: Client, host: str, port: int, command: str = CONNECT) -> None:
        """`host` is as the client wrote it. Raises ResolveError if it can't be one."""
        self.command = command
        self._rules = rules
        self.client = client
        self.port = port
        try:
            address, sent = _canonical(host)
        except ValueError as error:
            raise ResolveError(host, str(error)) from None
        self.sent = sent
        """The host in canonical form."""
        self.absent: list[ResolveError] = []
        """Names that do not exist or have no address."""
        self.name: str | None = None
        """The name that counts: the one that was resolved, or is being resolved, or was denied."""
        self.ruling: Ruling | None = None
        """The ruling that counts: on the name, then on the address to try first, at last on the one connected."""
        self.candidates: list[Candidate] | None = None
        """The addresses of the host, in the order in which to try them; None while its name is not resolved."""
        if address is not None:
            self.ruling = rules.judge(client, None, address, port, command=command)
            self.candidates = [Candidate(address, sent, self.ruling)]

    @property
    def unresolved(self) -> bool:
        """Whether the host is a name whose addresses are not known yet."""
        return self.candidates is None

    def names(self, full_names: Iterable[str]) -> Iterator[str]:
        """The names to resolve, until one is `resolved`: those of `full_names` that the rules allow.

        Raises Denied if rules deny one and no other has an address, and ResolveError if none exists.
        """
        denied: tuple[str, Ruling] | None = None
        for name in full_names:
            ruling = self.judge_name(name)
            if ruling.allowed:
                yield name
                if self.candidates is not None:
                    return
            else:
                denied = denied or (name, ruling)
        if denied is not None:
            self.name, self.ruling = denied
            raise Denied(denied[1].rule)
        raise self.absent[0]

    async def resolve(self, full_names: Iterable[str], lookup: Callable[[str], Awaitable[Iterable[IPAddress]]]) -> None:
        """Resolve the name: `lookup` gives the addresses of a name, or raises ResolveError.

        Raises Denied, ResolveError, and whatever else `lookup` does.
        """
        for name in self.names(full_names):
            try:
                self.resolved(await lookup(name))
            except ResolveError as error:
                self.not_resolved(error)

    def judge_name(self, name: str) -> Ruling:
        """Judge a name that the host stands for."""
        self.name = name
        ruling = self.ruling = self._rules.judge(
            self.client, name, None, self.port, self._other_name, command=self.command
        )
        return ruling

    def not_resolved(self, error: ResolveError) -> None:
        """The name can't be resolved. Raises `error` unless it says that the next name may be tried."""
        if not error.absent:
            raise error
        self.absent.append(error)

    def resolved(self, addresses: Iterable[IPAddress]) -> None:
        """The name has these addresses, in the order in which to try them: at least one."""
        judge, client, name, port = self._rules.judge, self.client, self.name, self.port
        sent, command = self._other_name, self.command
        self.candidates = [
            Candidate(address, address_text(address), judge(client, name, address, port, sent, command=command))
            for address in addresses
        ]

    def choose_egress(self, pick: Pick) -> list[tuple[str, Source]]:
        """Choose the egress address for each address that the rules allow. Returns what can be dialled, in order.

        Raises Denied if the rules allow none, NoEgress if no egress address is usable.
        """
        assert self.candidates
        # The datagrams of a client's port leave from one address, wherever they go (RFC 4787, REQ-1 and REQ-2).
        sites = {4: "", 6: ""} if self.command == UDP_ASSOCIATE else sites_of(each.address for each in self.candidates)
        found: list[tuple[str, Source]] = []
        for candidate in self.candidates:
            ruling, address = candidate.ruling, candidate.address
            if not ruling.allowed:
                continue
            try:
                source = candidate.source = pick(ruling.pool, self.client, sites[address.version], address)
            except NoEgress as error:
                candidate.error = error
                continue
            if not found:
                self.ruling = ruling
            found.append((candidate.host, source))
        if not found:
            best = next((each for each in self.candidates if each.ruling.allowed), self.candidates[0])
            self.ruling = best.ruling
            raise best.error or Denied(best.ruling.rule)
        return found

    def connected(self, host: str) -> None:
        """The candidate with this text is connected."""
        for candidate in self.candidates or ():
            if candidate.host == host:
                self.ruling = candidate.ruling
                return

    def trace(self, candidate: Candidate | None = None) -> list[RuleAnswer]:
        """The answer of each rule to the name, or to one of its candidates; or to the requested address."""
        if candidate is None and self.name is None and self.candidates:
            candidate = self.candidates[0]
        address = None if candidate is None else candidate.address
        return self._rules.trace(self.client, self.name, address, self.port, self._other_name, command=self.command)

    @property
    def _other_name(self) -> str | None:
        """The name that the client has sent, if a search domain has made another one of it."""
        return None if self.name is None or self.name == self.sent else self.sent

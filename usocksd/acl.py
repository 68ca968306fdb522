"""Where clients may go: ordered rules, the first match decides. Pure.

A destination is judged as the client has asked for it, and if that is a name, again with each address that the name
resolves to. Both ask the same rules in the same order. A rule matches if its client, user, port and destination do;
for an address behind a name it is enough that `to` has one of the two. So a network that is denied is denied to an
allowed name too, and a rule that denies all the rest does not deny the addresses of a name that a rule above allows.

A rule that allows a *name* does not lift the built-in protection of addresses: only a rule whose `to` has the
*address* does. Otherwise the owner of a name below an allowed domain could point it at this host. For protected
addresses, all other rules that allow do not match.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv6Network
from typing import NamedTuple, TypeAlias

from attrs import frozen

from usocksd.clients import Client
from usocksd.names.match import PROTECTED_NETWORKS, NetworkMap, entries_of, judged_addresses, parse_network
from usocksd.names.site_index import PortIndex, SiteIndex, has_port, mask_of
from usocksd.names.sites import Prefix, SiteList, parse_entry
from usocksd.net.address import IPAddress, IPNetwork

CONNECT, BIND, UDP_ASSOCIATE = COMMANDS = ("connect", "bind", "udp_associate")
"""The commands of SOCKS, as access records and rules name them."""
PROTOCOLS: Mapping[str, frozenset[str]] = {"tcp": frozenset({CONNECT, BIND}), "udp": frozenset({UDP_ASSOCIATE})}
"""The commands that carry each protocol."""


class Ruling(NamedTuple):
    """The rules' decision on a name or an address."""

    allowed: bool
    rule: str
    """The rule that decides, as log records show it."""
    pool: str = "default"
    """The egress pool to leave from."""


_DEFAULT = Ruling(True, "default")


@frozen
class RuleAnswer:
    """Whether one rule matches a request, and why or why not, in a short phrase."""

    rule: str
    matched: bool
    why: str
    line: int | None = None
    """The line of the configuration where the rule begins."""


EntryFinder: TypeAlias = Callable[[str | None, Sequence[IPAddress], int], str]
"""Names the entry of a list that has a name, an address or the port."""


@frozen(kw_only=True)
class Rule:
    """One rule. A condition that is None matches everything."""

    name: str
    allow: bool
    clients: tuple[IPNetwork, ...] | None = None
    users: frozenset[str] | None = None
    """Users who have authenticated."""
    to: tuple[SiteList, ...] | None = None
    ports: tuple[tuple[int, int], ...] | None = None
    """The first and last port of each range."""
    commands: frozenset[str] | None = None
    """Of COMMANDS."""
    pool: str = "default"
    """The egress pool of a rule that allows."""
    complement: bool = False
    """The rule matches destinations that are not in `to`."""
    line: int | None = None
    """Where it begins in the configuration."""
    entry: EntryFinder | None = None
    """For a list of [outgoing], of which records name the entry."""


def rules_of_lists(allow_sites: Sequence[str], deny_sites: Sequence[str], deny_ports: Sequence[int]) -> list[Rule]:
    """The lists of [outgoing] as rules, in the order of the original: destinations outside allow_sites (if set) are
    denied; then deny_sites; then deny_ports; then allow_sites allows.

    Raises ValueError for an entry that has an `entry_fault`.
    """
    rules: list[Rule] = []
    allowed = (SiteList(map(parse_entry, allow_sites)),)
    denied = (SiteList(map(parse_entry, deny_sites)),)
    if allow_sites:
        rules.append(Rule(name="allow_sites", allow=False, to=allowed, complement=True))
    if deny_sites:
        rules.append(Rule(name="deny_sites", allow=False, to=denied, entry=_entry_finder(deny_sites)))
    if deny_ports:
        ports = tuple((port, port) for port in deny_ports)
        rules.append(Rule(name="deny_ports", allow=False, ports=ports, entry=lambda _, __, port: str(port)))
    if allow_sites:
        rules.append(Rule(name="allow_sites", allow=True, to=allowed, entry=_entry_finder(allow_sites)))
    return rules


def _entry_finder(entries: Iterable[str]) -> EntryFinder:
    """Finds the entry that has an address or the name, as the operator wrote it; else "", which has all requests for an
    address.
    """
    names: dict[str, str] = {}
    networks: dict[IPNetwork, str] = {}
    for text in entries:
        entry = parse_entry(text)
        if isinstance(entry, Prefix):
            networks[parse_network(str(entry))] = str(entry)
        elif entry:
            names.setdefault(entry, text)
    addresses = NetworkMap(networks)

    def find(name: str | None, judged: Sequence[IPAddress], _port: int) -> str:
        found = next(filter(None, map(addresses.match, judged)), None)
        if found is None and name is not None:
            found = next(filter(None, map(names.get, entries_of(name))), None)
        return f'"{found or ""}"'

    return find


class AccessRules:
    """The rules on destinations, in order, and behind them the built-in protection. Asking is cheap.

    Each rule is a bit, the first one the lowest. For each property of a request there is a mask of the rules that match
    it. The lowest bit that all masks have in common is the rule that decides.

    A request is `client`, `name`, `address`, `port`, `sent` and `command`: the canonical name before it is resolved, an
    address behind it together with the name, or an address that was asked for with None for the name. `sent` is the
    name as the client sent it, if a search domain has completed it: a rule matches if it has either name.
    """

    _MOST_REMEMBERED = 16384

    def __init__(
        self, rules: Sequence[Rule], is_local: Callable[[IPAddress], bool], nat64: Sequence[IPv6Network] = ()
    ) -> None:
        """`is_local` tells the addresses of this host; `nat64` are as `judged_addresses` takes them.

        A million entries take some seconds.
        """
        self._rules = tuple(rules)
        self._is_local = is_local
        self._nat64 = tuple(nat64)
        self._rulings = {1 << at: Ruling(rule.allow, rule.name, rule.pool) for at, rule in enumerate(rules)}
        self._entries = {1 << at: rule.entry for at, rule in enumerate(rules) if rule.entry is not None}

        self._deny = mask_of(not rule.allow for rule in rules)
        self._complement = mask_of(rule.complement for rule in rules)
        self._anywhere = mask_of(rule.to is None for rule in rules)
        self._sites = SiteIndex.of_rules([rule.to for rule in rules])
        self._last_name = ""
        self._last_mask = 0

        self._anyone = mask_of(rule.clients is None for rule in rules)
        self._clients = SiteIndex.of_networks([rule.clients for rule in rules])
        self._any_user = mask_of(rule.users is None for rule in rules)
        self._users: dict[str, int] = {}
        for at, rule in enumerate(rules):
            for user in rule.users or ():
                self._users[user] = self._users.get(user, self._any_user) | 1 << at
        self._asks_who = any(rule.clients is not None or rule.users is not None for rule in rules)
        self._remembered: dict[tuple[str, str | None], int] = {}

        self._ports = PortIndex([rule.ports for rule in rules])
        self._commands = {
            command: mask_of(rule.commands is None or command in rule.commands for rule in rules)
            for command in COMMANDS
        }

    def judge(
        self,
        client: Client,
        name: str | None,
        address: IPAddress | None,
        port: int,
        sent: str | None = None,
        *,
        command: str = CONNECT,
    ) -> Ruling:
        """The decision on a request. For a name alone it is half of one: judge its addresses too."""
        return self._ruling(self._find(client, name, address, port, sent, command=command), name, address, port, sent)

    def trace(
        self,
        client: Client,
        name: str | None,
        address: IPAddress | None,
        port: int,
        sent: str | None = None,
        *,
        command: str = CONNECT,
    ) -> list[RuleAnswer]:
        """The answer of each rule up to the one that decides: the last answer, and the only one that matched.

        Slow: for `explain`.
        """
        bit, kind = found = self._find(client, name, address, port, sent, command=command)
        ruling = self._ruling(found, name, address, port, sent)
        judged = () if address is None else judged_addresses(address, self._nat64)
        answers: list[RuleAnswer] = []
        for at, rule in enumerate(self._rules):
            entry = self._entry(at, name, judged) or (sent and self._entry(at, sent, ()))
            asked = " or ".join(str(each) for each in (sent, name, address) if each is not None)
            conditions = list(_conditions(rule, client, asked, entry, port, command=command))
            if bit == 1 << at:
                why = ", ".join(text for _, text in conditions) or "it has no conditions"
                return [*answers, RuleAnswer(ruling.rule, True, why, rule.line)]
            protected = f"{address} is protected ({self._kind(judged)}), which only an entry with the address lifts"
            why = next((text for met, text in conditions if not met), protected)
            answers.append(RuleAnswer(rule.name, False, why, rule.line))
        if kind is not None:
            return [*answers, RuleAnswer(ruling.rule, True, f"{address} is protected ({kind})")]
        if address is not None:
            answers.append(RuleAnswer("built-in", False, f"{address} is not protected"))
        return [*answers, RuleAnswer(ruling.rule, True, "no rule has decided")]

    def _find(
        self, client: Client, name: str | None, address: IPAddress | None, port: int, sent: str | None, *, command: str
    ) -> tuple[int, str | None]:
        """The bit of the rule that decides. If none does: 0, and the kind of protected address, if it is one."""
        mask = self._ports.match(port) & self._commands[command]
        if self._asks_who:
            mask &= self._who(client)
        if name is None:
            to = self._sites.nameless
        else:
            if name != self._last_name:  # a request asks for a name, and then for each of its addresses
                self._last_name, self._last_mask = name, self._sites.of_name(name)
            to = self._last_mask
            if sent is not None:
                to |= self._sites.of_name(sent)
        if address is None:
            mask &= (to | self._anywhere) ^ self._complement
            return mask & -mask, None
        judged = judged_addresses(address, self._nat64)
        direct = self._sites.of_address(address)
        to = (to | direct | self._anywhere) ^ self._complement
        # An address is allowed only as itself: an address that it embeds can forbid it, but not allow it.
        for inner in judged[1:]:
            to |= self._sites.of_address(inner) & self._deny & ~self._complement
        mask &= to
        bit = mask & -mask
        if bit & (self._deny | direct):
            return bit, None
        kind = self._kind(judged)
        if kind is not None:
            mask &= self._deny | direct
            bit = mask & -mask
        return bit, None if bit else kind

    def _who(self, client: Client) -> int:
        """The rules that match this client and user."""
        key = client.host, client.user
        mask = self._remembered.get(key)
        if mask is None:
            if len(self._remembered) >= self._MOST_REMEMBERED:
                self._remembered.clear()
            users = self._any_user if client.user is None else self._users.get(client.user, self._any_user)
            mask = self._remembered[key] = (self._clients.of_address(client.address) | self._anyone) & users
        return mask

    def _kind(self, judged: Iterable[IPAddress]) -> str | None:
        """The kind of protected address that one of these is, or None."""
        for address in judged:
            kind = PROTECTED_NETWORKS.match(address)
            if kind is not None:
                return kind
            if self._is_local(address):
                return "address of this host"
        return None

    def _ruling(
        self, found: tuple[int, str | None], name: str | None, address: IPAddress | None, port: int, sent: str | None
    ) -> Ruling:
        """The ruling on what `_find` has found."""
        bit, kind = found
        if not bit:
            return _DEFAULT if kind is None else Ruling(False, f"built-in: {kind}")
        ruling = self._rulings[bit]
        entry = self._entries.get(bit)
        if entry is None:
            return ruling
        if sent is not None and self._sites.of_name(sent) & bit:
            name = sent
        judged = () if address is None else judged_addresses(address, self._nat64)
        text = entry(name, judged[:1] if ruling.allowed else judged, port)
        return Ruling(ruling.allowed, f"{ruling.rule} {text}", ruling.pool)

    def _entry(self, at: int, name: str | None, judged: Sequence[IPAddress]) -> str | None:
        """The entry of this rule's `to` that has the address or the name, and the file that it is in."""
        rule = self._rules[at]
        lists = rule.to or ()
        for address in judged[:1] if rule.allow or rule.complement else judged:
            for sites in lists:
                if (prefix := sites.find(address)) is not None:
                    return _show_entry(str(prefix), sites)
        if name is None:
            return next((_show_entry("", sites) for sites in lists if sites.nameless), None)
        entry = self._sites.entry_of(name, 1 << at)
        return None if entry is None else _show_entry(entry, next(sites for sites in lists if sites.has(entry)))


def _conditions(
    rule: Rule, client: Client, asked: str, entry: str | None, port: int, *, command: str
) -> Iterator[tuple[bool, str]]:
    """Whether each condition of a rule is met, and how to say that."""
    if rule.commands is not None:
        met = command in rule.commands
        yield met, f"command is {command}" if met else f"command {command} not in {_show_commands(rule.commands)}"
    if rule.clients is not None:
        met = any(client.address in network for network in rule.clients)
        yield met, f"from {'lists' if met else 'does not list'} {client.address}"
    if rule.users is not None:
        yield client.user in rule.users, f"user is {client.user or 'nobody'}"
    if rule.to is not None:
        # A list of [outgoing] has its own name.
        to = rule.name if rule.complement or rule.entry is not None else "to"
        yield (entry is None) is rule.complement, f"{to} lists {entry}" if entry else f"{to} does not list {asked}"
    if rule.ports is not None:
        met = has_port(rule.ports, port)
        yield met, f"port is {port}" if met else f"port {port} not in {_show_ports(rule.ports)}"


def _show_commands(commands: Collection[str]) -> str:
    return ", ".join(command for command in COMMANDS if command in commands)


def _show_ports(ports: Sequence[tuple[int, int]], most: int = 6) -> str:
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ports[:most]]
    return ", ".join(shown) + (f" and {len(ports) - most} more" if len(ports) > most else "")


def _show_entry(entry: str, sites: SiteList) -> str:
    return f'"{entry}" ({sites.label})' if sites.label else f'"{entry}"'

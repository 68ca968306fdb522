"""Where clients may go: ordered rules, the first match decides. Pure.

A destination is judged twice: as the client asked for it (`decide_name`), and then each address that its name
resolved to, together with the name (`decide_address`). Both ask the same rules in the same order, and a rule matches
if the client, the user, the port and the destination do. Behind a name it is enough that `to` has the name or the
address; so a denied network is denied to an allowed name, and what denies all the rest does not deny the addresses
of a name that a rule above it allows.

A rule that allows a *name* says nothing about the addresses behind it: only a rule whose `to` has the *address*
lifts the built-in protection, or whoever owns a name below an allowed domain could point it at this host. For
protected addresses all other rules that allow do not match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv6Network

from attrs import frozen

from usocksd.names.match import PROTECTED_NETWORKS, NameSet, NetworkMap, judged_addresses, parse_network
from usocksd.names.site_index import PortIndex, SiteIndex, has_port, mask_of
from usocksd.names.sites import Prefix, SiteList, parse_entry
from usocksd.net.address import IPAddress, IPNetwork


@frozen
class Decision:
    """Whether a destination is allowed, the rule that decided as log records show it, and the pool to leave from."""

    allowed: bool
    rule: str
    egress: str = "default"


_DEFAULT = Decision(True, "default")


@frozen
class Step:
    """What one rule said to a request: whether it decided, and why, in a short phrase."""

    rule: str
    matched: bool
    why: str
    line: int | None = None
    """of the rule in its file, where one line is it"""


@frozen(kw_only=True)
class Rule:
    """One rule. What is None matches everything; a user is matched by who has authenticated only."""

    name: str
    allow: bool
    clients: tuple[IPNetwork, ...] | None = None
    users: frozenset[str] | None = None
    to: tuple[SiteList, ...] | None = None
    ports: tuple[tuple[int, int], ...] | None = None
    """first and last of each range"""
    egress: str = "default"
    complement: bool = False
    """whether it matches what `to` has not"""
    line: int | None = None
    """in the configuration"""
    entry: Callable[[str | None, Sequence[IPAddress], int], str] | None = None
    """Of a list that stands for many rules, one an entry: the entry that has a name, an address or the port"""


def rules_of_lists(allow_sites: Sequence[str], deny_sites: Sequence[str], deny_ports: Sequence[int]) -> list[Rule]:
    """The lists of [outgoing] in the original's order: with allow_sites given, everything that it has not is denied;
    then deny_sites; then deny_ports; then allow_sites allows.

    Raises ValueError for an entry that has an `entry_fault`.
    """
    rules: list[Rule] = []
    allowed = (SiteList(map(parse_entry, allow_sites)),)
    denied = (SiteList(map(parse_entry, deny_sites)),)
    if allow_sites:
        rules.append(Rule(name="allow_sites", allow=False, to=allowed, complement=True))
    if deny_sites:
        rules.append(Rule(name="deny_sites", allow=False, to=denied, entry=_Written(deny_sites).entry))
    if deny_ports:
        ports = tuple((port, port) for port in deny_ports)
        rules.append(Rule(name="deny_ports", allow=False, ports=ports, entry=lambda _, __, port: str(port)))
    if allow_sites:
        rules.append(Rule(name="allow_sites", allow=True, to=allowed, entry=_Written(allow_sites).entry))
    return rules


class AccessRules:
    """The rules on destinations, in order. Cheap to ask, once a connection and once a resolved address.

    Each rule is a bit, the first one the lowest. For each thing that is asked about there is a mask of the rules that
    match it, and the lowest bit that all masks have in common is the rule that decides.
    """

    _MOST_REMEMBERED = 16384

    def __init__(
        self, rules: Sequence[Rule], is_local: Callable[[IPAddress], bool], nat64: Sequence[IPv6Network] = ()
    ) -> None:
        """`is_local` tells the addresses of this host; `nat64` are as `judged_addresses` takes them."""
        self._rules = tuple(rules)
        self._is_local = is_local
        self._nat64 = tuple(nat64)
        self._protected = PROTECTED_NETWORKS
        self._decisions = {1 << at: Decision(rule.allow, rule.name, rule.egress) for at, rule in enumerate(rules)}
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
        self._remembered: dict[tuple[IPAddress, str | None], int] = {}

        self._ports = PortIndex([rule.ports for rule in rules])

    @classmethod
    def compile(
        cls,
        rules: Sequence[Rule] = (),
        *,
        allow_sites: Sequence[str] = (),
        deny_sites: Sequence[str] = (),
        deny_ports: Sequence[int] = (),
        is_local: Callable[[IPAddress], bool],
        nat64: Sequence[IPv6Network] = (),
    ) -> AccessRules:
        """These rules in order, then the lists of [outgoing], and at the end the built-in protection.

        `is_local` tells the addresses of this host; `nat64` are as `judged_addresses` takes them. Raises ValueError for
        an entry that has an `entry_fault`.
        """
        return cls((*rules, *rules_of_lists(allow_sites, deny_sites, deny_ports)), is_local, nat64)

    def decide_name(
        self, client: IPAddress, user: str | None, host: IPAddress | str, port: int, *, sent: str | None = None
    ) -> Decision:
        """The decision on what the client asked for, `host` being the result of `canonical_host`.

        For an address this is the whole decision; behind a name each resolved address is yet to be judged. `client` is
        its address, IPv4-mapped ones as IPv4; `user` is who it has proved to be. `sent` is what it called `host`, if
        that is a name that a search domain made of it: a rule that has either has the host.
        """
        bit, kind = self._find(client, user, host, None, port, sent=sent)
        return self._decision(bit, kind, host, None, port, sent=sent)

    def decide_address(
        self, client: IPAddress, user: str | None, name: str, ip: IPAddress, port: int, *, sent: str | None = None
    ) -> Decision:
        """The decision on an address that an allowed name resolved to, judged together with the name."""
        bit, kind = self._find(client, user, name, ip, port, sent=sent)
        return self._decision(bit, kind, name, ip, port, sent=sent)

    def trace(
        self,
        client: IPAddress,
        user: str | None,
        host: IPAddress | str,
        port: int,
        *,
        address: IPAddress | None = None,
        sent: str | None = None,
    ) -> list[Step]:
        """What each rule said, up to the one that decided: the last step, and the only one with `matched`.

        The arguments are those of decide_name, or with `address` those of decide_address. In no hurry.
        """
        bit, kind = self._find(client, user, host, address, port, sent=sent)
        decision = self._decision(bit, kind, host, address, port, sent=sent)
        name, ip = (host, address) if isinstance(host, str) else (None, host)
        judged = () if ip is None else judged_addresses(ip, self._nat64)
        steps = []
        for at, rule in enumerate(self._rules):
            shown = "to" if rule.entry is None and not rule.complement else rule.name
            entry = self._entry(at, name, judged)
            if entry is None and sent is not None:
                entry = self._entry(at, sent, ())
            if bit == 1 << at:
                reasons = [
                    *([] if rule.clients is None else [f"from has {client}"]),
                    *([] if rule.users is None else [f"user is {user}"]),
                    *([] if rule.to is None else [f"{shown} has {entry}" if entry else f"{shown} has it not"]),
                    *([] if rule.ports is None else [f"port is {port}"]),
                ]
                steps.append(Step(decision.rule, True, ", ".join(reasons) or "it has no conditions", rule.line))
                return steps
            if rule.clients is not None and not any(client in network for network in rule.clients):
                why = f"from has not {client}"
            elif rule.users is not None and user not in rule.users:
                why = f"user is {user or 'nobody'}"
            elif not has_port(rule.ports, port):
                why = f"port {port} not in {_show_ports(rule.ports or ())}"
            elif rule.complement:
                why = f"{shown} has {entry}"
            elif rule.to is not None and entry is None:
                why = f"{shown} has not {' or '.join(str(one) for one in (sent, name, ip) if one is not None)}"
            else:
                protection = self._kind(judged)
                why = f"{ip} is protected ({protection}), which only an entry with the address lifts"
            steps.append(Step(rule.name, False, why, rule.line))
        if kind is not None:
            steps.append(Step(decision.rule, True, f"{ip} is protected ({kind})"))
        else:
            if ip is not None:
                steps.append(Step("built-in", False, f"{ip} is not protected"))
            steps.append(Step(decision.rule, True, "no rule has decided"))
        return steps

    # What a decision is made of.

    def _find(
        self,
        client: IPAddress,
        user: str | None,
        host: IPAddress | str,
        address: IPAddress | None,
        port: int,
        *,
        sent: str | None,
    ) -> tuple[int, str | None]:
        """The bit of the rule that decides; 0 if none does, and then what the address is protected as, if it is."""
        mask = self._ports.match(port)
        if self._asks_who:
            mask &= self._who(client, user)
        if isinstance(host, str):
            if host != self._last_name:  # one request asks for a name and then for each of its addresses
                self._last_name, self._last_mask = host, self._sites.of_name(host)
            to = self._last_mask
            if sent is not None:
                to |= self._sites.of_name(sent)
            if address is None:
                mask &= (to | self._anywhere) ^ self._complement
                return mask & -mask, None
        else:
            to, address = self._sites.nameless, host
        judged = judged_addresses(address, self._nat64)
        direct = self._sites.of_address(address)
        to = (to | direct | self._anywhere) ^ self._complement
        # An address is allowed as itself only: what it embeds can forbid it but not permit it.
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

    def _who(self, client: IPAddress, user: str | None) -> int:
        """The rules that this client and user match."""
        mask = self._remembered.get((client, user))
        if mask is None:
            if len(self._remembered) >= self._MOST_REMEMBERED:
                self._remembered.clear()
            users = self._any_user if user is None else self._users.get(user, self._any_user)
            mask = self._remembered[client, user] = (self._clients.of_address(client) | self._anyone) & users
        return mask

    def _kind(self, judged: Iterable[IPAddress]) -> str | None:
        """What one of these addresses is protected as."""
        for address in judged:
            kind = self._protected.match(address)
            if kind is not None:
                return kind
            if self._is_local(address):
                return "address of this host"
        return None

    def _decision(
        self,
        bit: int,
        kind: str | None,
        host: IPAddress | str,
        address: IPAddress | None,
        port: int,
        *,
        sent: str | None,
    ) -> Decision:
        """What `_find` has found, in words."""
        if not bit:
            return _DEFAULT if kind is None else Decision(False, f"built-in: {kind}")
        decision = self._decisions[bit]
        entry = self._entries.get(bit)
        if entry is None:
            return decision
        name, ip = (host, address) if isinstance(host, str) else (None, host)
        if sent is not None and self._sites.of_name(sent) & bit:
            name = sent
        judged = () if ip is None else judged_addresses(ip, self._nat64)
        text = entry(name, judged[:1] if decision.allowed else judged, port)
        return Decision(decision.allowed, f"{decision.rule} {text}", decision.egress)

    def _entry(self, at: int, name: str | None, judged: Sequence[IPAddress]) -> str | None:
        """The entry of this rule's `to` that has the address or the name, and the file that it is in."""
        rule = self._rules[at]
        for ip in judged[:1] if rule.allow or rule.complement else judged:
            if self._sites.of_address(ip) & 1 << at:
                for sites in rule.to or ():
                    if (prefix := sites.find(ip)) is not None:
                        return _show_entry(str(prefix), sites)
        if name is not None and (entry := self._sites.entry_of(name, 1 << at)) is not None:
            return _show_entry(entry, next(sites for sites in rule.to or () if sites.has(entry)))
        if name is None and self._sites.nameless & 1 << at:
            return _show_entry("", next(sites for sites in rule.to or () if sites.nameless))
        return None


def _show_ports(ports: Sequence[tuple[int, int]], most: int = 6) -> str:
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ports[:most]]
    return ", ".join(shown) + (f" and {len(ports) - most} more" if len(ports) > most else "")


def _show_entry(entry: str, sites: SiteList) -> str:
    return f'"{entry}" ({sites.label})' if sites.label else f'"{entry}"'


class _Written:
    """The entries of a list of [outgoing] as the operator wrote them, to name them so in records."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._names = NameSet()
        networks: dict[IPNetwork, str] = {}
        for text in entries:
            entry = parse_entry(text)
            if isinstance(entry, Prefix):
                networks[parse_network(str(entry))] = str(entry)
            elif entry:
                self._names.add(text)
        self._networks = NetworkMap(networks)

    def entry(self, name: str | None, judged: Iterable[IPAddress], _port: int) -> str:
        """The one that has an address or the name; else "", which has all requests for an address."""
        for address in judged:
            entry = self._networks.match(address)
            if entry is not None:
                return f'"{entry}"'
        return f'"{"" if name is None else self._names.match(name) or ""}"'

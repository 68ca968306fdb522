"""Who may come in and where they may go: ordered rules, the first match decides. Pure.

A destination is judged twice: as the client asked for it (`decide_name`), and then each address that its name
resolved to (`decide_address`). Both walk the same rules. A rule that allows a *name* says nothing about the
addresses behind it: only a rule that allows the *address* lifts the built-in protection, or whoever owns a
name below an allowed domain could point it at this host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv6Address
from typing import NamedTuple

from attrs import field, frozen

from usocksd.match import (
    IPAddress,
    IPNetwork,
    NameSet,
    NetworkMap,
    canonical_host,
    judged_addresses,
    numeric_address,
    parse_network,
)

LOOPBACK = ("127.0.0.0/8", "::1/128")
LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")
# RFC 1918, RFC 6598, RFC 4193
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")

DEFAULT_CLIENTS = LOOPBACK + PRIVATE + LINK_LOCAL

# What is denied unless a rule allows the address. The metadata services answer credentials to whoever asks.
PROTECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loopback", LOOPBACK),
    ("unspecified", ("0.0.0.0/8", "::/128")),  # RFC 1122 section 3.2.1.3; Linux connects these to loopback
    ("link-local", LINK_LOCAL),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    ("broadcast", ("255.255.255.255/32",)),
    (
        "cloud metadata",
        (
            "fd00:ec2::254/128",
            "fd00:ec2::23/128",
            "fd20:ce::254/128",
            "100.100.100.200/32",
            "192.0.0.192/32",
            "168.63.129.16/32",
        ),
    ),
)


@frozen
class Decision:
    """Whether a destination is allowed, and the rule that decided as the admin knows it, for log records."""

    allowed: bool
    rule: str


_DEFAULT = Decision(True, "default")


class Destination(NamedTuple):
    """What a rule is asked about: a name, or an address with all that it is judged as."""

    port: int
    name: str | None = None
    addresses: tuple[IPAddress, ...] = ()
    resolved: bool = False  # the address came from resolving a name that was judged already


class Sites:
    """Destinations of a list: "host", ".domain", an address, a network, "" for requests without a name."""

    __slots__ = ("_nameless", "_names", "_networks")

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ValueError for the first entry that is none of these; `site_fault` checks one by one."""
        self._names = NameSet()
        self._nameless = False
        networks: dict[IPNetwork, str] = {}
        for entry in entries:
            if entry == "":
                self._nameless = True
            elif (network := _site_network(entry)) is not None:
                single = network.prefixlen == network.max_prefixlen
                networks[network] = str(network.network_address if single else network)
            else:
                self._names.add(entry)
        self._networks = NetworkMap(networks)

    def match_name(self, name: str) -> str | None:
        """The entry that has this canonical name."""
        return self._names.match(name)

    def match_address(self, addresses: Iterable[IPAddress]) -> str | None:
        """The entry that has one of these addresses."""
        for address in addresses:
            entry = self._networks.match(address)
            if entry is not None:
                return entry
        return None

    def match(self, to: Destination) -> str | None:
        """The entry that has this destination; "" only matches what the client sent as an address."""
        if to.name is not None:
            return self._names.match(to.name)
        entry = self.match_address(to.addresses)
        if entry is None and self._nameless and not to.resolved:
            return ""
        return entry


def _site_network(entry: str) -> IPNetwork | None:
    """The network that an entry means; None if it is a name. Raises ValueError if it is neither."""
    if "/" in entry:
        return parse_network(entry)
    if entry.startswith("."):
        return None
    host = canonical_host(entry)
    return None if isinstance(host, str) else parse_network(str(host))


def site_fault(entry: str) -> str | None:
    """What is wrong with an entry of a site list, or None."""
    try:
        Sites((entry,))
    except ValueError:
        hint = f' ("{entry[1:]}" for all names below it)' if entry.startswith("*.") else ""
        return f'expected a host, ".domain", an address, a network or "" for requests without a name{hint}'
    return None


class _NotListed:
    """Denies what a list of allowed sites has not. Resolved addresses stand behind a name that was listed."""

    __slots__ = ("_sites",)

    def __init__(self, sites: Sites) -> None:
        self._sites = sites

    def judge(self, to: Destination) -> Decision | None:
        if to.resolved:
            return None
        # An address is in the list as itself only: what it embeds can forbid it but not permit it.
        listed = Destination(to.port, to.name, to.addresses[:1])
        return Decision(False, "allow_sites") if self._sites.match(listed) is None else None


class _DenySites:
    __slots__ = ("_sites",)

    def __init__(self, sites: Sites) -> None:
        self._sites = sites

    def judge(self, to: Destination) -> Decision | None:
        entry = self._sites.match(to)
        return None if entry is None else Decision(False, f'deny_sites "{entry}"')


class _DenyPorts:
    __slots__ = ("_ports",)

    def __init__(self, ports: Iterable[int]) -> None:
        self._ports = frozenset(ports)

    def judge(self, to: Destination) -> Decision | None:
        return Decision(False, f"deny_ports {to.port}") if to.port in self._ports else None


class _AllowSites:
    __slots__ = ("_sites",)

    def __init__(self, sites: Sites) -> None:
        self._sites = sites

    def judge(self, to: Destination) -> Decision | None:
        # "" allows requests for addresses as such, no address in particular, and so lifts no protection.
        name = to.name
        entry = self._sites.match_address(to.addresses[:1]) if name is None else self._sites.match_name(name)
        return None if entry is None else Decision(True, f'allow_sites "{entry}"')


class _Protection:
    __slots__ = ("_is_local", "_kinds")

    def __init__(self, is_local: Callable[[IPAddress], bool]) -> None:
        self._is_local = is_local
        self._kinds = NetworkMap({parse_network(text): kind for kind, texts in PROTECTED for text in texts})

    def judge(self, to: Destination) -> Decision | None:
        for address in to.addresses:
            kind = self._kinds.match(address)
            if kind is not None:
                return Decision(False, f"built-in: {kind}")
            if self._is_local(address):
                return Decision(False, "built-in: address of this host")
        return None


_Rule = _NotListed | _DenySites | _DenyPorts | _AllowSites | _Protection


@frozen
class AccessRules:
    """The rules on destinations, in order. Cheap to ask, once a connection and once a resolved address."""

    _rules: tuple[_Rule, ...] = field(alias="rules")

    @classmethod
    def from_lists(
        cls,
        *,
        allow_sites: Sequence[str] = (),
        deny_sites: Sequence[str] = (),
        deny_ports: Sequence[int] = (),
        is_local: Callable[[IPAddress], bool],
    ) -> AccessRules:
        """The lists of [outgoing] as rules, in the original's order: with allow_sites given, everything that
        it has not is denied; then deny_sites; then deny_ports; and at the end the built-in protection.

        `is_local` tells the addresses of this host. Raises ValueError for an entry that has a `site_fault`.
        """
        rules: list[_Rule] = []
        allowed = Sites(allow_sites)
        if allow_sites:
            rules.append(_NotListed(allowed))
        if deny_sites:
            rules.append(_DenySites(Sites(deny_sites)))
        if deny_ports:
            rules.append(_DenyPorts(deny_ports))
        if allow_sites:
            rules.append(_AllowSites(allowed))
        rules.append(_Protection(is_local))
        return cls(tuple(rules))

    def decide_name(self, host: IPAddress | str, port: int) -> Decision:
        """The decision on what the client asked for, `host` being the result of `canonical_host`.

        For an address this is the whole decision; behind a name each resolved address is yet to be judged.
        """
        if isinstance(host, str):
            return self._decide(Destination(port, host))
        return self._decide(Destination(port, None, judged_addresses(host)))

    def decide_address(self, ip: IPAddress, port: int) -> Decision:
        """The decision on an address that an allowed name resolved to."""
        return self._decide(Destination(port, None, judged_addresses(ip), True))

    def _decide(self, to: Destination) -> Decision:
        for rule in self._rules:
            decision = rule.judge(to)
            if decision is not None:
                return decision
        return _DEFAULT


class ClientRules:
    """Which clients may connect at all: `allow_from`, or loopback, private and link-local networks."""

    _MOST_REMEMBERED = 16384

    def __init__(self, allow_from: Iterable[IPNetwork] = ()) -> None:
        """None given means `DEFAULT_CLIENTS`, where the original admitted everybody; `is_default` tells."""
        networks = tuple(allow_from)
        self.is_default = not networks
        self._networks = NetworkMap(dict.fromkeys(networks or map(parse_network, DEFAULT_CLIENTS), True))
        self._remembered: dict[str | IPAddress, bool] = {}

    def admits(self, peer: str | IPAddress) -> bool:
        """Whether a client with this address may connect; text as accept(2) gives it, also "fe80::1%eth0".

        IPv4-mapped IPv6 addresses, the peers of a dual-stack listener, are judged as IPv4.
        """
        try:
            return self._remembered[peer]
        except KeyError:
            pass
        address = numeric_address(peer) if isinstance(peer, str) else peer
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        if len(self._remembered) >= self._MOST_REMEMBERED:
            self._remembered.clear()
        admitted = self._remembered[peer] = self._networks.match(address) is not None
        return admitted

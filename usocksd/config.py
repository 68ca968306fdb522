"""usocksd.toml as typed values. deploy/usocksd.toml tells the operator what each setting does.

The tables [log], [incoming] and [outgoing] are those of the original usocksd, with the same meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv6Network
from typing import Annotated, Any, ClassVar

import attrs

from usocksd.acl import COMMANDS, PROTOCOLS, AccessRules, Rule, rules_of_lists
from usocksd.clients import DEFAULT_CLIENTS
from usocksd.names.conditions import (
    ConditionsConfig,
    Network,
    Site,
    as_table,
    check_references,
    port_range,
    rule_name,
    table_name,
)
from usocksd.names.match import NAT64_LENGTHS, canonical_host, parse_network
from usocksd.net.address import IPAddress, IPNetwork
from usocksd.settings.common import CommonConfig
from usocksd.settings.loader import Invalid, show
from usocksd.settings.types import (
    ANY_ADDRESS,
    LOCALHOST,
    Count,
    Interface,
    ListenAddress,
    ListenIPs,
    ListenIPsOrNone,
    ListenPort,
    Mark,
    Port,
    ReadableFile,
    Seconds,
    SocketPath,
    host_ip,
    integer,
    none_if_empty,
    one_of,
    one_or_more,
    text,
)


def _domain(value: str) -> str:
    host = canonical_host(value)
    if not isinstance(host, str):
        raise ValueError
    return host


def _egress_address(value: str) -> IPAddress | IPNetwork:
    if "/" not in value:
        return host_ip(value)
    network = parse_network(value)
    if str(network) != value.lower():
        raise Invalid(f'expected "{network}"')
    host_ip(str(network[-1]))
    return network if network.num_addresses > 1 else network[0]


def _dnsbl_domain(value: str) -> str | None:
    return _domain(value) if value else None  # "" means none in the original's configuration


def _nat64(value: str) -> IPv6Network:
    network = IPv6Network(value)
    if network.prefixlen not in NAT64_LENGTHS:
        raise ValueError
    return network


def _user(value: str) -> str:
    if not value or ":" in value or not value.isprintable():  # as in a users file
        raise ValueError
    return value


# The names in records and metrics for "no [[rule]] matched", and for rules without a name.
_BUILT_IN = r"default|other|rule \d+|(?:allow_from|allow_sites|deny_sites|deny_ports|built-in|incoming\.)\b.*"

RuleName = Annotated[str, rule_name("rule", _BUILT_IN)]
User = Annotated[str, text(_user, "the name of a user")]
PoolName = Annotated[str, table_name()]
Nat64Prefix = Annotated[
    IPv6Network, text(_nat64, 'the prefix of a NAT64, of 32, 40, 48, 56, 64 or 96 bits, as in "2001:db8:64::/96"')
]
EgressAddress = Annotated[
    IPAddress | IPNetwork,
    text(_egress_address, 'an IP address or network, as in "192.0.2.1", "2001:db8::1" or "2001:db8:9::/64"'),
]
Domain = Annotated[str, text(_domain, 'a domain, as in "dnsbl.example.org"')]


def _command(value: str) -> list[str]:
    if value not in COMMANDS:
        raise ValueError
    return [value]


def _check_once(value: str, earlier: Sequence[str]) -> None:
    if value in earlier:
        raise Invalid("is there already, expected every command once")


Commands = Annotated[
    tuple[str, ...],
    one_or_more(_command, f"one of {', '.join(map(show, COMMANDS))}, or a list of them", distinct=_check_once),
]
RelayPorts = Annotated[tuple[int, int], port_range(1024)]


def _public_address(value: str) -> list[IPAddress]:
    return [host_ip(value)]


def _check_one_of_family(address: IPAddress, earlier: Sequence[IPAddress]) -> None:
    for other in earlier:
        if address.version == other.version:
            raise Invalid(f"is IPv{address.version} like {other}, expected one address of each family")


PublicAddresses = Annotated[
    tuple[IPAddress, ...],
    one_or_more(
        _public_address,
        'an IP address or a list with one of each family, as in "203.0.113.5"',
        distinct=_check_one_of_family,
        empty=True,
    ),
]


@attrs.frozen(kw_only=True)
class ProxyProtocol:
    """[incoming.proxy_protocol]: the port for proxies that name their client in a PROXY header."""

    port: Port
    """not `incoming.port`"""
    addresses: ListenIPsOrNone | None = attrs.field(default=None, converter=none_if_empty)
    """None: those of `incoming`"""
    trusted: tuple[Network, ...]
    """the proxies whose headers are believed: their connections count as those of the clients that they name"""

    def __attrs_post_init__(self) -> None:
        if not self.trusted:
            raise Invalid("expected the networks of your proxies: nobody else is believed", shown="[]", at="trusted")


@attrs.frozen(kw_only=True)
class Incoming:
    """[incoming]: where clients connect, and which of them may."""

    port: ListenPort = 1080
    metrics_port: ListenPort | None = None
    """None: 1082 if nobody else has it; 0: no metrics endpoint"""
    metrics_address: ListenIPs = LOCALHOST[:1]
    addresses: ListenIPsOrNone | None = attrs.field(default=None, converter=none_if_empty)
    """None: all interfaces"""
    allow_from: tuple[Network, ...] | None = attrs.field(default=None, converter=none_if_empty)
    """None: loopback and private networks only (the original: everybody). An empty list says the same."""
    proxy_protocol: ProxyProtocol | None = None

    def __attrs_post_init__(self) -> None:
        proxied = self.proxy_protocol
        if proxied is not None and proxied.port == self.port:
            expected = "is incoming.port too, expected another: a header is required there, and would be a fault here"
            raise Invalid(expected, shown=show(proxied.port), at="proxy_protocol.port")

    @property
    def listen(self) -> tuple[ListenAddress, ...]:
        """The addresses to listen on; for all interfaces the wildcards of both families, each optional."""
        return tuple(listen for _, listen in _listen("incoming", self.addresses, "incoming.port", self.port))

    @property
    def listen_keys(self) -> tuple[tuple[str, ListenAddress], ...]:
        """All the addresses to listen on, those of `proxy_protocol` too, with the key of each."""
        found = _listen("incoming", self.addresses, "incoming.port", self.port)
        if (proxied := self.proxy_protocol) is None:
            return found
        own = proxied.addresses is not None
        table = "incoming.proxy_protocol"
        return found + _listen(
            table if own else "incoming",
            proxied.addresses if own else self.addresses,
            f"{table}.port",
            proxied.port,
        )


def _listen(
    table: str, addresses: Sequence[IPAddress] | None, port_key: str, port: int
) -> tuple[tuple[str, ListenAddress], ...]:
    if addresses is None:
        return tuple((port_key, ListenAddress(address, port, optional=True)) for address in ANY_ADDRESS)
    return tuple((f"{table}.addresses[{at}]", ListenAddress(address, port)) for at, address in enumerate(addresses))


@attrs.frozen(kw_only=True)
class Outgoing:
    """[outgoing]: which destinations are allowed, and from where they are dialled.

    The entries of the site lists are valid, and as they were written: log records name rules by them.
    """

    allow_sites: tuple[Site, ...] = ()
    deny_sites: tuple[Site, ...] = ()
    deny_ports: tuple[ListenPort, ...] = ()
    nat64_prefixes: tuple[Nat64Prefix, ...] = ()
    """of this network's translators, besides 64:ff9b::/96: addresses in them are judged as the IPv4 address inside"""
    iface: Interface = None
    addresses: tuple[EgressAddress, ...] = ()
    dnsbl_domain: Annotated[str | None, text(_dnsbl_domain, 'a domain, as in "dnsbl.example.org"')] = None
    mark: Mark | None = None


@attrs.frozen(kw_only=True)
class RuleConfig(ConditionsConfig):
    """[[rule]]: who may go where, and from which pool."""

    name: RuleName | None = None
    """None: "rule N", counted from 1"""
    action: Annotated[str, one_of(("allow", "deny"))]
    user: tuple[User, ...] | None = None
    protocol: Annotated[str | None, one_of(tuple(PROTOCOLS))] = None
    """None: both"""
    command: Commands | None = None
    """None: all"""
    egress: str | None = None
    """None: "default" """

    @property
    def commands(self) -> frozenset[str] | None:
        """The commands that it holds for; None: all."""
        if self.protocol is None:
            return None if self.command is None else frozenset(self.command)
        found = PROTOCOLS[self.protocol]
        return found if self.command is None else found.intersection(self.command)

    def faults(self) -> Iterator[Invalid]:
        yield from super().faults()
        if self.egress is not None and self.action == "deny":
            yield Invalid('expected only beside action = "allow"', shown=show(self.egress), at="egress")
        for index, command in enumerate(self.command or ()):
            if self.protocol is not None and command not in PROTOCOLS[self.protocol]:
                at = f"command[{index}]" if len(self.command or ()) > 1 else "command"
                yield Invalid(f'is no command of protocol = "{self.protocol}"', shown=show(command), at=at)


@attrs.frozen(kw_only=True)
class PoolConfig:
    """[egress.NAME]: where connections leave from. Without addresses the kernel chooses one."""

    addresses: tuple[EgressAddress, ...] = ()
    iface: Interface = None
    mark: Mark | None = None
    sticky: Annotated[str, one_of(("client+destination", "client"))] = "client+destination"
    dnsbl_domains: tuple[Domain, ...] = ()
    when_all_listed: Annotated[str, one_of(("use", "refuse"))] = "use"


@attrs.frozen(kw_only=True)
class Auth:
    """[auth]: users. Without `users_file` (htpasswd, bcrypt) there is no authentication.

    `required`: clients that don't offer username and password are refused. Default: true when there are
    users.
    """

    users_file: ReadableFile | None = None
    required: bool = attrs.field(default=attrs.Factory(lambda self: self.users_file is not None, takes_self=True))

    def __attrs_post_init__(self) -> None:
        if self.required and self.users_file is None:
            raise Invalid("expected users_file to name the users who may authenticate", shown="true", at="required")


@attrs.frozen(kw_only=True)
class UDPConfig:
    """[udp]: UDP ASSOCIATE."""

    enabled: bool = True
    ports: RelayPorts | None = None
    """of relay sockets, to which clients send; None: of the kernel's choice"""
    public: PublicAddresses = ()
    """what clients are told as the address of relay sockets, one for each family: for a server behind NAT"""
    idle: Seconds = 300.0
    """without a datagram of the client, after which the outgoing port is given up (RFC 4787, REQ-5)"""
    filtering: Annotated[str, one_of(("asked", "any"))] = "asked"
    """who may send to the client: addresses that it has sent to, or any (full cone) that the rules allow"""
    per_client: Count = 0
    """associations of one client address over all workers; 0 is no limit"""
    queue: Annotated[int, integer(0, 4096)] = 64
    """datagrams of an association that may wait for names"""


@attrs.frozen(kw_only=True)
class BindConfig:
    """[bind]: BIND, by which a client takes a connection from a host that it names."""

    enabled: bool = False
    ports: RelayPorts | None = None
    """where it listens; None: of the kernel's choice"""
    wait: Seconds = 60.0
    """for that connection"""


@attrs.frozen(kw_only=True)
class UsocksdConfig(CommonConfig):
    """The whole of usocksd.toml; every table has defaults, so an empty file is a configuration."""

    metrics_default: ClassVar[int] = 1082
    metrics_table: ClassVar[str] = "incoming."
    mark_key: ClassVar[str] = "outgoing.mark"

    incoming: Incoming = attrs.field(factory=Incoming)
    outgoing: Outgoing = attrs.field(factory=Outgoing)
    rule: tuple[RuleConfig, ...] = ()
    egress: Mapping[PoolName, PoolConfig] = attrs.field(factory=dict)
    auth: Auth = attrs.field(factory=Auth)
    udp: UDPConfig = attrs.field(factory=UDPConfig)
    bind: BindConfig = attrs.field(factory=BindConfig)
    control: SocketPath = "/run/usocksd/control.sock"

    @staticmethod
    def check_table(table: dict[str, Any]) -> Iterator[Invalid]:
        """Rules with the same name or without a pool, and pools that are there twice."""
        pools, outgoing = (as_table(table.get(key)) for key in ("egress", "outgoing"))
        yield from check_references(table, "rule", "egress", "pool", dict.fromkeys(("default", *pools)))
        for key in ("addresses", "iface", "mark", "dnsbl_domain") if "default" in pools else ():
            if outgoing.get(key) not in (None, [], ""):
                expected = "expected here or in [egress.default], which is the same pool"
                yield Invalid(expected, shown="", at=f"outgoing.{key}")

    def pools(self) -> dict[str, PoolConfig]:
        """All pools by name. "default" is there always, and is [outgoing]'s unless [egress.default] is there."""
        outgoing = self.outgoing
        of_outgoing = PoolConfig(
            addresses=outgoing.addresses,
            iface=outgoing.iface,
            mark=outgoing.mark,
            dnsbl_domains=() if outgoing.dnsbl_domain is None else (outgoing.dnsbl_domain,),
        )
        return {"default": of_outgoing, **self.egress}

    def rules(self) -> list[Rule]:
        """[[rule]], as the evaluator takes them."""
        return [
            Rule(
                name=rule.name or f"rule {number}",
                allow=rule.action == "allow",
                clients=rule.from_,
                users=None if rule.user is None else frozenset(rule.user),
                to=rule.destinations(),
                ports=rule.ports,
                commands=rule.commands,
                pool=rule.egress or "default",
                line=self.line_of_rule(number - 1),
            )
            for number, rule in enumerate(self.rule, 1)
        ]

    def line_of_rule(self, at: int) -> int | None:
        """The line where this element of `rule` begins; None without a file."""
        return self.lines.line_of(f"rule[{at}]") if self.lines.source else None

    def access_rules(self, is_local: Callable[[IPAddress], bool]) -> AccessRules:
        """The rules of [[rule]] and of the lists of [outgoing]. `is_local` tells the addresses of this host."""
        outgoing = self.outgoing
        lists = rules_of_lists(outgoing.allow_sites, outgoing.deny_sites, outgoing.deny_ports)
        return AccessRules([*self.rules(), *lists], is_local, outgoing.nat64_prefixes)

    @property
    def listen_keys(self) -> tuple[tuple[str, ListenAddress], ...]:
        return self.incoming.listen_keys

    @property
    def metrics_port(self) -> int | None:
        return self.incoming.metrics_port

    @property
    def metrics_address(self) -> tuple[IPAddress, ...]:
        return self.incoming.metrics_address

    @property
    def mark(self) -> int | None:
        return self.outgoing.mark

    @property
    def shown(self) -> Mapping[str, object]:
        incoming = self.incoming
        proxied = incoming.proxy_protocol
        allow_from = DEFAULT_CLIENTS if incoming.allow_from is None else incoming.allow_from
        return {
            "incoming.allow_from": tuple(map(str, allow_from)),
            "incoming.proxy_protocol.trusted": () if proxied is None else tuple(map(str, proxied.trusted)),
            "outgoing.addresses": tuple(map(str, self.outgoing.addresses)),
            "rule": len(self.rule),
            "egress": tuple(self.egress),
            "auth.required": self.auth.required,
        }

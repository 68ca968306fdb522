"""transocks.toml as typed values. deploy/transocks.toml tells the operator what each setting does."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import attrs

from transocks.route_settings import NAME, NamesConfig, RouteConfig
from transocks.routes import DEFAULT, DIRECT, REJECT, Routes
from transocks.rules.config import Mode, RulesConfig
from transocks.rules.redirection import MARK, eligible
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL, ProxyURLs, parse_proxy_url
from usocksd.names.conditions import as_table, check_references, table_name
from usocksd.names.match import canonical_host
from usocksd.net.address import IPAddress
from usocksd.settings.common import CommonConfig
from usocksd.settings.loader import Invalid, show
from usocksd.settings.types import (
    ANY_ADDRESS,
    LOCALHOST,
    ListenAddress,
    ListenIPs,
    ListenPort,
    Mark,
    Seconds,
    SocketPath,
    check_distinct_address,
    integer,
    one_of,
    one_or_more,
    parse_address,
    parse_listen_address,
    split_port,
)

_LISTEN_EXPECTED = '"host:port" or a list of them, as in "localhost:1081", "[::1]:1081" or ":1081" (all interfaces)'


def _parse_listen(value: str) -> list[ListenAddress]:
    host, port = split_port(value)
    if port is None:
        raise Invalid('expected a port, as in "localhost:1081"')
    pair = ANY_ADDRESS if host in ("", "*") else LOCALHOST if host.lower() == "localhost" else None
    if pair is not None:
        return [ListenAddress(address, port, optional=True) for address in pair]
    try:
        return [ListenAddress(parse_listen_address(host), port)]
    except Invalid:
        raise
    except ValueError:
        return [ListenAddress(address, port) for address in _lookup(host)]


def _lookup(name: str) -> list[IPAddress]:
    """The addresses of a name of this host, by the system's resolver: asked once, as the original did."""
    try:
        canonical_host(name)
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise Invalid(f"expected a name that resolves: {exc.strerror}") from None
    found = [str(info[4][0]) for info in infos]
    # Link-local addresses are left out: nobody can listen on one without its zone, and the name does not mean them.
    return list(dict.fromkeys(parse_address(address) for address in found if "%" not in address))


def _check_distinct(listen: ListenAddress, earlier: Sequence[ListenAddress]) -> None:
    check_distinct_address(listen.address, [other.address for other in earlier if other.port == listen.port])


def _parse_listen_tproxy(value: str) -> list[ListenAddress]:
    return [attrs.evolve(listen, transparent=True) for listen in _parse_listen(value)]


Listen = Annotated[tuple[ListenAddress, ...], one_or_more(_parse_listen, _LISTEN_EXPECTED, distinct=_check_distinct)]
ListenTproxy = Annotated[
    tuple[ListenAddress, ...],
    one_or_more(_parse_listen_tproxy, _LISTEN_EXPECTED, distinct=_check_distinct, empty=True),
]

FAILOVER, ROUND_ROBIN, STICKY = "failover", "round-robin", "sticky"
REFUSE = "refuse"


_WAY = "a way without a proxy"
GroupName = Annotated[str, table_name({DEFAULT: "the group of proxy_url at the top", DIRECT: _WAY, REJECT: _WAY})]
Policy = Annotated[str, one_of((FAILOVER, ROUND_ROBIN, STICKY))]
"""The order in which the proxies of a group are tried: as listed, in turn, or by rendezvous on client and destination.
"""
WithoutProxy = Annotated[str, one_of((REFUSE, DIRECT))]


@attrs.frozen(kw_only=True)
class GroupConfig:
    """[upstream.NAME]: proxies that stand in for each other."""

    proxy_url: ProxyURLs
    policy: Policy = FAILOVER
    when_all_down: WithoutProxy = REFUSE
    when_no_udp: WithoutProxy = REFUSE
    """what becomes of UDP if none of the proxies carries it"""
    proxy_protocol: bool = False
    """whether a PROXY header before everything else names the client"""

    def __attrs_post_init__(self) -> None:
        _check_discovery(self.proxy_url)


def _check_discovery(proxies: ProxyURLs) -> None:
    """Whoever looks up a list of proxies has no others beside it, since their places in it would be unclear."""
    if len(proxies) > 1 and any(url.discovery is not None for url in proxies):
        raise Invalid("expected a URL with +srv or +dns alone: it is a list by itself", shown="", at="proxy_url")


@attrs.frozen(kw_only=True)
class HealthConfig:
    """[health]: how upstreams are watched; all in seconds."""

    interval: Seconds = 10.0
    """between two probes of an upstream that is up; the longest pause between those of one that is down"""
    timeout: Seconds = 5.0
    """for a probe, and so for an upstream to be found down that nobody uses"""
    suspect_after: Seconds = 0.3
    """an upstream that keeps a connection waiting for this long is probed at once"""
    suspect_timeout: Seconds = 0.3
    """for that probe to connect, and again to answer; at least three round trips"""

    def __attrs_post_init__(self) -> None:
        if self.suspect_timeout > self.timeout:
            expected = f"expected at most timeout, which is {self.timeout:g}"
            raise Invalid(expected, shown=f"{self.suspect_timeout:g}", at="suspect_timeout")


@attrs.frozen(kw_only=True)
class UdpConfig:
    """[udp]: how datagrams are carried."""

    idle: Seconds = 300.0
    """without a datagram in either direction (RFC 4787 REQ-5)"""
    flows: Annotated[int, integer(1, 1_000_000)] = 4096
    """the most pairs of a client's port and a destination at a time, in each worker"""
    queue: Annotated[int, integer(1, 65536)] = 64
    """the most datagrams of a client's port that wait for its proxy"""


# A port to connect to, so not 0.
_WHERE_RULES_SEND = {
    Mode.HOST: ("listen", '"localhost:1081"'),
    Mode.GATEWAY: ("listen", '":1081"'),
    Mode.TPROXY: ("listen_tproxy", '"localhost:1084"'),
}


@attrs.frozen(kw_only=True)
class TransocksConfig(CommonConfig):
    """The whole of transocks.toml; only `proxy_url` is required."""

    metrics_default: ClassVar[int] = 1083

    proxy_url: ProxyURLs
    policy: Policy = FAILOVER
    when_all_down: WithoutProxy = REFUSE
    when_no_udp: WithoutProxy = REFUSE
    proxy_protocol: bool = False
    upstream: Mapping[GroupName, GroupConfig] = attrs.field(factory=dict)
    health: HealthConfig = attrs.field(factory=HealthConfig)
    listen: Listen = tuple(ListenAddress(address, 1081, optional=True) for address in LOCALHOST)
    """`localhost` is always both 127.0.0.1 and ::1, since REDIRECT goes to either."""
    listen_tproxy: ListenTproxy = ()
    """where TPROXY rules bring connections; their addresses are as in `listen`, their ports others"""
    listen_udp: ListenTproxy = ()
    """where TPROXY rules bring datagrams; each worker has sockets of its own there"""
    udp: UdpConfig = attrs.field(factory=UdpConfig)
    mark: Mark | None = None
    """SO_MARK of the connections to the upstream, so that the firewall rules can exempt them"""
    fast_open: bool = True
    """TCP Fast Open towards upstreams that support it"""
    names: NamesConfig = attrs.field(factory=NamesConfig)
    route: tuple[RouteConfig, ...] = ()
    metrics_port: ListenPort | None = None
    """None: 1083 if nobody else has it; 0: no metrics endpoint"""
    metrics_address: ListenIPs = LOCALHOST[:1]
    control: SocketPath = "/run/transocks/control.sock"
    rules: RulesConfig | None = None
    """what `transocks rules` applies; the daemon does not use it"""

    @staticmethod
    def check_table(table: dict[str, Any]) -> Iterator[Invalid]:
        """Routes with the same name or without a group."""
        groups = (DEFAULT, *as_table(table.get("upstream")), DIRECT, REJECT)
        return check_references(table, "route", "via", "group", dict.fromkeys(groups))

    def __attrs_post_init__(self) -> None:
        ports = {listen.port for listen in self.listen if listen.port}
        for listen in self.listen_tproxy:
            if listen.port in ports:
                expected = "has a port of listen, expected another: a listener is for REDIRECT or for TPROXY"
                raise Invalid(expected, shown=show(str(listen)), at="listen_tproxy")
        _check_discovery(self.proxy_url)
        if self.rules is not None:
            self._check_rules(self.rules)

    def _check_rules(self, rules: RulesConfig) -> None:
        """Settings elsewhere that [rules] needs."""
        if (Mode.TPROXY in rules.mode or rules.udp_ports) and rules.tproxy_mark == (
            MARK if self.mark is None else self.mark
        ):
            expected = "expected another than that of connections to leave alone, `mark`"
            raise Invalid(expected, shown=f"{rules.tproxy_mark:#x}", at="rules.tproxy_mark")
        if rules.udp_ports and not eligible(Mode.TPROXY, self.listen_udp):
            expected = 'expected listen_udp = "localhost:1084" beside it'
            raise Invalid(expected, shown="", at="rules.udp_ports")
        for mode in rules.mode:
            if not eligible(mode, self.listen_tproxy if mode is Mode.TPROXY else self.listen):
                key, example = _WHERE_RULES_SEND[mode]
                raise Invalid(f"expected {key} = {example} beside it", shown=show(mode.value), at="rules.mode")

    def groups(self) -> dict[str, GroupConfig]:
        """All upstream groups by name; "default" is that of the top-level `proxy_url`."""
        top = GroupConfig(
            proxy_url=self.proxy_url,
            policy=self.policy,
            when_all_down=self.when_all_down,
            when_no_udp=self.when_no_udp,
            proxy_protocol=self.proxy_protocol,
        )
        return {DEFAULT: top, **self.upstream}

    def keyed_groups(self) -> Iterator[tuple[str, GroupConfig]]:
        """The groups with the key path of the proxies of each."""
        for name, group in self.groups().items():
            yield "proxy_url" if name == DEFAULT else f"upstream.{name}.proxy_url", group

    def routes(self) -> Routes:
        """The routes of [[route]]."""
        routes = [route.route(number, self.names) for number, route in enumerate(self.route, 1)]
        return Routes(routes, send_name=self.names.send == NAME)

    @property
    def listen_keys(self) -> tuple[tuple[str, ListenAddress], ...]:
        keys = ("listen", self.listen), ("listen_tproxy", self.listen_tproxy)
        return tuple((key, listen) for key, listens in keys for listen in listens)

    @property
    def shown(self) -> Mapping[str, object]:
        proxies = {key: ", ".join(map(str, group.proxy_url)) for key, group in self.keyed_groups()}
        listens = {"listen_tproxy": self.listen_tproxy, "listen_udp": self.listen_udp}
        return {key: tuple(map(str, listen)) for key, listen in listens.items()} | proxies


__all__ = ["DEFAULT", "DIRECT", "REJECT", "ProxyScheme", "ProxyURL", "TransocksConfig", "parse_proxy_url"]

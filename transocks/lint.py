"""Warnings about a valid transocks.toml: what this host can't do, and what is probably a mistake."""

from __future__ import annotations

import pwd
from collections.abc import Iterator, Sequence

from transocks.config import DEFAULT, DIRECT, FAILOVER, REFUSE, TransocksConfig
from transocks.original_dst import OWN_USERS
from transocks.route_settings import NAME
from transocks.routes import UDP
from transocks.rules.lint import lint_rules
from transocks.upstreams.proxy_url import ProxyURL
from usocksd.errors import Fault
from usocksd.host.addresses import HostAddresses
from usocksd.names.lint import covering_rules, lint_networks, lint_sites, never_decides
from usocksd.names.resolv_conf import lint_servers
from usocksd.settings.loader import show
from usocksd.settings.types import LOCALHOST, ListenAddress
from usocksd.settings.warnings import HostFacts, lint_address, lint_common, readable_by_all


def lint(
    config: TransocksConfig,
    source: str | None = None,
    *,
    host: HostFacts | None = None,
    own_users: Sequence[str] = OWN_USERS,
) -> list[Fault]:
    """The warnings for this host and user: key, value, what is wrong and what would be right.

    `source` is the file of the configuration, whose mode is looked at; rules exempt `own_users`. Takes about a
    millisecond, and changes nothing.
    """
    host = host or HostFacts.here(HostAddresses().current)
    found = [
        *lint_common(config, host),
        *(lint_servers(config.dns.servers) if config.dns.resolver == "dns" else ()),
        *_tproxy(config, host),
        *_groups(config, host, None if source is None or not readable_by_all(source) else source),
        *_without_udp(config),
        *_direct(config, own_users),
        *_routes(config),
        *lint_networks("names.skip_networks", config.names.skip_networks),
        *(lint_rules(config.rules, config.mark, host) if config.rules is not None else ()),
    ]
    return config.lines.locate(found)


def _tproxy(config: TransocksConfig, host: HostFacts) -> Iterator[Fault]:
    """Whether this process could open the sockets."""
    for key, listens in (("listen_tproxy", config.listen_tproxy), ("listen_udp", config.listen_udp)):
        for listen in listens[:1]:
            if not host.may_be_transparent:
                missing = "this user may not open sockets with IP_TRANSPARENT: the daemon does not start without"
                yield Fault(key, str(listen), f"{missing} CAP_NET_ADMIN")
    for listen in config.listen_udp:
        if not listen.optional:
            yield from lint_address("listen_udp", listen.address, host)


def _groups(config: TransocksConfig, host: HostFacts, readable: str | None) -> Iterator[Fault]:
    """Proxies that are this daemon, or listed twice, or whose password everybody may read in the file `readable`."""
    for key, group in config.keyed_groups():
        seen: set[ProxyURL] = set()
        for index, proxy in enumerate(group.proxy_url):
            place = key if len(group.proxy_url) == 1 else f"{key}[{index}]"
            ours = next(
                (listen for listen in config.listen + config.listen_tproxy if _hears(listen, proxy, host)), None
            )
            if ours is not None:
                yield Fault(place, str(proxy), f"is our own listener {ours}: expected the proxy's port")
            if readable is not None and proxy.secret:
                mend = f"chmod o-r {readable}, and give it to the group of the service"
                yield Fault(place, "", f"has a password, and every user may read this file: {mend}")
            if proxy in seen:  # (for another user it is another one)
                yield Fault(place, str(proxy), "is there already: expected every proxy once")
            seen.add(proxy)
        if len(seen) == 1 and group.policy != FAILOVER and not any(proxy.discovery for proxy in seen):
            at = key.replace("proxy_url", "policy")
            yield Fault(at, show(group.policy), "has no meaning for one proxy: remove it, or add proxies")


def _without_udp(config: TransocksConfig) -> Iterator[Fault]:
    """Groups through which no datagram can go."""
    for key, group in config.keyed_groups():
        if (
            config.listen_udp
            and group.when_no_udp == REFUSE
            and not any(url.scheme.is_socks5 for url in group.proxy_url)
        ):
            dropped = 'none of its proxies carries UDP, so datagrams are dropped: expected "direct", or a socks5 proxy'
            yield Fault(key.replace("proxy_url", "when_no_udp"), show(REFUSE), dropped)


def _hears(listen: ListenAddress, proxy: ProxyURL, host: HostFacts) -> bool:
    """Whether connections to this proxy arrive at this listener."""
    # Other names may be this host's too, but a check asks no name server.
    addresses = LOCALHOST if proxy.host == "localhost" else () if isinstance(proxy.host, str) else (proxy.host,)
    if listen.address.is_unspecified:
        here = any(address.version == listen.address.version and host.has(address) for address in addresses)
    else:
        here = listen.address in addresses
    return here and listen.port == proxy.port


def _direct(config: TransocksConfig, own_users: Sequence[str]) -> Iterator[Fault]:
    """Connections past the proxies must not be redirected to us again."""
    if config.mark is not None or any(_exists(user) for user in own_users):
        return
    again = "direct connections are redirected again, unless the rules exempt them: expected a mark, or a user"
    again += f" {own_users[0]} for the service"
    for key, group in config.keyed_groups():
        for at, value in (("when_all_down", group.when_all_down), ("when_no_udp", group.when_no_udp)):
            if value == DIRECT:
                yield Fault(key.replace("proxy_url", at), show(DIRECT), again)
    for number, route in enumerate(config.route):
        if route.via == DIRECT:
            yield Fault(f"route[{number}].via", show(DIRECT), again)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _routes(config: TransocksConfig) -> Iterator[Fault]:
    """Routes that can never match, or not by the name they list; and groups that no route uses."""
    routes = [route.route(number, config.names) for number, route in enumerate(config.route, 1)]
    groups = config.groups()
    covering = covering_rules(routes)
    for at, (route, written, covers) in enumerate(zip(routes, config.route, covering, strict=True)):
        key = f"route[{at}]"
        above = [by for by in covers if routes[by].protocol in {None, route.protocol}]
        if above:
            by, name = above[0], show(written.name) if written.name else ""
            line = config.lines.line_of(f"route[{by}]") if config.lines.source else None
            yield Fault(key, name, never_decides("route", by, config.route[by].name, line))
        yield from lint_networks(f"{key}.from", written.from_)
        yield from lint_sites(f"{key}.to", written.to)
        entries = [entry for sites in route.to or () for entry in sites.entries()]
        if entries and all(isinstance(entry, str) and entry for entry in entries):
            if not config.names.sniff:
                yield Fault(f"{key}.to", "", "has names only, and names.sniff is false: it never decides")
            elif route.protocol == UDP:
                yield Fault(f"{key}.to", "", "has names only, and datagrams have none: it never decides")
        if written.send == NAME and not any(url.scheme.takes_names for url in groups[route.via].proxy_url):
            yield Fault(f"{key}.send", show(NAME), f"its proxies take addresses only: expected socks5h in {route.via}")
    used = {DEFAULT, *(route.via for route in routes)}
    for name in config.upstream:
        if name not in used:
            yield Fault(f"upstream.{name}", "", f'no route leads there: expected a route with via = "{name}"')

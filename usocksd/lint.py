"""What a valid usocksd.toml says that this host can't do, that has no effect, or that nobody can have meant."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from usocksd.auth import Users
from usocksd.clients import DEFAULT_CLIENTS
from usocksd.config import Config, PoolConfig
from usocksd.coverage import covered_entries, covered_networks, covered_rules, idle_sites
from usocksd.egress import covers
from usocksd.errors import ConfigError, Fault
from usocksd.host.addresses import HostAddresses
from usocksd.names.conditions import unclear_networks, unclear_sites
from usocksd.names.match import parse_network
from usocksd.names.resolv_conf import RESOLV_CONF, lint_servers, parse
from usocksd.names.sites import SiteList
from usocksd.settings.loader import show
from usocksd.settings.warnings import Host, first_few, lint_common, lint_mark, readable_by_all


def warnings(config: Config, source: str | None = None) -> list[str]:
    """A line for each of `lint`, with its place, for the log."""
    return [fault.at(config.lines.source) for fault in lint(config, source)]


def lint(config: Config, source: str | None = None) -> list[Fault]:
    """What to warn of, on this host and as this user: key, value, what is wrong with it and what would be right.

    `source`, the file that the configuration is from, has no secrets that its mode could give away. Takes about a
    millisecond, with 100,000 sites a second, and changes nothing.
    """
    host = Host.here(HostAddresses().current)
    outgoing = config.outgoing
    found = [
        *lint_common(config.common(), host),
        *(lint_servers(config.dns.servers, RESOLV_CONF) if config.dns.resolver == "dns" else ()),
        *_open_proxy(config),
        *first_few(unclear_networks("incoming.allow_from", config.incoming.allow_from or ())),
        *first_few(covered_networks("incoming.allow_from", config.incoming.allow_from or ())),
        *_trusted(config),
        *_rules(config),
        *covered_rules(config),
        *_pools(config, host),
        *first_few(unclear_sites("outgoing.allow_sites", outgoing.allow_sites)),
        *first_few(unclear_sites("outgoing.deny_sites", outgoing.deny_sites)),
        *idle_sites(outgoing.allow_sites, outgoing.deny_sites, searching=_searching()),
        *_ports(outgoing.deny_ports),
        *_users(config),
    ]
    return config.lines.locate(found)


# [incoming]


def _open_proxy(config: Config) -> Iterator[Fault]:
    if config.auth.required or config.incoming.allow_from is None:
        return
    reachable = {listen.address.version for listen in config.incoming.listen if not listen.address.is_loopback}
    fours = [network for network in config.incoming.allow_from if isinstance(network, IPv4Network)]
    sixes = [network for network in config.incoming.allow_from if isinstance(network, IPv6Network)]
    for version, merged in ((4, list(collapse_addresses(fours))), (6, list(collapse_addresses(sixes)))):
        if version in reachable and any(network.prefixlen == 0 for network in merged):
            mend = "set auth.required" if config.auth.users_file else "set auth.users_file"
            yield Fault(
                "incoming.allow_from",
                show([str(network) for network in config.incoming.allow_from]),
                "admits the whole Internet without authentication, an open proxy: name your clients' networks,"
                f" or {mend}",
            )
            return


def _trusted(config: Config) -> Iterator[Fault]:
    if config.incoming.proxy_protocol is None:
        return
    key, trusted = "incoming.proxy_protocol.trusted", config.incoming.proxy_protocol.trusted
    for index, network in enumerate(trusted):
        if network.prefixlen == 0:
            problem = "lets everybody claim to be any client: name your proxies' addresses"
            yield Fault(f"{key}[{index}]", f'"{network}"', problem)
    yield from first_few(unclear_networks(key, trusted))
    yield from first_few(covered_networks(key, trusted))


# [[rule]]


def _rules(config: Config) -> Iterator[Fault]:
    known = None
    if config.auth.users_file is not None:
        with contextlib.suppress(ConfigError):  # which is a fault of its own
            known = Users(config.auth.users_file).names
    proxied = config.incoming.proxy_protocol
    admitted = [*(config.incoming.allow_from or map(parse_network, DEFAULT_CLIENTS))]
    admitted += () if proxied is None else proxied.trusted
    for at, rule in enumerate(config.rule):
        key = f"rule[{at}]"
        yield from first_few(unclear_sites(f"{key}.to", rule.to or ()))
        if rule.from_ is not None:
            yield from first_few(unclear_networks(f"{key}.from", rule.from_))
            yield from first_few(covered_networks(f"{key}.from", rule.from_))
            if not any(
                one.version == other.version and one.overlaps(other) for one in rule.from_ for other in admitted
            ):
                shown = show([str(network) for network in rule.from_])
                yield Fault(f"{key}.from", shown, "incoming.allow_from admits no such client: add them there")
        if rule.user is not None and config.auth.users_file is None:
            yield Fault(f"{key}.user", show(list(rule.user)), "matches nobody: expected auth.users_file to name users")
        elif rule.user is not None and rule.action == "deny" and not config.auth.required:
            shown = show(list(rule.user))
            yield Fault(
                f"{key}.user",
                shown,
                "holds for nobody who does not authenticate, and none of them has to: set auth.required, or allow the"
                " other users and deny all else",
            )
        for index, user in enumerate(rule.user or ()):
            if known is not None and user not in known:
                yield Fault(f"{key}.user[{index}]", show(user), f"no user of {config.auth.users_file}: add it there")
        own = {index: entry for index, entry in enumerate(rule.to or ()) if isinstance(entry, str)}
        yield from covered_entries(f"{key}.to", own)
        for index, entry in enumerate(rule.to or ()):
            if isinstance(entry, SiteList) and not len(entry):
                yield Fault(f"{key}.to[{index}]", show(entry.label), "has no entries: expected one a line")


def _searching() -> bool:
    """Whether search domains make other names of those that clients ask for, as far as this host is set up so."""
    text = ""
    with contextlib.suppress(OSError):
        text = RESOLV_CONF.read_text("utf-8", "replace")
    return bool(parse(text, hostname=socket.gethostname()).search)


# [outgoing] and [egress]


def _pools(config: Config, host: Host) -> Iterator[Fault]:
    pools = config.pools()
    yield from _pool("egress.default" if "default" in config.egress else "outgoing", pools["default"], host)
    used = {"default", *(rule.egress for rule in config.rule)}
    for name, pool in config.egress.items():
        key = f"egress.{name}"
        if name not in used:
            yield Fault(key, "", f'no rule uses it: expected a rule with egress = "{name}"')
        yield from lint_mark(f"{key}.mark", pool.mark, host)
        if name != "default":
            yield from _pool(key, pool, host)
        if pool == PoolConfig():
            yield Fault(key, "", 'does what the kernel does anyway: expected "addresses", "iface" or "mark"')
        elif pool.dnsbl_domains and not pool.addresses:
            domains = show(list(pool.dnsbl_domains))
            yield Fault(f"{key}.dnsbl_domains", domains, "never asked: expected addresses in this pool to ask about")


def _pool(table: str, pool: PoolConfig, host: Host) -> Iterator[Fault]:
    for index, address in enumerate(pool.addresses):
        key = f"{table}.addresses[{index}]"
        # With ip_nonlocal_bind the kernel would take it, and no answer would ever come back.
        if isinstance(address, IPv4Network | IPv6Network):
            if not covers(host.addresses, address):
                mend = f"ip route add local {address} dev lo"
                yield Fault(key, str(address), f"not routed to this host, so not used until it is: {mend}")
            elif pool.dnsbl_domains:
                yield Fault(f"{table}.dnsbl_domains", "", f"not asked about the addresses of {address}: there are many")
        elif not host.has(address):
            yield Fault(
                key, str(address), "not an address of this host, so not used until it is: add it to an interface"
            )
        if address in pool.addresses[:index]:
            yield Fault(key, str(address), "is in this list already: remove it")
    if pool.iface is not None and pool.iface not in host.interfaces:
        yield Fault(
            f"{table}.iface",
            show(pool.iface),
            f"this host has no such interface, so nothing can be dialled: expected one of {', '.join(host.interfaces)}",
        )


def _ports(ports: Sequence[int]) -> Iterator[Fault]:
    seen: Counter[int] = Counter()
    for index, port in enumerate(ports):
        if seen[port]:
            yield Fault(f"outgoing.deny_ports[{index}]", str(port), "is in this list already: remove it")
        seen[port] += 1


# [auth]


def _users(config: Config) -> Iterator[Fault]:
    path = config.auth.users_file
    if path is not None and config.auth.required:
        with contextlib.suppress(ConfigError):  # which is a fault of its own
            if not Users(path).names:
                yield Fault(
                    "auth.users_file", show(str(path)), "has no users, so nobody is let in: htpasswd -B adds one"
                )
    if path is not None and readable_by_all(path):
        yield Fault(
            "auth.users_file",
            show(str(path)),
            "every user of this host may read the hashes: chmod o-r it, and give it to the group of the service",
        )

"""What a valid usocksd.toml says that this host can't do, that has no effect, or that nobody can have meant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from usocksd.acl import Rule, rules_of_lists
from usocksd.auth import Users
from usocksd.clients import DEFAULT_CLIENTS
from usocksd.config import Config, PoolConfig
from usocksd.egress import covers
from usocksd.errors import ConfigError, Fault
from usocksd.host.addresses import HostAddresses
from usocksd.log.words import counted
from usocksd.names.conditions import unclear_networks, unclear_sites
from usocksd.names.coverage import covered_entries, covering_rules, never_decides
from usocksd.names.match import parse_network
from usocksd.names.resolv_conf import RESOLV_CONF, lint_servers
from usocksd.names.sites import SiteList
from usocksd.net.address import IPNetwork
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
        *_networks("incoming.allow_from", config.incoming.allow_from),
        *_trusted(config),
        *_rules(config),
        *_covered_rules(config),
        *_pools(config, host),
        *_sites("outgoing.allow_sites", outgoing.allow_sites),
        *_sites("outgoing.deny_sites", outgoing.deny_sites),
        *_repeated("outgoing.deny_ports", outgoing.deny_ports),
        *_users(config),
    ]
    return config.lines.locate(found)


# Lists


def _networks(key: str, networks: Sequence[IPNetwork] | None) -> Iterator[Fault]:
    yield from first_few(unclear_networks(key, networks or ()))
    yield from first_few(covered_entries(key, networks or ()))


def _sites(key: str, entries: Sequence[str | SiteList] | None) -> Iterator[Fault]:
    yield from first_few(unclear_sites(key, entries or ()))
    yield from first_few(covered_entries(key, entries or ()))


def _repeated(key: str, values: Sequence[object]) -> Iterator[Fault]:
    seen: set[object] = set()
    for index, value in enumerate(values):
        if value in seen:
            yield Fault(f"{key}[{index}]", str(value), "is in this list already: remove it")
        seen.add(value)


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
    yield from _networks(key, trusted)


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
        if rule.from_ is not None:
            yield from _networks(f"{key}.from", rule.from_)
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
        yield from _sites(f"{key}.to", rule.to)
        for index, entry in enumerate(rule.to or ()):
            if isinstance(entry, SiteList) and not len(entry):
                yield Fault(f"{key}.to[{index}]", show(entry.label), "has no entries: expected one a line")


def _covered_rules(config: Config) -> Iterator[Fault]:
    """Rules and lists that never decide, since a rule above has all that they have."""
    rules, lists = config.rules(), rules_of_lists((), config.outgoing.deny_sites, config.outgoing.deny_ports)
    # Behind a rule that denies everything there is nothing to look at: that is reported once.
    end = next((at for at, rule in enumerate(rules) if not rule.allow and _takes_all(rule)), None)
    if end is not None:
        rules, lists = rules[: end + 1], []
        yield from _denies_everything(config, end, any(rule.allow for rule in rules))
    keys = [*(f"rule[{at}]" for at in range(len(rules))), *(f"outgoing.{rule.name}" for rule in lists)]
    every = [*rules, *lists]
    for at, above in enumerate(covering_rules(every)):
        rule = every[at]
        by = next((by for by in above if by < len(rules) and _leaves_nothing(rules[by], rule)), None)
        if by is not None:
            name = config.rule[at].name if at < len(rules) else None
            # A denial that comes too late is meant to deny. (And of IPv4 addresses it still denies those inside IPv6.)
            mend = ["move it up"] if rules[by].allow and not rule.allow else []
            said = never_decides("rule", by, config.rule[by].name, rules[by].line, *mend)
            yield Fault(keys[at], show(name) if name else "", said)


def _takes_all(rule: Rule) -> bool:
    return all(each is None for each in (rule.clients, rule.users, rule.to, rule.ports))


def _leaves_nothing(above: Rule, rule: Rule) -> bool:
    """Whether a rule that has all clients, ports and destinations of one below it leaves nothing to that."""
    if above.users is not None and (rule.users is None or not rule.users <= above.users):
        return False
    # An entry with an address lifts the protection of addresses, and a rule without `to` does not.
    lifts = rule.allow and any(len(sites.prefixes(4)) or len(sites.prefixes(6)) for sites in rule.to or ())
    return not (above.allow and above.to is None and lifts)


def _denies_everything(config: Config, at: int, some_allowed: bool) -> Iterator[Fault]:
    value = show(config.rule[at].name) if config.rule[at].name else ""
    if not some_allowed:
        yield Fault(f"rule[{at}]", value, "denies every request: expected rules above that allow some")
        return
    behind = [counted(count, "rule")] if (count := len(config.rule) - 1 - at) else []
    behind += [f"outgoing.{key}" for key in _LISTS if getattr(config.outgoing, key)]
    if behind:
        never = f"denies everything, so {' and '.join(behind)} behind it never decide: move it down"
        yield Fault(f"rule[{at}]", value, never)


_LISTS = ("allow_sites", "deny_sites", "deny_ports")


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
    yield from _repeated(f"{table}.addresses", pool.addresses)
    if pool.iface is not None and pool.iface not in host.interfaces:
        yield Fault(
            f"{table}.iface",
            show(pool.iface),
            f"this host has no such interface, so nothing can be dialled: expected one of {', '.join(host.interfaces)}",
        )


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

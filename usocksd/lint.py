"""Warnings about a valid usocksd.toml: what this host can't do, what has no effect, and what is probably a mistake."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from pathlib import Path

from usocksd.acl import Rule, rules_of_lists
from usocksd.clients import DEFAULT_CLIENTS
from usocksd.config import PoolConfig, UsocksdConfig
from usocksd.egress import covers
from usocksd.errors import Fault
from usocksd.host.addresses import HostAddresses
from usocksd.names.lint import covering_rules, lint_networks, lint_sites, never_decides
from usocksd.names.match import parse_network
from usocksd.names.resolv_conf import RESOLV_CONF, lint_servers
from usocksd.names.sites import SiteList
from usocksd.net.address import IPNetwork
from usocksd.settings.loader import counted, show
from usocksd.settings.warnings import HostFacts, lint_common, lint_mark, readable_by_all


def lint(
    config: UsocksdConfig,
    users: Collection[str] | None,
    host: HostFacts | None = None,
    resolv_conf: Path = RESOLV_CONF,
) -> list[Fault]:
    """The warnings for this host and user: key, value, what is wrong and what would be right.

    `users` are those of the file of users; None: there is none, or it is faulty, which is reported elsewhere.
    Takes about a millisecond, with 100,000 sites a second, and changes nothing.
    """
    host = host or HostFacts.here(HostAddresses().current)
    outgoing = config.outgoing
    found = [
        *lint_common(config, host),
        *(lint_servers(config.dns.servers, resolv_conf) if config.dns.resolver == "dns" else ()),
        *_open_proxy(config),
        *lint_networks("incoming.allow_from", config.incoming.allow_from),
        *_trusted(config),
        *_rules(config, users),
        *_covered_rules(config),
        *_pools(config, host),
        *lint_sites("outgoing.allow_sites", outgoing.allow_sites),
        *lint_sites("outgoing.deny_sites", outgoing.deny_sites),
        *_repeated("outgoing.deny_ports", outgoing.deny_ports),
        *_users(config, users),
    ]
    return config.lines.locate(found)


# [incoming]


def _open_proxy(config: UsocksdConfig) -> Iterator[Fault]:
    allowed = config.incoming.allow_from
    if config.auth.required or allowed is None:
        return
    reachable = {listen.address.version for listen in config.incoming.listen if not listen.address.is_loopback}
    fours = collapse_addresses(network for network in allowed if isinstance(network, IPv4Network))
    sixes = collapse_addresses(network for network in allowed if isinstance(network, IPv6Network))
    merged: list[IPNetwork] = [*fours, *sixes]
    if any(network.prefixlen == 0 and network.version in reachable for network in merged):
        mend = f"name your clients' networks, or set auth.{'required' if config.auth.users_file else 'users_file'}"
        open_to_all = f"admits the whole Internet without authentication, an open proxy: {mend}"
        yield Fault("incoming.allow_from", _shown(allowed), open_to_all)


def _shown(values: Sequence[object]) -> str:
    return show(list(map(str, values)))


def _trusted(config: UsocksdConfig) -> Iterator[Fault]:
    if config.incoming.proxy_protocol is None:
        return
    key, trusted = "incoming.proxy_protocol.trusted", config.incoming.proxy_protocol.trusted
    for index, network in enumerate(trusted):
        if network.prefixlen == 0:
            problem = "lets everybody claim to be any client: name your proxies' addresses"
            yield Fault(f"{key}[{index}]", f'"{network}"', problem)
    yield from lint_networks(key, trusted)


# [[rule]]


def _rules(config: UsocksdConfig, users: Collection[str] | None) -> Iterator[Fault]:
    file = config.auth.users_file
    proxied = config.incoming.proxy_protocol
    admitted = [*(config.incoming.allow_from or map(parse_network, DEFAULT_CLIENTS))]
    admitted += () if proxied is None else proxied.trusted
    for at, rule in enumerate(config.rule):
        key = f"rule[{at}]"
        yield from lint_networks(f"{key}.from", rule.from_)
        if rule.from_ and not any(
            one.version == other.version and one.overlaps(other) for one in rule.from_ for other in admitted
        ):
            yield Fault(f"{key}.from", _shown(rule.from_), "incoming.allow_from admits no such client: add them there")
        if rule.user and file is None:
            yield Fault(f"{key}.user", _shown(rule.user), "matches nobody: expected auth.users_file to name users")
        elif rule.user and rule.action == "deny" and not config.auth.required:
            avoided = (
                "does not match clients that do not authenticate, and none of them has to: set auth.required, or allow"
            )
            yield Fault(f"{key}.user", _shown(rule.user), f"{avoided} the other users and deny all else")
        for index, user in enumerate(rule.user or ()):
            if users is not None and user not in users:
                yield Fault(f"{key}.user[{index}]", show(user), f"no user of {file}: add it there")
        yield from lint_sites(f"{key}.to", rule.to)
        for index, entry in enumerate(rule.to or ()):
            if isinstance(entry, SiteList) and not len(entry):
                yield Fault(f"{key}.to[{index}]", show(entry.label), "has no entries: expected one a line")


def _covered_rules(config: UsocksdConfig) -> Iterator[Fault]:
    """Rules and lists that never decide, since a rule above covers them."""
    rules, lists = config.rules(), rules_of_lists((), config.outgoing.deny_sites, config.outgoing.deny_ports)
    # Rules behind one that denies everything are reported once, together.
    end = next((at for at, rule in enumerate(rules) if not rule.allow and _takes_all(rule)), None)
    if end is not None:
        rules, lists = rules[: end + 1], []
        yield from _denies_everything(config, end, any(rule.allow for rule in rules))
    keys = [*(f"rule[{at}]" for at in range(len(rules))), *(f"outgoing.{rule.name}" for rule in lists)]
    every = [*rules, *lists]
    for at, above in enumerate(covering_rules(every)):
        rule = every[at]
        by = next((by for by in above if _leaves_nothing(every[by], rule)), None)
        if by is not None:
            name = config.rule[at].name if at < len(rules) else None
            # A denial that comes too late is meant to deny, and still denies IPv4 addresses inside IPv6 ones.
            mend = ["move it up"] if rules[by].allow and not rule.allow else []
            expected = never_decides("rule", by, config.rule[by].name, rules[by].line, *mend)
            yield Fault(keys[at], show(name) if name else "", expected)


def _takes_all(rule: Rule) -> bool:
    return all(each is None for each in (rule.clients, rule.users, rule.to, rule.ports, rule.commands))


def _leaves_nothing(above: Rule, rule: Rule) -> bool:
    """Whether a rule that covers one below it leaves it nothing to decide."""
    if above.users is not None and (rule.users is None or not rule.users <= above.users):
        return False
    if above.commands is not None and (rule.commands is None or not rule.commands <= above.commands):
        return False
    # An entry with an address lifts the protection of addresses, and a rule without `to` does not.
    lifts = rule.allow and any(len(sites.prefixes(4)) or len(sites.prefixes(6)) for sites in rule.to or ())
    return not (above.allow and above.to is None and lifts)


def _denies_everything(config: UsocksdConfig, at: int, some_allowed: bool) -> Iterator[Fault]:
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


def _pools(config: UsocksdConfig, host: HostFacts) -> Iterator[Fault]:
    used = {"default", *(rule.egress for rule in config.rule)}
    for name, pool in config.pools().items():
        key = f"egress.{name}"
        if name not in config.egress:  # the default one, of [outgoing]
            yield from _pool("outgoing", pool, host)
            continue
        if name not in used:
            yield Fault(key, "", f'no rule uses it: expected a rule with egress = "{name}"')
        yield from lint_mark(f"{key}.mark", pool.mark, host)
        yield from _pool(key, pool, host)
        if pool == PoolConfig():
            yield Fault(key, "", 'does what the kernel does anyway: expected "addresses", "iface" or "mark"')
        elif pool.dnsbl_domains and not pool.addresses:
            never = "never asked: expected addresses in this pool to ask about"
            yield Fault(f"{key}.dnsbl_domains", _shown(pool.dnsbl_domains), never)


def _pool(table: str, pool: PoolConfig, host: HostFacts) -> Iterator[Fault]:
    for index, address in enumerate(pool.addresses):
        key = f"{table}.addresses[{index}]"
        # With ip_nonlocal_bind the kernel would accept it, but no answer would ever arrive.
        if isinstance(address, IPv4Network | IPv6Network):
            if not covers(host.addresses, address):
                mend = f"ip route add local {address} dev lo"
                yield Fault(key, str(address), f"not routed to this host, so not used until it is: {mend}")
            elif pool.dnsbl_domains:
                yield Fault(f"{table}.dnsbl_domains", "", f"not asked about the addresses of {address}: there are many")
        elif not host.has(address):
            mend = "add it to an interface"
            yield Fault(key, str(address), f"not an address of this host, so not used until it is: {mend}")
    yield from _repeated(f"{table}.addresses", pool.addresses)
    if pool.iface is not None and pool.iface not in host.interfaces:
        others = f"expected one of {', '.join(host.interfaces)}"
        none = f"this host has no such interface, so nothing can be dialled: {others}"
        yield Fault(f"{table}.iface", show(pool.iface), none)


def _repeated(key: str, values: Sequence[object]) -> Iterator[Fault]:
    seen: set[object] = set()
    for index, value in enumerate(values):
        if value in seen:
            yield Fault(f"{key}[{index}]", str(value), "is in this list already: remove it")
        seen.add(value)


# [auth]


def _users(config: UsocksdConfig, users: Collection[str] | None) -> Iterator[Fault]:
    path = config.auth.users_file
    if path is None:
        return
    shown = show(str(path))
    if config.auth.required and users is not None and not users:
        yield Fault("auth.users_file", shown, "has no users, so nobody is let in: htpasswd -B adds one")
    if readable_by_all(path):
        mend = "chmod o-r it, and give it to the group of the service"
        yield Fault("auth.users_file", shown, f"every user of this host may read the hashes: {mend}")

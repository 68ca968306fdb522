"""What a valid usocksd.toml says that this host can't do, that has no effect, or that nobody can have meant."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from usocksd.acl import DEFAULT_CLIENTS, Rule, rules_of_lists
from usocksd.addresses import HostAddresses
from usocksd.auth import Users
from usocksd.config import Config, PoolConfig
from usocksd.errors import ConfigError, Fault
from usocksd.match import IPNetwork, NameSet, NetworkMap, canonical_host, parse_network
from usocksd.runtime.config import show
from usocksd.runtime.lint import Host, first_few, lint_common, lint_mark, readable_by_all
from usocksd.sites import SiteIndex, SiteList, prefix_of


def warnings(config: Config, source: str | None = None) -> list[str]:
    """A line for each of `lint`, for the log."""
    return [str(fault) for fault in lint(config, source)]


def lint(config: Config, source: str | None = None) -> list[Fault]:
    """What to warn of, on this host and as this user: key, value, what is wrong with it and what would be right.

    `source`, the file that the configuration is from, has no secrets that its mode could give away. Takes about a
    millisecond, with 100,000 sites a second, and changes nothing.
    """
    host = Host.here(HostAddresses().current)
    outgoing = config.outgoing
    return [
        *lint_common(config.common(), host),
        *_open_proxy(config),
        *first_few(_covered_networks("incoming.allow_from", config.incoming.allow_from or ())),
        *_trusted(config),
        *_rules(config),
        *_covered_rules(config),
        *_pools(config, host),
        *_sites(outgoing.allow_sites, outgoing.deny_sites),
        *_ports(outgoing.deny_ports),
        *_users(config),
    ]


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
    yield from first_few(_covered_networks(key, trusted))


def _covered_networks(key: str, networks: Sequence[IPNetwork]) -> Iterator[Fault]:
    for index, by in sorted(_covered(networks).items()):
        which = "the same as" if networks[index] == networks[by] else "within"
        yield Fault(f"{key}[{index}]", f'"{networks[index]}"', f'{which} "{networks[by]}" of this list: remove it')


def _covered(networks: Sequence[IPNetwork]) -> dict[int, int]:
    """The index of each network that is within another one, or the same as an earlier one, and the other's."""
    covered: dict[int, int] = {}
    outer = last = -1
    version = 0
    # Networks nest or are disjoint: in this order those within one follow it.
    for index in sorted(
        range(len(networks)),
        key=lambda at: (networks[at].version, int(networks[at].network_address), networks[at].prefixlen, at),
    ):
        network = networks[index]
        end = int(network.broadcast_address)
        if network.version == version and end <= last:
            covered[index] = outer
        else:
            outer, last, version = index, end, network.version
    return covered


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
            yield from first_few(_covered_networks(f"{key}.from", rule.from_))
            if not any(
                one.version == other.version and one.overlaps(other) for one in rule.from_ for other in admitted
            ):
                shown = show([str(network) for network in rule.from_])
                yield Fault(f"{key}.from", shown, "incoming.allow_from admits no such client: add them there")
        if rule.user is not None and config.auth.users_file is None:
            yield Fault(f"{key}.user", show(list(rule.user)), "matches nobody: expected auth.users_file to name users")
        for index, user in enumerate(rule.user or ()):
            if known is not None and user not in known:
                yield Fault(f"{key}.user[{index}]", show(user), f"no user of {config.auth.users_file}: add it there")
        own = {index: entry for index, entry in enumerate(rule.to or ()) if isinstance(entry, str)}
        indices = list(own)
        listed = _List(f"{key}.to", list(own.values()))
        for found, problem in sorted(_covered_sites(listed)):
            yield Fault(f"{key}.to[{indices[found]}]", show(own[indices[found]]), problem)
        for index, entry in enumerate(rule.to or ()):
            if isinstance(entry, SiteList) and not len(entry):
                yield Fault(f"{key}.to[{index}]", show(entry.label), "has no entries: expected one a line")


def _covered_rules(config: Config) -> Iterator[Fault]:
    """Rules that never decide, since one above has all that they have. (Not those that several above share.)"""
    outgoing = config.outgoing
    rules = config.rules()
    keys = [f"rule[{at}]" for at in range(len(rules))]
    for rule in rules_of_lists(outgoing.allow_sites, outgoing.deny_sites, outgoing.deny_ports):
        rules.append(rule)
        keys.append(f"outgoing.{rule.name}")
    above = len(config.rule)
    destinations = SiteIndex([(sites, 1 << at) for at, rule in enumerate(rules[:above]) for sites in rule.to or ()])
    told: set[str] = set()
    for at, rule in enumerate(rules):
        lifts_later = any(map(_lifts, rules[at + 1 :]))
        covering = 0
        for other, earlier in enumerate(rules[: min(at, above)]):
            if _same_who(earlier, rule) and not (earlier.allow and _allows_less(earlier, rule, lifts_later)):
                covering |= 1 << other
        everywhere = covering & sum(1 << other for other, earlier in enumerate(rules[:above]) if earlier.to is None)
        if rule.to is None or rule.complement:
            covering = everywhere
        else:
            for sites in rule.to:
                for entry in sites.entries():
                    covering &= everywhere | destinations.covering(entry)
                    if not covering:
                        break
        if covering and keys[at] not in told:
            told.add(keys[at])
            by = (covering & -covering).bit_length() - 1
            yield Fault(
                keys[at],
                show(rule.name) if at < above else "",
                f"never decides, since rule[{by}] {show(rules[by].name)} above has all of it: remove it, or move it up",
            )


def _same_who(earlier: Rule, rule: Rule) -> bool:
    """Whether one rule has all clients, users and ports of another."""
    if earlier.users is not None and (rule.users is None or not rule.users <= earlier.users):
        return False
    if earlier.ports is not None and not _has_ports(earlier.ports, rule.ports or ((0, 65535),)):
        return False
    if earlier.clients is not None:
        if rule.clients is None:
            return False
        clients = SiteIndex([(SiteList(map(prefix_of, earlier.clients)), 1)])
        return all(clients.covering(prefix_of(network)) for network in rule.clients)
    return True


def _has_ports(ranges: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> bool:
    """Whether these ranges have all ports of those."""
    for port, last in wanted:
        missing = port
        for first, end in sorted(ranges):
            if first <= missing:
                missing = max(missing, end + 1)
        if missing <= last:
            return False
    return True


def _allows_less(earlier: Rule, rule: Rule, lifts_later: bool) -> bool:
    """Whether one that allows leaves protected addresses to the other.

    (Of networks that both have, what the first leaves are IPv6 addresses that embed IPv4 ones: nothing to keep a
    rule for.)
    """
    if rule.allow:
        return earlier.to is None and _lifts(rule)
    return lifts_later


def _lifts(rule: Rule) -> bool:
    """Whether it may lift the protection of addresses."""
    return rule.allow and any(len(sites.prefixes(4)) or len(sites.prefixes(6)) for sites in rule.to or ())


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
        if not host.has(address):
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


class _List:
    """A list of sites, sorted into what its entries mean. Entries are known by their index."""

    def __init__(self, key: str, entries: Sequence[str]) -> None:
        self.key = key
        self.entries = entries
        self.names: dict[int, str] = {}
        """canonical; ".name" for those below it"""
        self.networks: dict[int, IPNetwork] = {}
        self.nameless: list[int] = []
        for index, entry in enumerate(entries):
            meaning = _meaning(entry)
            if meaning == "":
                self.nameless.append(index)
            elif isinstance(meaning, str):
                self.names[index] = meaning
            else:
                self.networks[index] = meaning
        self.has_name = NameSet(self.names.values())
        self.has_below = NameSet(name for name in self.names.values() if name.startswith("."))
        self.has_network = NetworkMap({network: network for network in self.networks.values()})

    def covers(self, meaning: str | IPNetwork) -> str | None:
        """What here has all that this stands for."""
        if not isinstance(meaning, str):
            widest = self.has_network.match(meaning.network_address)
            return str(widest) if widest is not None and widest.prefixlen <= meaning.prefixlen else None
        # Any one label in front makes a domain itself match what it stands for: the names below it.
        return self.has_below.match("x" + meaning) if meaning.startswith(".") else self.has_name.match(meaning)

    def fault(self, index: int, expected: str) -> Fault:
        return Fault(f"{self.key}[{index}]", show(self.entries[index]), expected)


def _meaning(entry: str) -> str | IPNetwork:
    """As acl.Sites reads it: "", a canonical name, with a dot before it if it has one, or a network."""
    if entry == "":
        return ""
    if "/" in entry:
        return parse_network(entry)
    host = canonical_host(entry.removeprefix("."))
    if entry.startswith("."):
        return f".{host}"
    return host if isinstance(host, str) else parse_network(str(host))


def _sites(allow_sites: Sequence[str], deny_sites: Sequence[str]) -> Iterator[Fault]:
    allow, deny = _List("outgoing.allow_sites", allow_sites), _List("outgoing.deny_sites", deny_sites)
    idle = {listed.key: dict(_covered_sites(listed)) for listed in (allow, deny)}
    for listed in (allow, deny):
        yield from first_few(listed.fault(*found) for found in sorted(idle[listed.key].items()))
    yield from first_few(
        allow.fault(index, f'never allowed, since deny_sites has "{by}": remove one of the two')
        for index, by in _never_allowed(allow, deny)
        if index not in idle[allow.key]
    )
    if allow_sites:
        yield from first_few(
            deny.fault(index, "denies nothing, since allow_sites has nothing of it: remove it")
            for index in _never_denied(allow, deny)
            if index not in idle[deny.key]
        )


def _covered_sites(listed: _List) -> Iterator[tuple[int, str]]:
    """The entries that another one of their list makes superfluous, and what to say."""
    seen: dict[str, int] = {}
    for index, name in listed.names.items():
        if name in seen:
            yield index, f"the same as {show(listed.entries[seen[name]])} of this list: remove it"
        elif by := listed.has_below.match(name.removeprefix(".")):
            yield index, f"has no effect beside {show(by)} of this list: remove it"
        seen.setdefault(name, index)
    for index in listed.nameless[1:]:
        yield index, "is in this list already: remove it"
    indices = list(listed.networks)
    for inner, outer in _covered(list(listed.networks.values())).items():
        by = listed.entries[indices[outer]]
        yield indices[inner], f"has no effect beside {show(by)} of this list: remove it"


def _never_allowed(allow: _List, deny: _List) -> Iterator[tuple[int, str]]:
    for index, meaning in (*allow.names.items(), *allow.networks.items()):
        if by := deny.covers(meaning):
            yield index, by
    if deny.nameless:
        # Networks still lift the protection of addresses that names resolve to.
        yield from ((index, "") for index in allow.nameless)


def _never_denied(allow: _List, deny: _List) -> Iterator[int]:
    """Entries that what comes behind allow_sites never meets."""
    above = {domain for name in allow.names.values() for domain in _domains(name)}
    for index, name in deny.names.items():
        inside = name in above if name.startswith(".") else False
        if not inside and allow.covers(name) is None:
            yield index
    if deny.nameless and not allow.nameless and not allow.networks:
        yield deny.nameless[0]
    # Networks are denied to allowed names as well, and IPv4 ones to IPv6 addresses that embed theirs.
    if allow.names or allow.nameless:
        return
    met = {deny.has_network.match(network.network_address) for network in allow.networks.values()}
    embedding = any(network.version == 6 for network in allow.networks.values())
    for index, network in deny.networks.items():
        if network not in met and allow.covers(network) is None and not (network.version == 4 and embedding):
            yield index


def _domains(name: str) -> Iterator[str]:
    """The domains that a name is below, and the one whose names it stands for: each with its dot."""
    dot = name.find(".")
    while dot >= 0:
        yield name[dot:]
        dot = name.find(".", dot + 1)


# [auth]


def _users(config: Config) -> Iterator[Fault]:
    path = config.auth.users_file
    if path is not None and readable_by_all(path):
        yield Fault(
            "auth.users_file",
            show(str(path)),
            "every user of this host may read the hashes: chmod o-r it, and give it to the group of the service",
        )

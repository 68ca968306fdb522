"""What a valid usocksd.toml says that this host can't do, that has no effect, or that nobody can have meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from usocksd.addresses import HostAddresses
from usocksd.config import Config
from usocksd.errors import Fault
from usocksd.match import IPNetwork, NameSet, NetworkMap, canonical_host, parse_network
from usocksd.runtime.config import show
from usocksd.runtime.lint import Host, first_few, lint_common, readable_by_all


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
        *_egress(config, host),
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


# [outgoing]


def _egress(config: Config, host: Host) -> Iterator[Fault]:
    outgoing = config.outgoing
    for index, address in enumerate(outgoing.addresses):
        key = f"outgoing.addresses[{index}]"
        # With ip_nonlocal_bind the kernel would take it, and no answer would ever come back.
        if not host.has(address):
            yield Fault(
                key, str(address), "not an address of this host, so not used until it is: add it to an interface"
            )
        if address in outgoing.addresses[:index]:
            yield Fault(key, str(address), "is in this list already: remove it")
    if outgoing.iface is not None and outgoing.iface not in host.interfaces:
        yield Fault(
            "outgoing.iface",
            show(outgoing.iface),
            f"this host has no such interface, so nothing can be dialled: expected one of {', '.join(host.interfaces)}",
        )
    if outgoing.dnsbl_domain is not None:
        yield Fault(
            "outgoing.dnsbl_domain",
            show(outgoing.dnsbl_domain),
            "not looked at by this version, so addresses that it lists are used: leave them out of outgoing.addresses",
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
        self.key = f"outgoing.{key}"
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
    allow, deny = _List("allow_sites", allow_sites), _List("deny_sites", deny_sites)
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

"""What rules and lists have no effect, since others have all that they have: what `usocksd check` says of them.

Every claim holds whatever is asked for: an operator who removes what is said to have no effect must not change what
is decided. Where that takes more than a look at two rules, or two lists, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from usocksd.acl import Rule, rules_of_lists
from usocksd.config import Config
from usocksd.errors import Fault
from usocksd.log.words import counted
from usocksd.names.match import NameSet, NetworkMap, canonical_host, parse_network
from usocksd.names.site_index import SiteIndex, has_networks, has_ports, mask_of, which_rules
from usocksd.names.sites import SiteList
from usocksd.net.address import IPNetwork
from usocksd.settings.loader import show
from usocksd.settings.warnings import first_few

# Networks


def covered_networks(key: str, networks: Sequence[IPNetwork]) -> Iterator[Fault]:
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


def covered_rules(config: Config) -> Iterator[Fault]:
    """Rules that decide nothing, since one above has all that they have. (Not those that several above share.)"""
    outgoing = config.outgoing
    rules = config.rules()
    keys = [f"rule[{at}]" for at in range(len(rules))]
    for rule in rules_of_lists(outgoing.allow_sites, outgoing.deny_sites, outgoing.deny_ports):
        rules.append(rule)
        keys.append(f"outgoing.{rule.name}")
    above = len(config.rule)
    owners = which_rules([rule.to for rule in rules[:above]])
    # Behind a rule that denies everything there is nothing to look at: that is said once.
    end = next((at for at, rule in enumerate(rules[:above]) if _denies_all(rule)), None)
    if end is not None:
        yield from _behind(config, end, rules, keys)
    destinations = SiteIndex(list(owners.items()))
    everywhere = mask_of(rule.to is None for rule in rules[:above])
    looked_up: dict[tuple[SiteList, int], int] = {}
    done: set[str] = set()
    for at, rule in enumerate(rules if end is None else rules[: end + 1]):
        lifts_later = any(map(_lifts, rules[at + 1 :]))
        left = {
            1 << other: _left(earlier, rule)
            for other, earlier in enumerate(rules[: min(at, above)])
            if _same_who(earlier, rule)
        }
        # Protected addresses are denied all the same, by this rule or none, unless one below allows them.
        covering = sum(bit for bit, what in left.items() if not (what.protected and (rule.allow or lifts_later)))
        if rule.to is None or rule.complement:
            covering &= everywhere
        else:
            for sites in rule.to:
                certain = everywhere | owners.get(sites, 0)
                key = sites, covering & ~certain
                if key not in looked_up:
                    looked_up[key] = destinations.covering_all(sites, covering & ~certain)
                covering &= certain | looked_up[key]
        if keys[at] in done:
            continue
        if covering:
            done.add(keys[at])
            best = min((bit for bit in left if bit & covering), key=lambda bit: (left[bit] != _Left(), bit))
            by = best.bit_length() - 1
            said = left[best].said(f"{_named(by, config.rule[by].name, rules[by].line)} above")
            name = config.rule[at].name if at < above else None
            yield Fault(keys[at], show(name) if name else "", said)
        elif rule.complement:
            # Of allow_sites the first part, which denies what it has not. It decides, whatever becomes of the other.
            done.add(keys[at])


def _denies_all(rule: Rule) -> bool:
    return not rule.allow and all(each is None for each in (rule.clients, rule.users, rule.to, rule.ports))


def _behind(config: Config, at: int, rules: Sequence[Rule], keys: Sequence[str]) -> Iterator[Fault]:
    """What is to be said of a rule that denies everything."""
    name = config.rule[at].name
    value = show(name) if name else ""
    if not any(rule.allow for rule in rules[:at]):
        yield Fault(f"rule[{at}]", value, "denies every request: expected rules above that allow some")
    elif behind := list(dict.fromkeys(key.partition("[")[0] for key in keys[at + 1 :])):
        count = len(config.rule) - 1 - at
        said = [counted(count, "rule")] if count else []
        said += [key for key in behind if key != "rule"]
        never = f"denies everything, so {' and '.join(said)} behind it never decide: move it down"
        yield Fault(f"rule[{at}]", value, never)


def _named(at: int, name: str | None, line: int | None) -> str:
    """A rule, and where it is."""
    return f"rule {at + 1}" + (f" {show(name)}" if name else "") + ("" if line is None else f" (line {line})")


@frozen
class _Left:
    """What a rule leaves to one below, of which it has all clients, users, ports and destinations."""

    protected: bool = False
    """protected addresses, which it does not allow"""
    embedding: bool = False
    """IPv6 addresses that embed the IPv4 ones: a denial has them, and what allows the IPv4 ones has not"""

    def said(self, by: str) -> str:
        """What to say of the rule below."""
        if self == _Left():
            return f"never decides, since {by} has all of it: remove it, or move it up"
        kinds = [
            *(["protected addresses, which are denied anyway"] if self.protected else []),
            *(["IPv6 addresses that lead to its IPv4 ones"] if self.embedding else []),
        ]
        mend = "move it up" if self.embedding else "remove it, or move it up"
        return f"{by} has all of it but {' and '.join(kinds)}: {mend}"


def _left(earlier: Rule, rule: Rule) -> _Left:
    if not earlier.allow:
        return _Left()
    if rule.allow:  # which has protected addresses only by themselves
        return _Left(protected=earlier.to is None and _lifts(rule))
    names = rule.to is None or any(sites.name_count or sites.nameless for sites in rule.to)
    return _Left(
        protected=earlier.to is None or names,
        embedding=earlier.to is not None and any(len(sites.prefixes(4)) for sites in rule.to or ()),
    )


def _same_who(earlier: Rule, rule: Rule) -> bool:
    """Whether one rule has all clients, users and ports of another."""
    if earlier.users is not None and (rule.users is None or not rule.users <= earlier.users):
        return False
    return has_ports(earlier.ports, rule.ports) and has_networks(earlier.clients, rule.clients)


def _lifts(rule: Rule) -> bool:
    """Whether it may lift the protection of addresses."""
    return rule.allow and any(len(sites.prefixes(4)) or len(sites.prefixes(6)) for sites in rule.to or ())


def covered_entries(key: str, entries: Mapping[int, str]) -> Iterator[Fault]:
    """Of the entries of one list, by their index, those that another one makes superfluous."""
    indices = list(entries)
    listed = _List(key, list(entries.values()))
    for at, problem in sorted(_covered_sites(listed)):
        yield Fault(f"{key}[{indices[at]}]", show(listed.entries[at]), problem)


# [outgoing]


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
    """As `parse_entry` reads it: "", a canonical name, with a dot before it if it has one, or a network."""
    if entry == "":
        return ""
    if "/" in entry:
        return parse_network(entry)
    host = canonical_host(entry.removeprefix("."))
    if entry.startswith("."):
        return f".{host}"
    return host if isinstance(host, str) else parse_network(str(host))


def idle_sites(allow_sites: Sequence[str], deny_sites: Sequence[str], *, searching: bool) -> Iterator[Fault]:
    """Entries of the two lists that allow or deny nothing.

    `searching`: search domains make other names of those that clients ask for. As either of the two is judged, what
    allow_sites has nothing of may be another name of what it has.
    """
    allow, deny = _List("outgoing.allow_sites", allow_sites), _List("outgoing.deny_sites", deny_sites)
    idle = {listed.key: dict(_covered_sites(listed)) for listed in (allow, deny)}
    for listed in (allow, deny):
        yield from first_few(listed.fault(*found) for found in sorted(idle[listed.key].items()))
    never = [found for found in _never_allowed(allow, deny) if found[0] not in idle[allow.key]]
    # Without the last one there would be no list, and all would be allowed.
    last = len(never) + len(idle[allow.key]) == len(allow_sites)
    mend = "remove it there" if last else "remove one of the two"
    yield from first_few(allow.fault(at, f'never allowed, since deny_sites has "{by}": {mend}') for at, by in never)
    if allow_sites:
        yield from first_few(
            deny.fault(index, "denies nothing, since allow_sites has nothing of it: remove it")
            for index in _never_denied(allow, deny)
            if index not in idle[deny.key] and not (searching and index in deny.names)
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

"""Warnings of `check` about lists of destinations and networks, and about rules and routes.

Ambiguous entries; entries and rules that another one covers. (Those that only several together cover are not found.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address
from typing import Protocol

from usocksd.errors import Fault
from usocksd.names.conditions import HostBits4, HostBits6, parse_keeping_host_bits
from usocksd.names.match import canonical_host
from usocksd.names.site_index import SiteIndex, has_networks, has_ports, mask_of, which_rules
from usocksd.names.sites import Entry, Prefix, SiteList, parse_entry
from usocksd.net.address import IPNetwork
from usocksd.settings.loader import show
from usocksd.settings.warnings import first_few


class Conditions(Protocol):
    """The conditions of a rule or route; None matches everything."""

    @property
    def clients(self) -> Sequence[IPNetwork] | None: ...
    @property
    def to(self) -> Sequence[SiteList] | None: ...
    @property
    def ports(self) -> Sequence[tuple[int, int]] | None: ...


def lint_networks(key: str, networks: Sequence[IPNetwork] | None) -> Iterator[Fault]:
    """The warnings about a list of networks."""
    yield from first_few(unclear_networks(key, networks or ()))
    yield from first_few(covered_entries(key, networks or ()))


def lint_sites(key: str, entries: Sequence[str | SiteList] | None) -> Iterator[Fault]:
    """The warnings about a list of destinations."""
    yield from first_few(unclear_sites(key, entries or ()))
    yield from first_few(covered_entries(key, entries or ()))


def covering_rules(rules: Sequence[Conditions]) -> Iterator[list[int]]:
    """For each rule, the indices of the rules above that cover its clients, ports and destinations."""
    lists = which_rules([rule.to for rule in rules])
    index = SiteIndex(list(lists.items()))
    anywhere = mask_of(rule.to is None for rule in rules)
    for at, rule in enumerate(rules):
        mask = mask_of(
            has_ports(above.ports, rule.ports) and has_networks(above.clients, rule.clients) for above in rules[:at]
        )
        if rule.to is None:
            mask &= anywhere
        for sites in rule.to or ():
            certain = anywhere | lists[sites]
            mask &= certain | index.covering_all(sites, mask & ~certain)
        yield [above for above in range(at) if mask >> above & 1]


def never_decides(
    kind: str, above: int, name: str | None, line: int | None, mend: str = "remove it, or move it up"
) -> str:
    """The warning about a rule that the rule with index `above` covers, which may have a name and a line."""
    shown, place = f" {show(name)}" if name else "", "" if line is None else f" (line {line})"
    return f"never decides, since {kind} {above + 1}{shown}{place} above matches everything that it matches: {mend}"


def unclear_networks(key: str, networks: Iterable[IPNetwork]) -> Iterator[Fault]:
    """Networks whose text suggests that only a part of them is meant."""
    for index, network in enumerate(networks):
        if isinstance(network, HostBits4 | HostBits6):
            written, address = network.written, network.written.partition("/")[0]
            whole = f'is all of {network}: write "{network}", or "{address}" for the one address'
            yield Fault(f"{key}[{index}]", show(written), whole)


def unclear_sites(key: str, entries: Iterable[object]) -> Iterator[Fault]:
    """Entries of a site list whose text suggests only a part of the network, or another one."""
    for index, entry in enumerate(entries):
        if (
            not isinstance(entry, str)
            or entry.startswith(".")
            or not (entry[-1:].isdigit() or "x" in entry or ":" in entry)
        ):
            continue
        if "/" in entry:
            for fault in unclear_networks(key, [parse_keeping_host_bits(entry)]):
                yield Fault(f"{key}[{index}]", fault.value, fault.expected)
        elif isinstance(host := canonical_host(entry), IPv4Address) and ":" not in entry and str(host) != entry:
            parts = entry.split(".")
            wider = ""
            if len(parts) < 4 and all(part.isdigit() and int(part) < 256 for part in parts):
                wider = f', or "{".".join([*parts, *["0"] * (4 - len(parts))])}/{8 * len(parts)}" for a network'
            yield Fault(f"{key}[{index}]", show(entry), f'is the address {host}: write "{host}"{wider}')


def covered_entries(key: str, entries: Iterable[str | IPNetwork | SiteList]) -> Iterator[Fault]:
    """The entries of a list that another of its entries covers. (Files are not looked into.)"""
    texts = {index: str(entry) for index, entry in enumerate(entries) if not isinstance(entry, SiteList)}
    parsed = {index: parse_entry(text) for index, text in texts.items()}
    first: dict[Entry, int] = {}
    for index, entry in parsed.items():
        first.setdefault(entry, index)
    lengths = sorted({entry.length for entry in first if isinstance(entry, Prefix)}, reverse=True)
    for index, entry in parsed.items():
        by = next((first[wider] for wider in _wider(entry, lengths) if first.get(wider, index) != index), None)
        if by is not None:
            mend = f"has no effect beside {show(texts[by])} of this list: remove it"
            yield Fault(f"{key}[{index}]", show(texts[index]), mend)


def _wider(entry: Entry, lengths: Iterable[int]) -> Iterator[Entry]:
    """This entry, and all that cover it: networks of these lengths, or domains."""
    if isinstance(entry, Prefix):
        bits = 32 if entry.version == 4 else 128
        for length in lengths:
            if length <= entry.length:
                below = bits - length
                yield Prefix(entry.version, entry.number >> below << below, length)
        return
    yield entry
    dot = entry.find(".", 1)
    while dot >= 0:
        yield entry[dot:]
        dot = entry.find(".", dot + 1)

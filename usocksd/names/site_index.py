"""Finds the rules that list a host, for many rules with long lists of destinations. Pure.

A name takes one hash for each label, an address one bisection, however many entries and rules there are. The result is
a bit mask with a bit for each rule, so the first match is the lowest bit: "bit vectors", after T. V. Lakshman and D.
Stiliadis, High-speed policy-based packet forwarding using efficient multi-dimensional range matching, SIGCOMM 1998.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from heapq import merge

from usocksd.names.match import entries_of
from usocksd.names.sites import LOW_64, Entry, Prefix, Prefixes, SiteList, array_types, prefix_of
from usocksd.net.address import IPAddress, IPNetwork

_NAMES_PER_BUCKET = 8


class SiteIndex:
    """Finds the lists that have a name or an address; the result is the union of their masks."""

    __slots__ = ("_names", "_v4", "_v6", "nameless")

    def __init__(self, lists: Sequence[tuple[SiteList, int]]) -> None:
        """Lists, and the mask of each."""
        self._names = _NameIndex(lists)
        self._v4 = NetworkIndex(4, [(sites.prefixes(4), mask) for sites, mask in lists])
        self._v6 = NetworkIndex(6, [(sites.prefixes(6), mask) for sites, mask in lists])
        self.nameless = 0
        """The mask of the lists that have requests for an address."""
        for sites, mask in lists:
            if sites.nameless:
                self.nameless |= mask

    @classmethod
    def of_rules(cls, rules: Sequence[Sequence[SiteList] | None]) -> SiteIndex:
        """An index of the lists of each rule; the first rule is the lowest bit, None has no list."""
        return cls(list(which_rules(rules).items()))

    @classmethod
    def of_networks(cls, rules: Sequence[Sequence[IPNetwork] | None]) -> SiteIndex:
        """An index of the networks of each rule, likewise."""
        return cls.of_rules([None if rule is None else (SiteList(map(prefix_of, rule)),) for rule in rules])

    def of_name(self, name: str) -> int:
        """The mask of this canonical name: lists that have it, or a domain above it."""
        return self._names.match(name.encode("ascii"))

    def of_address(self, ip: IPAddress) -> int:
        """The mask of this address."""
        return (self._v4 if ip.version == 4 else self._v6).match(int(ip))

    def entry_of(self, name: str, mask: int) -> str | None:
        """The entry of these lists that matches the name: the name itself, else the longest domain."""
        return next((entry for entry in entries_of(name) if self._names.get(entry.encode("ascii")) & mask), None)

    def covering_all(self, sites: SiteList, mask: int) -> int:
        """The rules of this mask that cover everything in this list."""
        for entry in sites.entries():
            if not mask:
                break
            mask &= self.covering(entry)
        return mask

    def covering(self, entry: Entry) -> int:
        """The mask of the lists that cover this entry."""
        if isinstance(entry, Prefix):
            return (self._v4 if entry.version == 4 else self._v6).covering(entry)
        if entry == "":
            return self.nameless
        # An entry with a dot in front is looked up as it is: domains only.
        return self._names.match(entry.encode("ascii"))


def has_ports(ranges: Sequence[tuple[int, int]] | None, wanted: Sequence[tuple[int, int]] | None) -> bool:
    """Whether these ranges cover those; None covers all ports."""
    if ranges is None:
        return True
    for port, last in ((0, 65535),) if wanted is None else wanted:
        missing = port
        for first, end in sorted(ranges):
            if first <= missing:
                missing = max(missing, end + 1)
        if missing <= last:
            return False
    return True


def has_networks(networks: Sequence[IPNetwork] | None, wanted: Sequence[IPNetwork] | None) -> bool:
    """Whether these networks cover those; None covers everything."""
    if networks is None or wanted is None:
        return networks is None
    index = SiteIndex.of_networks([networks])
    return all(index.covering(prefix_of(network)) for network in wanted)


def which_rules(rules: Sequence[Sequence[SiteList] | None]) -> dict[SiteList, int]:
    """Each list once, with the rules that have it. (A file with a million entries may be in many rules.)"""
    found: dict[SiteList, int] = {}
    for at, rule in enumerate(rules):
        for sites in rule or ():
            found[sites] = found.get(sites, 0) | 1 << at
    return found


def mask_of(rules: Iterable[bool]) -> int:
    """The bit mask of the rules for which this is true."""
    return sum(1 << at for at, bit in enumerate(rules) if bit)


class PortIndex:
    """Finds the rules that have a port; the result is a bit mask."""

    __slots__ = ("_cuts", "_masks")

    def __init__(self, rules: Sequence[Sequence[tuple[int, int]] | None]) -> None:
        """The ranges of each rule, first and last port; None has all ports. The first rule is the lowest bit."""
        ranges = [range_ for ports in rules for range_ in ports or ()]
        # The ports at which a range begins or has ended, and the mask from there on.
        self._cuts = sorted({0, *(first for first, _ in ranges), *(last + 1 for _, last in ranges)})
        self._masks = [mask_of(has_port(ports, cut) for ports in rules) for cut in self._cuts]

    def match(self, port: int) -> int:
        """The mask of a port."""
        return self._masks[bisect_right(self._cuts, port) - 1]


def has_port(ports: Sequence[tuple[int, int]] | None, port: int) -> bool:
    """Whether one of these ranges has the port; None has all."""
    return ports is None or any(first <= port <= last for first, last in ports)


class _NameIndex:
    """A hash table whose buckets are short texts, "\\nNAME LIST\\nNAME LIST\\n", which bytes.find searches: a name
    costs its own length and 15 bytes.
    """

    __slots__ = ("_below", "_buckets", "_masks", "_modulo")

    def __init__(self, lists: Sequence[tuple[SiteList, int]]) -> None:
        self._masks = [mask for _, mask in lists]
        count = sum(sites.name_count for sites, _ in lists)
        size = 1 << (count // _NAMES_PER_BUCKET).bit_length()
        self._modulo = modulo = size - 1
        self._buckets = buckets = [b"\n"] * size
        self._below = False
        for number, (sites, _) in enumerate(lists):
            tail = b" %d\n" % number
            for name in sites.names():
                buckets[hash(name) & modulo] += name + tail
                if name.startswith(b"."):
                    self._below = True

    def match(self, name: bytes) -> int:
        mask = self.get(name)
        if self._below:
            dot = name.find(b".", 1)
            while dot >= 0:
                mask |= self.get(name[dot:])
                dot = name.find(b".", dot + 1)
        return mask

    def get(self, key: bytes) -> int:
        """The mask of the lists that have exactly this entry."""
        bucket = self._buckets[hash(key) & self._modulo]
        at = bucket.find(b"\n" + key + b" ")
        mask = 0
        while at >= 0:
            start = at + len(key) + 2
            end = bucket.index(b"\n", start)
            mask |= self._masks[int(bucket[start:end])]
            at = bucket.find(b"\n" + key + b" ", end)
        return mask


class NetworkIndex:
    """The address space of one IP version, divided where networks begin or end: each part has one mask."""

    __slots__ = ("_bits", "_high", "_low", "_masks", "_values")

    def __init__(self, version: int, lists: Sequence[tuple[Prefixes, int]]) -> None:
        high, low = array_types(version)
        self._bits = 32 if version == 4 else 128
        self._high = array(high)
        self._low = array(low)
        self._values = array("I")
        self._masks: list[int] = []
        self._cut(merge(*(prefixes.rows(mask) for prefixes, mask in lists)))

    def match(self, number: int) -> int:
        """The mask of an address."""
        at = self._part(number)
        return self._masks[self._values[at]] if at >= 0 else 0

    def covering(self, prefix: Prefix) -> int:
        """The mask of the lists that have all addresses of this network."""
        at = self._part(prefix.number)
        if at < 0:
            return 0
        last = self._part(prefix.number | (1 << self._bits - prefix.length) - 1)
        mask = self._masks[self._values[at]]
        while mask and at < last:
            at += 1
            mask &= self._masks[self._values[at]]
        return mask

    def _part(self, number: int) -> int:
        high, low = number >> 64, number & LOW_64
        start = bisect_left(self._high, high)
        return bisect_right(self._low, low, start, bisect_right(self._high, high, start)) - 1

    def _cut(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        numbers: dict[int, int] = {}

        def begin(first: int, mask: int) -> None:
            value = numbers.setdefault(mask, len(numbers))
            if self._values and self._high[-1] == first >> 64 and self._low[-1] == first & LOW_64:
                self._values[-1] = value
            elif not self._values or self._values[-1] != value:
                self._high.append(first >> 64)
                self._low.append(first & LOW_64)
                self._values.append(value)

        # Two networks nest or are disjoint. The networks around the present position, the innermost last: the end of
        # each, and the mask inside.
        inside: list[tuple[int, int]] = []

        def leave(before: int) -> None:
            while inside and inside[-1][0] < before:
                end, _ = inside.pop()
                if end + 1 < 1 << self._bits:
                    begin(end + 1, inside[-1][1] if inside else 0)

        for high, low, length, mask in rows:
            first = high << 64 | low
            leave(first)
            union = mask | inside[-1][1] if inside else mask
            inside.append((first | (1 << self._bits - length) - 1, union))
            begin(first, union)
        leave(1 << self._bits)
        self._masks = list(numbers)

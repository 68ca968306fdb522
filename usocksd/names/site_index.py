"""Which rules have a host, of many rules with long lists of destinations. Pure.

A name is found with one hash a label, an address with one bisection, however many entries and rules there are. What is
found is a bit mask, a bit for each rule, so that first match is the lowest bit: "bit vectors", after T. V. Lakshman
and D. Stiliadis, High-speed policy-based packet forwarding using efficient multi-dimensional range matching, SIGCOMM
1998.
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
    """Which lists have a name or an address: a bit mask, the union of the masks of those that do."""

    __slots__ = ("_names", "_v4", "_v6", "nameless")

    def __init__(self, lists: Sequence[tuple[SiteList, int]]) -> None:
        """Lists, and the mask of each."""
        self._names = _NameIndex(lists)
        self._v4 = NetworkIndex(4, [(sites.prefixes(4), mask) for sites, mask in lists])
        self._v6 = NetworkIndex(6, [(sites.prefixes(6), mask) for sites, mask in lists])
        self.nameless = 0
        """Of those that have requests for an address."""
        for sites, mask in lists:
            if sites.nameless:
                self.nameless |= mask

    @classmethod
    def of_rules(cls, rules: Sequence[Sequence[SiteList] | None]) -> SiteIndex:
        """The lists of each rule, of which the first is the lowest bit; None has nothing here."""
        return cls(list(which_rules(rules).items()))

    @classmethod
    def of_networks(cls, rules: Sequence[Sequence[IPNetwork] | None]) -> SiteIndex:
        """The networks of each rule, alike."""
        return cls.of_rules([None if rule is None else (SiteList(map(prefix_of, rule)),) for rule in rules])

    def of_name(self, name: str) -> int:
        """Which have this canonical name, themselves or as one below a domain."""
        return self._names.match(name.encode("ascii"))

    def of_address(self, ip: IPAddress) -> int:
        """Which have this address."""
        return (self._v4 if ip.version == 4 else self._v6).match(int(ip))

    def entry_of(self, name: str, mask: int) -> str | None:
        """The entry by which one of these has the name: itself before the longest domain."""
        return next((entry for entry in entries_of(name) if self._names.get(entry.encode("ascii")) & mask), None)

    def covering_all(self, sites: SiteList, mask: int) -> int:
        """Of the rules of this mask, those that have everything in this list."""
        for entry in sites.entries():
            if not mask:
                break
            mask &= self.covering(entry)
        return mask

    def covering(self, entry: Entry) -> int:
        """Which have everything that this entry stands for."""
        if isinstance(entry, Prefix):
            return (self._v4 if entry.version == 4 else self._v6).covering(entry)
        if entry == "":
            return self.nameless
        # What begins with a dot is looked up as such: domains only.
        return self._names.match(entry.encode("ascii"))


def has_ports(ranges: Sequence[tuple[int, int]] | None, wanted: Sequence[tuple[int, int]] | None) -> bool:
    """Whether these ranges have all ports of those; None has all."""
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
    """Whether these networks have all of those; None has all."""
    if networks is None or wanted is None:
        return networks is None
    index = SiteIndex.of_networks([networks])
    return all(index.covering(prefix_of(network)) for network in wanted)


def which_rules(rules: Sequence[Sequence[SiteList] | None]) -> dict[SiteList, int]:
    """Each list of these rules, once, and which of them have it. (A file may be in many, with a million entries.)"""
    found: dict[SiteList, int] = {}
    for at, rule in enumerate(rules):
        for sites in rule or ():
            found[sites] = found.get(sites, 0) | 1 << at
    return found


def mask_of(rules: Iterable[bool]) -> int:
    """Which of these rules it is true for: a bit mask."""
    return sum(1 << at for at, bit in enumerate(rules) if bit)


class PortIndex:
    """Which rules have a port: a bit mask."""

    __slots__ = ("_cuts", "_masks")

    def __init__(self, rules: Sequence[Sequence[tuple[int, int]] | None]) -> None:
        """The ranges of each rule, first and last port; None has all. The first rule is the lowest bit."""
        ranges = [range_ for ports in rules for range_ in ports or ()]
        # Where ranges begin, or others have just ended, and the mask from there on.
        self._cuts = sorted({0, *(first for first, _ in ranges), *(last + 1 for _, last in ranges)})
        self._masks = [mask_of(has_port(ports, cut) for ports in rules) for cut in self._cuts]

    def match(self, port: int) -> int:
        """The mask of a port."""
        return self._masks[bisect_right(self._cuts, port) - 1]


def has_port(ports: Sequence[tuple[int, int]] | None, port: int) -> bool:
    """Whether one of these ranges has it; None has all."""
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
        """Of those that have just this entry."""
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
    """The address space of one IP version, cut where a network begins or ends: each part has one mask."""

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
        """Of those that have all addresses of this network."""
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

        # Two networks nest or are disjoint. Those that the present place is in, the innermost last: where each ends,
        # and the mask inside.
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

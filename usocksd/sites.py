"""The destinations that rules name: what an entry means, long lists of them, and which rules have a host. Pure.

Built for a million entries: they are kept as bytes and arrays, not as objects (100 bytes and more each). A name is
found with one hash a label, an address with one bisection, however many entries and rules there are. What is found is
a bit mask, a bit for each rule, so that first match is the lowest bit: "bit vectors", after T. V. Lakshman and D.
Stiliadis, High-speed policy-based packet forwarding using efficient multi-dimensional range matching, SIGCOMM 1998.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from ipaddress import IPv4Address, IPv6Address
from itertools import repeat
from socket import AF_INET, AF_INET6, inet_pton
from typing import TypeAlias

from attrs import frozen

from usocksd.match import IPAddress, IPNetwork, canonical_host, parse_network

_LOW = (1 << 64) - 1
_LONGEST_NAME = 253
# What `canonical_host` would give back as it is: most of a long list.
_PLAIN_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z][a-z0-9_-]{0,62}", re.ASCII)
_NAMES_PER_BUCKET = 8


@frozen
class Prefix:
    """A network as its version, its first address and its length: a third of the time of an `ipaddress` object."""

    version: int
    number: int
    length: int

    def __str__(self) -> str:
        """As log records name it: an address alone has no length."""
        address = IPv4Address(self.number) if self.version == 4 else IPv6Address(self.number)
        return str(address) if self.length == address.max_prefixlen else f"{address}/{self.length}"


Entry: TypeAlias = str | Prefix
"""What an entry means: a canonical name, ".name" for all names below it, a network, or "" for requests for an
address."""


def parse_entry(text: str) -> Entry:
    """An entry of a list of destinations: "host", ".domain", an address, a network or "". Raises ValueError."""
    name = text.removeprefix(".")
    if len(name) <= _LONGEST_NAME and _PLAIN_NAME.fullmatch(name):
        return text
    if text == "":
        return text
    address, slash, length = text.partition("/")
    try:
        packed = inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except (OSError, ValueError):  # another notation, a name, or nothing good
        return _parse_slowly(text)
    bits = 8 * len(packed)
    if not slash:
        return _prefix(bits, int.from_bytes(packed), bits)
    if not (length.isascii() and length.isdigit() and len(length) <= 3) or int(length) > bits:
        raise ValueError(f"not a network: {text!r}")
    return _prefix(bits, int.from_bytes(packed), int(length))


def _parse_slowly(text: str) -> Entry:
    if "/" in text:
        return prefix_of(parse_network(text))
    host = canonical_host(text.removeprefix("."))
    if isinstance(host, str):
        return f".{host}" if text.startswith(".") else host
    if text.startswith("."):
        raise ValueError(f"a domain is a name: {text!r}")
    return Prefix(host.version, int(host), host.max_prefixlen)


def _prefix(bits: int, number: int, length: int) -> Prefix:
    if bits == 128 and length >= 96 and number >> 32 == 0xFFFF:  # IPv4-mapped
        bits, number, length = 32, number & 0xFFFFFFFF, length - 96
    below = bits - length
    return Prefix(4 if bits == 32 else 6, number >> below << below, length)


def prefix_of(network: IPNetwork) -> Prefix:
    """The same network."""
    return Prefix(network.version, int(network.network_address), network.prefixlen)


def entry_fault(text: str) -> str | None:
    """What is wrong with an entry of a list of destinations, or None."""
    try:
        parse_entry(text)
    except ValueError:
        hint = f' ("{text[1:]}" for all names below it)' if text.startswith("*.") else ""
        return f'expected a host, ".domain", an address, a network or "" for requests without a name{hint}'
    return None


class _Prefixes:
    """Networks of one version, sorted, the wider first of those that begin together."""

    __slots__ = ("_high", "_length", "_low", "bits", "version")

    def __init__(self, version: int, prefixes: list[int]) -> None:
        """Of each the first address and, in the last 8 bits, the length. Sorts the list."""
        self.version = version
        self.bits = 32 if version == 4 else 128
        prefixes.sort()
        high, low = _types(version)
        self._high = array(high, (prefix >> 72 for prefix in prefixes))
        self._low = array(low, (prefix >> 8 & _LOW for prefix in prefixes))
        self._length = array("B", (prefix & 0xFF for prefix in prefixes))

    def __len__(self) -> int:
        return len(self._length)

    def __iter__(self) -> Iterator[Prefix]:
        for high, low, length, _ in self.rows(0):
            yield Prefix(self.version, high << 64 | low, length)

    def rows(self, mask: int) -> Iterator[tuple[int, int, int, int]]:
        """The upper and the lower 64 bits of the first address, the length, and the mask."""
        return zip(self._high, self._low, self._length, repeat(mask, len(self)), strict=True)

    def find(self, number: int) -> Prefix | None:
        """The narrowest that has this address."""
        for length in range(self.bits, -1, -1):
            below = self.bits - length
            first = number >> below << below
            high = first >> 64
            start = bisect_left(self._high, high)
            end = bisect_right(self._high, high, start)
            start = bisect_left(self._low, first & _LOW, start, end)
            end = bisect_right(self._low, first & _LOW, start, end)
            at = bisect_left(self._length, length, start, end)
            if at < end and self._length[at] == length:
                return Prefix(self.version, first, length)
        return None


def _types(version: int) -> tuple[str, str]:
    """Of arrays for the upper and the lower 64 bits of an address: IPv4 has its 32 in the lower."""
    return ("B", "I") if version == 4 else ("Q", "Q")


class SiteList:
    """Many destinations, compact. `label` tells where they are from: "" for those of the configuration itself."""

    __slots__ = ("_names", "_v4", "_v6", "label", "nameless")

    def __init__(self, entries: Iterable[Entry], label: str = "") -> None:
        self.label = label
        self.nameless = False
        """Whether requests for an address are in it."""
        names = bytearray()
        fours: list[int] = []
        sixes: list[int] = []
        for entry in entries:
            if isinstance(entry, Prefix):
                (fours if entry.version == 4 else sixes).append(entry.number << 8 | entry.length)
            elif entry:
                names += entry.encode("ascii")
                names += b"\n"
            else:
                self.nameless = True
        self._names = bytes(names)
        self._v4 = _Prefixes(4, fours)
        self._v6 = _Prefixes(6, sixes)

    def __len__(self) -> int:
        return self.name_count + len(self._v4) + len(self._v6) + self.nameless

    @property
    def name_count(self) -> int:
        """How many names and domains."""
        return self._names.count(b"\n")

    def names(self) -> Iterator[bytes]:
        """Names, and domains with their dot."""
        return (match[0] for match in re.finditer(rb"[^\n]+", self._names))

    def prefixes(self, version: int) -> _Prefixes:
        """The networks of one IP version."""
        return self._v4 if version == 4 else self._v6

    def entries(self) -> Iterator[Entry]:
        """All of them; the order is not that of the list."""
        yield from (name.decode("ascii") for name in self.names())
        yield from self._v4
        yield from self._v6
        if self.nameless:
            yield ""

    def find(self, ip: IPAddress) -> Prefix | None:
        """The narrowest network that has this address. In no hurry."""
        return self.prefixes(ip.version).find(int(ip))

    def has(self, entry: str) -> bool:
        """Whether this name or ".domain" is an entry. In no hurry."""
        return b"\n%b\n" % entry.encode("ascii") in b"\n" + self._names


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
        lists: dict[SiteList, int] = {}
        for at, rule in enumerate(rules):
            for sites in rule or ():
                lists[sites] = lists.get(sites, 0) | 1 << at
        return cls(list(lists.items()))

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
        for key in _keys(name.encode("ascii")):
            if self._names.get(key) & mask:
                return key.decode("ascii")
        return None

    def covering_all(self, lists: Iterable[SiteList], mask: int, everywhere: int) -> int:
        """Of the rules of this mask, those that have all of these lists; the ones of `everywhere` do."""
        for sites in lists:
            for entry in sites.entries():
                if not mask & ~everywhere:
                    return mask
                mask &= everywhere | self.covering(entry)
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


def _keys(name: bytes) -> Iterator[bytes]:
    """The name, and the domains that it is below, each with its dot."""
    yield name
    dot = name.find(b".", 1)
    while dot >= 0:
        yield name[dot:]
        dot = name.find(b".", dot + 1)


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

    def __init__(self, version: int, lists: Sequence[tuple[_Prefixes, int]]) -> None:
        high, low = _types(version)
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
        high, low = number >> 64, number & _LOW
        start = bisect_left(self._high, high)
        return bisect_right(self._low, low, start, bisect_right(self._high, high, start)) - 1

    def _cut(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        numbers: dict[int, int] = {}

        def begin(first: int, mask: int) -> None:
            value = numbers.setdefault(mask, len(numbers))
            if self._values and self._high[-1] == first >> 64 and self._low[-1] == first & _LOW:
                self._values[-1] = value
            elif not self._values or self._values[-1] != value:
                self._high.append(first >> 64)
                self._low.append(first & _LOW)
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

"""The destinations that rules list: single entries, and long lists of them. Pure.

For a million entries: they are kept as bytes and arrays, not as objects (of 100 bytes and more each).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from itertools import repeat
from socket import AF_INET, AF_INET6, inet_pton
from typing import TypeAlias

from attrs import frozen

from usocksd.names.match import canonical_host, parse_network
from usocksd.net.address import IPAddress, IPNetwork

LOW_64 = (1 << 64) - 1
_LONGEST_NAME = 253
# Names that `canonical_host` would return unchanged: most of a long list.
_PLAIN_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z][a-z0-9_-]{0,62}", re.ASCII)


@frozen
class Prefix:
    """A network: version, first address and length. It takes a third of the time of an `ipaddress` object."""

    version: int
    number: int
    length: int

    def __str__(self) -> str:
        """As in log records: a single address has no length."""
        address = IPv4Address(self.number) if self.version == 4 else IPv6Address(self.number)
        return str(address) if self.length == address.max_prefixlen else f"{address}/{self.length}"


Entry: TypeAlias = str | Prefix
"""A parsed entry: a canonical name, ".name" for all names below it, a network, or "" for requests for an address."""


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
    except (
        OSError,
        ValueError,
    ):  # another notation of an address, a name, or a fault
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


class Prefixes:
    """Networks of one version, sorted, the wider first of those that begin together."""

    __slots__ = ("_high", "_length", "_low", "bits", "version")

    def __init__(self, version: int, prefixes: list[int]) -> None:
        """In each number, the last 8 bits are the length, and the others the first address. Sorts the list."""
        self.version = version
        self.bits = 32 if version == 4 else 128
        prefixes.sort()
        high, low = array_types(version)
        self._high = array(high, (prefix >> 72 for prefix in prefixes))
        self._low = array(low, (prefix >> 8 & LOW_64 for prefix in prefixes))
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
        """The narrowest network that has this address."""
        for length in range(self.bits, -1, -1):
            below = self.bits - length
            first = number >> below << below
            high = first >> 64
            start = bisect_left(self._high, high)
            end = bisect_right(self._high, high, start)
            start = bisect_left(self._low, first & LOW_64, start, end)
            end = bisect_right(self._low, first & LOW_64, start, end)
            at = bisect_left(self._length, length, start, end)
            if at < end and self._length[at] == length:
                return Prefix(self.version, first, length)
        return None


def array_types(version: int) -> tuple[str, str]:
    """An address as its upper and lower 64 bits, for the arrays; IPv4 uses the lower ones."""
    return ("B", "I") if version == 4 else ("Q", "Q")


class SiteList:
    """Many destinations, compact. `label` names their file: "" for those in the configuration itself."""

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
        self._v4 = Prefixes(4, fours)
        self._v6 = Prefixes(6, sixes)

    def __len__(self) -> int:
        return self.name_count + len(self._v4) + len(self._v6) + self.nameless

    @property
    def name_count(self) -> int:
        """The number of names and domains."""
        return self._names.count(b"\n")

    def names(self) -> Iterator[bytes]:
        """The names, and the domains with their dot."""
        return (match[0] for match in re.finditer(rb"[^\n]+", self._names))

    def prefixes(self, version: int) -> Prefixes:
        """The networks of one IP version."""
        return self._v4 if version == 4 else self._v6

    def entries(self) -> Iterator[Entry]:
        """All entries, in another order than in the list."""
        yield from (name.decode("ascii") for name in self.names())
        yield from self._v4
        yield from self._v6
        if self.nameless:
            yield ""

    def find(self, ip: IPAddress) -> Prefix | None:
        """The narrowest network that has this address. Not for the path of a connection."""
        return self.prefixes(ip.version).find(int(ip))

    def has(self, entry: str) -> bool:
        """Whether this name or ".domain" is an entry. Not for the path of a connection."""
        return b"\n%b\n" % entry.encode("ascii") in b"\n" + self._names

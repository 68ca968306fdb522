"""The tools of rules: canonical hosts, sets of networks, and rendezvous hashing. Pure.

The rule of this file: what `canonical_host` returns is judged *and* resolved or dialled. No spelling may be an address
to one stage and a name to another.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)
from math import log
from typing import Generic, TypeVar

from usocksd.net.address import IPAddress, IPNetwork, without_zone

T = TypeVar("T")

# RFC 1123 section 2.1 plus the underscore, which DNS has in use; hyphens anywhere, since real names have them
# there.
_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
# "The host ends in a number" of the URL standard: no such name exists in DNS, so the text is meant as an address.
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_ATON_PART = re.compile(r"0x[0-9a-f]+|[0-9]+")
_LONGEST_NAME = 253
_LONGEST_TEXT = 255


@lru_cache(maxsize=8192)
def canonical_host(text: str) -> IPAddress | str:
    """The one form of a host that everything after the handshake sees.

    Returns an address for every notation that inet_aton(3) takes (127.1, 0x7f.1, 2130706433, 0177.0.0.1), for IPv6 with
    or without brackets or zone (the zone is dropped) and with IPv4-mapped IPv6 as IPv4, since the packets are IPv4;
    otherwise the name in lower case, as A-labels (IDNA 2008 behind the mapping of UTS 46), without the trailing dot.
    Raises ValueError for what can't be a host: empty labels, spaces, NUL, characters outside letters, digits, '-' and
    '_', labels over 63 or names over 253 octets, and names that end in a number but are no address.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError("host name longer than 255 characters")
    host = text.lower() if text.isascii() else _to_ascii(text)
    if ":" in host or host.startswith("["):
        return _ipv6(host)
    host = host.removesuffix(".")
    if _ENDS_IN_NUMBER.fullmatch(host):
        return _inet_aton(host)
    if len(host) > _LONGEST_NAME or not _NAME.fullmatch(host):
        raise ValueError(f"not a host name: {text!r}")
    return host


def _to_ascii(text: str) -> str:
    # Only names with non-ASCII characters pay for the import of idna's tables (10 ms).
    import idna  # noqa: PLC0415

    # Mapping first and as a whole: full-width digits and ideographic dots may turn a name into an address.
    # Labels that are ASCII by now are not encoded, so that underscores stay possible beside them. IDNAError
    # is a ValueError.
    mapped = idna.uts46_remap(text, std3_rules=False, transitional=False)
    return ".".join(label if label.isascii() else idna.alabel(label).decode("ascii") for label in mapped.split("."))


def _inet_aton(host: str) -> IPv4Address:
    parts = host.split(".")
    if len(parts) > 4 or not all(_ATON_PART.fullmatch(part) for part in parts):
        raise ValueError(f"neither an address nor a host name: {host!r}")
    # A leading 0x means base 16, a leading 0 base 8 (where 8 and 9 are a ValueError of int), as in C.
    values = [int(part, 16 if part.startswith("0x") else 8 if part.startswith("0") else 10) for part in parts]
    *octets, rest = values
    if any(octet > 0xFF for octet in octets) or rest >= 1 << (8 * (5 - len(parts))):
        raise ValueError(f"not an IPv4 address: {host!r}")
    number = rest
    for position, octet in enumerate(octets):
        number |= octet << (24 - 8 * position)
    return IPv4Address(number)


def _ipv6(host: str) -> IPAddress:
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    address = IPv6Address(host)  # refuses an empty zone; AddressValueError is a ValueError
    return without_zone(address)


def parse_network(text: str) -> IPNetwork:
    """A network "10.0.0.0/8" or a single address (full length of its family); host bits are cleared, as Go's
    ParseCIDR does. A network inside ::ffff:0:0/96 is the IPv4 one, as addresses are. Raises ValueError.
    """
    length = text.rpartition("/")[2] if "/" in text else "0"
    if not (length.isascii() and length.isdigit()):  # ipaddress would take net masks, and host masks too
        raise ValueError(f"not a network: {text!r}")
    network = ip_network(text, strict=False)
    if isinstance(network, IPv6Network):
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= 96:
            return IPv4Network((mapped, network.prefixlen - 96))
        if network.network_address.scope_id is not None:
            raise ValueError(f"a network has no zone: {text!r}")
    return network


# Where an IPv6 address contains the IPv4 address that its packets reach: prefix, distance of the 32 bits from the end,
# and the value to XOR them with.
_EMBEDDED = tuple(
    (int(network.network_address) >> (128 - network.prefixlen), 128 - network.prefixlen, shift, mask)
    for network, shift, mask in (
        (IPv6Network("::ffff:0:0/96"), 0, 0),  # IPv4-mapped and -compatible, RFC 4291 section 2.5.5
        (IPv6Network("::/96"), 0, 0),
        (IPv6Network("::ffff:0:0:0/96"), 0, 0),  # IPv4-translated, RFC 2765 section 2.1
        (IPv6Network("64:ff9b::/96"), 0, 0),  # NAT64, RFC 6052 section 2.1
        (IPv6Network("2002::/16"), 80, 0),  # 6to4, RFC 3056 section 2
        (IPv6Network("2001::/32"), 64, 0),  # Teredo, RFC 4380 section 4: the server,
        (IPv6Network("2001::/32"), 0, 0xFFFFFFFF),  # and the client
    )
)
_ISATAP = 0x5EFE  # RFC 5214 section 6.1: with or without the bit that says "universal"
_UNIVERSAL = 0x02000000
_LOCAL_NAT64 = 0x0064FF9B0001  # 64:ff9b:1::/48, RFC 8215

NAT64_LENGTHS = (32, 40, 48, 56, 64, 96)
"""How long the prefix of a NAT64 may be (RFC 6052 section 2.2)."""


def judged_addresses(ip: IPAddress, nat64: Iterable[IPv6Network] = ()) -> tuple[IPAddress, ...]:
    """The address itself, and the IPv4 addresses inside to which its packets may get: a denial of any denies it.

    `nat64` are the prefixes of this network's translators, of `NAT64_LENGTHS`: nothing else tells them from others.
    """
    if isinstance(ip, IPv4Address):
        return (ip,)
    number = int(ip)
    if number <= 1:  # :: and ::1 are in ::/96 but embed nothing
        return (ip,)
    inside = [
        number >> shift & 0xFFFFFFFF ^ mask for prefix, below, shift, mask in _EMBEDDED if number >> below == prefix
    ]
    if number >> 32 & 0xFFFFFFFF & ~_UNIVERSAL == _ISATAP:
        inside.append(number & 0xFFFFFFFF)
    translated = [_translated(number, network.prefixlen) for network in nat64 if ip in network]
    if not translated and number >> 80 == _LOCAL_NAT64:
        # The operator chooses the length of the prefix, so all are tried. 0.0.0.0/8 means that there are only zeros.
        longer = (_translated(number, length) for length in (48, 56, 64))
        translated = [number & 0xFFFFFFFF, *(each for each in longer if each >> 24)]
    return (ip, *map(IPv4Address, dict.fromkeys(inside + translated)))


def _translated(number: int, length: int) -> int:
    """The IPv4 address behind a prefix of this length: bits 64 to 71 are left out (RFC 6052 section 2.2)."""
    if length == 96:
        return number & 0xFFFFFFFF
    without = number >> 64 << 56 | number & (1 << 56) - 1
    return without >> (120 - 32 - length) & 0xFFFFFFFF


def entries_of(name: str) -> Iterator[str]:
    """The entries that have this canonical name: itself, then ".domain" for each domain above, the longest first."""
    yield name
    dot = name.find(".", 1)
    while dot >= 0:
        yield name[dot:]
        dot = name.find(".", dot + 1)


class NetworkMap(Generic[T]):
    """A map from networks and single addresses to values; a lookup is one bisection, however many there are.

    Two networks either nest or are disjoint, so with the nested ones left out the rest is sorted and free of
    overlap, and each range still knows the entry that it came from.
    """

    __slots__ = ("_v4", "_v6")

    def __init__(self, entries: Mapping[IPNetwork, T]) -> None:
        by_family: dict[int, list[tuple[int, int, T]]] = {4: [], 6: []}
        for network, value in entries.items():
            first = int(network.network_address)
            by_family[network.version].append((first, first + network.num_addresses - 1, value))
        self._v4 = _outermost(by_family[4])
        self._v6 = _outermost(by_family[6])

    def __len__(self) -> int:
        return len(self._v4[0]) + len(self._v6[0])

    def match(self, ip: IPAddress) -> T | None:
        """The value of the widest network that has this address."""
        firsts, lasts, values = self._v4 if isinstance(ip, IPv4Address) else self._v6
        if not firsts:
            return None
        number = int(ip)
        at = bisect_right(firsts, number) - 1
        return values[at] if at >= 0 and number <= lasts[at] else None


def _outermost(ranges: list[tuple[int, int, T]]) -> tuple[list[int], list[int], list[T]]:
    ranges.sort(key=lambda item: (item[0], -item[1]))
    firsts: list[int] = []
    lasts: list[int] = []
    values: list[T] = []
    for first, last, value in ranges:
        if lasts and last <= lasts[-1]:
            continue
        firsts.append(first)
        lasts.append(last)
        values.append(value)
    return firsts, lasts, values


# Networks to which no foreign name may lead: this host by another address, its link, metadata services. usocksd denies
# them unless a rule allows the address; transocks denies them on direct routes by name.
LOOPBACK = ("127.0.0.0/8", "::1/128")
LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")

PROTECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loopback", LOOPBACK),
    ("unspecified", ("0.0.0.0/8", "::/128")),  # RFC 1122 section 3.2.1.3; Linux connects these to loopback
    ("link-local", LINK_LOCAL),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    ("broadcast", ("255.255.255.255/32",)),
    ("site-local", ("fec0::/10",)),  # deprecated by RFC 3879: any that remain are in private networks
    (
        "cloud metadata",
        (
            "fd00:ec2::254/128",
            "fd00:ec2::23/128",
            "fd20:ce::254/128",
            "100.100.100.200/32",
            "192.0.0.192/32",
            "168.63.129.16/32",
        ),
    ),
)

PROTECTED_NETWORKS = NetworkMap({parse_network(text): kind for kind, texts in PROTECTED for text in texts})
"""The kind of protected address that this is, or None."""


def _seed(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()


def rendezvous(key: bytes, candidates: Collection[T], identity: Callable[[T], bytes]) -> list[T]:
    """The candidates in order of preference for this key: highest random weight first.

    The order depends on the key and the candidates' identities alone: it is the same in every process and
    after every restart, and without one candidate the others keep their order, so that only its own keys
    move.
    """
    seed = _seed(key)
    return sorted(
        candidates,
        key=lambda candidate: blake2b(identity(candidate), digest_size=16, key=seed).digest(),
        reverse=True,
    )


def weighted_rendezvous(
    key: bytes, candidates: Collection[T], identity: Callable[[T], bytes], weight: Callable[[T], float]
) -> list[T]:
    """The same, and each is the first for a share of the keys that its weight is of all weights: by -ln(u) / weight,
    where u is the candidate's hash as a number between 0 and 1.
    """
    seed = _seed(key)

    def cost(candidate: T) -> float:
        digest = blake2b(identity(candidate), digest_size=8, key=seed).digest()
        return -log((int.from_bytes(digest) + 1) / 2**64) / weight(candidate)

    return sorted(candidates, key=cost)

"""The address that a connection leaves from. Pure.

A client keeps its address towards a destination (or, if its pool says so, towards all) for as long as that address is
usable: the choice depends on nothing but client, pool and where the destination is, not on the process, the time or
what other clients do.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable, Iterator, Mapping
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network

from attrs import Factory, evolve, field, frozen

from usocksd.errors import NoEgress
from usocksd.names.match import rendezvous
from usocksd.net.address import IPAddress, IPNetwork

DEFAULT = "default"
"""The name of the pool that [outgoing] describes, for what no rule sends elsewhere."""

# How many addresses of a network a client and destination have, in case one is out of ports.
_OF_A_NETWORK = 3

_BY_VERSION = {4: socket.AF_INET, 6: socket.AF_INET6}
_FAMILIES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


# Of a destination's addresses, by IP version: the bytes of the smallest network that is announced on the Internet.
_SITE = {4: 3, 6: 6}


def sites(addresses: Iterable[IPAddress]) -> dict[int, str]:
    """The site of a destination with these addresses, by IP version: a client keeps its egress address towards a site.
    It is the network (/24 or /48) of the lowest address, so that a name and each of its addresses are mostly one site:
    FTP asks for the name, and then for an address.
    """
    lowest: dict[int, IPAddress] = {}
    for address in addresses:
        known = lowest.get(address.version)
        if known is None or address.packed < known.packed:
            lowest[address.version] = address
    return {version: address.packed[: _SITE[version]].hex() for version, address in lowest.items()}


def _distinct(addresses: Iterable[IPAddress | IPNetwork]) -> tuple[IPAddress | IPNetwork, ...]:
    return tuple(dict.fromkeys(addresses))


def covers(local: Container[IPAddress], entry: IPAddress | IPNetwork) -> bool:
    """Whether all of an entry of a pool is on this host: an address, or a network that is routed to it."""
    if isinstance(entry, IPv4Network | IPv6Network):
        return entry[0] in local and entry[-1] in local
    return entry in local


@frozen
class Pool:
    """Source addresses, and the interface (SO_BINDTODEVICE) and SO_MARK that go along; all of them apply together.

    Without addresses the kernel chooses one, and `iface` and `mark` apply all the same.
    """

    addresses: tuple[IPAddress | IPNetwork, ...] = field(default=(), converter=_distinct)
    """A network is chosen as one address is, and of its addresses one by client and destination."""
    iface: str | None = None
    mark: int | None = None
    sticky: str = "client+destination"
    """What has to be the same for two connections to have the same address: that, or "client"."""
    when_all_listed: str = "use"
    """When all addresses of a family that are on this host are listed: "use" them all the same, or "refuse"."""

    @property
    def singles(self) -> tuple[IPAddress, ...]:
        """Without those of networks, which nobody lists one by one."""
        return tuple(each for each in self.addresses if not isinstance(each, IPv4Network | IPv6Network))


@frozen
class Source:
    """What a dial binds to: address, interface (SO_BINDTODEVICE), SO_MARK; None leaves it to the kernel."""

    address: str | None = None
    iface: str | None = None
    mark: int | None = None
    pool: str = DEFAULT
    spare: tuple[str, ...] = ()
    """The addresses that are next, in this order, when this one can't be used (it is out of ports, say)."""
    routed: bool = False
    """One of them is on no interface, but routed to this host."""


@frozen
class Usable:
    """What pools may be left from right now. Immutable: when something changes, there is another one."""

    local: frozenset[IPAddress]
    """The addresses of this host: those of its interfaces, and it may have others that are routed to it."""
    listed: Mapping[str, frozenset[IPAddress]] = Factory(dict)
    """By pool: those of its addresses that a DNSBL lists"""


class EgressPools:
    """All pools, by name."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        """There is a default pool in any case: if it is not among these, the kernel chooses."""
        self._pools = {name: _Ranked(name, pool) for name, pool in ({DEFAULT: Pool()} | dict(pools)).items()}

    def pick(self, pool: str, client: IPAddress, site: str, family: socket.AddressFamily, usable: Usable) -> Source:
        """The source for this client's connections to this site (see `sites`).

        `family` is that of the address to be dialled. Pass the same `usable` as long as nothing has changed. Raises
        NoEgress if the pool has addresses but none of this family is usable.
        """
        return self._pools[pool].first(client, site, family, usable)

    def ranking(
        self, pool: str, client: IPAddress, site: str, family: socket.AddressFamily, usable: Usable
    ) -> list[Source]:
        """All usable sources, the one that `pick` gives first. Raises NoEgress as there."""
        source = self.pick(pool, client, site, family, usable)
        spare = source.spare
        return [source, *(evolve(source, address=next_, spare=spare[at:]) for at, next_ in enumerate(spare, 1))]


class _Ranked:
    """One pool, with what has been worked out of it for one state of the world."""

    _MOST_REMEMBERED = 8192

    def __init__(self, name: str, pool: Pool) -> None:
        self._name = name
        self._pool = pool
        self._by_client = pool.sticky == "client"
        self._kernels_choice = None if pool.addresses else Source(None, pool.iface, pool.mark, name)
        self._usable: Usable | None = None
        self._of: dict[socket.AddressFamily, tuple[IPAddress | IPNetwork, ...]] = {}
        self._routed: set[socket.AddressFamily] = set()
        """Of which one of the addresses is on no interface."""
        self._remembered: dict[tuple[IPAddress, str, socket.AddressFamily], Source] = {}

    def first(self, client: IPAddress, site: str, family: socket.AddressFamily, usable: Usable) -> Source:
        if self._kernels_choice is not None:
            return self._kernels_choice
        if usable is not self._usable:
            self._refresh(usable)
        if self._by_client:
            site = ""
        key = (client, site, family)
        source = self._remembered.get(key)
        if source is None:
            if len(self._remembered) >= self._MOST_REMEMBERED:
                self._remembered.clear()
            source = self._remembered[key] = self._choose(client, site, family, usable)
        return source

    def _choose(self, client: IPAddress, site: str, family: socket.AddressFamily, usable: Usable) -> Source:
        candidates = self._of.get(family, ())
        if not candidates:
            raise NoEgress(self._why_none(family, usable))
        # The version byte tells how long the client's packed form is, so no two keys coincide.
        key = bytes((client.version,)) + client.packed + site.encode()
        ranked = rendezvous(key, candidates, _packed)
        address, *spare = (str(address) for entry in ranked for address in _members(key, entry))
        return Source(address, self._pool.iface, self._pool.mark, self._name, tuple(spare), family in self._routed)

    def _refresh(self, usable: Usable) -> None:
        self._usable = usable
        self._remembered.clear()
        self._of = {}
        self._routed = set()
        interfaces = set(usable.local)
        listed = usable.listed.get(self._name, frozenset())
        for version, family in _BY_VERSION.items():
            here = [each for each in self._pool.addresses if each.version == version and covers(usable.local, each)]
            clean = [address for address in here if address not in listed]
            if not clean and self._pool.when_all_listed == "use":
                clean = here
            self._of[family] = tuple(clean)
            if not interfaces.issuperset(clean):
                self._routed.add(family)

    def _why_none(self, family: socket.AddressFamily, usable: Usable) -> str:
        text = f'no usable egress address for {_FAMILIES[family]} in pool "{self._name}"'
        ours = [address for address in self._pool.addresses if _BY_VERSION[address.version] == family]
        if not ours:
            return f"{text}: it has none"
        listed = sum(covers(usable.local, address) for address in ours)
        reasons = [f"{count} {what}" for count, what in ((len(ours) - listed, "not on this host"), (listed, "listed"))]
        return f"{text}: {', '.join(reason for reason in reasons if not reason.startswith('0 '))}"


def _packed(entry: IPAddress | IPNetwork) -> bytes:
    if isinstance(entry, IPv4Network | IPv6Network):
        return entry.network_address.packed + bytes((entry.prefixlen,))
    return entry.packed


def _members(key: bytes, entry: IPAddress | IPNetwork) -> Iterator[IPAddress]:
    """An address is one; of a network there are some for this key, without its first and last if it has others."""
    if not isinstance(entry, IPv4Network | IPv6Network):
        yield entry
        return
    margin = 1 if entry.num_addresses > 2 else 0
    room = entry.num_addresses - 2 * margin
    first = int.from_bytes(blake2b(key + _packed(entry), digest_size=24).digest())
    for number in range(min(room, _OF_A_NETWORK)):
        yield entry[margin + (first + number) % room]

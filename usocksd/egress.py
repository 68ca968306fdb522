"""The address that a connection leaves from. Pure.

A client keeps its address towards a destination (or, if its pool says so, towards all) while that address is usable.
The choice depends only on the client, the pool and where the destination is: not on the process, the time or other
clients.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from attrs import Factory, frozen

from usocksd.clients import Client
from usocksd.errors import NoEgress
from usocksd.names.match import rendezvous
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

DEFAULT = "default"
"""The pool of [outgoing], for connections whose rule names no other."""

# How many addresses of a network a client and site may use, in case one is out of ports.
_ADDRESSES_OF_NETWORK = 3
# By IP version: the bytes of the smallest network that is announced on the Internet (/24 and /48).
_SITE = {4: 3, 6: 6}


def sites_of(addresses: Iterable[IPAddress]) -> dict[int, str]:
    """The site of a destination with these addresses, by IP version: a client keeps its egress address towards a site.

    It is the network of the lowest address, so a name and each of its addresses are usually one site. (FTP requests the
    name, and then an address.)
    """
    lowest: dict[int, IPAddress] = {}
    for address in addresses:
        known = lowest.get(address.version)
        if known is None or address.packed < known.packed:
            lowest[address.version] = address
    return {version: address.packed[: _SITE[version]].hex() for version, address in lowest.items()}


def covers(local: Container[IPAddress], entry: IPAddress | IPNetwork) -> bool:
    """Whether an entry of a pool is completely on this host: an address, or a network that is routed to it."""
    if isinstance(entry, IPv4Network | IPv6Network):
        return entry[0] in local and entry[-1] in local
    return entry in local


@frozen
class Pool:
    """Source addresses, and the interface (SO_BINDTODEVICE) and SO_MARK that apply along with them.

    Without addresses the kernel chooses one; `iface` and `mark` still apply.
    """

    addresses: tuple[IPAddress | IPNetwork, ...] = ()
    """Each only once. A network is chosen like one address; client and destination choose an address of it."""
    iface: str | None = None
    mark: int | None = None
    sticky: str = "client+destination"
    """What two connections must have in common to leave from the same address: client and site, or only "client"."""
    when_all_listed: str = "use"
    """What happens when all local addresses of a family are listed: "use" them, or "refuse" connections."""

    @property
    def singles(self) -> tuple[IPAddress, ...]:
        """The entries that are addresses. Block lists are not asked about networks."""
        return tuple(each for each in self.addresses if not isinstance(each, IPv4Network | IPv6Network))


class Source(NamedTuple):
    """The source of a dial, with the fields of `Target`; None leaves the choice to the kernel."""

    address: str | None = None
    iface: str | None = None
    mark: int | None = None
    spare: tuple[str, ...] = ()
    """The addresses to use next, in this order, if `address` can't be used (it is out of ports, for example)."""
    routed: bool = False
    """One of the addresses is on no interface, but routed to this host."""


@frozen
class Usable:
    """The addresses usable now. Immutable: a change makes a new object."""

    local: frozenset[IPAddress]
    """The addresses of the interfaces of this host. (`in` is also true for addresses that are routed to it.)"""
    listed: Mapping[str, frozenset[IPAddress]] = Factory(dict)
    """The listed addresses of each pool."""


class EgressPools:
    """All pools, by name."""

    def __init__(self, pools: Mapping[str, Pool], usable: Callable[[], Usable], *, most_remembered: int = 8192) -> None:
        """Without a default pool, the kernel chooses for it. `usable` returns the same object while nothing changes.

        Each pool remembers its latest choices.
        """
        named = {DEFAULT: Pool()} | dict(pools)
        self.usable = usable
        """Returns the addresses that are usable now: the same object while nothing changes"""
        self._pools = {name: _RankedPool(name, pool, most_remembered) for name, pool in named.items()}

    def pick(self, pool: str, client: Client, site: str, destination: IPAddress) -> Source:
        """The source for this client's connections to this site (see `sites_of`).

        Raises NoEgress if the pool has addresses but none of the destination's family is usable.
        """
        return self._pools[pool].pick(self.usable(), client, site, destination.version)

    def is_here(self, address: str) -> bool:
        """Whether this address is still on this host, or routed to it."""
        return numeric_address(address) in self.usable().local


class _RankedPool:
    """One pool, and its choices while the same addresses are usable."""

    def __init__(self, name: str, pool: Pool, most_remembered: int) -> None:
        self._name = name
        self._pool = pool
        self._by_client = pool.sticky == "client"
        self._kernels_choice = None if pool.addresses else Source(None, pool.iface, pool.mark)
        self._usable: Usable | None = None
        self._entries: dict[int, tuple[IPAddress | IPNetwork, ...]] = {}
        """The usable entries, by IP version."""
        self._routed: set[int] = set()
        """The IP versions with an entry that is on no interface."""
        self._remembered: dict[tuple[str, str, int], Source] = {}
        self._most_remembered = most_remembered

    def pick(self, usable: Usable, client: Client, site: str, version: int) -> Source:
        if self._kernels_choice is not None:
            return self._kernels_choice
        if usable is not self._usable:
            self._refresh(usable)
        if self._by_client:
            site = ""
        key = (client.host, site, version)
        source = self._remembered.get(key)
        if source is None:
            if len(self._remembered) >= self._most_remembered:
                self._remembered.clear()
            source = self._remembered[key] = self._choose(client.address, site, version, usable)
        return source

    def _choose(self, client: IPAddress, site: str, version: int, usable: Usable) -> Source:
        entries = self._entries[version]
        if not entries:
            raise NoEgress(self._why_none(version, usable))
        # The version byte tells the length of the client's packed address, so no two keys coincide.
        key = bytes((client.version,)) + client.packed + site.encode()
        ranked = rendezvous(key, entries, _packed)
        address, *spare = (str(address) for entry in ranked for address in _members(key, entry))
        return Source(address, self._pool.iface, self._pool.mark, tuple(spare), version in self._routed)

    def _refresh(self, usable: Usable) -> None:
        self._usable = usable
        self._remembered.clear()
        self._routed.clear()
        interfaces = set(usable.local)
        listed = usable.listed.get(self._name, frozenset())
        for version in _SITE:
            here = [each for each in self._pool.addresses if each.version == version and covers(usable.local, each)]
            clean = [entry for entry in here if entry not in listed]
            if not clean and self._pool.when_all_listed == "use":
                clean = here
            self._entries[version] = tuple(clean)
            if not interfaces.issuperset(clean):
                self._routed.add(version)

    def _why_none(self, version: int, usable: Usable) -> str:
        text = f'no usable egress address for IPv{version} in pool "{self._name}"'
        ours = [entry for entry in self._pool.addresses if entry.version == version]
        if not ours:
            return f"{text}: it has none"
        listed = sum(covers(usable.local, entry) for entry in ours)
        reasons = ((len(ours) - listed, "not on this host"), (listed, "listed"))
        return f"{text}: {', '.join(f'{count} {what}' for count, what in reasons if count)}"


def _packed(entry: IPAddress | IPNetwork) -> bytes:
    if isinstance(entry, IPv4Network | IPv6Network):
        return entry.network_address.packed + bytes((entry.prefixlen,))
    return entry.packed


def _members(key: bytes, entry: IPAddress | IPNetwork) -> Iterator[IPAddress]:
    """An address itself; or some addresses of a network for this key, without its first and last if it has others."""
    if not isinstance(entry, IPv4Network | IPv6Network):
        yield entry
        return
    margin = 1 if entry.num_addresses > 2 else 0
    room = entry.num_addresses - 2 * margin
    first = int.from_bytes(blake2b(key + _packed(entry), digest_size=24).digest())
    for number in range(min(room, _ADDRESSES_OF_NETWORK)):
        yield entry[margin + (first + number) % room]

"""The address that a connection leaves from. Pure.

A client keeps its address towards a destination for as long as that address is usable: the choice depends on
nothing but the two and the pool, not on the process, the time or what other clients do.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from attrs import frozen

from usocksd.errors import NoEgress
from usocksd.match import IPAddress, rendezvous


@frozen
class Source:
    """What a dial binds to: address, interface (SO_BINDTODEVICE), SO_MARK; None leaves it to the kernel."""

    address: str | None = None
    iface: str | None = None
    mark: int | None = None


_BY_VERSION = {4: socket.AF_INET, 6: socket.AF_INET6}


class EgressPool:
    """Source addresses with the interface and mark that go along; all of them apply together."""

    _MOST_REMEMBERED = 8192

    def __init__(self, addresses: Iterable[IPAddress] = (), iface: str | None = None, mark: int | None = None) -> None:
        """Without addresses the kernel chooses one; `iface` and `mark` apply all the same."""
        self.addresses = tuple(dict.fromkeys(addresses))
        self._iface = iface
        self._mark = mark
        self._kernels_choice = Source(None, iface, mark)
        self._usable: frozenset[IPAddress] | None = None
        self._pools: dict[int, list[IPAddress]] = {}  # by address family
        self._remembered: dict[tuple[IPAddress, str, int], Source] = {}

    def pick(
        self,
        client: IPAddress,
        destination: str,
        family: socket.AddressFamily,
        usable: frozenset[IPAddress],
    ) -> Source:
        """The source for this client's connections to this destination (the host as the client asked for it).

        `family` is that of the address to be dialled, `usable` are the addresses that may be used right now:
        pass the same object as long as they are the same. Raises NoEgress if the pool has addresses but none
        of this family is usable.
        """
        if not self.addresses:
            return self._kernels_choice
        if usable is not self._usable:
            self._refresh(usable)
        key = (client, destination, family)
        source = self._remembered.get(key)
        if source is None:
            ranking = self._ranking(client, destination, family)
            if not ranking:
                raise NoEgress(f"no usable egress address for {'IPv4' if family == socket.AF_INET else 'IPv6'}")
            if len(self._remembered) >= self._MOST_REMEMBERED:
                self._remembered.clear()
            source = self._remembered[key] = Source(str(ranking[0]), self._iface, self._mark)
        return source

    def _ranking(self, client: IPAddress, destination: str, family: socket.AddressFamily) -> list[IPAddress]:
        # The version byte tells how long the client's packed form is, so no two keys coincide.
        key = bytes((client.version,)) + client.packed + destination.encode()
        return rendezvous(key, self._pools.get(family, ()), _packed)

    def _refresh(self, usable: frozenset[IPAddress]) -> None:
        self._usable = usable
        self._remembered.clear()
        self._pools = {}
        for address in self.addresses:
            if address in usable:
                self._pools.setdefault(_BY_VERSION[address.version], []).append(address)


def _packed(address: IPAddress) -> bytes:
    return address.packed

"""A UDP association: relays the datagrams of a client while its TCP connection lives (RFC 1928, sections 4, 6, 7).

    client -> relay socket -> rules, once for each destination -> mapping (an egress socket) -> destination
    destination -> mapping -> may it answer? -> relay socket -> client

What a NAT owes its clients (RFC 4787) decides the form. A client's port has one egress socket for all destinations
(endpoint-independent mapping): one for each pool and family. All associations of a client leave from the same address.

A datagram to a known destination costs a lookup by the bytes of its header; all else is done once per destination.
Datagrams wait nowhere, except for a name that is being resolved.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from functools import partial
from math import inf
from socket import SocketType
from typing import Final, NamedTuple

from usocksd.acl import UDP_ASSOCIATE, AccessRules
from usocksd.association_log import AssociationRecords
from usocksd.clients import Client
from usocksd.decision import Decision
from usocksd.egress import DEFAULT, EgressPools, Source
from usocksd.errors import Denied, DialError, Error, NoEgress, ResolveError
from usocksd.mapping import LOOK_EVERY, NOBODY, Destination, Mapping, RelaySocket, open_mapping
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort, join_port, numeric_address
from usocksd.net.datagrams import Association, Ended
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import Endpoint, Interruptible
from usocksd.net.reactor import Reactor
from usocksd.serve.associations import Associations
from usocksd.socks.datagram import BadDatagram, header, parse

log = logging.getLogger(__name__)

_DNS_PORT: Final = 53
# A mapping that has only asked name servers is closed after this many seconds: stub resolvers have given up by then.
_DNS_IDLE: Final = 17.0
_IPV4: Final = 1
_IPV6: Final = 4
# With more destinations, the oldest is forgotten.
_MOST_DESTINATIONS: Final = 8192
# What may soon be otherwise (no route, no egress address, no such name) is tried again after this many seconds.
_AGAIN_AFTER: Final = 5.0
# Only the family of these counts.
_ANY_ADDRESS = {version: numeric_address(text) for version, text in ((4, "0.0.0.0"), (6, "::"))}
_REFUSALS = {
    errno.EADDRINUSE: "out_of_ports",
    errno.EMFILE: "descriptors",
    errno.ENFILE: "descriptors",
    errno.ENOSPC: "descriptors",
}
_CAUSES = {errno.EAGAIN: "send_buffer_full", errno.ENOBUFS: "send_buffer_full", errno.EMSGSIZE: "too_long"}


class Means(NamedTuple):
    """What the associations of a worker work with."""

    rules: AccessRules
    egress: EgressPools
    resolver: Resolver
    associations: Associations
    connect: float
    """Seconds to resolve a name"""
    idle: float
    """Seconds without a datagram of the client after which a mapping is closed"""
    queue: int
    """How many datagrams of an association may wait for names"""
    answers_from_any: bool
    """Whether addresses that were not asked may send to the client, if the rules allow them (full cone)"""


class Lookup(Interruptible):
    """A name that an association waits for."""


class ClientAssociation(Association):
    """One association. Its session in udp.py opens it, waits for the end of the TCP connection, and closes it."""

    __slots__ = (
        "_client",
        "_destinations",
        "_lookups",
        "_mappings",
        "_peer",
        "_records",
        "_relay",
        "_waiting",
        "means",
        "reactor",
    )

    def __init__(
        self, means: Means, control: Endpoint, client: Client, sock: SocketType, records: AssociationRecords
    ) -> None:
        super().__init__(control, records)
        self.reactor: Reactor = control.reactor
        self.means = means
        self._client = client
        self._peer = HostPort("", 0)
        self._records = records
        self._destinations: dict[bytes, Destination] = {}
        self._mappings: dict[tuple[str, int], Mapping] = {}
        self._lookups: set[Lookup] = set()
        self._waiting = 0
        self._relay = RelaySocket(self, sock)

    def await_client(self, peer: HostPort) -> None:
        """Take datagrams from this numeric address. With port 0, the first one decides its port. Raises OSError."""
        self._peer = peer
        if peer.port:
            self._connect(peer)

    # ---- from the client

    def is_client(self, sender: tuple[object, ...]) -> bool:
        """Whether a datagram from this address is the client's. The first one decides its port."""
        host, port = str(sender[0]).partition("%")[0], sender[1]
        if host != self._peer.host or (self._peer.port and port != self._peer.port):
            return False
        if not self._relay.connected:
            assert isinstance(port, int)
            self._peer = HostPort(host, port)
            self._connect(sender)
        return True

    def _connect(self, sender: tuple[object, ...]) -> None:
        self._relay.sock.connect(sender)
        self._relay.connected = True

    def send(self, size: int) -> None:
        """Relay the datagram of `size` bytes in the reactor's buffer."""
        reactor = self.reactor
        buffer, view = reactor.buffer, reactor.view
        kind = buffer[3]
        start = 10 if kind == _IPV4 else 22 if kind == _IPV6 else 7 + buffer[4]
        destination = self._destinations.get(bytes(view[:start])) if start <= size else None
        mapping = None if destination is None else destination.mapping
        if destination is None or mapping is None:
            self._send_elsewhere(destination, size)
            return
        if not self._has_source(mapping):
            self.drop("no_egress")
            return
        try:
            mapping.sock.sendto(view[start:size], destination.address)
        except OSError as error:
            self.drop(_CAUSES.get(error.errno or 0, "no_route"))
        else:
            self._count_sent(destination, mapping, size - start)

    def _count_sent(self, destination: Destination, mapping: Mapping, size: int) -> None:
        self.active = mapping.active = self.reactor.now
        destination.tx_packets += 1
        destination.tx_bytes += size
        associations = self.means.associations
        associations.tx_packets.value += 1
        associations.tx_bytes.value += size

    def _send_elsewhere(self, destination: Destination | None, size: int) -> None:
        """Relay a datagram to a destination that is new, refused, or has a name that is being resolved."""
        view = self.reactor.view
        try:
            head = parse(view, size)
        except BadDatagram as fault:
            self.drop(fault.cause)
            return
        key, payload = bytes(view[: head.size]), bytes(view[head.size : size])
        now = self.reactor.now
        if destination is None or (destination.refused and destination.again <= now):
            if destination is not None:
                self._forget(key)
            destination = self._new_destination(key, head.host, head.port)
        if destination.refused:
            self.drop(destination.refused)
        elif destination.waiting is None:
            self._send_first(destination, [payload])
        elif self._waiting < self.means.queue:
            self._waiting += 1
            destination.waiting.append(payload)
        else:
            self.drop("queue_full")

    def _new_destination(self, key: bytes, host: str, port: int) -> Destination:
        destinations = self._destinations
        if len(destinations) >= _MOST_DESTINATIONS:
            self._forget(next(iter(destinations)))
        now = self.reactor.now
        try:
            decision = Decision(self.means.rules, self._client, host, port, UDP_ASSOCIATE)
        except ResolveError:
            destination = destinations[key] = Destination(key, None, now)
            self._refuse(destination, "name")
            return destination
        destination = destinations[key] = Destination(key, decision, now)
        if decision.unresolved:
            destination.waiting = []
            lookup = Lookup(self.reactor)
            self._lookups.add(lookup)
            self.reactor.start(self._resolve(lookup, destination, decision, host))
        return destination

    async def _resolve(self, lookup: Lookup, destination: Destination, decision: Decision, host: str) -> None:
        """A session of its own: resolves a destination's name, and sends what has waited for that."""
        if self.result is not None:
            return
        resolver, client = self.means.resolver, self._client.host
        deadline = self.reactor.clock() + self.means.connect
        try:
            names = resolver.full_names(host)
            await decision.resolve(names, lambda name: resolver.resolve_for(lookup, client, name, deadline))
        except Denied as denial:
            self._refuse(destination, "denied", denial)
        except ResolveError as error:
            self._refuse(destination, "unresolved", error)
        except Ended:
            return
        except Exception as bug:
            self.failed(bug)
            return
        finally:
            self._lookups.discard(lookup)
            waiting, destination.waiting = destination.waiting or [], None
            self._waiting -= len(waiting)
        if self._destinations.get(destination.key) is not destination:
            self.drop("queue_full", len(waiting))  # others have come meanwhile, or the association is over
            return
        if destination.refused:
            self.drop(destination.refused, len(waiting))
        else:
            self._send_first(destination, waiting)

    def _send_first(self, destination: Destination, payloads: list[bytes]) -> None:
        """Send these from the egress address that the rules choose, to the first address that has a route."""
        decision = destination.decision
        assert decision is not None
        failure: DialError | None = None
        try:
            for host, source in decision.choose_egress(self.means.egress.pick):
                decision.connected(host)
                try:
                    self._open(destination, decision, host, source, payloads)
                    return
                except DialError as error:
                    failure = failure or error
        except Denied as denial:
            self._refuse(destination, "denied", denial)
        except NoEgress as shortage:
            self._refuse(destination, "no_egress", shortage)
        else:
            assert failure is not None
            self._refuse(destination, _REFUSALS.get(failure.errno, "no_route"), failure)
        self.drop(destination.refused, len(payloads))

    def _open(
        self, destination: Destination, decision: Decision, host: str, source: Source, payloads: list[bytes]
    ) -> None:
        """Send to this address, and relay what comes back. Raises DialError if that can't be."""
        v6 = ":" in host
        pool = DEFAULT if decision.ruling is None else decision.ruling.pool
        key = pool, 6 if v6 else 4
        mapping = self._mappings.get(key)
        if mapping is None:
            mapping = self._mappings[key] = open_mapping(self, key, source)
        address = host, decision.port
        for payload in payloads:
            try:
                mapping.sock.sendto(payload, address)
            except OSError as error:
                if error.errno not in _CAUSES:
                    raise DialError(error.errno or errno.EIO, join_port(host, decision.port), "send to") from None
                self.drop(_CAUSES[error.errno])
            else:
                self._count_sent(destination, mapping, len(payload))
        destination.mapping = mapping
        destination.address = address
        destination.reply = header(host, decision.port)
        mapping.lone = mapping.lone and decision.port == _DNS_PORT
        mapping.asked[host] = destination
        mapping.replies[(*address, 0, 0) if v6 else address] = destination

    # ---- to the client

    def unknown_sender(self, mapping: Mapping, sender: tuple[object, ...]) -> Destination:
        """The destination that this address belongs to; NOBODY if it may not send to the client."""
        host, port = str(sender[0]).partition("%")[0], sender[1]
        assert isinstance(port, int)
        if host not in mapping.asked and not self.means.answers_from_any:
            return NOBODY
        # It counts as a destination of its own, and the rules have to allow it too.
        key = header(host, port)
        decision = Decision(self.means.rules, self._client, host, port, UDP_ASSOCIATE)
        ruling = decision.ruling
        destination = NOBODY
        if key not in self._destinations and ruling is not None and ruling.allowed and ruling.pool == mapping.key[0]:
            self._make_room()
            destination = self._destinations[key] = Destination(key, decision, self.reactor.now)
            destination.mapping = mapping
            destination.address = host, port
            destination.reply = key
        if len(mapping.replies) < 2 * _MOST_DESTINATIONS:
            mapping.replies[sender] = destination
        return destination

    def deliver(self, datagram: memoryview) -> bool:
        """Send this to the client, with its header. Returns whether the kernel has taken it."""
        try:
            self._relay.sock.send(datagram)
        except OSError as error:
            self.drop(_CAUSES.get(error.errno or 0, "client_gone"))
            return False
        return True

    def answered(self, mapping: Mapping) -> None:
        """A name server has answered: if all of them have, close the mapping, which was for these queries only."""
        if self._all_answered(mapping):
            self.reactor.call_soon(partial(self._close_answered, mapping))

    def _close_answered(self, mapping: Mapping) -> None:
        if mapping.lone and self._mappings.get(mapping.key) is mapping and self._all_answered(mapping):
            self._close_mapping(mapping)

    def _all_answered(self, mapping: Mapping) -> bool:
        return all(each.rx_packets >= each.tx_packets for each in self._of(mapping))

    # ---- mappings

    def look_at(self, mapping: Mapping, now: float) -> None:
        """Close a mapping that is not in use, and move one whose address is no longer on this host."""
        if self._mappings.get(mapping.key) is not mapping:
            return
        idle = min(self.means.idle, _DNS_IDLE) if mapping.lone else self.means.idle
        if mapping.active + idle <= now:
            self._close_mapping(mapping)
            return
        self._has_source(mapping)
        mapping.deadline = min(mapping.active + idle, now + LOOK_EVERY)

    def _has_source(self, mapping: Mapping) -> bool:
        """Whether the mapping's address is on this host. If it has gone, the mapping moves to another, and its
        destinations see a new client. (The kernel would go on sending from an address of IPv6 that has gone.)
        """
        usable = self.means.egress.usable()
        if mapping.usable is not usable:
            mapping.usable = usable
            used = mapping.used
            mapping.has_source = used is None or self.means.egress.is_here(used) or self._move(mapping, used)
        return mapping.has_source

    def _move(self, mapping: Mapping, before: str) -> bool:
        """Go on from another address, if there is one."""
        pool, version = mapping.key
        try:
            mapping.move(self.means.egress.pick(pool, self._client, "", _ANY_ADDRESS[version]))
        except (NoEgress, DialError) as error:
            self._records.mapping_lost(pool, before, error)
            return False
        self._records.mapping_moves(pool, before, mapping.used)
        return True

    def _close_mapping(self, mapping: Mapping) -> None:
        """Its destinations are over; the next datagram to one of them opens another mapping."""
        del self._mappings[mapping.key]
        for key in [key for key, each in self._destinations.items() if each.mapping is mapping]:
            self._forget(key)
        self.drop("receive_buffer_full", mapping.overflowed())
        mapping.close()
        self.means.associations.give_back()

    def _of(self, mapping: Mapping) -> Iterator[Destination]:
        return (each for each in self._destinations.values() if each.mapping is mapping)

    # ---- destinations

    def _make_room(self) -> None:
        """Forget the oldest destination if there are too many. The next datagram to it opens it again."""
        if len(self._destinations) >= _MOST_DESTINATIONS:
            self._forget(next(iter(self._destinations)))

    def _forget(self, key: bytes) -> None:
        """A destination is over."""
        destination = self._destinations.pop(key)
        mapping = destination.mapping
        if mapping is None:
            return
        host, port = destination.address
        sender = (host, port, 0, 0) if ":" in host else destination.address
        if mapping.replies.get(sender) is destination:
            del mapping.replies[sender]
        if mapping.asked.get(host) is destination:
            del mapping.asked[host]
        self._records.flow_ends(destination, mapping, self.reactor.now)

    def _refuse(self, destination: Destination, cause: str, error: Error | None = None) -> None:
        """Nothing is sent to it, until it is judged again; the first of these are recorded."""
        destination.refused = cause
        destination.again = inf if cause in ("denied", "name") else self.reactor.now + _AGAIN_AFTER
        if error is not None:
            self._records.flow_refused(destination.decision, error)

    # ---- the association

    def drop(self, cause: str, number: int = 1) -> None:
        """Count datagrams that are not relayed."""
        if number:
            self.means.associations.dropped(cause, number)

    def moved(self) -> tuple[int, int]:
        destinations, over = self._destinations.values(), self._records.over
        tx_bytes, rx_bytes = sum(each.tx_bytes for each in destinations), sum(each.rx_bytes for each in destinations)
        return over.tx_bytes + tx_bytes, over.rx_bytes + rx_bytes

    def failed(self, error: Exception) -> None:
        """A bug: it ends this association, and no other."""
        log.error("internal error", exc_info=error)
        self.end(Reason.ERROR, Side.PROXY)

    def close(self) -> None:
        """Close the sockets and write the records of destinations, once. Only behind the events of a turn."""
        if self._relay.fd < 0:
            return
        if self.result is None:
            self.result = Reason.STOPPED, Side.PROXY
        for lookup in list(self._lookups):
            if lookup.on_interrupt is not None:
                lookup.on_interrupt(Ended())
        for mapping in list(self._mappings.values()):
            self._close_mapping(mapping)
        self._destinations.clear()  # refused ones
        self.drop("receive_buffer_full", self._relay.overflowed())
        self._relay.close()

"""All transparent UDP of a worker: where a client's first datagram to a destination goes, and the bounds of it all.

    datagram -> destination not of this host? -> no loop? -> route -> a way for UDP? -> flow -> association

Later ones of the same flow go to its own socket; see sockets.py.
"""

from __future__ import annotations

import errno
import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

from transocks.access_log import AccessLog
from transocks.direct import Direct
from transocks.original_dst import Loop, LoopGuard
from transocks.routes import REJECT, UDP, Routes
from transocks.udp.association import Means, UdpAssociation
from transocks.udp.flow import ClientFlow
from transocks.udp.listener import DatagramListener
from transocks.udp.records import UdpRecords
from transocks.udp.sockets import open_flow, open_listener
from transocks.upstreams.group import UpstreamGroup
from usocksd.net.address import HostPort, IPAddress, numeric_address, with_zone
from usocksd.net.ending import Reason, Side
from usocksd.net.listeners import NO_SUCH_FAMILY, ListenError
from usocksd.net.reactor import Reactor, Session
from usocksd.settings.types import ListenAddress

log = logging.getLogger(__name__)

# At the bound of flows, and at that of descriptors, one in 16 of a client's gives way at a time.
_SHARE: Final = 16
_LEAST: Final = 4
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Causes by which datagrams are dropped, beside those of usocksd/serve/associations.py.
_DROPPED: Final = (
    "unreachable",
    "limit",
    "no_udp",
    "local",
    "loop",
    "rejected",
    "not_redirected",
    "address_in_use",
    "no_flow",
)

Address = tuple[Any, ...]
"""As sockets give it: for IPv6 with flow information and scope."""


class TransparentUdp:
    """All of it."""

    def __init__(
        self,
        listen: Sequence[ListenAddress],
        *,
        means: Means,
        reactor: Reactor,
        begin: Callable[[Session, str, int], bool],
        guard: LoopGuard,
        routes: Routes,
        ways: Mapping[str, UpstreamGroup | Direct],
        is_local: Callable[[IPAddress], bool],
        access_log: AccessLog,
    ) -> None:
        """`begin`: see Parts. `ways` are where routes lead, by name. `guard` is about datagrams."""
        self.means = means
        means.counters.declare(_DROPPED)
        self._listen = listen
        self._reactor = reactor
        self._begin = begin
        self._guard = guard
        self._routes = routes
        self._ways = ways
        self._is_local = is_local
        self._access_log = access_log
        self._listeners: list[DatagramListener] = []
        self._flows: dict[tuple[Address, Address], ClientFlow] = {}
        self._associations: dict[tuple[Address, str], UdpAssociation] = {}
        self._own_ports: dict[int, int] = {}
        """Those of outlets, with the number of outlets that have it"""
        self._makes_room = False

    def open(self) -> None:
        """Receive from now on. Raises ListenError."""
        for listen in self._listen:
            try:
                sock = open_listener(str(listen.address), listen.port)
            except ListenError as error:
                if listen.optional and error.errno in NO_SUCH_FAMILY and len(self._listen) > 1:
                    continue
                raise
            self._listeners.append(DatagramListener(self, self._reactor, sock))
            log.debug("listening for datagrams", extra={"fields": {"address": str(listen)}})

    def shut(self) -> None:
        """Begin no more flows: another worker does. Those that there are go on."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()

    def close(self) -> None:
        """Give back what it has opened, but for associations, which are sessions."""
        self.shut()
        self._guard.close()

    # ---- datagrams

    def first(self, client: Address, destination: Address, size: int) -> None:
        """A listener has got this datagram of `size` bytes, which is in the reactor's buffer at ROOM."""
        flow = self._flows.get((client, destination))
        if flow is None:
            flow = self._new_flow(client, destination)
            if flow is None:
                return
        flow.arrived(size)

    def answer(self, association: UdpAssociation, host: str, port: int) -> ClientFlow | None:
        """The flow for a datagram from this address, where the client has sent nothing. None: it is dropped."""
        if self._may_not(numeric_address(host)):
            self._drop("local")
            return None
        client = association.key[0]
        destination: Address = (host, port, 0, 0) if len(client) > 2 else (host, port)
        if len(destination) != (4 if ":" in host else 2) or (client, destination) in self._flows:
            # Of the other family, or of a flow that has another way.
            self._drop("stranger")
            return None
        return self._open(association, client, destination, "")

    # ---- flows

    def _new_flow(self, client: Address, destination: Address) -> ClientFlow | None:
        """None: the datagram is dropped, and has been counted."""
        source, place = _host_port(client), _host_port(destination)
        address = numeric_address(place.host)
        if self._may_not(address):
            self._drop("local")
            return None
        try:
            if source.port in self._own_ports and self._is_local(numeric_address(source.host)):
                raise Loop("it is one of our own: exempt them from the redirect rules")
            self._guard.check(source, place)
        except Loop as error:
            self._drop("loop", "loop refused", source.host, client_addr=source, dest_addr=place, error=error)
            return None
        decision = self._routes.decide(numeric_address(source.host), address, None, place.port, UDP)
        if decision.via == REJECT:
            more = {"client_addr": source, "dest_addr": place, "route": decision.route}
            self._drop("rejected", "rejected by route", (source.host, decision.route), **more)
            return None
        association = self._associations.get((client, decision.via))
        if association is None or association.result is not None:
            association = self._new_association(client, source, place, decision.via, decision.route)
            if association is None:
                return None
        flow = self._open(association, client, destination, decision.route)
        if flow is None and not association.flows:
            association.end(Reason.ERROR, Side.PROXY)
        return flow

    def _new_association(
        self, client: Address, source: HostPort, place: HostPort, via: str, route: str
    ) -> UdpAssociation | None:
        way = self._ways[via]
        group = way if isinstance(way, UpstreamGroup) else None
        if group is not None and not group.carries_udp:
            self._drop("no_udp", "no upstream carries UDP", via, group=via, client_addr=source, dest_addr=place)
            return None
        if not self.means.counters.room():
            self._out_of_descriptors()
            return None
        records = UdpRecords(self._access_log, source, place, route, self._reactor.now)
        association = UdpAssociation(self, self._reactor, (client, via), client=source, group=group, records=records)
        if not self._begin(association.serve(), source.host, source.port):
            self._drop("limit")
            return None
        self._associations[client, via] = association
        return association

    def _open(
        self, association: UdpAssociation, client: Address, destination: Address, route: str
    ) -> ClientFlow | None:
        counters = self.means.counters
        if len(self._flows) >= self.means.udp.flows:
            self._make_room()
        if not counters.take():
            self._out_of_descriptors()
            return None
        place = _host_port(destination)
        try:
            sock = open_flow(destination, client, self.means.mark)
            try:
                flow = ClientFlow(association, sock, (client, destination), place, route)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            counters.give_back()
            if error.errno in _NO_DESCRIPTOR:
                self._out_of_descriptors()
            else:
                cause = "address_in_use" if error.errno == errno.EADDRINUSE else "no_flow"
                self._drop(cause, "can't answer for a destination", place.port, dest_addr=place, error=error)
            return None
        self._flows[flow.key] = flow
        association.add(flow)
        return flow

    def closed(self, flow: ClientFlow) -> None:
        """A flow is over."""
        del self._flows[flow.key]
        self.means.counters.give_back()

    def forget(self, association: UdpAssociation) -> None:
        """An association is over."""
        if self._associations.get(association.key) is association:
            del self._associations[association.key]

    def outlet_opens(self, port: int) -> None:
        """Our own datagrams leave from this port."""
        self._own_ports[port] = self._own_ports.get(port, 0) + 1

    def outlet_closes(self, port: int) -> None:
        """No longer."""
        left = self._own_ports.pop(port) - 1
        if left:
            self._own_ports[port] = left

    # ---- bounds

    def _make_room(self) -> None:
        """Have old flows end, behind the events of this turn."""
        if not self._makes_room:
            self._makes_room = True
            self._reactor.call_soon(self._end_oldest)

    def _out_of_descriptors(self) -> None:
        """A datagram is dropped, since no descriptor is left for a flow or an association."""
        self._make_room()
        self._drop("descriptors", "too few file descriptors left", flows=len(self._flows))

    def _end_oldest(self) -> None:
        """Those of the client with the most flows, so that a scan harms no other client; first those that were used
        longest ago.
        """
        self._makes_room = False
        by_client: dict[str, list[ClientFlow]] = {}
        for flow in self._flows.values():
            by_client.setdefault(str(flow.key[0][0]), []).append(flow)
        found = max(by_client.values(), key=len, default=[])
        number = max(len(found) // _SHARE, len(self._flows) - self.means.udp.flows, _LEAST)
        for flow in heapq.nsmallest(number, found, key=attrgetter("used")):
            flow.association.forget(flow, Reason.SHED, Side.PROXY)

    def _may_not(self, address: IPAddress) -> bool:
        """Whether no transparent socket may have this address: this host's own datagrams would come to it."""
        return (
            address.is_multicast
            or address.is_unspecified
            or address.is_loopback
            or address.is_link_local
            or (address.version == 4 and int(address) == 0xFFFFFFFF)
            or self._is_local(address)
        )

    def _drop(self, cause: str, message: str = "", about: object = None, **fields: object) -> None:
        """Count a datagram that is dropped; with a message, also record that, now and then for each `about`."""
        self.means.counters.dropped(cause)
        if message and (times := self._access_log.repeats.due((cause, about))) is not None:
            more = {"count": times} if times > 1 else {}
            shown = {key: str(value) for key, value in fields.items()}
            log.warning(message, extra={"fields": {"protocol": UDP, **shown, **more}})


def _host_port(address: Address) -> HostPort:
    if len(address) > 2 and address[3]:
        return HostPort(with_zone(address[0], address[3]), address[1])
    return HostPort(address[0], address[1])

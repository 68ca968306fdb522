"""The datagrams of one port of a client on one way: a UDP association with an upstream proxy, or a socket past them.

    client -> flow socket -> outlet: the relay of the proxy -> destination
    destination -> relay -> outlet -> flow socket -> client

While the proxy is asked, datagrams wait in a short queue. When the proxy dies, the client's next datagram has another
one asked; what the proxy's mapping was is lost with it. The session that does this is the association's life: it ends
when the last of its flows is over.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from transocks.config import UdpConfig
from transocks.udp.flow import ROOM, ClientFlow
from transocks.udp.outlets import DirectOutlet, Outlet, RelayOutlet
from transocks.udp.records import UdpRecords
from transocks.upstreams.group import UpstreamGroup
from transocks.upstreams.request import Tunnel, TunnelRequest
from transocks.upstreams.state import UpstreamState
from usocksd.errors import DialError, Error
from usocksd.net.address import HostPort, bound_to, socket_address
from usocksd.net.datagrams import Association, Ended, open_socket
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import Endpoint, Interruptible, PeerReset
from usocksd.net.keepalive import KeepAlive, keep_alive
from usocksd.net.reactor import Reactor
from usocksd.serve.associations import Associations
from usocksd.settings.types import Timeouts
from usocksd.socks.datagram import BadDatagram, header, parse

if TYPE_CHECKING:
    from transocks.udp.transparent import TransparentUdp

log = logging.getLogger(__name__)

# After a failure, datagrams of the client are dropped for this many seconds before a proxy is asked again.
_AGAIN_AFTER: Final = 1.0
_CAUSES: Final = {
    errno.EAGAIN: "send_buffer_full",
    errno.ENOBUFS: "send_buffer_full",
    errno.EMSGSIZE: "too_long",
}


class Means:
    """What all associations of a worker share."""

    def __init__(
        self,
        *,
        udp: UdpConfig,
        timeouts: Timeouts,
        mark: int | None,
        counters: Associations,
        keepalive: KeepAlive,
    ) -> None:
        self.udp = udp
        self.timeouts = timeouts
        self.mark = mark
        self.counters = counters
        self.keepalive = keepalive


class UdpAssociation(Association):
    """One of them. `group` None: the datagrams go past the proxies."""

    __slots__ = (
        "_asleep",
        "_client",
        "_group",
        "_hosts",
        "_kept",
        "_owner",
        "_recorded",
        "counters",
        "flows",
        "key",
        "means",
        "outlet",
        "reactor",
        "records",
        "rx_bytes",
        "space",
        "tx_bytes",
    )

    def __init__(
        self,
        owner: TransparentUdp,
        reactor: Reactor,
        key: tuple[tuple[Any, ...], str],
        *,
        client: HostPort,
        group: UpstreamGroup | None,
        records: UdpRecords,
    ) -> None:
        """`key`: the client's address, and the name of the way."""
        super().__init__(Interruptible(reactor), records)
        means = owner.means
        self.reactor = reactor
        self.means = means
        self.counters = means.counters
        self.key = key
        self.records = records
        self.space = reactor.view[ROOM:]
        self.outlet: Outlet | None = None
        """Where datagrams leave; None: they wait for it."""
        self.flows: dict[bytes, ClientFlow] = {}
        """By their headers"""
        self.tx_bytes = 0
        """Of flows that are over"""
        self.rx_bytes = 0
        self._owner = owner
        self._client = client
        self._group = group
        self._hosts: dict[str, int] = {}
        """How many flows each destination's address has"""
        self._kept: list[tuple[ClientFlow, bytes]] = []
        self._asleep = False
        """It has no outlet, and the next datagram wakes it."""

    # ---- the session

    async def serve(self) -> None:
        """The session, from the first datagram to the end of the last flow."""
        self.counters.enter(self)
        try:
            while self.result is None:
                try:
                    await self._carry()
                except Error as error:
                    self._drop_kept("unreachable")
                    self.records.refused(error)
                    await self.control.wait_until(self.reactor.clock() + _AGAIN_AFTER)
                    self.end(Reason.ERROR, Side.UPSTREAM)
        except Ended:
            pass
        finally:
            self._close()

    async def _carry(self) -> None:
        """One proxy, until it dies; then until there is a datagram again. Raises Error, Ended."""
        first = next(iter(self.flows.values()))
        request = TunnelRequest(self._client, first.place, udp=True)
        found: tuple[Tunnel, UpstreamState] | None = None
        if self._group is not None:
            found = await self._group.associate(request, self.control, self.means.timeouts, self.records)
        if found is None:
            await self._go_directly()
            return
        endpoint, since = found[0].endpoint, self.reactor.clock()
        try:
            if self.result is None:
                self._open(self._relay_outlet(found[0], found[1]))
                await self._outlive(endpoint)
        finally:
            self._shut()
            endpoint.close()
        if self.result is None:
            self.records.upstream_ended()
            # A proxy that ends each association at once is not asked more often than one that refuses.
            await self.control.wait_until(since + _AGAIN_AFTER)
        if self.result is None and not self._kept:
            self._asleep = True
            await self.control.wait()

    async def _go_directly(self) -> None:
        v6 = ":" in self._client.host
        self.records.goes_directly()
        try:
            self._open(DirectOutlet(self, open_socket(v6=v6, host="::" if v6 else "0.0.0.0", mark=self.means.mark)))
            await self.control.wait()
        finally:
            self._shut()

    def _relay_outlet(self, tunnel: Tunnel, state: UpstreamState) -> RelayOutlet:
        """Leaves from the address of the connection to the proxy, which takes datagrams from there.

        Raises DialError.
        """
        relay = tunnel.relay
        assert relay is not None
        control = tunnel.endpoint
        here = bound_to(control.sock).host
        v6 = ":" in relay.host
        sock = open_socket(v6=v6, host=here if v6 == (":" in here) else None, mark=self.means.mark)
        try:
            sock.connect(socket_address(relay.host, relay.port))
            keep_alive(control.sock, self.means.keepalive.open)
            return RelayOutlet(self, sock, control, state)
        except OSError as error:
            sock.close()
            raise DialError(error.errno or errno.EIO, f"{relay} (UDP)") from None

    async def _outlive(self, control: Endpoint) -> None:
        """Wait for the end of the connection to the proxy, and so of its association."""
        control.deadline = inf
        self.control.on_interrupt = control.interrupt
        try:
            while self.result is None and await control.receive():
                await self.reactor.yield_turn()
        except (OSError, PeerReset):
            pass
        finally:
            self.control.on_interrupt = None

    def _open(self, outlet: Outlet) -> None:
        self.outlet = outlet
        self._owner.outlet_opens(outlet.port)
        self.records.starts(outlet)
        kept, self._kept = self._kept, []
        for flow, payload in kept:
            outlet.send_kept(flow, payload)

    def _shut(self) -> None:
        outlet, self.outlet = self.outlet, None
        if outlet is not None:
            self.dropped("receive_buffer_full", outlet.overflowed())
            self._owner.outlet_closes(outlet.port)
            outlet.close()

    def _close(self) -> None:
        if self.result is None:
            self.result = Reason.STOPPED, Side.PROXY
        self._drop_kept("unreachable")
        self._shut()
        self._owner.forget(self)
        for flow in list(self.flows.values()):
            self._remove(flow)
        self.records.ends(self.result, self.tx_bytes, self.rx_bytes, self.reactor.now)
        self.counters.leave(self)

    # ---- datagrams

    def keep(self, flow: ClientFlow, size: int) -> None:
        """A datagram of the client, in the reactor's buffer at ROOM, waits for the outlet."""
        if self.result is not None:
            self.dropped("unreachable")
        elif len(self._kept) >= self.means.udp.queue:
            self.dropped("queue_full")
        else:
            self._kept.append((flow, bytes(self.space[:size])))
            if self._asleep:
                self._asleep = False
                self.control.wake()

    def _drop_kept(self, cause: str) -> None:
        self.dropped(cause, len(self._kept))
        self._kept = []

    def dropped(self, cause: str, number: int = 1) -> None:
        """Count datagrams that are not relayed."""
        if number:
            self.counters.dropped(cause, number)

    def not_sent(self, error: OSError) -> None:
        """The kernel has refused to send a datagram."""
        self.dropped(_CAUSES.get(error.errno or 0, "no_route"))

    def belongs_to(self, client: tuple[Any, ...], destination: tuple[Any, ...], size: int) -> None:
        """A datagram in the reactor's buffer at ROOM is not of this association, but of another client."""
        self._owner.first(client, destination, size)

    def unknown_sender(self, size: int) -> ClientFlow | None:
        """The flow for a datagram from the proxy, in the reactor's buffer, that comes from where nothing was sent.

        The proxy decides who may answer. None: it is dropped.
        """
        try:
            head = parse(self.reactor.view, size)
        except BadDatagram as fault:
            self.dropped(fault.cause)
            return None
        return self._owner.answer(self, head.host, head.port)

    def flow_of(self, sender: tuple[Any, ...]) -> ClientFlow | None:
        """The flow for a datagram that has come directly. None: it is dropped, for its address was not asked."""
        host, port = str(sender[0]), int(sender[1])
        flow = self.flows.get(header(host.partition("%")[0], port))
        if flow is None:
            if host in self._hosts:
                return self._owner.answer(self, host, port)
            self.dropped("stranger")
        return flow

    # ---- flows

    def add(self, flow: ClientFlow) -> None:
        """A flow begins."""
        self.flows[flow.header] = flow
        host = flow.place.host
        self._hosts[host] = self._hosts.get(host, 0) + 1

    def answered(self, flow: ClientFlow) -> None:
        """A name server has answered all that it was asked: it is over, unless more has come by the end of the turn."""
        self.reactor.call_soon(partial(self._forget_if, flow, flow.is_answered, Side.PROXY))

    def client_left(self, flow: ClientFlow) -> None:
        """Nobody listens at the client's port any more."""
        self.reactor.call_soon(partial(self._forget_if, flow, lambda: True, Side.CLIENT))

    def _forget_if(self, flow: ClientFlow, over: Callable[[], bool], by: Side) -> None:
        if flow.fd >= 0 and over():
            self.forget(flow, Reason.CLOSED, by)

    def forget(self, flow: ClientFlow, reason: Reason, by: Side) -> None:
        """A flow is over, and the association with its last one. Only behind the events of a turn."""
        self._remove(flow)
        if not self.flows:
            self.end(reason, by)

    def _remove(self, flow: ClientFlow) -> None:
        del self.flows[flow.header]
        host = flow.place.host
        left = self._hosts[host] - 1
        if left:
            self._hosts[host] = left
        else:
            del self._hosts[host]
        self.tx_bytes += flow.tx_bytes
        self.rx_bytes += flow.rx_bytes
        self.dropped("receive_buffer_full", flow.overflowed())
        flow.close()
        self._owner.closed(flow)
        self.records.flow_ends(flow, self.reactor.now)

    # ---- for the worker

    def moved(self) -> tuple[int, int]:
        flows = self.flows.values()
        return (
            self.tx_bytes + sum(flow.tx_bytes for flow in flows),
            self.rx_bytes + sum(flow.rx_bytes for flow in flows),
        )

    def stop(self) -> None:
        """The process stops."""
        self.end(Reason.STOPPED, Side.PROXY)

    def failed(self, error: Exception) -> None:
        """A bug: it ends this association, and no other."""
        log.error("internal error", exc_info=error)
        self.end(Reason.ERROR, Side.PROXY)

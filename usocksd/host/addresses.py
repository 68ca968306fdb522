"""The addresses of this host: a snapshot by netifaces, then changes from rtnetlink(7) while `watch` runs."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NoReturn

import netifaces
import trio

from usocksd.errors import Error
from usocksd.host.netlink import DUMP, DUMP_INTR, RECEIVE_SIZE, ROUTE, ask, attributes, connect, messages
from usocksd.log.metrics import Counter, Metrics
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

_logger = logging.getLogger("usocksd.host.addresses")

# linux/rtnetlink.h, linux/if_addr.h, linux/netlink.h
_RTMGRP_ADDRESSES = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_IFA_F_OPTIMISTIC, _IFA_F_TENTATIVE = 0x04, 0x40
_IFADDRMSG = struct.Struct("=BBBBi")  # family, length of the prefix, flags, scope, interface
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_RTM_NEWROUTE, _RTM_GETROUTE, _RTN_LOCAL, _RT_TABLE_LOCAL, _RTA_DST = 24, 26, 2, 255, 1
_RTMSG = struct.Struct("=8BI")  # family, lengths of destination and source, tos, table, protocol, scope, type; flags
# How often routes are looked at, in seconds: an event for each would cost too much on a router, which has a million.
_LOOK_AT_ROUTES_EVERY = 5.0
# Seconds until watching is tried again; they double each time, up to the second number.
_FIRST_RETRY, _LONGEST_RETRY = 0.5, 30.0
# The kernel has no routes of this family.
_NO_FAMILY = {errno.EOPNOTSUPP, errno.EAFNOSUPPORT}


class LocalAddresses(frozenset[IPAddress]):
    """The addresses of this host: iterating gives those of its interfaces; `in` knows networks routed to it too."""

    networks: tuple[IPNetwork, ...] = ()

    def __contains__(self, ip: object) -> bool:
        return super().__contains__(ip) or any(ip in network for network in self.networks)

    def texts(self) -> set[str]:
        """This host's addresses and networks."""
        return {*map(str, self), *map(str, self.networks)}


class HostAddresses:
    """The addresses that this host has right now."""

    def __init__(self, metrics: Metrics | None = None, *, look_every: float = _LOOK_AT_ROUTES_EVERY) -> None:
        """Takes a snapshot, which is valid until `watch` runs. `look_every`: seconds until a route to this host
        is noticed.
        """
        self.current: LocalAddresses = _snapshot()
        self._look_every = look_every
        name, help = "addresses_watched", "Whether changes of the addresses of this host are noticed"
        self._watched = Counter() if metrics is None else metrics.minimum(name, help)
        self._complained = False
        # An address can be on several interfaces; it is gone when the last of them has lost it.
        self._assigned: set[tuple[IPAddress, int]] = set()
        self._networks = self.current.networks

    def is_local(self, ip: IPAddress) -> bool:
        """Whether a connection to this address ends here: an address of this host or of a network that is routed to
        it, 127.0.0.0/8, or ::1.
        """
        if isinstance(ip, IPv6Address):
            ip = ip.ipv4_mapped or ip
        return ip in self.current or ip.is_loopback

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep `current` up to date until cancelled; started when it is up to date for the first time.

        `current` is replaced only when an address has come or gone. If netlink does not work (a sandbox forbids it, or
        no descriptor is left), a record and a metric say so, `current` stays, and watching is tried again.
        """
        after = _FIRST_RETRY
        while True:
            try:
                with connect(ROUTE) as events, trio.socket.from_stdlib_socket(events) as receiver:
                    # Subscribed before the dump, so that changes during it are applied after it.
                    events.bind((0, _RTMGRP_ADDRESSES))
                    await self._dump()
                    self._watching()
                    task_status.started()
                    task_status, after = trio.TASK_STATUS_IGNORED, _FIRST_RETRY
                    await self._follow(receiver, events)
            except OSError as error:
                self._not_watching(error)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(after)
            after = min(2 * after, _LONGEST_RETRY)

    async def _follow(self, receiver: trio.socket.SocketType, events: socket.socket) -> NoReturn:
        """Raises OSError when it can't continue."""
        look_at = trio.current_time() + self._look_every
        while True:
            data = None
            try:
                with trio.move_on_at(look_at):
                    data = await receiver.recv(RECEIVE_SIZE)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # The kernel dropped events. Those still queued are older: applied after the dump they
                # would bring back what the dropped ones took away.
                _discard_queued(events)
                await self._dump()
            else:
                if data is None:
                    self._networks = _routed()
                    look_at = trio.current_time() + self._look_every
                for kind, _, body in messages(data or b""):
                    self._apply(kind, body)
                self._publish()

    def _watching(self) -> None:
        self._watched.value = 1
        if self._complained:
            self._complained = False
            _logger.info("addresses of this host are watched again")

    def _not_watching(self, error: OSError) -> None:
        self._watched.value = 0
        if not self._complained:
            self._complained = True
            fields = {"error": str(error)}
            _logger.error(
                "addresses of this host are not watched: the last known ones stay in use", extra={"fields": fields}
            )

    async def _dump(self) -> None:
        """Ask for all addresses. Raises OSError."""
        complete = False
        while not complete:
            await trio.lowlevel.checkpoint()
            self._assigned.clear()
            complete = True
            with connect(ROUTE) as asker:
                for kind, flags, body in ask(asker, _RTM_GETADDR, DUMP, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
                    self._apply(kind, body)
                    complete &= not flags & DUMP_INTR
        self._networks = _routed()
        self._publish()

    def _apply(self, kind: int, message: bytes) -> None:
        if kind not in {_RTM_NEWADDR, _RTM_DELADDR}:
            return
        _, _, flags, _, index = _IFADDRMSG.unpack_from(message)
        found = dict(attributes(message[_IFADDRMSG.size :]))
        # On a point-to-point link IFA_ADDRESS is the other end's address.
        address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if address is None:
            return
        assignment = (ip_address(address), index)
        # Until duplicate address detection is over, the address can't be used; then another event comes.
        tentative = flags & (_IFA_F_TENTATIVE | _IFA_F_OPTIMISTIC) == _IFA_F_TENTATIVE
        if kind == _RTM_NEWADDR and not tentative:
            self._assigned.add(assignment)
        else:
            self._assigned.discard(assignment)

    def _publish(self) -> None:
        now, before = LocalAddresses(address for address, _ in self._assigned), self.current
        now.networks = self._networks
        if now == before and now.networks == before.networks:
            return
        self.current = now
        fields = {"added": sorted(now.texts() - before.texts()), "removed": sorted(before.texts() - now.texts())}
        _logger.info("addresses of this host changed", extra={"fields": fields})


def _discard_queued(sock: socket.socket) -> None:
    while True:
        try:
            sock.recv(RECEIVE_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


def _routed() -> tuple[IPNetwork, ...]:
    """The networks that are routed to this host, besides loopback, though no interface has their addresses (AnyIP:
    `ip route add local PREFIX dev lo`): local routes to more than one address. Raises OSError.
    """
    found: list[IPNetwork] = []
    for family, bits in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        wanted = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_LOCAL, 0, 0, _RTN_LOCAL, 0)
        with connect(ROUTE) as asker:
            with contextlib.suppress(OSError):  # older kernels answer with all tables
                asker.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            try:
                routes = [body for kind, _, body in ask(asker, _RTM_GETROUTE, DUMP, wanted) if kind == _RTM_NEWROUTE]
            except OSError as error:
                if error.errno not in _NO_FAMILY:
                    raise
                routes = []
        for body in routes:
            _, length, _, _, table, _, _, route, _ = _RTMSG.unpack_from(body)
            if length < bits and (table, route) == (_RT_TABLE_LOCAL, _RTN_LOCAL):
                # The default route has no destination.
                packed = dict(attributes(body[_RTMSG.size :])).get(_RTA_DST, bytes(bits // 8))
                found.append(ip_network((packed, length)))
    return tuple(network for network in found if not network.is_loopback)


def _snapshot() -> LocalAddresses:
    found: set[IPAddress] = set()
    try:
        names = netifaces.interfaces()
    except OSError as error:
        raise Error(
            f"can't list the addresses of this host: {error.strerror}; a sandbox has to allow netlink sockets"
            " (AF_NETLINK in RestrictAddressFamilies= of the unit)"
        ) from None
    for name in names:
        try:
            families = netifaces.ifaddresses(name)
        except ValueError:  # it went meanwhile
            continue
        for family in (netifaces.AF_INET, netifaces.AF_INET6):
            found.update(numeric_address(entry["addr"]) for entry in families.get(family, ()) if "addr" in entry)
    here = LocalAddresses(found)
    with contextlib.suppress(OSError):
        here.networks = _routed()
    return here

"""The addresses of this host, and whose a local socket is: what netifaces and netlink tell.

`HostAddresses` knows the addresses from a netifaces snapshot at once, and from rtnetlink(7) events as long as
`watch` runs. `SocketOwners` asks the kernel for the owner of one TCP socket through sock_diag(7).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import sys
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NoReturn, TypeAlias

import netifaces
import trio

from usocksd.errors import Error
from usocksd.host.netlink import HEADER, attributes, messages
from usocksd.log.metrics import Counter, Metrics
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

_logger = logging.getLogger("usocksd.host.addresses")

Address: TypeAlias = tuple[str, int]

# linux/rtnetlink.h, linux/netlink.h, linux/if_addr.h
_RTMGRP_ADDRESSES = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 0x1, 0x10, 0x300
_IFA_F_OPTIMISTIC, _IFA_F_TENTATIVE = 0x04, 0x40
_IFADDRMSG = struct.Struct("=BBBBi")  # family, length of the prefix, flags, scope, interface
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_RTM_NEWROUTE, _RTM_GETROUTE, _RTN_LOCAL, _RT_TABLE_LOCAL, _RTA_DST = 24, 26, 2, 255, 1
_RTMSG = struct.Struct("=8BI")  # family, lengths of destination and source, tos, table, protocol, scope, type; flags
# Seconds. No event tells of a route only, unless of all of them, and a router has a million.
_LOOK_AT_ROUTES_EVERY = 5.0
# Seconds until it is tried again to watch, twice as long each time.
_TRY_AGAIN_FIRST, _TRY_AGAIN_AT_LEAST = 0.5, 30.0
_RECEIVE_SIZE = 1 << 16  # the kernel fills at most 32 KiB into one message of a dump


class Here(frozenset[IPAddress]):
    """Addresses of this host: it lists those of its interfaces, and has those of networks too that are routed to it."""

    networks: tuple[IPNetwork, ...] = ()

    def __contains__(self, ip: object) -> bool:
        return super().__contains__(ip) or any(ip in network for network in self.networks)

    def texts(self) -> set[str]:
        """All of it."""
        return {*map(str, self), *map(str, self.networks)}


class HostAddresses:
    """The addresses that this host has right now."""

    def __init__(self, metrics: Metrics | None = None, *, look_every: float = _LOOK_AT_ROUTES_EVERY) -> None:
        """Takes the snapshot; it stays what it is until `watch` runs. `look_every`: seconds until a route to this host
        is noticed.
        """
        self.current: Here = _snapshot()
        self._look_every = look_every
        name, help = "addresses_watched", "Whether changes of the addresses of this host are noticed"
        self._watched = Counter() if metrics is None else metrics.minimum(name, help)
        self._complained = False
        # An address can be on several interfaces, and goes with the last of them.
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
        """Keeps `current` true until cancelled; has started when it is so for the first time.

        `current` becomes another set when, and only when, an address came or went. When it can't (netlink is
        forbidden in a sandbox, or there is no descriptor left) it says so, in the log and in a metric, the addresses
        stay what they were, and it tries again.
        """
        after = _TRY_AGAIN_FIRST
        while True:
            try:
                with _netlink() as events, trio.socket.from_stdlib_socket(events) as receiver:
                    # Subscribed before the dump: what changes meanwhile is told by an event that is applied after it.
                    events.bind((0, _RTMGRP_ADDRESSES))
                    await self._dump()
                    self._watching()
                    task_status.started()
                    task_status, after = trio.TASK_STATUS_IGNORED, _TRY_AGAIN_FIRST
                    await self._follow(receiver, events)
            except OSError as error:
                self._not_watching(error)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(after)
            after = min(2 * after, _TRY_AGAIN_AT_LEAST)

    async def _follow(self, receiver: trio.socket.SocketType, events: socket.socket) -> NoReturn:
        """Raises OSError when it can't any more."""
        look_at = trio.current_time() + self._look_every
        while True:
            data = None
            try:
                with trio.move_on_at(look_at):
                    data = await receiver.recv(_RECEIVE_SIZE)
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
            _logger.error("addresses of this host are not watched: they stay what they were", extra={"fields": fields})

    async def _dump(self) -> None:
        """Asks for all addresses. The kernel answers from memory, so this does not block. Raises OSError."""
        complete = False
        while not complete:
            await trio.lowlevel.checkpoint()
            self._assigned.clear()
            with _netlink() as asker:
                body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
                asker.send(_request(_RTM_GETADDR, _NLM_F_DUMP, body))
                complete, last = True, False
                while not last:
                    for kind, flags, message in messages(asker.recv(_RECEIVE_SIZE)):
                        self._apply(kind, message)
                        # The list changed under the dump's feet and may lack any address: ask again.
                        complete &= not flags & _NLM_F_DUMP_INTR
                        last |= kind == _NLMSG_DONE
                        if kind == _NLMSG_ERROR:
                            code = -int.from_bytes(message[:4], sys.byteorder, signed=True)
                            raise OSError(code, os.strerror(code))
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
        # Until duplicate address detection is over nothing can be sent from it; then another event comes.
        tentative = flags & (_IFA_F_TENTATIVE | _IFA_F_OPTIMISTIC) == _IFA_F_TENTATIVE
        if kind == _RTM_NEWADDR and not tentative:
            self._assigned.add(assignment)
        else:
            self._assigned.discard(assignment)

    def _publish(self) -> None:
        now, before = Here(address for address, _ in self._assigned), self.current
        now.networks = self._networks
        if now == before and now.networks == before.networks:
            return
        self.current = now
        fields = {"added": sorted(now.texts() - before.texts()), "removed": sorted(before.texts() - now.texts())}
        _logger.info("addresses of this host changed", extra={"fields": fields})


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


def _discard_queued(sock: socket.socket) -> None:
    while True:
        try:
            sock.recv(_RECEIVE_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


def _routed() -> tuple[IPNetwork, ...]:
    """The networks that the kernel takes for this host's own beside loopback, though no interface has their addresses
    (AnyIP: `ip route add local PREFIX dev lo`): local routes to more than one address. Raises OSError.
    """
    found: list[IPNetwork] = []
    for family, bits in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
        with _netlink() as asker:
            with contextlib.suppress(OSError):  # older kernels tell of all tables
                asker.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            wanted = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_LOCAL, 0, 0, _RTN_LOCAL, 0)
            asker.send(_request(_RTM_GETROUTE, _NLM_F_DUMP, wanted))
            kinds: set[int] = set()
            while kinds.isdisjoint({_NLMSG_DONE, _NLMSG_ERROR}):  # (an error: it has no such family)
                for kind, _, body in messages(asker.recv(_RECEIVE_SIZE)):
                    kinds.add(kind)
                    if kind == _RTM_NEWROUTE:
                        _, length, _, _, table, _, _, route, _ = _RTMSG.unpack_from(body)
                        if length < bits and (table, route) == (_RT_TABLE_LOCAL, _RTN_LOCAL):
                            # Without a destination it is all there is.
                            packed = dict(attributes(body[_RTMSG.size :])).get(_RTA_DST, bytes(bits // 8))
                            found.append(ip_network((packed, length)))
    return tuple(network for network in found if not network.is_loopback)


def _snapshot() -> Here:
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
    here = Here(found)
    with contextlib.suppress(OSError):
        here.networks = _routed()
    return here


def _request(kind: int, flags: int, body: bytes, sequence: int = 1) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, sequence, 0) + body


# linux/sock_diag.h, linux/inet_diag.h, and the states of include/net/tcp_states.h that have no owner.
_SOCK_DIAG_BY_FAMILY = 20
_NETLINK_SOCK_DIAG = 4
_TCP_SYN_RECV, _TCP_TIME_WAIT, _TCP_LISTEN, _TCP_NEW_SYN_RECV = 3, 6, 10, 12
_OWNERLESS = frozenset({_TCP_SYN_RECV, _TCP_TIME_WAIT, _TCP_LISTEN, _TCP_NEW_SYN_RECV})
# struct inet_diag_req_v2: family, protocol, extensions, pad, states; id: ports, addresses, interface, cookie
_DIAG_REQUEST = struct.Struct("=BBBxI2s2s16s16sIII")
# struct inet_diag_msg: family, state, timer, retransmits; id; expires, queues, uid, inode
_DIAG_ANSWER = struct.Struct("=BBBB48sIIIII")
_ALL_STATES = _NO_COOKIE = 0xFFFFFFFF


class SocketOwners:
    """Who owns a TCP socket of this host: one exact lookup in the kernel, some 5 µs, which never blocks."""

    def __init__(self) -> None:
        """Raises OSError where the kernel has no sock_diag(7) or a sandbox forbids netlink."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._socket.setblocking(False)  # the answer is there when send returns
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def owner_uid(self, local: Address, remote: Address) -> int | None:
        """The uid of the socket bound to `local` and connected to `remote`, as that socket sees them: for the
        client of a redirected connection, `remote` is the original destination.

        Numeric addresses of one family, as getsockname(2) gives them. None if there is no such socket on this
        host and in this network namespace, or nobody owns it any more (TIME_WAIT).
        """
        uid = self._lookup(local, remote, 0)
        if uid is None:
            # A socket with SO_BINDTODEVICE is found only with the interface it is bound to.
            for index, _ in socket.if_nameindex():
                uid = self._lookup(local, remote, index)
                if uid is not None:
                    break
        return uid

    def _lookup(self, local: Address, remote: Address, interface: int) -> int | None:
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        ports = local[1].to_bytes(2, "big"), remote[1].to_bytes(2, "big")
        request = _DIAG_REQUEST.pack(
            family,
            socket.IPPROTO_TCP,
            0,
            _ALL_STATES,
            *ports,
            socket.inet_pton(family, local[0].partition("%")[0]),
            socket.inet_pton(family, remote[0].partition("%")[0]),
            interface,
            _NO_COOKIE,
            _NO_COOKIE,
        )
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        try:
            self._socket.send(_request(_SOCK_DIAG_BY_FAMILY, 0, request, self._sequence))
            while True:
                answer = self._socket.recv(4096)
                _, kind, _, sequence, _ = HEADER.unpack_from(answer)
                if sequence == self._sequence:
                    break
        except OSError as error:  # no memory for the answer, or none came
            _logger.warning("socket owner unknown", extra={"fields": {"error": str(error)}})
            return None
        if kind != _SOCK_DIAG_BY_FAMILY:  # an error: ENOENT if there is no such socket
            return None
        _, state, _, _, identity, _, _, _, uid, _ = _DIAG_ANSWER.unpack_from(answer, HEADER.size)
        # Without a connection the kernel offers a listener on the same port instead.
        if state in _OWNERLESS or identity[:4] != ports[0] + ports[1]:
            return None
        return int(uid)

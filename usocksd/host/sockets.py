"""The sockets of this network namespace: sock_diag(7). Only resetting them needs privileges."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from ipaddress import ip_address
from typing import NamedTuple

import attrs

from usocksd.host.netlink import ACK, DUMP, HEADER, SOCK_DIAG, ask, attributes, connect, request
from usocksd.net.address import IPAddress

_logger = logging.getLogger("usocksd.host.sockets")

# linux/sock_diag.h
_BY_FAMILY, _DESTROY = 20, 21
# include/net/tcp_states.h
_SYN_RECV, _TIME_WAIT, _CLOSE, _LISTEN, _NEW_SYN_RECV = 3, 6, 7, 10, 12
_OWNERLESS = frozenset({_SYN_RECV, _TIME_WAIT, _LISTEN, _NEW_SYN_RECV})
_ALL_STATES = _NO_COOKIE = 0xFFFFFFFF
_BOTH_ENDS = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11  # ESTABLISHED to CLOSING; not TIME_WAIT
# linux/inet_diag.h. struct inet_diag_req_v2: family, protocol, extensions, states; struct inet_diag_sockid: ports,
# addresses, interface, cookie
_REQUEST = struct.Struct("=BBBxI4s16s16sIII")
_SOCKET_ID = 48  # the size of struct inet_diag_sockid, at the end of a request and at 4 in an answer
# struct inet_diag_msg: family, state; port and peer's port, address, peer's address; uid, inode
_ANSWER = struct.Struct("=BBxx4s16s16s12x12xII")
_LARGEST_ANSWER = 4096  # about one socket, attributes included
_SKV6ONLY, _SOCKOPT = 11, 22
_TRANSPARENT = 0x20 if sys.byteorder == "little" else 0x04  # the sixth bit of struct inet_diag_sockopt


@attrs.frozen(kw_only=True)
class ListeningSocket:
    """A socket that accepts connections."""

    address: IPAddress
    port: int
    uid: int
    inode: int
    only_v6: bool = False
    """:: does not stand for IPv4 too"""
    transparent: bool | None = None
    """IP_TRANSPARENT is set; None: the kernel does not say (before 5.10)"""

    def accepts(self, address: IPAddress, port: int) -> bool:
        """Whether a connection to this local address ends here."""
        if port != self.port:
            return False
        if self.address.version == address.version:
            return self.address.is_unspecified or self.address == address
        return self.address.is_unspecified and self.address.version == 6 and not self.only_v6


class Connection(NamedTuple):
    """Both ends of one, as address and port."""

    local: tuple[IPAddress, int]
    peer: tuple[IPAddress, int]


def listeners(*, udp: bool = False) -> tuple[ListeningSocket, ...]:
    """All of them; `udp`: the UDP sockets that are not connected. Raises OSError where netlink is forbidden, or the
    kernel has no sock_diag.
    """
    if udp:
        return tuple(_listener(message) for _, message in _dump(1 << _CLOSE, socket.IPPROTO_UDP))
    return tuple(_listener(message) for _, message in _dump(1 << _LISTEN))


def tcp_connections() -> Iterator[Connection]:
    """All connections; those of IPv4 over an IPv6 socket are given as IPv4. Raises OSError."""
    for family, message in _dump(_BOTH_ENDS):
        _, _, ports, local, peer, *_ = _ANSWER.unpack_from(message)
        size = 4 if family == socket.AF_INET else 16
        ends = [(ip_address(raw[:size]), int.from_bytes(at)) for raw, at in ((local, ports[:2]), (peer, ports[2:]))]
        yield Connection(*((getattr(address, "ipv4_mapped", None) or address, at) for address, at in ends))


def end_accepted(ports: Collection[int]) -> None:
    """Reset the connections accepted on these ports; for listeners with IP_TRANSPARENT also connections to other ports.

    Takes CAP_NET_ADMIN. Raises OSError, where the kernel can't (before 4.5, or built without) among others.
    """
    owners = {listener.uid for listener in listeners() if listener.port in ports and listener.transparent}
    found = [
        (family, message)
        for family, message in _dump(_BOTH_ENDS)
        if int.from_bytes(message[4:6]) in ports
        or (_ANSWER.unpack_from(message)[-2] in owners and _is_transparent(message))
    ]
    with connect(SOCK_DIAG) as sock:
        sock.settimeout(2)
        for family, message in found:
            body = _request(family, _BOTH_ENDS)[:-_SOCKET_ID] + message[4 : 4 + _SOCKET_ID]
            try:
                list(ask(sock, _DESTROY, ACK, body))
            except OSError as error:
                if error.errno != errno.ENOENT:  # it has ended by itself
                    raise


class SocketOwners:
    """Finds the owner of a socket of this host: one exact lookup in the kernel, some 5 µs, which never blocks."""

    def __init__(self, *, udp: bool = False) -> None:
        """Of UDP sockets, or else of TCP sockets. Raises OSError where the kernel has no sock_diag(7) or a sandbox
        forbids netlink.
        """
        self._udp = udp
        self._socket = connect(SOCK_DIAG)
        self._socket.setblocking(False)  # the answer is there when send returns
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def owner_uid(self, local: tuple[str, int], remote: tuple[str, int]) -> int | None:
        """The uid of the socket bound to `local` and connected to `remote`, as that socket sees them: for the
        client of a redirected connection, `remote` is the original destination. (A UDP socket need not be connected.)

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

    def _lookup(self, local: tuple[str, int], remote: tuple[str, int], interface: int) -> int | None:
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        ports = local[1].to_bytes(2) + remote[1].to_bytes(2)
        near = socket.inet_pton(family, local[0].partition("%")[0])
        far = socket.inet_pton(family, remote[0].partition("%")[0])
        protocol, wanted = socket.IPPROTO_TCP, ports
        if self._udp:
            # The kernel looks for the receiver of a datagram: "src and dst are swapped for historical reasons"
            # (udp_diag.c).
            protocol, wanted, near, far = socket.IPPROTO_UDP, ports[2:] + ports[:2], far, near
        body = _REQUEST.pack(family, protocol, 0, _ALL_STATES, wanted, near, far, interface, _NO_COOKIE, _NO_COOKIE)
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        try:
            self._socket.send(request(_BY_FAMILY, 0, body, self._sequence))
            while True:
                answer = self._socket.recv(_LARGEST_ANSWER)
                _, kind, _, sequence, _ = HEADER.unpack_from(answer)
                if sequence == self._sequence:
                    break
        except OSError as error:  # no memory for the answer, or none came
            _logger.warning("socket owner unknown", extra={"fields": {"error": str(error)}})
            return None
        if kind != _BY_FAMILY:  # an error: ENOENT if there is no such socket
            return None
        _, state, found, _, _, uid, _ = _ANSWER.unpack_from(answer, HEADER.size)
        if self._udp:
            return int(uid) if found[:2] == ports[:2] else None
        # Without a connection the kernel offers a listener on the same port instead.
        if state in _OWNERLESS or found != ports:
            return None
        return int(uid)


def _request(family: int, states: int, protocol: int = socket.IPPROTO_TCP) -> bytes:
    return _REQUEST.pack(family, protocol, 0, states, b"", b"", b"", 0, 0, 0)


def _dump(states: int, protocol: int = socket.IPPROTO_TCP) -> Iterator[tuple[int, bytes]]:
    """For each socket in one of these states: its family, and struct inet_diag_msg with the attributes after it."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with connect(SOCK_DIAG) as sock:
            sock.settimeout(2)
            for message in ask(sock, _BY_FAMILY, DUMP, _request(family, states, protocol)):
                if message.kind == _BY_FAMILY:
                    yield family, message.body


def _listener(message: bytes) -> ListeningSocket:
    family, _, ports, raw, _, uid, inode = _ANSWER.unpack_from(message)
    found = dict(attributes(message[_ANSWER.size :]))
    return ListeningSocket(
        address=ip_address(raw[: 4 if family == socket.AF_INET else 16]),
        port=int.from_bytes(ports[:2]),
        uid=uid,
        inode=inode,
        only_v6=bool(found.get(_SKV6ONLY, b"\0")[0]),
        transparent=_is_transparent(message),
    )


def _is_transparent(message: bytes) -> bool | None:
    options = dict(attributes(message[_ANSWER.size :])).get(_SOCKOPT)
    return None if options is None else bool(options[0] & _TRANSPARENT)

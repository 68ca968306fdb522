"""The TCP sockets of this network namespace: sock_diag(7). Needs no privilege."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from ipaddress import ip_address
from typing import NamedTuple

import attrs

from usocksd.host.netlink import HEADER, attributes, messages
from usocksd.net.address import IPAddress

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG_BY_FAMILY, _NETLINK_SOCK_DIAG = 20, 4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOCK_DESTROY, _SOCKET_ID = 21, 48  # and the size of struct inet_diag_sockid
_REQUEST_ACK = 0x5  # NLM_F_REQUEST | NLM_F_ACK
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_LISTEN = 1 << 10  # include/net/tcp_states.h
_CONNECTED = ~_LISTEN & 0xFFF
_BOTH_ENDS = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11  # ESTABLISHED to CLOSING; not TIME_WAIT
_REQUEST = struct.Struct("=BBBxI48x")
# family, state, timer, retransmits; port, peer's port, address, peer's address, ...; expires, queues, uid, inode
_ANSWER = struct.Struct("=BBBB2s2s16s16s12xIIIII")
_CODE = struct.Struct("=i")  # nlmsgerr
_SKV6ONLY, _SOCKOPT = 11, 22
_TRANSPARENT = 0x20 if sys.byteorder == "little" else 0x04  # the sixth bit of struct inet_diag_sockopt


@attrs.frozen(kw_only=True)
class Listener:
    """A socket that accepts connections."""

    address: IPAddress
    port: int
    uid: int
    inode: int
    waiting: int = 0
    """connections that nobody has accepted yet"""
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


def listeners() -> tuple[Listener, ...]:
    """All of them. Raises OSError where netlink is forbidden, or the kernel has no sock_diag."""
    families = (socket.AF_INET, socket.AF_INET6)
    return tuple(_listener(message) for family in families for message in _dump(family, _LISTEN))


class Connection(NamedTuple):
    """Both ends of one, as address and port."""

    local: tuple[IPAddress, int]
    peer: tuple[IPAddress, int]


def tcp_connections(family: int) -> Iterator[Connection]:
    """Those that have both ends, of sockets of this family; IPv4 over a socket of IPv6 is IPv4. Raises OSError."""
    for message in _dump(family, _BOTH_ENDS):
        _, _, _, _, port, peer_port, local, peer, *_ = _ANSWER.unpack_from(message)
        size = 4 if family == socket.AF_INET else 16
        ends = [(ip_address(raw[:size]), int.from_bytes(at, "big")) for raw, at in ((local, port), (peer, peer_port))]
        yield Connection(*((getattr(address, "ipv4_mapped", None) or address, at) for address, at in ends))


def end_accepted(ports: Collection[int]) -> None:
    """Reset the connections that were accepted on these ports, by listeners with IP_TRANSPARENT also those to others.

    Takes CAP_NET_ADMIN. Raises OSError, where the kernel can't (before 4.5, or built without) among others.
    """
    owners = {listener.uid for listener in listeners() if listener.port in ports and listener.transparent}
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in list(_dump(family, _BOTH_ENDS)):
            _, _, _, _, port, _, _, _, _, _, _, uid, _ = _ANSWER.unpack_from(message)
            if int.from_bytes(port, "big") in ports or (uid in owners and _is_transparent(message)):
                _destroy(family, message)


def _destroy(family: int, message: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(2)
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _CONNECTED)[:-_SOCKET_ID] + message[4 : 4 + _SOCKET_ID]
        sock.send(HEADER.pack(HEADER.size + len(body), _SOCK_DESTROY, _REQUEST_ACK, 1, 0) + body)
        for _, _, answer in messages(sock.recv(1 << 16)):
            code = -_CODE.unpack_from(answer)[0]
            if code not in (0, errno.ENOENT):
                raise OSError(code, os.strerror(code))


def connections(family: int) -> Iterator[tuple[int, tuple[IPAddress, int]]]:
    """The local port, and the peer's address and port, of each connection over this family. Raises OSError."""
    for message in _dump(family, _CONNECTED):
        _, _, _, _, port, peer_port, _, peer, *_ = _ANSWER.unpack_from(message)
        address = ip_address(peer[: 4 if family == socket.AF_INET else 16])
        yield int.from_bytes(port, "big"), (address, int.from_bytes(peer_port, "big"))


def _dump(family: int, states: int) -> Iterator[bytes]:
    """The struct inet_diag_msg of each socket in one of these states, attributes behind it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(2)
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, states)
        sock.send(HEADER.pack(HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 1, 0) + body)
        while True:
            for kind, _, message in messages(sock.recv(1 << 16)):
                if kind == _NLMSG_ERROR:
                    code = -_CODE.unpack_from(message)[0]
                    raise OSError(code, os.strerror(code))
                if kind == _NLMSG_DONE:
                    return
                yield message


def _listener(message: bytes) -> Listener:
    family, _, _, _, port, _, raw, _, _, waiting, _, uid, inode = _ANSWER.unpack_from(message)
    found = dict(attributes(message[_ANSWER.size :]))
    return Listener(
        address=ip_address(raw[: 4 if family == socket.AF_INET else 16]),
        port=int.from_bytes(port, "big"),
        uid=uid,
        inode=inode,
        waiting=waiting,
        only_v6=bool(found.get(_SKV6ONLY, b"\0")[0]),
        transparent=_is_transparent(message),
    )


def _is_transparent(message: bytes) -> bool | None:
    options = dict(attributes(message[_ANSWER.size :])).get(_SOCKOPT)
    return None if options is None else bool(options[0] & _TRANSPARENT)

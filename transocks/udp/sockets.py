"""The transparent UDP sockets: a listener's, to which TPROXY rules bring datagrams, and those of single flows.

The kernel (nf_tproxy_get_sock_v4 and _v6, since Linux 2.6.37) gives a datagram that meets a TPROXY rule to the socket
that is connected to its source and bound to its destination, if there is one, else to the listener. Of several
listeners with SO_REUSEPORT it chooses by a hash of the source's address and port, so each client's port stays with one
worker while the group does not change. (It runs no BPF program there.)

A flow's socket has to be bound before it is connected. The kernel does not take it for connected meanwhile, but it may
choose the socket just before connect(2), and look whether it is connected just after. So datagrams of other clients for
the same destination can be in its queue: 14 of 2,000 in a burst of new clients (Linux 6.18, two CPUs).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from socket import SocketType
from typing import Any

from usocksd.net.address import join_port, socket_address
from usocksd.net.listeners import ListenError

# linux/in.h and linux/in6.h; Python 3.11 has no names for them.
_IP_TRANSPARENT, _IP_RECVORIGDSTADDR = 19, 20
_IPV6_RECVORIGDSTADDR, _IPV6_TRANSPARENT = 74, 75
_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
# A burst of clients may come while this process is busy; see net/datagrams.py.
_RECEIVE_BUFFER = 1 << 20
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4s")  # (the scope, alone, is in the order of this machine)
ANCILLARY_SIZE = socket.CMSG_SPACE(_SOCKADDR_IN6.size)
"""The room that a destination takes in recvmsg(2)."""


def open_listener(host: str, port: int) -> SocketType:
    """A non-blocking socket bound to this numeric address, which receives datagrams with their original destinations.

    Raises ListenError.
    """
    v6 = ":" in host
    sock = None
    try:
        sock = SocketType(socket.AF_INET6 if v6 else socket.AF_INET, _DATAGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        _make_transparent(sock, v6=v6)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
        sock.bind(socket_address(host, port))
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ListenError(f"{join_port(host, port)} (UDP)", error.errno or errno.EIO, transparent=True) from None
    return sock


def open_flow(destination: tuple[Any, ...], client: tuple[Any, ...], mark: int | None) -> SocketType:
    """A non-blocking socket that receives what this client sends to this destination, and answers in its name.

    Both are addresses as recvmsg(2) gives them. Raises OSError: EADDRINUSE if a socket of this host has all addresses
    of the destination's port and does not share them.
    """
    v6 = len(destination) > 2
    sock = SocketType(socket.AF_INET6 if v6 else socket.AF_INET, _DATAGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        # Several clients may talk to the same destination.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _make_transparent(sock, v6=v6)
        if mark is not None:
            # So that answers are not taken for datagrams of this host that are to be proxied.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.bind(destination)
        sock.connect(client)
    except BaseException:
        sock.close()
        raise
    return sock


def original_destination(ancillary: Iterable[tuple[int, int, bytes]], *, v6: bool) -> tuple[Any, ...] | None:
    """The destination of a datagram, from its control messages: an address as bind(2) takes it."""
    for level, kind, data in ancillary:
        if v6 and level == socket.IPPROTO_IPV6 and kind == _IPV6_RECVORIGDSTADDR:
            port, raw, scope = _SOCKADDR_IN6.unpack_from(data)
            return socket.inet_ntop(socket.AF_INET6, raw), port, 0, int.from_bytes(scope, "little")
        if not v6 and level == socket.IPPROTO_IP and kind == _IP_RECVORIGDSTADDR:
            port, raw = _SOCKADDR_IN.unpack_from(data)
            return socket.inet_ntoa(raw), port
    return None


def _make_transparent(sock: SocketType, *, v6: bool) -> None:
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)

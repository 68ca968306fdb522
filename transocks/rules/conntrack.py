"""Enters existing connections of this host in its connection tracking (ctnetlink).

Rules that refuse packets without a connection would refuse those of connections that were never tracked: on most hosts,
the admin's own SSH session.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection

from transocks.tools import FirewallError
from usocksd.host.netlink import ACK, CREATE, EXCL, NETFILTER, ask, attribute, connect
from usocksd.host.sockets import Connection, tcp_connections
from usocksd.net.address import IPAddress

# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_NEW = 1 << 8  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW
_NESTED = 0x8000
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _PROTOCOL_INFO, _TIMEOUT = 1, 2, 3, 4, 7
_IP, _PROTOCOL = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_TCP, _TCP_STATE, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 1, 1, 4, 5
_SEEN_ASSURED_CONFIRMED = 2 | 4 | 8
_ESTABLISHED = 3
_LIBERAL = bytes((8, 8))  # IP_CT_TCP_FLAG_BE_LIBERAL, and its mask: nobody has seen how large the windows are
_SECONDS = 432_000


def enter(*, ports: Collection[int]) -> None:
    """All TCP connections of this network namespace, but those of transocks's clients on this host: it listens on these
    ports.

    What is tracked already stays as it is. Raises FirewallError.
    """
    try:
        found = list(tcp_connections())
        clients = {connection.peer for connection in found if connection.local[1] in ports}
        with connect(NETFILTER) as sock:
            sock.settimeout(2)
            for connection in found:
                if connection.local not in clients and not connection.peer[0].is_loopback:
                    _enter(sock, connection)
    except OSError as error:
        raise FirewallError(
            "connections that are there can't be made known to connection tracking, and would be refused"
            f" ({error.strerror}): load nf_conntrack_netlink, or set rules.when_down to open"
        ) from None


def _enter(sock: socket.socket, connection: Connection) -> None:
    state = attribute(_TCP_STATE, bytes((_ESTABLISHED,)))
    state += attribute(_TCP_FLAGS_ORIGINAL, _LIBERAL) + attribute(_TCP_FLAGS_REPLY, _LIBERAL)
    body = struct.pack("=BBH", socket.AF_INET if connection.local[0].version == 4 else socket.AF_INET6, 0, 0)
    body += _nested(_TUPLE_ORIGINAL, _ends(connection.local, connection.peer))
    body += _nested(_TUPLE_REPLY, _ends(connection.peer, connection.local))
    body += attribute(_STATUS, struct.pack(">I", _SEEN_ASSURED_CONFIRMED))
    body += attribute(_TIMEOUT, struct.pack(">I", _SECONDS))
    body += _nested(_PROTOCOL_INFO, _nested(_TCP, state))
    try:
        list(ask(sock, _NEW, ACK | EXCL | CREATE, body))
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise


def _ends(source: tuple[IPAddress, int], destination: tuple[IPAddress, int]) -> bytes:
    first = 1 if source[0].version == 4 else 3  # CTA_IP_V4_SRC, _DST; CTA_IP_V6_SRC, _DST
    addresses = attribute(first, source[0].packed) + attribute(first + 1, destination[0].packed)
    ports = attribute(_NUMBER, bytes((socket.IPPROTO_TCP,)))
    ports += attribute(_SOURCE_PORT, struct.pack(">H", source[1]))
    ports += attribute(_DESTINATION_PORT, struct.pack(">H", destination[1]))
    return _nested(_IP, addresses) + _nested(_PROTOCOL, ports)


def _nested(kind: int, attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, attributes)

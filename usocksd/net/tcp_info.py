"""The kernel's data about a TCP socket: struct tcp_info of linux/tcp.h, by TCP_INFO of tcp(7)."""

from __future__ import annotations

import socket
from struct import Struct, unpack_from

SYN_SENT, CLOSE = 2, 7
"""States (tcp_states.h): of a connection without an answer, and of one that failed or was reset."""

# Offsets of fields. The last one exists since Linux 4.6.
_STATE, _TOTAL_RETRANS, _MIN_RTT, _SIZE = 0, 100, 148, 152
# Of a listening socket: tcpi_unacked is the length of its accept queue, tcpi_sacked the limit.
_QUEUE = Struct("=24xII")
_UNKNOWN = 0xFFFFFFFF


def state(sock: socket.SocketType) -> int:
    """The state, as in tcp_states.h."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[_STATE]


def round_trip(sock: socket.SocketType) -> float | None:
    """The shortest round trip so far, in seconds, None if there is none.

    Neither retransmissions nor a busy peer make it longer.
    """
    microseconds: int = unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE), _MIN_RTT)[0]
    return None if microseconds == _UNKNOWN else microseconds / 1e6


def retransmitted(sock: socket.SocketType) -> bool:
    """Whether any segment had to be sent again."""
    segments: int = unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE), _TOTAL_RETRANS)[0]
    return segments > 0


def accept_queue(listener: socket.socket) -> tuple[int, int]:
    """How many connections wait to be accepted, and how many may."""
    length, limit = _QUEUE.unpack(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE.size))
    return length, limit

"""What the kernel has measured of a connection: struct tcp_info of linux/tcp.h, by TCP_INFO of tcp(7)."""

from __future__ import annotations

import socket
from struct import unpack_from

# Where fields are. The last is there since Linux 4.6.
_STATE, _TOTAL_RETRANS, _MIN_RTT, _SIZE = 0, 100, 148, 152
_UNKNOWN = 0xFFFFFFFF


def state(sock: socket.SocketType) -> int:
    """One of those in tcp_states.h."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[_STATE]


def round_trip(sock: socket.SocketType) -> float | None:
    """The shortest round trip so far, in seconds, None if there is none.

    Neither what was sent twice nor a peer that is busy makes it longer.
    """
    microseconds: int = unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE), _MIN_RTT)[0]
    return None if microseconds == _UNKNOWN else microseconds / 1e6


def retransmitted(sock: socket.SocketType) -> bool:
    """Whether any segment had to be sent again."""
    segments: int = unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE), _TOTAL_RETRANS)[0]
    return segments > 0

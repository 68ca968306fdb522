"""The options of every proxied TCP connection, on either side. Accepted sockets inherit them from their listener."""

from __future__ import annotations

import socket

# A peer that is silent for five minutes is asked, and taken for dead when it answers none of six probes in a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 300), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))

KEEP_ALIVE_AFTER = 60.0
"""When a relay has lived so many seconds, its outgoing connection is worth the five system calls of `keep_alive`."""


def set_options(sock: socket.SocketType) -> None:
    """TCP_NODELAY (a proxy that waits for more to send only adds delay) and SO_OOBINLINE (the urgent byte is not
    lost).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def set_listener_options(sock: socket.SocketType) -> None:
    """All of them, for the connections that it accepts: they inherit them."""
    set_options(sock)
    keep_alive(sock)


def keep_alive(sock: socket.SocketType) -> None:
    """SO_KEEPALIVE, so that dead peers go away.

    Not TCP_USER_TIMEOUT: it would also end connections to a peer that lives and has closed its window.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)

"""The options of every proxied TCP connection, on either side. Accepted sockets inherit them from their listener."""

from __future__ import annotations

import socket

from usocksd.net.keepalive import KeepAlive, keep_alive


def set_options(sock: socket.SocketType) -> None:
    """TCP_NODELAY (a proxy that waits for more to send only adds delay) and SO_OOBINLINE (the urgent byte is not
    lost).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def set_listener_options(sock: socket.SocketType) -> None:
    """All of them, for the connections that it accepts: they inherit them."""
    set_options(sock)
    keep_alive(sock, KeepAlive().open)  # a worker puts in what its configuration says

"""The interface to systemd: sd_notify(3) and sd_listen_fds(3). Without systemd it does nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time

_FIRST_FD = 3
_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class Notifier:
    """Reports the state to the service manager that has started this process, if there is one."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = os.environ.pop("WATCHDOG_USEC", "")
        ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog: float | None = int(watchdog) / 1e6 if watchdog.isdigit() and ours else None
        """Seconds within which the manager expects a sign of life; None if it expects none"""

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, within: float) -> None:
        """`within`: how many seconds it may take; the manager waits that long."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within * 1e6)}", f"STATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        if self.watchdog is not None:
            self._send("WATCHDOG=1")

    def environment(self) -> dict[str, str]:
        """The environment for a new version of this process"""
        found = {}
        if self._address:
            found["NOTIFY_SOCKET"] = "@" + self._address[1:] if self._address[0] == "\0" else self._address
        if self.watchdog is not None:
            found["WATCHDOG_USEC"] = str(int(self.watchdog * 1e6))
        return found

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        # A manager that does not listen, or is busy, is no reason to fail or to wait.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, _DATAGRAM) as sock:
            sock.sendto("\n".join(lines).encode(), self._address)


def inherited_sockets() -> list[socket.socket]:
    """The sockets of socket activation (LISTEN_FDS), if they are for this process"""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets

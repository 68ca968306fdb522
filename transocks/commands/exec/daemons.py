"""The daemons of `transocks exec`, on free ports."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from transocks.tools import die_with_parent
from usocksd.errors import Error

READY_WITHIN = 15.0  # seconds for a daemon to listen, which takes a fraction of one


class ExecError(Error):
    """The command could not be run as asked."""


def free_port(ipv6: bool) -> int:
    """A port that is free now on loopback, of both families."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
            if not ipv6:
                return port
            try:
                with socket.create_server(("::1", port), family=socket.AF_INET6):
                    return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ExecError(f"can't listen on ::1: {error.strerror}") from None


@contextlib.contextmanager
def running(folder: str, configurations: dict[str, str], ports: dict[str, int]) -> Iterator[None]:
    """Both daemons, until the end of the block. Raises ExecError."""
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, text in configurations.items():
            path = Path(folder, f"{name}.toml")
            path.write_text(text, encoding="utf-8")
            # It reports errors on our stderr. It has a session of its own, so the terminal's signals reach only the
            # command.
            daemons[name] = subprocess.Popen(
                [sys.executable, "-m", name, "-f", str(path), "-loglevel", "error"],
                stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=die_with_parent(),  # noqa: PLW1509
            )  # fmt: skip
        for name, daemon in daemons.items():
            _wait_until_ready(name, daemon, ports[name])
        yield
    finally:
        for daemon in daemons.values():
            daemon.terminate()  # the command has ended, so there are no connections to wait for: stop = 0
        for daemon in daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(READY_WITHIN)
            daemon.kill()
            daemon.wait()


def _wait_until_ready(name: str, daemon: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            # A probe might be bound to the very port that it connects to, and so meet itself. We look for a listener.
            probe.connect(("127.0.0.1", port))
            if probe.getsockname() != probe.getpeername():
                return
        if daemon.poll() is not None:
            raise ExecError(f"{name} did not start")
        if time.monotonic() > deadline:
            raise ExecError(f"{name} does not listen")
        time.sleep(0.01)

"""Messages to a service manager, on a real socket."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import PATIENCE, wait_until
from tiny import Tiny


class Manager:
    """Receives messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.heard: list[dict[str, str]] = []

    def hear(self, key: str, value: str | None = None) -> dict[str, str]:
        """Wait for a message with this assignment, and return it."""
        while True:
            text = self._sock.recv(4096).decode()
            message = dict(line.split("=", 1) for line in text.splitlines())
            self.heard.append(message)
            if key in message and value in (None, message[key]):
                return message


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        if request.param == "file":
            name = str(tmp_path / "notify")
            sock.bind(name)
        else:
            name = f"@transocks-test-{os.getpid()}"
            sock.bind("\0" + name[1:])
        yield Manager(sock), name


def test_states(tmp_path: Path, manager: tuple[Manager, str]) -> None:
    hears, name = manager
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"}
    with Tiny(tmp_path, environment=environment, timing={"status_every": 0.05}) as tiny:
        first = hears.hear("READY", "1")
        assert first["STATUS"] == "ready: generation 1, 1 worker, 0 connections"
        assert not any("RELOADING" in message for message in hears.heard)
        hears.hear("WATCHDOG", "1")
        hears.hear("WATCHDOG", "1")
        before = time.monotonic()
        client = tiny.client(b"echo")
        wait_until(lambda: "1 connection" in hears.hear("STATUS")["STATUS"], "the status tells")
        tiny.signal(signal.SIGHUP)
        reloading = hears.hear("RELOADING", "1")
        assert before <= int(reloading["MONOTONIC_USEC"]) / 1e6 <= time.monotonic()
        assert "generation 2" in hears.hear("READY", "1")["STATUS"]
        # A reload that fails ends as well.
        tiny.expected |= {"bad configuration", "nothing has changed: the configuration in force stays"}
        good = tiny.config.read_text()
        tiny.write(workers=0)
        tiny.signal(signal.SIGHUP)
        hears.hear("RELOADING", "1")
        assert "generation 2" in hears.hear("READY", "1")["STATUS"]
        tiny.config.write_text(good)
        tiny.signal(signal.SIGTERM)
        stopping = hears.hear("STOPPING", "1")
        assert stopping["STATUS"].startswith("draining")
        client.close()
        assert tiny.ended() == 0


def test_one_that_does_not_listen(tmp_path: Path) -> None:
    with Tiny(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready() as tiny:
        tiny.reload()


def test_one_that_does_not_read(tmp_path: Path) -> None:
    """Its full queue delays neither the start, nor a reload, nor the end."""
    name = str(tmp_path / "notify")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        manager.bind(name)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"STATUS=full", name)
        with Tiny(tmp_path, environment={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"}).ready() as tiny:
            tiny.reload()
            tiny.client(b"echo").close()


def test_a_watchdog_of_another_process(tmp_path: Path) -> None:
    """Signs of life are not needed, and do no harm."""
    environment = {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    with Tiny(tmp_path, environment=environment).ready() as tiny:
        tiny.client(b"echo")

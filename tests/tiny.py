"""The tiny daemon as a process: started, signalled, asked and connected to. See tiny_daemon.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import socket as Socket
from typing import Any

from daemons import PATIENCE, Process, Record, wait_until

import usocksd

ROOT = Path(usocksd.__file__).parents[1]
PROGRAM = Path(__file__).with_name("tiny_daemon.py")


def _toml(values: Mapping[str, Any]) -> str:
    """`values`, tables last."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


class Tiny(Process):
    """One tiny daemon in a folder of its own, with its clients.

    Settings are those of its configuration; `workers` 1, and a control socket in the folder.
    """

    TROUBLE = ("critical", "error")
    STATUS = None

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        timing: Mapping[str, Any] | None = None,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        python: str = sys.executable,
        root: Path = ROOT,
        text: str | None = None,
        logfile: Path | None = None,
        **settings: Any,
    ) -> None:
        """`text`: the configuration as it is, in place of settings; `timing`: fields of the daemon's `Timing`."""
        log = logfile or folder / "log"
        self.folder = folder
        self.config = folder / "config"
        self.settings: dict[str, Any] = {
            "control": str(folder / "control"),
            "metrics_port": 0,
            "log": {"filename": str(log), "format": "json", "level": "debug"},
        }
        if text is None:
            self.write(**settings)
        else:
            self.config.write_text(text)
        self._stack = ExitStack()
        super().__init__(
            "tiny",
            log,
            folder / "stderr",
            *(*prefix, python, "-W", "error", str(PROGRAM), "-f", str(self.config), *arguments),
            pass_fds=pass_fds,
            env={
                **os.environ,
                "PYTHONPATH": str(root),
                "TINY_FOLDER": str(folder),
                "TINY_TIMING": json.dumps({"rates_over": 0.02, **(timing or {})}),
                **(environment or {}),
            },
        )

    def __exit__(self, *raised: Any) -> None:
        try:
            super().__exit__(*raised)
        finally:
            self._stack.close()

    # Its life

    def write(self, **settings: Any) -> None:
        """Put these into its configuration, in addition to what is there."""
        for key, value in settings.items():
            old = self.settings.get(key)
            self.settings[key] = {**old, **value} if isinstance(old, dict) else value
        self.config.write_text(_toml({key: value for key, value in self.settings.items() if value is not None}))

    def flag(self, name: str) -> Path:
        """A file that makes its workers misbehave; there when it was touched."""
        return self.folder / name

    def held(self, where: str, count: int = 1) -> list[int]:
        """Wait until this many workers have stopped at the given point; returns their process ids."""
        names = wait_until(
            lambda: len(found := list(self.folder.glob(f"held-{where}-*"))) >= count and found, f"{count} held"
        )
        return [int(name.name.rpartition("-")[2]) for name in names or ()]

    def refused(self) -> list[Record]:
        """Wait for a start that fails; returns the records on stderr."""
        assert self.ended() == 1, self.stderr()
        self._stack.close()
        found = [*self.stderr().splitlines(), *self.lines()]
        return [json.loads(line) for line in found if line.startswith("{")]

    def reload(self, **settings: Any) -> None:
        """Reload, and wait until that is done."""
        self.write(**settings)
        before = self.generation()
        self.signal(signal.SIGHUP)
        wait_until(lambda: self.generation() > before, lambda: "reloaded: " + "\n".join(self.lines()[-20:]))

    def generation(self) -> int:
        """The number of the configuration in force, by the log."""
        return max((int(record["generation"]) for record in self.records("reloaded")), default=1)

    # Its operators

    def ask(self, verb: str, **more: Any) -> Record:
        """The answer of the control socket."""
        with Socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.settings["control"]))
            sock.sendall(json.dumps({"verb": verb, **more}).encode() + b"\n")
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        found: Record = json.loads(answer)
        return found

    def rows(self) -> list[Record]:
        """The workers, by status."""
        return [row for generation in self.ask("status")["generations"] for row in generation["workers"]]

    def metrics(self, port: int, host: str = "127.0.0.1") -> dict[str, float]:
        """The answer of the metrics endpoint."""
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    # Its clients

    def client(self, words: bytes = b"", *, port: int | None = None) -> Socket:
        """A client; after "echo" and "relay" it has been answered."""
        sock = self._stack.enter_context(socket.create_connection(("127.0.0.1", port or self.port), PATIENCE))
        if words:
            sock.sendall(words)
            word = words.split()[0]
            if word in (b"echo", b"relay"):
                assert sock.recv(len(word), socket.MSG_WAITALL) == word
        return sock

    def who(self, sock: Socket | None = None) -> tuple[int, str, Socket]:
        """A connection that stays open, and the process and version that serve it."""
        sock = sock or self.client()
        sock.sendall(b"who")
        line = b""
        while not line.endswith(b"\n"):
            data = sock.recv(100)
            assert data, f"closed after {line!r}"
            line += data
        pid, version = line.decode().split()
        return int(pid), version, sock

    def one_each(self) -> dict[int, Socket]:
        """A connection to each worker that serves."""
        found: dict[int, Socket] = {}
        rest = []
        wanted = {row["pid"] for row in self.rows() if row["state"] == "serving"}
        while set(found) < wanted:
            pid, _, sock = self.who()
            if pid in found:
                rest.append(sock)
            else:
                found[pid] = sock
        for sock in rest:
            sock.close()
        return found

    def relayed(self) -> tuple[Socket, Socket]:
        """A relayed connection: the client, and its destination."""
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)
        client = self.client(b"relay %d" % listener.getsockname()[1])
        upstream = self._stack.enter_context(listener.accept()[0])
        upstream.settimeout(PATIENCE)
        return client, upstream

    def wait_until_closed(self, port: int | None = None) -> None:
        """Return when nobody listens there any more, or it refuses."""
        place, state = f"0100007F:{port or self.port:04X}", "0A"
        wait_until(
            lambda: (
                not any(
                    line.split()[1:4:2] == [place, state] for line in Path("/proc/net/tcp").read_text().splitlines()
                )
            ),
            "its port is closed",
        )

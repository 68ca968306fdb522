"""A control socket with known answers, and the verbs of usocksd, which ask it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from usocksd.cli import USOCKSD
from usocksd.errors import ConfigError, Fault
from usocksd.serve.control import Control, Handler
from usocksd.serve.daemon import run
from usocksd.serve.verbs.parsers import add_parsers

PATIENCE = 20.0

# A verb as a process, with a default configuration and control socket of the test's.
_VERB = """
import sys, attrs
from usocksd.cli import USOCKSD
from usocksd.serve.daemon import run
from usocksd.serve.verbs.parsers import add_parsers

config, control, *words = sys.argv[1:]
daemon = attrs.evolve(USOCKSD, file=config, control=control)
sys.exit(run(daemon, lambda subparsers: add_parsers(subparsers, daemon), words))
"""


class Bench:
    """A folder with what belongs to one daemon; a thread answers in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "usocksd.toml"
        self.control = folder / "control.sock"
        self.answers: dict[str, Any] = {}
        """By verb: an answer, a list of answers that are given in turn, {"faults": [...]}, or {"hang": True}"""
        self._asked: dict[str, int] = {}
        self._thread: threading.Thread | None = None

    def start(self, **answers: Any) -> None:
        """Begin to answer; "drain" ends it."""
        self.answers = {verb.replace("_", "-"): answer for verb, answer in answers.items()}
        ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=[self._serve, ready])
        self._thread.start()
        assert ready.wait(PATIENCE)

    async def _serve(self, ready: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        verbs = ("status", "connections", "reload", "confirm", "log-level")
        handlers: dict[str, Handler] = dict.fromkeys(verbs, self._answer)
        self._sock = Control.open(str(self.control), "usocksd", {**handlers, "drain": self._drain})
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            await nursery.start(lambda task_status: self._sock.serve(task_status=task_status))
            ready.set()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = request["verb"]
        answer = self.answers[verb]
        at = self._asked[verb] = self._asked.get(verb, -1) + 1
        if isinstance(answer, list):
            answer = answer[min(at, len(answer) - 1)]
        if "hang" in answer:
            await trio.sleep_forever()
        if "faults" in answer:
            raise ConfigError("/etc/usocksd.toml", [Fault("port", text, "expected less") for text in answer["faults"]])
        if verb == "connections":
            now = time.monotonic()
            answer = answer | {"connections": [{"at": now} | each for each in answer["connections"]]}
        return answer | ({"level": request["level"]} if "level" in request else {})

    async def _drain(self, _: dict[str, Any]) -> dict[str, Any]:
        self._sock.close()
        return {}

    def die(self) -> None:
        """As if the daemon was killed: its socket's file stays."""
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self.join()
        for sock in self._sock.sockets:
            sock.close()

    def join(self) -> None:
        """Wait until nobody answers any more."""
        assert self._thread is not None
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def command(self, *words: str) -> list[str]:
        """The command line of a verb, as arguments."""
        return [sys.executable, "-c", _VERB, str(self.config), str(self.control), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end, in this process."""
        daemon = attrs.evolve(USOCKSD, file=str(self.config), control=str(self.control))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = run(daemon, lambda subparsers: add_parsers(subparsers, daemon), words)
            except SystemExit as exit:
                status = int(exit.code or 0)
        return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

    def lines(self, *words: str, env: dict[str, str] | None = None) -> list[str]:
        """The output of a verb, which must succeed without complaint; with `env`, as a process."""
        if env is None:
            result = self.run(*words)
        else:
            result = subprocess.run(self.command(*words), capture_output=True, text=True, check=False, env=env)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.splitlines()

    def json(self, *words: str) -> Any:
        """The output of a verb with --json: one line."""
        (line,) = self.lines(*words, "--json")
        return json.loads(line)

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self.die()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def connection() -> Callable[..., dict[str, Any]]:
    """Makes a connection as the daemon tells it."""

    def make(number: int = 1, **values: Any) -> dict[str, Any]:
        return {
            "worker": 4712,
            "id": f"c2b81a64-c1c0-8dbe-ab18-{number:012x}",
            "state": "relay",
            "client": f"198.51.100.10:{40000 + number}",
            "destination": "203.0.113.80:80",
            "name": None,
            "user": None,
            "rule": "default",
            "egress": "192.0.2.1:51278",
            "age": 60.0,
            "idle": 0.5,
            "tx_bytes": 1000,
            "rx_bytes": 2000,
        } | values

    return make

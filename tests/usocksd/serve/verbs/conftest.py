"""A process with a control socket and known answers, and the verbs as processes that ask it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 20.0

# Answers what the file says (read anew for each request), by verb: an answer, or a list of them that is gone through,
# or {"faults": [...]}. "drain" ends it.
_DAEMON = """
import itertools, json, sys, time, trio
from usocksd.errors import ConfigError, Error, Fault
from usocksd.serve.control import Control

path, answers = sys.argv[1:]
asked = {}

def handler(verb):
    async def handle(request):
        with open(answers) as file:
            answer = json.load(file)[verb]
        asked[verb] = asked.get(verb, -1) + 1
        if isinstance(answer, list):
            answer = answer[min(asked[verb], len(answer) - 1)]
        for connection in answer.get("connections", []) if verb == "connections" else ():
            connection.setdefault("at", time.monotonic())
        if "hang" in answer:
            await trio.sleep_forever()
        if "faults" in answer:
            raise ConfigError("/etc/usocksd.toml", [Fault("port", text, "expected less") for text in answer["faults"]])
        return answer | ({"level": request["level"]} if "level" in request else {})
    return handle

async def main():
    async def drain(request):
        scope.cancel()
        return {}
    verbs = ("status", "connections", "reload", "confirm", "log-level")
    handlers = {verb: handler(verb) for verb in verbs} | {"drain": drain}
    sock = Control.open(path, "usocksd", handlers)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            await nursery.start(lambda task_status: sock.serve(task_status=task_status))
            print("ready", flush=True)
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    sock.close()

trio.run(main)
"""

# A command line as the daemons have it, with a default configuration and control socket of the test's.
_VERB = """
import sys
import attrs
from usocksd.cli import USOCKSD
from usocksd.serve.daemon import run
from usocksd.serve.verbs.parsers import add_parsers

config, control, *words = sys.argv[1:]
daemon = attrs.evolve(USOCKSD, file=config, control=control)
sys.exit(run(daemon, lambda subparsers: add_parsers(subparsers, daemon), words))
"""


class Bench:
    """A folder with what belongs to one daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "usocksd.toml"
        self.control = folder / "control.sock"
        self._answers = folder / "answers.json"
        self.daemon: subprocess.Popen[str] | None = None

    def start(self, **answers: Any) -> None:
        """Start the daemon; `answers` by verb."""
        self.answer(**answers)
        command = [sys.executable, "-c", _DAEMON, str(self.control), str(self._answers)]
        self.daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.daemon.stdout is not None
        assert self.daemon.stdout.readline() == "ready\n"

    def answer(self, **answers: Any) -> None:
        """What to answer from now on."""
        # At once, since the daemon may be reading.
        fresh = self._answers.with_suffix(".new")
        fresh.write_text(json.dumps({verb.replace("_", "-"): answer for verb, answer in answers.items()}))
        fresh.replace(self._answers)

    def command(self, *words: str) -> list[str]:
        """The command line of a verb, as arguments."""
        return [sys.executable, "-c", _VERB, str(self.config), str(self.control), *words]

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, check=False, timeout=PATIENCE, **options
        )

    def lines(self, *words: str, **options: Any) -> list[str]:
        """What a verb prints, which must go well and without complaint."""
        result = self.run(*words, **options)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.splitlines()

    def json(self, *words: str) -> Any:
        """What a verb prints with --json: one line."""
        (line,) = self.lines(*words, "--json")
        return json.loads(line)

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.communicate()


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

"""The master's side of one worker: starts it, sends it orders, and receives its messages."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Any

import attrs
import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error, Fault
from usocksd.log.metrics import Snapshot
from usocksd.serve.channel import Channel, Message
from usocksd.serve.daemon import CHANNEL
from usocksd.serve.plan import PROTOCOL, Plan
from usocksd.serve.timing import Timing
from usocksd.serve.worker import IGNORED, STDERR
from usocksd.settings.files import NamedFiles

log = logging.getLogger(__name__)

_numbers = itertools.count(1)
# How much of a dead worker's stderr is logged, in bytes.
_MOST_STDERR = 16 * 1024


class WorkerState(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    """It is ready to serve, but has not been told to."""
    SERVING = "serving"
    SUSPECTED = "suspected"
    """It is silent, and may hang."""
    DRAINING = "draining"


class WorkerEnded(Error):
    """A worker ended before it was ready. The message tells why, as far as that is known."""


@attrs.define
class WorkerAnswer:
    """A worker's answer to a question."""

    rows: list[Any] = attrs.Factory(list)
    error: str | None = None
    whole: bool = False
    """The answer is complete. If not, the worker is late or gone."""
    over: trio.Event = attrs.Factory(trio.Event)


class WorkerProcess:
    """The master's side of one worker. `slot`: its number in its generation, which its replacement gets too; `column`:
    where it counts connections.
    """

    def __init__(self, generation: int, slot: int, column: int, pid: int, channel: Channel, *, timing: Timing) -> None:
        self.generation = generation
        self.slot = slot
        self.column = column
        self.pid = pid
        self.channel = channel
        self.timing = timing
        self.born = trio.current_time()
        self.state = WorkerState.STARTING
        self.ordered = False
        """It has its order to serve: orders from now on are followed once it is ready."""
        self.version = ""
        self.alive: Message = {}
        """Its last sign of life"""
        self.seen = trio.current_time()
        """When that arrived"""
        self.exit_status: int | None = None
        """As subprocess.Popen.returncode"""
        self.cause = ""
        """How it ended, in words"""
        self.exited = trio.Event()
        self.killed = False
        """This process has killed it."""
        self.hung = False
        """It was killed for its silence."""
        self._stderr: int | None = None
        """A memory file with its stderr until it is ready"""
        self._listening = True
        self._questions: dict[int, WorkerAnswer] = {}

    @classmethod
    def start(cls, generation: int, slot: int, column: int, timing: Timing) -> WorkerProcess:
        """Start one by exec, with this process's own command line: the program that is installed now.

        Raises Error if the system has no room for one more process.
        """
        # The worker inherits the mask. Until it ignores these signals, they would end it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                end, its_end = socket.socketpair()
                ours.enter_context(end)
                theirs.enter_context(its_end)
                early = os.memfd_create("stderr")
                ours.callback(os.close, early)
                stderr = _duplicate_stderr()
                theirs.callback(os.close, stderr)
                process = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    env={**os.environ, CHANNEL: str(its_end.fileno()), STDERR: str(stderr)},
                    pass_fds=[its_end.fileno(), stderr],
                    stdin=subprocess.DEVNULL,
                    stderr=early,
                )
            except OSError as error:
                raise Error(f"can't start a worker: {error.filename or sys.executable}: {error.strerror}") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            ours.pop_all()
        process.returncode = 0  # `Crew.reap` waits for all children, also for those of an earlier version of the master
        channel = Channel(trio.socket.from_stdlib_socket(end))
        worker = cls(generation, slot, column, process.pid, channel, timing=timing)
        worker._stderr = early
        return worker

    @property
    def coming(self) -> bool:
        """Whether it has not yet been told to accept connections; until then its reports are not read."""
        return self.state in (WorkerState.STARTING, WorkerState.READY)

    @property
    def live(self) -> int:
        """Connections that it serves"""
        return int(self.alive.get("live", 0))

    @property
    def metrics(self) -> Snapshot:
        """Its latest counts"""
        snapshot: Snapshot = self.alive.get("metrics", {})
        return snapshot

    async def plan(self, text: str, source: str, kept: NamedFiles | None) -> tuple[Plan, NamedFiles]:
        """Have it read a configuration. Returns its plan and the files that it names, which the caller closes. Files in
        `kept` are not read again.

        Raises ConfigError with every fault, WorkerEnded, or Error if it is of a version that this one can't talk to.
        """
        await self.configure(text, source, kept or NamedFiles(), first=True)
        answer, fds = await self._expect("plan")
        return Plan.from_json(answer["plan"]), NamedFiles.received(answer["files"], fds)

    async def configure(self, text: str, source: str, files: NamedFiles, *, first: bool = False) -> None:
        """Have it read a configuration, and the files that it names as they were."""
        order = {"type": "configure", "protocol": PROTOCOL, "version": __version__, "text": text, "source": source}
        await self._order(order | {"first": first, "files": files.places}, files.fds)

    async def serve(self, order: dict[str, Any], fds: Sequence[int]) -> None:
        """Have it get ready to serve its configuration; returns when it is ready. Raises as `plan` does."""
        self.ordered = True
        await self._order({"type": "serve", **order, "column": self.column}, fds)
        ready, _ = await self._expect("ready")
        self.version = ready["version"]
        self.state = WorkerState.READY
        self.seen = trio.current_time()
        self._close_stderr()

    async def accept(self) -> None:
        """Have it accept connections."""
        self.state = WorkerState.SERVING
        self.seen = trio.current_time()
        await self.send({"type": "accept"})

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send it an order. If it is gone, or does not read, its listener notices."""
        with contextlib.suppress(OSError), trio.move_on_after(self.timing.send_within):
            await self.channel.send(message, fds)

    async def ask(self, verb: str, *, within: float = math.inf, request: Message | None = None) -> WorkerAnswer:
        """Its answer to a question, as far as it has come after `within` seconds, or when the worker ends."""
        number, answer = next(_numbers), WorkerAnswer()
        self._questions[number] = answer
        try:
            with trio.move_on_after(within):
                await self.send({"type": "ask", "id": number, "verb": verb, "request": request})
                if self._listening:
                    await answer.over.wait()
        finally:
            del self._questions[number]
        return answer

    async def listen(self) -> AsyncIterator[Message]:
        """Receive its messages until its end; yields its signs of life, and the values that it shares."""
        while (received := await self.channel.receive()) is not None:
            message, _ = received
            self.seen = trio.current_time()
            if message["type"] == "answer":
                self._take(message)
                continue
            if message["type"] in ("alive", "ended"):
                self.alive = message
            yield message
        self._listening = False
        for answer in self._questions.values():
            answer.over.set()

    def kill(self) -> None:
        """End it at once."""
        if self.exit_status is None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def ended(self, status: int, cause: str) -> None:
        """It has ended; `status` is as `exit_status`."""
        self.exit_status, self.cause = status, cause
        self.exited.set()

    def close(self) -> None:
        """Stop listening to it."""
        self.channel.close()
        self._close_stderr()

    def _take(self, message: Message) -> None:
        answer = self._questions.get(message["id"])
        if answer is not None:
            answer.rows += message["rows"]
            if message["last"]:
                answer.whole, answer.error = message["error"] is None, message["error"]
                answer.over.set()

    async def _order(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send without a time limit: the message may be long, and a worker does not read before it has started."""
        with contextlib.suppress(OSError):
            await self.channel.send(message, fds)

    async def _expect(self, kind: str) -> tuple[Message, list[int]]:
        while (received := await self.channel.receive()) is not None:
            message, fds = received
            if message["type"] == kind:
                return message, fds
            if message["type"] == "faults":
                faults = [Fault(*fault) for fault in message["faults"]]
                if message["source"]:
                    raise ConfigError(message["source"], faults)
                raise Error(faults[0].expected)
        # If it were killed now, it could not report why it ends.
        with trio.move_on_after(self.timing.last_words):
            await self.exited.wait()
        raise WorkerEnded(f"a worker (pid {self.pid}) ended before it was ready: {self._last_words()}")

    def _last_words(self) -> str:
        """How it ended, with the last line of its stderr. The log gets all of it."""
        cause = self.cause or "it has closed its channel"
        text = "" if self._stderr is None else os.pread(self._stderr, _MOST_STDERR, 0).decode(errors="replace").strip()
        self._close_stderr()
        if not text:
            return cause
        log.error("stderr of a worker that failed to start", extra={"fields": {"pid": self.pid, "stderr": text}})
        return f"{cause}: {text.splitlines()[-1]}"

    def _close_stderr(self) -> None:
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # closed before we were started
        return os.open(os.devnull, os.O_WRONLY)

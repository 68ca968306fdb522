"""One worker as the master sees it: started, told, listened to."""

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
from dataclasses import fields
from enum import Enum
from typing import Any

import attrs
import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error, Fault
from usocksd.log.metrics import Snapshot, lasting, total
from usocksd.serve.channel import Channel, Message
from usocksd.serve.plan import Plan
from usocksd.serve.worker import CHANNEL, IGNORED, STDERR
from usocksd.settings.files import NamedFiles

log = logging.getLogger(__name__)

_numbers = itertools.count(1)
# A worker that reads nothing for so long, in seconds, is not waited for; it will be found to hang.
_SEND_WITHIN = 2.0
# So much of what a worker has said on stderr before it ended is logged, in bytes.
_MOST_SAID = 16 * 1024
LAST_WORDS = 5.0
"""Seconds that a worker has to end, once it has been told to or has closed its channel, before it is killed."""


class State(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    """It could serve, and is not told to."""
    SERVING = "serving"
    SUSPECTED = "suspected"
    """It is silent, and another worker serves its slot as well."""
    DRAINING = "draining"


class WorkerEnded(Error):
    """A worker ended before it was ready. The message tells why, as far as one can know."""


@attrs.define
class Answer:
    """What a worker has said to a question."""

    rows: list[Any] = attrs.Factory(list)
    whole: bool = False
    """Whether that is all, or it is late or gone."""


class WorkerProcess:
    """The master's side of one worker. `slot` is which listening sockets are its own, `column` where it counts."""

    def __init__(self, generation: int, slot: int, column: int, pid: int, channel: Channel) -> None:
        self.generation = generation
        self.slot = slot
        self.column = column
        self.pid = pid
        self.channel = channel
        self.state = State.STARTING
        self.ordered = False
        """It has been told how to serve: what it is told now, it does once it is ready."""
        self.version = ""
        self.handover = 0
        """The format in which its version takes over from another master."""
        self.verbs: list[str] = []
        """What its daemon answers on the control socket itself."""
        self.alive: Message = {}
        """What it last said of itself."""
        self.seen = trio.current_time()
        """When that was."""
        self.exit_status: int | None = None
        """As subprocess.Popen.returncode has it."""
        self.cause = ""
        """How it ended, in words."""
        self.exited = trio.Event()
        self.killed = False
        """By this process."""
        self.hung = False
        """It was killed for its silence."""
        self._legible: bool | None = None
        """Whether its signs of life can be read; not known before the first."""
        self._stderr: int | None = None
        """What it says before it can say it otherwise; closed once it is ready, or has ended."""
        self._ended = False
        self._questions: dict[int, trio.MemorySendChannel[Message]] = {}

    @classmethod
    def start(cls, generation: int, slot: int, column: int) -> WorkerProcess:
        """Start one by exec, with this process's own command line: the program that is installed now.

        Raises Error when the system has no room for one more process.
        """
        # It inherits the mask: until it ignores these signals, they would end it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as theirs:
            try:
                ours, end = socket.socketpair()
                opened.enter_context(ours)
                theirs.enter_context(end)
                early = os.memfd_create("stderr")
                opened.callback(os.close, early)
                stderr = _duplicate_stderr()
                theirs.callback(os.close, stderr)
                process = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    env={**os.environ, CHANNEL: str(end.fileno()), STDERR: str(stderr)},
                    pass_fds=[end.fileno(), stderr],
                    stdin=subprocess.DEVNULL,
                    stderr=early,
                )
            except OSError as error:
                raise Error(f"can't start a worker: {error.filename or sys.executable}: {error.strerror}") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            opened.pop_all()
        # The master waits for all its children itself, also for those that an earlier version of it has started.
        process.returncode = 0
        worker = cls(generation, slot, column, process.pid, Channel(trio.socket.from_stdlib_socket(ours)))
        worker._stderr = early
        return worker

    @property
    def coming(self) -> bool:
        """Whether it is yet to be told to accept connections; until then nobody listens to its reports."""
        return self.state in (State.STARTING, State.READY)

    @property
    def live(self) -> int:
        """Connections that it serves."""
        count: int = self.alive.get("live", 0)
        return count

    @property
    def metrics(self) -> Snapshot:
        """What it last counted."""
        snapshot: Snapshot = self.alive.get("metrics", {})
        return snapshot

    async def plan(self, text: str, source: str, kept: NamedFiles | None) -> tuple[Plan, dict[str, Any], NamedFiles]:
        """Have it read a configuration, and say what is in it: as the master knows it, and as the worker has said it;
        and the files that it names, which are the caller's to close. Those that are `kept` are not read again.

        Raises ConfigError with every fault, WorkerEnded, or Error when a newer version says what this can't make out.
        """
        order = {"type": "configure", "text": text, "source": source, "plan": True}
        await self._order(order | ({"files": kept.places} if kept else {}), kept.fds if kept else ())
        answer, fds = await self._expect("plan")
        values, files = answer["plan"], NamedFiles.received(answer.get("files", {}), fds)
        try:
            return Plan.from_json(values), values, files
        except (KeyError, TypeError, ValueError):
            files.close()
            version = values.get("version", "another")
            raise Error(f"version {version} can't be reloaded into from {__version__}: restart the daemon") from None

    async def configure(self, text: str, source: str, files: NamedFiles) -> None:
        """Have it read a configuration, and the files that it names as they were. Raises as `plan` does."""
        order = {"type": "configure", "text": text, "source": source, "plan": False, "files": files.places}
        await self._order(order, files.fds)
        await self._expect("plan")

    async def serve(self, order: dict[str, Any], fds: Sequence[int]) -> None:
        """Have it make ready to serve; returns when it is. Raises Error with what it says is wrong, WorkerEnded."""
        self.ordered = True
        await self._order({"type": "serve", **order, "column": self.column}, fds)
        ready, _ = await self._expect("ready")
        self.version, self.handover = ready["version"], ready.get("handover", 0)
        self.verbs = ready.get("verbs", [])
        self.state = State.READY
        self.seen = trio.current_time()
        self._close_stderr()

    async def accept(self) -> None:
        """Have it accept connections."""
        self.state = State.SERVING
        self.seen = trio.current_time()
        await self.send({"type": "accept"})

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Tell it something; if it is gone, or does not read, so be it: whoever listens to it finds out."""
        with contextlib.suppress(OSError), trio.move_on_after(_SEND_WITHIN):
            await self.channel.send(message, fds)

    async def ask(self, question: str, *, within: float = math.inf, **details: object) -> Answer:
        """Its answer to a question; what there is of it after so many seconds, or if it ends meanwhile."""
        number = next(_numbers)
        sender, receiver = trio.open_memory_channel[Message](math.inf)
        self._questions[number] = sender
        if self._ended:
            sender.close()
        answer = Answer()
        try:
            with trio.move_on_after(within):
                await self.send({"type": question, "id": number, **details})
                async for part in receiver:
                    answer.rows += part["rows"]
                    answer.whole = part["last"]
        finally:
            self._questions.pop(number, None)
        return answer

    async def listen(self) -> AsyncIterator[Message]:
        """Take note of what it says, until its end; yields its signs of life, and what it shares or refuses."""
        while (received := await self.channel.receive()) is not None:
            message, _ = received
            self.seen = trio.current_time()
            match message["type"]:
                case "answer":
                    self._answered(message)
                case "alive" | "ended":
                    if self._legible is None:
                        self._legible = self._reads(message)
                    if self._legible:
                        self.alive = message
                    yield message
                case "share" | "refuse":
                    yield message
        self._ended = True
        for sender in self._questions.values():
            sender.close()

    def kill(self) -> None:
        """End it at once."""
        if self.exit_status is None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def ended(self, status: int, cause: str) -> None:
        """It has; `status` is as `exit_status`."""
        self.exit_status, self.cause = status, cause
        self.exited.set()

    def close(self) -> None:
        """Nothing more is to be heard of it."""
        self.channel.close()
        self._close_stderr()

    def _reads(self, message: Message) -> bool:
        """Whether its figures can be added up. Another version might give them in another form; one that serves is
        worth more than its figures, and nothing in it may end this process.
        """
        try:
            total([lasting(message["metrics"])])
            return isinstance(message["live"], int)
        except (LookupError, TypeError, ValueError, AttributeError):
            log.exception("the figures of a worker can't be read", extra={"fields": {"pid": self.pid}})
            return False

    def _answered(self, message: Message) -> None:
        sender = self._questions.get(message["id"])
        if sender is None:
            return
        sender.send_nowait(message)
        if message["last"]:
            sender.close()

    async def _order(self, message: Message, fds: Sequence[int] = ()) -> None:
        """What the caller waits for: it may be long, and the worker may not read before it has started."""
        with contextlib.suppress(OSError):
            await self.channel.send(message, fds)

    async def _expect(self, kind: str) -> tuple[Message, list[int]]:
        while (received := await self.channel.receive()) is not None:
            message, fds = received
            if message["type"] == kind:
                return message, fds
            if message["type"] == "faults":
                # (A later version may say more of each.)
                faults = [Fault(*fault[: len(fields(Fault))]) for fault in message["faults"]]
                if message["source"]:
                    raise ConfigError(message["source"], faults)
                raise Error(faults[0].expected)
        # Killed now, it could not say why.
        with trio.move_on_after(LAST_WORDS):
            await self.exited.wait()
        raise WorkerEnded(f"a worker (pid {self.pid}) ended before it was ready: {self._last_words()}")

    def _last_words(self) -> str:
        """How it ended, with the last line of what it said on stderr. All of that goes to the log."""
        cause = self.cause or "it has closed its channel"
        said = "" if self._stderr is None else os.pread(self._stderr, _MOST_SAID, 0).decode(errors="replace").strip()
        self._close_stderr()
        if not said:
            return cause
        log.error("the last words of a worker", extra={"fields": {"pid": self.pid, "stderr": said}})
        return f"{cause}: {said.splitlines()[-1]}"

    def _close_stderr(self) -> None:
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # closed before we were started
        return os.open(os.devnull, os.O_WRONLY)

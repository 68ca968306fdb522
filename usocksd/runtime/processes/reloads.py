"""A configuration comes into force: at the start, and at each reload; or nothing changes, and the log says why.

Reloads that are asked for while one is under way are one. At most two older generations drain at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from usocksd.errors import ConfigError, Error
from usocksd.runtime.exporter import Exporter
from usocksd.runtime.processes.crew import Candidate, Crew
from usocksd.runtime.processes.doors import Doors
from usocksd.runtime.processes.invocation import Invocation, MasterLog
from usocksd.runtime.processes.notify import Notifier
from usocksd.runtime.processes.report import Report
from usocksd.runtime.processes.slots import Slots, place_names

log = logging.getLogger(__name__)

# A third generation would drain: so long, in seconds, a reload waits for the oldest to end by itself.
_MOST_DRAINING = 2
_PATIENCE = 30.0


def complain(level: int, message: str, error: Error) -> None:
    """A record for each fault of a configuration, or for what else is in the way."""
    if isinstance(error, ConfigError):
        for fault in error.faults:
            place: dict[str, object] = {"file": error.source} | ({} if fault.line is None else {"line": fault.line})
            log.log(level, "bad configuration", extra={"fields": {**place, "error": str(fault)}})
    else:
        log.log(level, message, extra={"fields": {"error": str(error)}})


class Reloads:
    """Brings configurations into force, one at a time.

    `committed` is called when the workers of one are those that serve; `done` is awaited after each reload.
    """

    def __init__(
        self,
        invocation: Invocation,
        own_log: MasterLog,
        notifier: Notifier,
        *,
        slots: Slots,
        crew: Crew,
        doors: Doors,
        report: Report,
        committed: Callable[[], None],
        done: Callable[[], Awaitable[None]],
    ) -> None:
        self._invocation = invocation
        self._log = own_log
        self._notifier = notifier
        self._slots = slots
        self._crew = crew
        self._doors = doors
        self._report = report
        self._committed = committed
        self._done = done
        self._wanted = trio.Event()
        # Of the task that reloads: whoever stops the daemon cancels it, and waits until it is over.
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        # Who asked for the next reload.
        self._waiting: list[trio.MemorySendChannel[Error | None]] = []

    def ask(self) -> None:
        """Have the configuration read again, soon."""
        self._wanted.set()

    async def ask_and_wait(self) -> None:
        """The same, and return when it is in force. Raises Error when that went wrong."""
        if self._report.draining:
            raise Error("the daemon is stopping")
        sender, receiver = trio.open_memory_channel[Error | None](1)
        self._waiting.append(sender)
        self.ask()
        error = await receiver.receive()
        if error is not None:
            raise error

    async def end(self) -> None:
        """No more reloads: the one under way changes nothing, unless it is past that point."""
        self._scope.cancel()
        await self._over.wait()

    async def run(self) -> None:
        """Reload whenever it is asked for, until told to end."""
        with self._scope:
            while True:
                await self._wanted.wait()
                # Whoever asked until here is answered by what is read from here on.
                self._wanted = trio.Event()
                asked, self._waiting = self._waiting, []
                failure: Error | None = Error("the daemon is stopping")
                try:
                    failure = await self._reload()
                finally:
                    _answer(asked, failure)
                if failure is None:
                    await self._done()
        _answer(self._waiting, Error("the daemon is stopping"))
        self._over.set()

    async def _reload(self) -> Error | None:
        """Returns what went wrong; then everything is as it was."""
        generation, report = self._crew.generation, self._report
        assert generation is not None
        failure = None
        report.reloading = True
        self._notifier.reloading()
        log.info("reloading")
        try:
            await self.bring_up(generation.number + 1)
            log.info("reloaded", extra={"fields": {"generation": generation.number + 1}})
        except Error as error:
            failure = error
            complain(logging.ERROR, "reload failed", error)
        except Exception as error:
            failure = Error(f"internal error: {error}")
            log.exception("reload failed")
        finally:
            report.reloading = False
        if failure is not None:
            log.error("nothing has changed: the configuration in force stays")
        report.reloaded(failure)
        self._notifier.ready(report.line)
        return failure

    async def bring_up(self, number: int) -> None:
        """Start a generation of what the configuration says now, and have it in force when it is ready.

        Raises Error, or is cancelled; then everything is as it was.
        """
        # In a thread: what it is read from may keep us waiting (a FIFO).
        text, source = await trio.to_thread.run_sync(self._invocation.read, abandon_on_cancel=True)
        try:
            candidate = await self._crew.prepare(number, text, source, self._log.prepare)
        except BaseException:
            self._log.drop()
            raise
        exporter = None
        try:
            exporter = self._doors.prepare(candidate.generation.plan.metrics)
            await self._let_drain()
        except BaseException:
            self._log.drop()
            self._doors.drop(exporter)
            self._crew.dismiss(candidate)
            raise
        with trio.CancelScope(shield=True):
            await self._commit(candidate, exporter)

    async def _let_drain(self) -> None:
        """One more generation is about to drain: the oldest must have ended if there would be too many."""
        crew = self._crew
        if len(crew.draining) < _MOST_DRAINING:
            return
        oldest = crew.draining[0]
        log.info("the reload waits for an older generation to drain", extra={"fields": {"generation": oldest}})
        with trio.move_on_after(_PATIENCE):
            while crew.of(oldest):
                await crew.changed.wait()
        if left := crew.of(oldest):
            live = sum(worker.live for worker in left)
            log.warning("ending the oldest generation", extra={"fields": {"generation": oldest, "live": live}})
            await crew.drain(left, 0.0)

    async def _commit(self, candidate: Candidate, exporter: Exporter | None) -> None:
        """Let a generation that is ready be the one in force."""
        plan = candidate.generation.plan
        listened = set() if self._crew.generation is None else set(place_names(self._slots, opened=False))
        old_log = self._log.commit()
        await self._crew.commit(candidate)
        self._committed()
        self._doors.commit(exporter, plan.metrics, plan.control)
        for warning in plan.warnings:
            log.warning(warning)
        for place in place_names(self._slots):
            if place not in listened:
                log.info("listening", extra={"fields": {"address": place}})
        if old_log is not None:
            await trio.to_thread.run_sync(old_log.close)


def _answer(asked: Sequence[trio.MemorySendChannel[Error | None]], failure: Error | None) -> None:
    for sender in asked:
        sender.send_nowait(failure)

"""A configuration comes into force: at the start, and at each reload; or nothing changes, and the log says why.

Reloads that are asked for while one is under way are one. At most two older generations drain at a time.

A reload may be on trial (trial.py). Until somebody confirms it, what was in force before is kept. Reloads meanwhile
neither confirm it nor give it more time, unless they are on trial themselves: whoever automates them is no witness that
all is well.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from math import inf

import trio

from usocksd.errors import ConfigError, Error
from usocksd.serve.crew import Candidate, Crew
from usocksd.serve.doors import Doors
from usocksd.serve.exporter import Exporter
from usocksd.serve.invocation import Invocation, MasterLog
from usocksd.serve.notify import Notifier
from usocksd.serve.report import Report
from usocksd.serve.slots import Slots, place_names
from usocksd.serve.trial import Before, Trial

log = logging.getLogger(__name__)

# A third generation would drain: so long, in seconds, a reload waits for the oldest to end by itself.
_MOST_DRAINING = 2
_PATIENCE = 30.0
# When what was before a trial can't be brought up, it is tried again after so many seconds.
_RETURN_AGAIN = 5.0


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
        self._wanted = False
        self._news = trio.Event()
        self._trial: Trial | None = None
        # Of the task that reloads: whoever stops the daemon cancels it, and waits until it is over.
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        # Who asked for the next reload, and for how many seconds it is to be on trial, if it is.
        self._waiting: list[trio.MemorySendChannel[Error | None]] = []
        self._on_trial_for: int | None = None

    def ask(self) -> None:
        """Have the configuration read again, soon."""
        self._wanted = True
        self._news.set()

    async def ask_and_wait(self, on_trial_for: int | None = None) -> None:
        """The same, and return when it is in force, perhaps for so many seconds. Raises Error when that went wrong."""
        if self._report.draining:
            raise Error("the daemon is stopping")
        sender, receiver = trio.open_memory_channel[Error | None](1)
        self._waiting.append(sender)
        self._on_trial_for = on_trial_for or self._on_trial_for
        self.ask()
        error = await receiver.receive()
        if error is not None:
            raise error

    def confirm(self) -> bool:
        """What is in force stays; False if it was not on trial. Raises Error when it is too late, or too early."""
        if self._trial is None:
            return False
        if self._trial.returning:
            raise Error("too late: the configuration before is coming back")
        if self._report.reloading:
            raise Error("a reload is under way: confirm what it brings when you have seen that")
        self._decided()
        log.info("the configuration is confirmed")
        self._news.set()
        return True

    async def end(self) -> None:
        """No more reloads: the one under way changes nothing, unless it is past that point."""
        if self._trial is not None:
            log.warning("stopping with a configuration that nobody has confirmed: the next start reads it again")
        self._scope.cancel()
        await self._over.wait()

    async def run(self) -> None:
        """Reload whenever it is asked for, and go back when a trial is over, until told to end."""
        with self._scope:
            while True:
                with trio.move_on_at(inf if self._trial is None else self._trial.deadline):
                    await self._news.wait()
                failure: Error | None = None
                if self._trial is not None and self._trial.over:
                    failure = await self._go_back(self._trial)
                else:
                    self._news = trio.Event()
                    if self._wanted:
                        failure = await self._reload_for_all()
                # A newer version of this process would know nothing of a trial.
                if failure is None and self._trial is None:
                    await self._done()
        _answer(self._waiting, Error("the daemon is stopping"))
        self._over.set()

    async def _reload_for_all(self) -> Error | None:
        """Whoever asked until here is answered by what is read from here on."""
        self._wanted = False
        asked, self._waiting = self._waiting, []
        seconds, self._on_trial_for = self._on_trial_for, None
        failure: Error | None = Error("the daemon is stopping")
        assert self._crew.generation is not None
        before = None if seconds is None or self._trial is not None else Before.of(self._crew.generation)
        try:
            failure = await self._reload()
            self._report.reloaded(failure)
            if failure is None and seconds is not None:
                self._begin_trial(before, seconds)
                before = None
        finally:
            if before is not None:
                before.files.close()
            _answer(asked, failure)
        return failure

    def _begin_trial(self, before: Before | None, seconds: int) -> None:
        """Or begin it anew, with what was before the first."""
        deadline = trio.current_time() + seconds
        if self._trial is not None:
            self._trial.seconds, self._trial.deadline = seconds, deadline
        elif before is not None:
            self._trial = self._report.trial = Trial(before, seconds, deadline)
        log.warning("the configuration is on trial", extra={"fields": {"seconds": seconds}})

    async def _go_back(self, trial: Trial) -> Error | None:
        log.warning("nobody has confirmed the configuration: the one before comes back")
        trial.returning = True
        failure = await self._reload(trial.before)
        if failure is None:
            seconds = trial.seconds
            self._decided()
            source = trial.before.source
            failure_of_trial = f"{source}: not confirmed within {seconds} s: what was in force before it is again"
            self._report.reloaded(Error(failure_of_trial))
        else:
            trial.returning, trial.deadline = False, trio.current_time() + _RETURN_AGAIN
        return failure

    def _decided(self) -> None:
        if self._trial is not None:
            self._trial.close()
        self._trial = self._report.trial = None

    async def _reload(self, before: Before | None = None) -> Error | None:
        """What is in the file, or was `before`. Returns what went wrong; then everything is as it was."""
        generation, report = self._crew.generation, self._report
        assert generation is not None
        failure = None
        report.reloading = True
        self._notifier.reloading()
        log.info("reloading")
        try:
            await self.bring_up(generation.number + 1, before)
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
        self._notifier.ready(report.line)
        return failure

    async def bring_up(self, number: int, before: Before | None = None) -> None:
        """Start a generation of what the configuration says now, or said `before`, and have it in force when it is
        ready.

        Raises Error, or is cancelled; then everything is as it was.
        """
        if before is None:
            # In a thread: what it is read from may keep us waiting (a FIFO).
            text, source = await trio.to_thread.run_sync(self._invocation.read, abandon_on_cancel=True)
            kept = None
        else:
            text, source, kept = before.text, before.source, before.files
        try:
            candidate = await self._crew.prepare(number, text, source, self._log.prepare, kept)
        except BaseException:
            self._log.drop()
            raise
        exporter = None
        try:
            exporter = self._doors.prepare(candidate.generation.plan.metrics)
            # Whoever goes back has been locked out, perhaps, and is not to wait.
            await self._let_drain(_MOST_DRAINING if before is None else _MOST_DRAINING + 1)
        except BaseException:
            self._log.drop()
            self._doors.drop(exporter)
            self._crew.dismiss(candidate)
            raise
        with trio.CancelScope(shield=True):
            await self._commit(candidate, exporter)

    async def _let_drain(self, most: int) -> None:
        """One more generation is about to drain: the oldest must have ended if there would be more than `most`."""
        crew = self._crew
        if len(crew.draining) < most:
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

"""Brings configurations into force, at the start and at each reload; or nothing changes, and the log says why.

Reloads that are requested while one is under way are combined into one. At most two older generations drain at a time.

A reload may be on trial: unless somebody confirms it in time, the previous configuration comes back. Other reloads
neither confirm a trial nor change its deadline, unless they are on trial themselves: a reload by a timer proves
nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from math import inf
from typing import TYPE_CHECKING

import attrs
import trio

from usocksd.errors import ConfigError, Error
from usocksd.serve.crew import Crew
from usocksd.serve.doors import Doors
from usocksd.serve.listening import ListeningSockets
from usocksd.serve.master_log import MasterLog
from usocksd.serve.notify import Notifier
from usocksd.serve.plan import Generation
from usocksd.serve.report import Reporter
from usocksd.serve.timing import Timing

if TYPE_CHECKING:
    from usocksd.serve.exporter import Exporter

log = logging.getLogger(__name__)

_MOST_DRAINING = 2

Read = Callable[[], tuple[str, str]]
"""Returns the text of the configuration, and the name of its file. Raises ConfigError."""


def complain(level: int, message: str, error: Error) -> None:
    """Log each fault of a configuration, or another error as `message`."""
    if isinstance(error, ConfigError):
        for fault in error.faults:
            place: dict[str, object] = {"file": error.source} | ({} if fault.line is None else {"line": fault.line})
            log.log(level, "bad configuration", extra={"fields": {**place, "error": str(fault)}})
    else:
        log.log(level, message, extra={"fields": {"error": str(error)}})


@attrs.define
class ReloadRequest:
    """A reload that has not begun. All who ask before it begins share its result."""

    on_trial_for: int | None = None
    """Seconds"""
    failure: Error | None = attrs.Factory(lambda: Error("the daemon is stopping"))
    """The error, or None; valid when it is done"""
    done: trio.Event = attrs.Factory(trio.Event)


@attrs.define
class Trial:
    """A configuration is on trial. `deadline` is by trio's clock, which setting the time does not move."""

    before: Generation
    """The previous configuration, with its files"""
    seconds: int
    """The duration that was asked for, in seconds"""
    deadline: float
    returning: bool = False
    """The deadline has passed, and the previous configuration is being restored."""


class Reloads:
    """Brings configurations into force, one at a time. `done` is awaited after each reload that went well."""

    def __init__(
        self,
        read: Read,
        own_log: MasterLog,
        notifier: Notifier,
        *,
        sockets: ListeningSockets,
        crew: Crew,
        doors: Doors,
        report: Reporter,
        timing: Timing,
        done: Callable[[], Awaitable[None]],
    ) -> None:
        self._read = read
        self._log = own_log
        self._notifier = notifier
        self._sockets = sockets
        self._crew = crew
        self._doors = doors
        self._report = report
        self._timing = timing
        self._done = done
        self._request: ReloadRequest | None = None
        self._news = trio.Event()
        self._trial: Trial | None = None
        # The scope of the reload under way: a stop cancels it, and waits until it is over.
        self._scope = trio.CancelScope()
        self._over = trio.Event()

    def ask(self, on_trial_for: int | None = None) -> ReloadRequest:
        """Have the configuration read again soon, perhaps for these seconds only."""
        if self._request is None:
            self._request = ReloadRequest()
        self._request.on_trial_for = on_trial_for or self._request.on_trial_for
        self._news.set()
        return self._request

    async def ask_and_wait(self, on_trial_for: int | None = None) -> None:
        """The same; returns when it is in force. Raises Error if that went wrong."""
        request = self.ask(on_trial_for)
        if not self._report.draining:
            await request.done.wait()
        if request.failure is not None:
            raise request.failure

    def confirm(self) -> bool:
        """End the trial: keep the configuration in force. False if it was not on trial. Raises Error if it is too late,
        or too early.
        """
        trial = self._trial
        if trial is None:
            return False
        if trial.returning:
            raise Error("too late: the configuration before is coming back")
        if self._report.reloading:
            raise Error("a reload is under way: confirm what it brings when you have seen that")
        self._end_trial(trial)
        log.info("the configuration is confirmed")
        self._news.set()
        return True

    async def end(self) -> None:
        """Reload no more. A reload that is under way changes nothing, unless it is coming into force already."""
        if self._trial is not None:
            log.warning("stopping with an unconfirmed configuration: the next start reads it again")
        self._scope.cancel()
        await self._over.wait()

    async def run(self) -> None:
        """Reload on request, and go back when a trial is over, until told to end."""
        with self._scope:
            while True:
                with trio.move_on_at(inf if self._trial is None else self._trial.deadline):
                    await self._news.wait()
                failure: Error | None = None
                if self._trial is not None and self._trial.deadline <= trio.current_time():
                    failure = await self._go_back(self._trial)
                else:
                    self._news = trio.Event()
                    if self._request is not None:
                        failure = await self._reload_for(self._request)
                # A trial is not passed on to a newer version of this process.
                if failure is None and self._trial is None:
                    await self._done()
        if self._request is not None:
            self._request.done.set()
        self._over.set()

    async def _reload_for(self, request: ReloadRequest) -> Error | None:
        self._request = None
        seconds = request.on_trial_for
        before = self._crew.generation if seconds is not None and self._trial is None else None
        if before is not None:
            before = attrs.evolve(before, files=before.files.copy())
        try:
            request.failure = await self._reload()
            self._report.reloaded(request.failure)
            if request.failure is None and seconds is not None:
                self._begin_trial(before, seconds)
                before = None
        finally:
            if before is not None:
                before.files.close()
            request.done.set()
        return request.failure

    def _begin_trial(self, before: Generation | None, seconds: int) -> None:
        """If a trial is under way, only set a new deadline: it still goes back to the configuration before the first
        one.
        """
        deadline = trio.current_time() + seconds
        if before is not None:
            self._trial = Trial(before, seconds, deadline)
        elif self._trial is not None:
            self._trial.seconds, self._trial.deadline = seconds, deadline
        self._report.confirm_by = deadline
        log.warning("the configuration is on trial", extra={"fields": {"seconds": seconds}})

    def _end_trial(self, trial: Trial) -> None:
        trial.before.files.close()
        self._trial = self._report.confirm_by = None

    async def _go_back(self, trial: Trial) -> Error | None:
        log.warning("configuration not confirmed in time: going back to the previous one")
        trial.returning = True
        failure = await self._reload(trial.before)
        if failure is None:
            self._end_trial(trial)
            source, seconds = trial.before.source, trial.seconds
            self._report.reloaded(
                Error(f"{source}: not confirmed within {seconds} s: what was in force before it is again")
            )
        else:
            trial.returning, trial.deadline = False, trio.current_time() + self._timing.return_again
        return failure

    async def _reload(self, before: Generation | None = None) -> Error | None:
        """Bring the file, or `before`, into force. Returns an error, and then nothing has changed; or None."""
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

    async def bring_up(self, number: int, before: Generation | None = None) -> None:
        """Start a generation of the configuration as it is now, or as it was `before`, and bring it into force when it
        is ready.

        Raises Error, or is cancelled; then everything is as it was.
        """
        if before is None:
            # In a thread: the file may block (a FIFO).
            text, source = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
        else:
            text, source = before.text, before.source
        with ExitStack() as undo:
            undo.callback(self._log.drop)
            kept = None if before is None else before.files
            generation = await self._crew.prepare(number, text, source, self._log.prepare, kept)
            undo.callback(self._crew.dismiss, generation)
            exporter = self._doors.prepare(generation.plan.metrics)
            undo.callback(self._doors.drop, exporter)
            # Going back does not wait, since the admin may be locked out.
            await self._let_drain(_MOST_DRAINING if before is None else _MOST_DRAINING + 1)
            undo.pop_all()
        with trio.CancelScope(shield=True):
            await self._commit(generation, exporter)

    async def _let_drain(self, most: int) -> None:
        """Wait until one more generation may drain; after the time limit, end the oldest."""
        crew = self._crew
        if len(crew.draining) < most:
            return
        oldest = crew.draining[0]
        log.info("the reload waits for an older generation to drain", extra={"fields": {"generation": oldest}})
        with trio.move_on_after(self._timing.patience):
            while crew.of(oldest):
                await crew.changed.park()
        if left := crew.of(oldest):
            live = sum(worker.live for worker in left)
            log.warning("ending the oldest generation", extra={"fields": {"generation": oldest, "live": live}})
            await crew.drain(left, 0.0)

    async def _commit(self, generation: Generation, exporter: Exporter | None) -> None:
        plan = generation.plan
        listened = set() if self._crew.generation is None else set(self._sockets.listening(opened=False))
        old_log = self._log.commit()
        await self._crew.commit(generation)
        self._doors.commit(exporter, plan)
        for warning in plan.warnings:
            log.warning(warning)
        for place in self._sockets.listening():
            if place not in listened:
                log.info("listening", extra={"fields": {"address": place}})
        if old_log is not None:
            await trio.to_thread.run_sync(old_log.close)

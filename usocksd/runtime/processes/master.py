"""The master: owns what must outlive a worker or be one truth for all, and carries no traffic.

It starts a generation of workers for each configuration, and lets the old one go when, and only when, the new one is
ready to serve. When the workers turn out to be of a newer version than itself, it becomes that version (handover.py).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error
from usocksd.runtime.exporter import Exporter
from usocksd.runtime.limits import raise_descriptor_limit
from usocksd.runtime.log import parse_level
from usocksd.runtime.metrics import Metrics, lasting, total
from usocksd.runtime.processes import handover
from usocksd.runtime.processes.control import Handler
from usocksd.runtime.processes.crew import Candidate, Crew, Generation
from usocksd.runtime.processes.doors import Doors
from usocksd.runtime.processes.invocation import Invocation, MasterLog
from usocksd.runtime.processes.notify import Notifier, inherited_sockets
from usocksd.runtime.processes.plan import HANDOVER
from usocksd.runtime.processes.report import Report
from usocksd.runtime.processes.slots import Slots, check_inherited, place_names

log = logging.getLogger(__name__)

_STOP_DELAY = "CANCELLATION_DELAY_SECONDS"
# A third generation would drain: so long, in seconds, a reload waits for the oldest to end by itself.
_MOST_DRAINING = 2
_PATIENCE = 30.0
# When the daemon stops, so long may what waits to be accepted take, in seconds.
_EMPTY_WITHIN = 1.0
# What a stop may take besides what its limits say.
_MARGIN = 10.0
# The service manager hears the state so often, in seconds, when it has changed.
_STATUS_EVERY = 5.0
# A worker has so long, in seconds, to answer a verb in its daemon's stead.
_VERB_WITHIN = 60.0
# The verb that asked for a reload has its answer by then, and the master may become another program.
_ANSWERED_AFTER = 0.5
_HEARD_AFTER = 0.05

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}


def stop_delay() -> float:
    """CANCELLATION_DELAY_SECONDS: how long to go on accepting after SIGTERM, in seconds; 0 if it is not set.

    Raises Error for what is no number of seconds.
    """
    text = os.environ.get(_STOP_DELAY, "0")
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay < float("inf"):
        raise Error(f"environment: {_STOP_DELAY}={text!r}: expected a number of seconds, 0 or more")
    return delay


def main(invocation: Invocation) -> int:
    """The master process. Returns the exit status."""
    # Signals wait until there is somebody to hear them. When nobody is any more, told to stop once more while it ends,
    # they do nothing: this is what trio puts back.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    own_log = MasterLog(invocation)
    try:
        return trio.run(_run, invocation, own_log)
    except Exception:
        log.critical("internal error", exc_info=True)
        return 1
    finally:
        for number in _SIGNALS:  # else the interpreter, which ends too, puts back what they do by default
            signal.signal(number, signal.SIG_IGN)
        own_log.current.close()


async def _run(invocation: Invocation, own_log: MasterLog) -> int:
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        state = handover.received()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        async with trio.open_nursery() as nursery:
            try:
                master = Master(invocation, own_log, nursery, state)
                await master.run(signals, state)
            except Error as error:
                _complain(logging.CRITICAL, "can't start", error)
                return 1
            finally:
                nursery.cancel_scope.cancel()
    log.info("stopped")
    return 0


def _complain(level: int, message: str, error: Error) -> None:
    if isinstance(error, ConfigError):
        for fault in error.faults:
            log.log(level, "bad configuration", extra={"fields": {"file": error.source, "error": str(fault)}})
    else:
        log.log(level, message, extra={"fields": {"error": str(error)}})


class Master:
    """One daemon from its start to its end. `state` is what an earlier version of this process has passed on."""

    def __init__(
        self, invocation: Invocation, own_log: MasterLog, nursery: trio.Nursery, state: dict[str, Any] | None
    ) -> None:
        """Raises Error for an environment that makes no sense."""
        self._invocation = invocation
        self._log = own_log
        self._nursery = nursery
        self._stop_delay = stop_delay()
        self._notifier = Notifier()
        self._metrics = Metrics(invocation.name)
        if state is None:
            inherited = inherited_sockets()
            check_inherited(inherited)
            self._slots = Slots(inherited)
        else:
            self._slots = Slots.take_over(state["slots"])
        raise_descriptor_limit()
        self._crew = Crew(nursery, self._slots, self._metrics, None if state is None else state["table"])
        started = time.time() if state is None else state["started"]
        self._report = Report(invocation.name, self._crew, self._slots, self._metrics, log=own_log, started=started)
        self._handlers: dict[str, Handler] = {
            "status": lambda _: self._report.status(),
            "connections": lambda _: self._report.connections(),
            "reload": self._on_reload,
            "drain": self._on_drain,
            "log-level": self._on_log_level,
        }
        self._doors = Doors(invocation.name, nursery, self._report, self._handlers)
        self._starting = trio.CancelScope()
        self._stop_wanted = trio.Event()
        self._stop_cause = ""
        self._reload_wanted = trio.Event()
        # Of the task that reloads: whoever stops the daemon cancels it, and waits until it is over.
        self._reloads = trio.CancelScope()
        self._reloads_over = trio.Event()
        # Who asked for the next reload.
        self._waiting: list[trio.MemorySendChannel[Error | None]] = []

    async def run(self, signals: AsyncIterator[int], state: dict[str, Any] | None) -> None:
        """Serve until told to stop. Raises Error when it can't start."""
        self._nursery.start_soon(self._obey, signals)
        with self._starting:
            if state is None:
                await self._bring_up(1)
            else:
                self._go_on(state)
            self._notifier.ready(self._report.line)
            self._nursery.start_soon(self._crew.look_after)
            self._nursery.start_soon(self._reload_when_wanted)
            self._nursery.start_soon(self._tell_manager)
            await self._stop_wanted.wait()
        if self._crew.generation is not None:  # else it was told so before it had begun
            await self._stop(self._crew.generation)

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            match number:
                case signal.SIGCHLD:
                    self._crew.reap()
                case signal.SIGUSR1:
                    self._log.current.reopen()
                    await self._crew.tell({"type": "reopen"})
                case signal.SIGHUP:
                    self._reload_wanted.set()
                case _:
                    self._stop_cause = signal.Signals(number).name
                    self._stop_wanted.set()
                    if self._crew.generation is None:
                        self._starting.cancel()

    async def _stop(self, generation: Generation) -> None:
        crew, report = self._crew, self._report
        report.draining = True
        self._stop_wanted = again = trio.Event()
        self._notifier.stopping(report.line, self._stop_delay + generation.plan.stop + _MARGIN)
        self._reloads.cancel()
        await self._reloads_over.wait()
        log.info("stopping", extra={"fields": {"cause": self._stop_cause, "live": await report.live_now()}})
        async with trio.open_nursery() as nursery:

            async def at_once() -> None:
                await again.wait()
                log.warning("told to stop again: ending at once", extra={"fields": {"live": report.live}})
                await crew.stop(0.0)
                nursery.cancel_scope.cancel()

            nursery.start_soon(at_once)
            await trio.sleep(self._stop_delay)
            refused = self._slots.refuse()
            nursery.start_soon(crew.stop, generation.plan.stop)
            # The workers take what is waiting, and close their ends.
            with trio.move_on_after(_EMPTY_WITHIN if refused else _EMPTY_WITHIN / 10):
                while not self._slots.inherited and self._slots.queues()[0]:  # noqa: ASYNC110 - the kernel's queue
                    await trio.sleep(0.01)
            self._slots.close()
            while crew.workers:
                await crew.changed.wait()
            nursery.cancel_scope.cancel()
        self._slots.close()
        self._doors.close()

    # A new configuration

    async def _reload_when_wanted(self) -> None:
        with self._reloads:
            while True:
                await self._reload_wanted.wait()
                # Whoever asked until here is answered by what is read from here on.
                self._reload_wanted = trio.Event()
                asked, self._waiting = self._waiting, []
                failure: Error | None = Error("the daemon is stopping")
                try:
                    failure = await self._reload()
                finally:
                    _answer(asked, failure)
                if failure is None:
                    await self._become_newer()
        _answer(self._waiting, Error("the daemon is stopping"))
        self._reloads_over.set()

    async def _reload(self) -> Error | None:
        """Returns what went wrong; then everything is as it was."""
        generation, report = self._crew.generation, self._report
        assert generation is not None
        failure = None
        report.reloading = True
        self._notifier.reloading()
        log.info("reloading")
        try:
            await self._bring_up(generation.number + 1)
            log.info("reloaded", extra={"fields": {"generation": generation.number + 1}})
        except Error as error:
            failure = error
            _complain(logging.ERROR, "reload failed", error)
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

    async def _bring_up(self, number: int) -> None:
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
        self._learn_verbs()
        self._doors.commit(exporter, plan.metrics, plan.control)
        for warning in plan.warnings:
            log.warning(warning)
        for place in place_names(self._slots):
            if place not in listened:
                log.info("listening", extra={"fields": {"address": place}})
        if old_log is not None:
            await trio.to_thread.run_sync(old_log.close)

    # What operators ask for

    def _learn_verbs(self) -> None:
        """What the daemon answers itself; its workers have said so."""
        for worker in self._crew.serving:
            for verb in worker.verbs:
                self._handlers.setdefault(verb, self._forward)

    async def _forward(self, request: dict[str, Any]) -> dict[str, Any]:
        """To a worker: that of the first slot, or the next one that serves."""
        for worker in sorted(self._crew.serving, key=lambda worker: worker.slot):
            try:
                with trio.fail_after(_VERB_WITHIN):
                    rows = await worker.ask("verb", request=request)
            except trio.TooSlowError:
                raise Error(f"no answer within {_VERB_WITHIN:.0f} s") from None
            for row in rows:  # one, or none if the worker has ended meanwhile
                if "error" in row:
                    raise Error(row["error"])
                return dict(row["answer"])
        raise Error("no worker serves")

    async def _on_reload(self, _: dict[str, Any]) -> dict[str, Any]:
        if self._report.draining:
            raise Error("the daemon is stopping")
        sender, receiver = trio.open_memory_channel[Error | None](1)
        self._waiting.append(sender)
        self._reload_wanted.set()
        error = await receiver.receive()
        if error is not None:
            raise error
        assert self._crew.generation is not None
        return {"generation": self._crew.generation.number}

    async def _on_drain(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self._report.draining:  # a second time does not mean "at once", as it does for signals
            self._stop_cause = "drain"
            self._stop_wanted.set()
        return {}

    async def _on_log_level(self, request: dict[str, Any]) -> dict[str, Any]:
        wanted = request.get("level")
        if wanted is not None:
            try:
                level = parse_level(str(wanted))
            except ValueError as error:
                raise Error(str(error)) from None
            self._log.current.set_level(level)
            self._crew.level = str(wanted)
            await self._crew.tell({"type": "level", "level": str(wanted)})
        return {"level": self._log.current.level.name.lower()}

    async def _tell_manager(self) -> None:
        """Signs of life, and the state when it has changed."""
        every = min(_STATUS_EVERY, (self._notifier.watchdog or _STATUS_EVERY * 2) / 2)
        said = ""
        while True:
            self._notifier.alive()
            line = self._report.line
            if line != said:
                said = line
                self._notifier.status(line)
            await trio.sleep(every)

    # A new version

    async def _become_newer(self) -> None:
        """If the workers are of another version than this process: that is the one that is installed now."""
        crew = self._crew
        newer = [worker for worker in crew.serving if worker.version != __version__]
        if not newer:
            return
        if any(worker.handover != HANDOVER for worker in newer):
            log.warning("the workers are of a newer version, which can't take over from this master: restart it")
            return
        try:
            await self._settle()
            log.info(
                "becoming the version of the workers",
                extra={"fields": {"from": __version__, "to": newer[0].version}},
            )
            state = self._hand_over()
            fds = [*self._slots.filenos(), *self._doors.filenos(), *crew.filenos()]
            self._log.current.close()
            try:
                handover.become(state, fds, self._notifier.environment(), _SIGNALS)
            except OSError as error:
                self._log.reopen()
                log.error("can't become the version of the workers", extra={"fields": {"error": str(error)}})
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    async def _settle(self) -> None:
        """Returns when there is nothing that could not be passed on, with signals held back for the new program."""
        while True:
            await trio.sleep(_ANSWERED_AFTER)
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS - {signal.SIGCHLD})
            # Those that had come before are heard now. One may say to stop, which cancels this.
            await trio.sleep(_HEARD_AFTER)
            if self._crew.settled:
                return
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _hand_over(self) -> dict[str, Any]:
        crew = self._crew
        assert crew.generation is not None
        return {
            "started": self._report.started,
            "last_reload": self._report.last_reload,
            "slots": self._slots.hand_over(),
            "doors": self._doors.hand_over(),
            "table": crew.table,
            "generation": crew.generation.as_json(),
            "retired": total([crew.retired, lasting(self._metrics.snapshot())], bounded=True),
            "level": crew.level,
            "shared": crew.shared,
            "workers": [handover.worker_state(worker) for worker in crew.workers],
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        """Where the earlier version of this process has stopped."""
        crew, report = self._crew, self._report
        os.set_inheritable(crew.table, False)
        generation = Generation.from_json(state["generation"])
        self._log.prepare(generation.plan.log)
        crew.retired, crew.level, crew.shared = state["retired"], state["level"], state.get("shared")
        crew.take_over(generation, [handover.restore_worker(worker) for worker in state["workers"]])
        self._learn_verbs()
        if crew.level is not None:
            self._log.current.set_level(parse_level(crew.level))
        self._doors.take_over(state["doors"])
        report.last_reload = state["last_reload"]
        log.info("this is the new version", extra={"fields": {"version": __version__}})


def _answer(asked: Sequence[trio.MemorySendChannel[Error | None]], failure: Error | None) -> None:
    for sender in asked:
        sender.send_nowait(failure)

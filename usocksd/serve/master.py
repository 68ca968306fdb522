"""The master: owns what must outlive a worker or be one truth for all, and carries no traffic.

It starts a generation of workers for each configuration, and lets the old one go when, and only when, the new one is
ready to serve (reloads.py). When the workers turn out to be of a newer version than itself, it becomes that version
(handover.py).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import Error
from usocksd.host.limits import raise_descriptor_limit
from usocksd.log.log import parse_level
from usocksd.log.metrics import Metrics, lasting, total
from usocksd.serve import handover
from usocksd.serve.control import Handler
from usocksd.serve.crew import Crew
from usocksd.serve.doors import Doors
from usocksd.serve.generation import Generation
from usocksd.serve.invocation import Invocation, MasterLog
from usocksd.serve.notify import Notifier, inherited_sockets
from usocksd.serve.plan import HANDOVER
from usocksd.serve.reloads import Reloads, complain
from usocksd.serve.report import Report, now
from usocksd.serve.slots import Slots, check_inherited
from usocksd.settings.files import NamedFiles

log = logging.getLogger(__name__)

_STOP_DELAY = "CANCELLATION_DELAY_SECONDS"
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

MOST_SECONDS = 86400
"""A trial takes a day at most."""

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
                complain(logging.CRITICAL, "can't start", error)
                return 1
            finally:
                nursery.cancel_scope.cancel()
    log.info("stopped")
    return 0


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
        started = now() if state is None else state["started"]
        self._report = Report(invocation.name, self._crew, self._slots, self._metrics, log=own_log, started=started)
        self._handlers: dict[str, Handler] = {
            "status": lambda _: self._report.status(),
            "connections": lambda _: self._report.connections(),
            "reload": self._on_reload,
            "confirm": self._on_confirm,
            "drain": self._on_drain,
            "log-level": self._on_log_level,
        }
        self._doors = Doors(invocation.name, nursery, self._report, self._handlers)
        self._starting = trio.CancelScope()
        self._stop_wanted = trio.Event()
        self._stop_cause = ""
        self._reloads = Reloads(
            invocation,
            own_log,
            self._notifier,
            slots=self._slots,
            crew=self._crew,
            doors=self._doors,
            report=self._report,
            committed=self._learn_verbs,
            done=self._become_newer,
        )

    async def run(self, signals: AsyncIterator[int], state: dict[str, Any] | None) -> None:
        """Serve until told to stop. Raises Error when it can't start."""
        self._nursery.start_soon(self._obey, signals)
        with self._starting:
            if state is None:
                await self._reloads.bring_up(1)
            else:
                self._go_on(state)
            self._notifier.ready(self._report.line)
            self._nursery.start_soon(self._crew.look_after)
            self._nursery.start_soon(self._reloads.run)
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
                    self._reloads.ask()
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
        await self._reloads.end()
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
                    rows = (await worker.ask("verb", request=request)).rows
            except trio.TooSlowError:
                raise Error(f"no answer within {_VERB_WITHIN:.0f} s") from None
            for row in rows:  # one, or none if the worker has ended meanwhile
                if "error" in row:
                    raise Error(row["error"])
                return dict(row["answer"])
        raise Error("no worker serves")

    async def _on_reload(self, request: dict[str, Any]) -> dict[str, Any]:
        seconds = request.get("confirm")
        if seconds is not None and (type(seconds) is not int or not 1 <= seconds <= MOST_SECONDS):
            raise Error(f"confirm: expected seconds, an integer from 1 to {MOST_SECONDS}")
        await self._reloads.ask_and_wait(seconds)
        generation, trial = self._crew.generation, self._report.trial
        assert generation is not None
        left = None if trial is None else trial.left
        return {"generation": generation.number, "confirm_within": left, "warnings": list(generation.plan.warnings)}

    async def _on_confirm(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"confirmed": self._reloads.confirm()}

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
            "files": [crew.generation.files.places, crew.generation.files.fds],
            "retired": total([crew.retired, lasting(self._metrics.snapshot())], bounded=True),
            "level": crew.level,
            "shared": crew.shared,
            "workers": [handover.worker_state(worker) for worker in crew.workers],
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        """Where the earlier version of this process has stopped."""
        crew, report = self._crew, self._report
        os.set_inheritable(crew.table, False)
        # (Of a version that passes none on, they are read from where they lie.)
        files = NamedFiles.received(*state.get("files", ({}, [])))
        for fd in files.fds:
            os.set_inheritable(fd, False)
        generation = Generation.from_json(state["generation"], files)
        self._log.prepare(generation.plan.log)
        crew.retired, crew.level, crew.shared = state["retired"], state["level"], state.get("shared")
        crew.take_over(generation, [handover.restore_worker(worker) for worker in state["workers"]])
        self._learn_verbs()
        if crew.level is not None:
            self._log.current.set_level(parse_level(crew.level))
        self._doors.take_over(state["doors"])
        report.last_reload = state["last_reload"]
        log.info("this is the new version", extra={"fields": {"version": __version__}})

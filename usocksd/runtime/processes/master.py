"""The master: owns what must outlive a worker or be one truth for all, and carries no traffic.

It starts a generation of workers for each configuration, and lets the old one go when, and only when, the new one is
ready to serve. When the workers turn out to be of a newer version than itself, it becomes that version (handover.py).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error
from usocksd.runtime.exporter import Exporter
from usocksd.runtime.hostport import join_port
from usocksd.runtime.listeners import ListenError, listen
from usocksd.runtime.log import parse_level
from usocksd.runtime.metrics import Metrics, Snapshot, lasting, total
from usocksd.runtime.processes import handover
from usocksd.runtime.processes.control import ControlError, ControlSocket
from usocksd.runtime.processes.crew import Candidate, Crew, Generation
from usocksd.runtime.processes.invocation import Invocation, MasterLog
from usocksd.runtime.processes.notify import Notifier, inherited_sockets
from usocksd.runtime.processes.plan import HANDOVER, Metering
from usocksd.runtime.processes.report import Report
from usocksd.runtime.processes.slots import Slots, check_inherited, place_names, restore_socket

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
# The verb that asked for a reload has its answer by then, and the master may become another program.
_ANSWERED_AFTER = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


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
    own_log = MasterLog(invocation)
    try:
        return trio.run(_run, invocation, own_log)
    except Exception:
        log.critical("internal error", exc_info=True)
        return 1
    finally:
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
        # Told to stop once more while it ends: it does.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
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
        table = None if state is None else state["table"]
        self._crew = Crew(nursery, self._slots, self._metrics, table)
        started = time.time() if state is None else state["started"]
        self._report = Report(invocation.name, self._crew, self._slots, self._metrics, log=own_log, started=started)
        self._exporter: Exporter | None = None
        self._metering: Metering | None = None
        self._control: ControlSocket | None = None
        self._control_scope = trio.CancelScope()
        self._reload_wanted = trio.Event()
        self._waiting: list[trio.MemorySendChannel[Error | None]] = []
        self._starting = trio.CancelScope()
        self._stop_wanted = trio.Event()
        self._stop_cause = ""

    async def run(self, signals: AsyncIterator[int], state: dict[str, Any] | None) -> None:
        """Serve until told to stop. Raises Error when it can't start."""
        self._nursery.start_soon(self._obey, signals)
        with self._starting:
            if state is None:
                text, source = self._invocation.read()
                candidate = await self._crew.prepare(1, text, source, self._log.prepare)
                try:
                    exporter = self._exporter_for(candidate.generation.plan.metrics)
                except Error:
                    self._crew.dismiss(candidate)
                    raise
                await self._commit(candidate, exporter)
            else:
                self._go_on(state)
            self._nursery.start_soon(self._crew.look_after)
            self._nursery.start_soon(self._reload_when_wanted)
            self._nursery.start_soon(self._tell_manager)
            await self._stop_wanted.wait()
        await self._stop()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            match number:
                case signal.SIGCHLD:
                    self._crew.reap()
                case signal.SIGUSR1:
                    self._log.current.reopen()
                    for worker in self._crew.ordered:
                        await worker.send({"type": "reopen"})
                case signal.SIGHUP:
                    self._reload_wanted.set()
                case _:
                    self._stop_cause = signal.Signals(number).name
                    self._stop_wanted.set()
                    if self._crew.generation is None:
                        self._starting.cancel()

    async def _stop(self) -> None:
        crew, report, generation = self._crew, self._report, self._crew.generation
        if generation is None:  # it was told so before it had begun
            return
        report.draining = True
        self._stop_wanted = again = trio.Event()
        self._notifier.stopping(report.line, self._stop_delay + generation.plan.stop + _MARGIN)
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
        self._control_scope.cancel()
        if self._control is not None:
            self._control.close()
        if self._exporter is not None:
            self._exporter.close()

    # A new configuration

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._reload_wanted.wait()
            # Whoever asked until here is answered by what is read from here on.
            self._reload_wanted = trio.Event()
            waiting, self._waiting = self._waiting, []
            failure: Error | None = None
            self._report.reloading = True
            self._notifier.reloading()
            try:
                await self._reload()
            except Error as error:
                failure = error
                _complain(logging.ERROR, "reload failed", error)
                log.error("nothing has changed: the configuration in force stays")
            finally:
                self._report.reloading = False
            self._report.reloaded(failure)
            self._notifier.ready(self._report.line)
            for sender in waiting:
                sender.send_nowait(failure)
            if failure is None:
                await self._become_newer()

    async def _reload(self) -> None:
        """Raises Error, and then everything is as it was."""
        crew = self._crew
        assert crew.generation is not None
        log.info("reloading")
        text, source = self._invocation.read()
        try:
            candidate = await crew.prepare(crew.generation.number + 1, text, source, self._log.prepare)
            try:
                exporter = self._exporter_for(candidate.generation.plan.metrics)
            except Error:
                crew.dismiss(candidate)
                raise
        except Error:
            self._log.drop()
            raise
        await self._let_drain()
        before = place_names(self._slots)
        await self._commit(candidate, exporter, before)
        log.info("reloaded", extra={"fields": {"generation": candidate.generation.number}})

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

    async def _commit(self, candidate: Candidate, exporter: Exporter | None, before: list[str] | None = None) -> None:
        """Let a generation that is ready be the one in force. `before`: the addresses that were listened on."""
        plan = candidate.generation.plan
        self._log.commit()
        await self._crew.commit(candidate)
        if exporter is not self._exporter and self._exporter is not None:
            self._exporter.close()
        self._exporter, self._metering = exporter, plan.metrics
        self._report.metrics_address = None if exporter is None else join_port(*exporter.address)
        if self._control is None or self._control.path != plan.control:
            self._open_control(plan.control)
        for warning in plan.warnings:
            log.warning(warning)
        for place in place_names(self._slots):
            if place not in (before or ()):
                log.info("listening", extra={"fields": {"address": place}})
        self._notifier.ready(self._report.line)

    # Metrics and control

    def _exporter_for(self, metering: Metering | None) -> Exporter | None:
        """The present one if nothing has changed. Raises ListenError when the port that was asked for can't be had."""
        if metering is None:
            return None
        if self._exporter is not None and self._metering is not None and metering[:2] == self._metering[:2]:
            return self._exporter
        try:
            sock = listen(metering.host, metering.port)
        except ListenError as error:
            if metering.required:
                raise
            log.warning("no metrics endpoint", extra={"fields": {"error": str(error)}})
            return None
        return self._export(sock)

    def _export(self, sock: Any) -> Exporter:
        token = trio.lowlevel.current_trio_token()

        def collect() -> Snapshot:
            return trio.from_thread.run_sync(self._report.collect, trio_token=token)

        return Exporter(sock, collect, lambda: self._report.health)

    def _open_control(self, path: str | None) -> None:
        if self._control is not None:
            self._control.close()  # whoever has asked for this reload there is answered
            self._control = None
        if path is not None:
            try:
                self._serve_control(ControlSocket.open(path, self._invocation.name))
            except ControlError as error:
                log.warning("no control socket", extra={"fields": {"error": str(error)}})

    def _serve_control(self, control: ControlSocket) -> None:
        self._control = control
        scope = self._control_scope = trio.CancelScope()
        handlers = {
            "status": lambda _: self._report.status(),
            "connections": lambda _: self._report.connections(),
            "reload": self._on_reload,
            "drain": self._on_drain,
            "log-level": self._on_log_level,
        }

        async def serve() -> None:
            with scope:
                await control.serve(handlers)

        self._nursery.start_soon(serve)

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
            for worker in self._crew.ordered:
                await worker.send({"type": "level", "level": str(wanted)})
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
        newer = [worker for worker in self._crew.serving if worker.version != __version__]
        if not newer:
            return
        if any(worker.handover != HANDOVER for worker in newer):
            log.warning("the workers are of a newer version, which can't take over from this master: restart it")
            return
        while True:
            await trio.sleep(_ANSWERED_AFTER)
            crew = self._crew
            if not crew.emptying and not any(worker.coming or worker.channel.sending for worker in crew.workers):
                break
        version = newer[0].version
        log.info("becoming the version of the workers", extra={"fields": {"from": __version__, "to": version}})
        state, fds = self._hand_over()
        self._log.current.close()
        try:
            handover.become(state, fds, self._notifier.environment(), _SIGNALS)
        except OSError as error:
            self._log.reopen()
            log.error("can't become the version of the workers", extra={"fields": {"error": str(error)}})

    def _hand_over(self) -> tuple[dict[str, Any], list[int]]:
        crew, slots = self._crew, self._slots
        assert crew.generation is not None
        counted = total([crew.retired, lasting(self._metrics.snapshot())])
        state = {
            "started": self._report.started,
            "last_reload": self._report.last_reload,
            "slots": slots.hand_over(),
            "table": crew.table,
            "generation": crew.generation.as_json(),
            "retired": counted,
            "level": crew.level,
            "workers": [handover.worker_state(worker) for worker in crew.workers],
            "metrics": None if self._exporter is None else self._exporter.fileno(),
            "metering": self._metering,
            "control": None
            if self._control is None
            else [self._control.path, self._control.fileno(), *self._control.inode],
        }
        fds = [*slots.filenos(), crew.table, *(worker.channel.fileno() for worker in crew.workers)]
        fds += [holder.fileno() for holder in (self._exporter, self._control) if holder is not None]
        return state, fds

    def _go_on(self, state: dict[str, Any]) -> None:
        """Where the earlier version of this process has stopped."""
        crew, report = self._crew, self._report
        os.set_inheritable(crew.table, False)
        generation = Generation.from_json(state["generation"])
        self._log.prepare(generation.plan.log)
        crew.retired, crew.level = state["retired"], state["level"]
        crew.take_over(generation, [handover.restore_worker(worker) for worker in state["workers"]])
        if crew.level is not None:
            self._log.current.set_level(parse_level(crew.level))
        if state["metrics"] is not None:
            self._exporter = self._export(restore_socket(state["metrics"]))
            report.metrics_address = join_port(*self._exporter.address)
        self._metering = None if state["metering"] is None else Metering(*state["metering"])
        if state["control"] is not None:
            path, fd, *inode = state["control"]
            self._serve_control(ControlSocket(path, restore_socket(fd), (inode[0], inode[1])))
        report.last_reload = state["last_reload"]
        log.info("this is the new version", extra={"fields": {"version": __version__}})
        self._notifier.ready(report.line)

"""The master: owns everything that must outlive a worker or be the same for all, and carries no traffic.

It starts a generation of workers for each configuration, and lets the old one drain when, and only when, the new one is
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
from usocksd.log.log import parse_level
from usocksd.log.metrics import Metrics
from usocksd.net.limits import raise_descriptor_limit
from usocksd.serve import handover
from usocksd.serve.control import Handler
from usocksd.serve.crew import Crew
from usocksd.serve.daemon import Daemon, Request
from usocksd.serve.doors import Doors
from usocksd.serve.listening import ListeningSockets, check_inherited
from usocksd.serve.master_log import MasterLog
from usocksd.serve.notify import Notifier, inherited_sockets
from usocksd.serve.plan import Generation
from usocksd.serve.reloads import Read, Reloads, complain
from usocksd.serve.report import Reporter
from usocksd.settings.types import LogConfig

log = logging.getLogger(__name__)

MOST_SECONDS = 86400
"""The longest trial of a configuration: a day"""

_STOP_DELAY = "CANCELLATION_DELAY_SECONDS"
# The time that the service manager grants a stop beyond the limits.
_MARGIN = 10.0
# How long signals that came before they were blocked take to be delivered.
_HEARD_AFTER = 0.05

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}


def stop_delay() -> float:
    """CANCELLATION_DELAY_SECONDS: how long to go on accepting after SIGTERM, in seconds; 0 if it is not set.

    Raises Error for anything but a number of seconds.
    """
    text = os.environ.get(_STOP_DELAY, "0")
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay < float("inf"):
        raise Error(f"environment: {_STOP_DELAY}={text!r}: expected a number of seconds, 0 or more")
    return delay


def main(daemon: Daemon[Any], read: Read, flags: LogConfig) -> int:
    """The master process. `flags` of the command line win over [log] of the configuration that `read` reads. Returns
    the exit status.
    """
    # Signals wait until trio listens. When trio ends it restores this handler, so a further signal to stop does
    # nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    own_log = MasterLog(daemon.name, flags)
    try:
        return trio.run(_run, daemon, read, own_log)
    except Exception:
        log.critical("internal error", exc_info=True)
        return 1
    finally:
        for number in _SIGNALS:  # else the interpreter restores the default handlers at its end
            signal.signal(number, signal.SIG_IGN)
        own_log.current.close()


async def _run(daemon: Daemon[Any], read: Read, own_log: MasterLog) -> int:
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            try:
                state = handover.received()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                master = Master(daemon, read, own_log, nursery, state)
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
        self,
        daemon: Daemon[Any],
        read: Read,
        own_log: MasterLog,
        nursery: trio.Nursery,
        state: dict[str, Any] | None,
    ) -> None:
        """Raises Error for an environment that makes no sense."""
        timing = self._timing = daemon.timing
        self._log = own_log
        self._nursery = nursery
        self._stop_delay = stop_delay()
        self._notifier = Notifier()
        metrics = self._metrics = Metrics(daemon.name)
        if state is None:
            inherited = inherited_sockets()
            check_inherited(inherited)
            self._sockets = ListeningSockets(inherited)
        else:
            self._sockets = ListeningSockets.take_over(state["sockets"])
        raise_descriptor_limit()
        self._crew = Crew(nursery, self._sockets, metrics, timing, None if state is None else state["crew"]["table"])
        self._report = Reporter(daemon.name, self._crew, self._sockets, metrics, log=own_log, timing=timing)
        handlers: dict[str, Handler] = {
            "status": lambda _: self._report.status(),
            "health": lambda _: self._report.health_of_daemon(),
            "connections": lambda _: self._report.connections(),
            "reload": self._on_reload,
            "confirm": self._on_confirm,
            "drain": self._on_drain,
            "log-level": self._on_log_level,
            **dict.fromkeys(daemon.verbs, self._forward),
        }
        self._doors = Doors(daemon.name, nursery, self._report, handlers, timing)
        self._starting = trio.CancelScope()
        self._stop_wanted = trio.Event()
        self._stop_cause = ""
        self._reloads = Reloads(
            read,
            own_log,
            self._notifier,
            sockets=self._sockets,
            crew=self._crew,
            doors=self._doors,
            report=self._report,
            timing=timing,
            done=self._become_newer,
        )

    async def run(self, signals: AsyncIterator[int], state: dict[str, Any] | None) -> None:
        """Serve until told to stop. Raises Error if it can't start."""
        self._nursery.start_soon(self._obey, signals)
        with self._starting:
            if state is None:
                await self._reloads.bring_up(1)
            else:
                self._take_over(state)
            self._notifier.ready(self._report.line)
            self._nursery.start_soon(self._crew.look_after)
            self._nursery.start_soon(self._reloads.run)
            self._nursery.start_soon(self._tell_manager)
            await self._stop_wanted.wait()
        if self._crew.generation is not None:  # else it was told to stop before the start was complete
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

            async def end_at_once() -> None:
                await again.wait()
                log.warning("told to stop again: ending at once", extra={"fields": {"live": report.live}})
                await crew.stop(0.0)
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_at_once)
            await trio.sleep(self._stop_delay)
            # Before the workers close theirs: the last to close a socket must have emptied its queue.
            self._sockets.close()
            nursery.start_soon(crew.stop, generation.plan.stop)
            while crew.workers:
                await crew.changed.park()
            nursery.cancel_scope.cancel()
        self._sockets.close()
        self._doors.close()

    async def _tell_manager(self) -> None:
        """Give signs of life to the service manager, and the state when it has changed."""
        every = self._timing.status_every
        every = min(every, (self._notifier.watchdog or every * 2) / 2)
        told = ""
        while True:
            self._notifier.alive()
            line = self._report.line
            if line != told:
                told = line
                self._notifier.status(line)
            await trio.sleep(every)

    # Verbs

    async def _forward(self, request: Request) -> dict[str, Any]:
        """Ask a worker: that of the first slot, or else the next one that serves."""
        within = self._timing.verb_within
        for worker in self._crew.serving:
            with trio.move_on_after(within) as patience:
                answer = await worker.ask(request["verb"], request=request)
            if patience.cancelled_caught:
                raise Error(f"no answer within {within:.0f} s")
            if answer.error is not None:
                raise Error(answer.error)
            if answer.whole:  # else the worker has ended meanwhile
                return dict(answer.rows[0])
        raise Error("no worker serves")

    async def _on_reload(self, request: Request) -> dict[str, Any]:
        seconds = request.get("confirm")
        if seconds is not None and (type(seconds) is not int or not 1 <= seconds <= MOST_SECONDS):
            raise Error(f"confirm: expected seconds, an integer from 1 to {MOST_SECONDS}")
        await self._reloads.ask_and_wait(seconds)
        generation = self._crew.generation
        assert generation is not None
        return {
            "generation": generation.number,
            "confirm_within": self._report.confirm_within,
            "warnings": list(generation.plan.warnings),
        }

    async def _on_confirm(self, _: Request) -> dict[str, Any]:
        return {"confirmed": self._reloads.confirm()}

    async def _on_drain(self, _: Request) -> dict[str, Any]:
        if not self._report.draining:  # unlike a signal, a second time does not mean "at once"
            self._stop_cause = "drain"
            self._stop_wanted.set()
        return {}

    async def _on_log_level(self, request: Request) -> dict[str, Any]:
        name = request.get("level")
        if name is not None:
            try:
                self._log.current.set_level(parse_level(str(name)))
            except ValueError as error:
                raise Error(str(error)) from None
            self._crew.level = str(name)
            await self._crew.tell({"type": "level", "level": str(name)})
        return {"level": self._log.current.level.name.lower()}

    # A new version

    async def _become_newer(self) -> None:
        """Become the version of the workers, which is the installed one, if it differs from this one."""
        crew, report = self._crew, self._report
        newer = next((worker.version for worker in crew.serving if worker.version != __version__), None)
        if newer is None:
            return
        try:
            await self._settle()
            log.info("upgrading the master", extra={"fields": {"from": __version__, "to": newer}})
            crew_state, crew_fds = handover.crew_state(crew, self._metrics.snapshot())
            state = {
                "started": report.started,
                "last_reload": report.last_reload,
                "sockets": self._sockets.hand_over(),
                "doors": self._doors.hand_over(),
                "crew": crew_state,
            }
            fds = [*self._sockets.filenos(), *self._doors.filenos(), *crew_fds]
            self._log.current.close()
            try:
                handover.become(state, fds, self._notifier.environment(), _SIGNALS)
            except OSError as error:
                self._log.reopen()
                log.error("can't upgrade the master", extra={"fields": {"error": str(error)}})
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    async def _settle(self) -> None:
        """Returns when everything can be passed on, with signals held back for the new program."""
        while True:
            await trio.sleep(self._timing.answered_after)
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS - {signal.SIGCHLD})
            # Signals that came before are delivered now. If one says to stop, this is cancelled.
            await trio.sleep(_HEARD_AFTER)
            if self._crew.settled:
                return
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Continue where the earlier version of this process stopped."""
        generation = handover.restore_crew(self._crew, state["crew"], self._timing)
        self._log.prepare(generation.plan.log)
        if self._crew.level is not None:
            self._log.current.set_level(parse_level(self._crew.level))
        self._doors.take_over(state["doors"], generation.plan)
        self._report.started, self._report.last_reload = state["started"], state["last_reload"]
        log.info("the master is upgraded", extra={"fields": {"version": __version__}})

"""Reports on the daemon: the answers to `status`, `health` and `connections`, all metrics, and a line for systemd."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import Error
from usocksd.log.metrics import Metrics, Snapshot, total
from usocksd.serve.crew import Crew
from usocksd.serve.daemon import form
from usocksd.serve.listening import ListeningSockets
from usocksd.serve.master_log import MasterLog
from usocksd.serve.plan import Generation
from usocksd.serve.timing import Timing
from usocksd.serve.vitals import LOG_FAILING
from usocksd.serve.worker_process import WorkerAnswer, WorkerProcess, WorkerState
from usocksd.settings.loader import counted

_RATES = ("connections", "tx_bytes", "rx_bytes")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Reporter:
    """Collects the state of master and workers."""

    def __init__(
        self, name: str, crew: Crew, sockets: ListeningSockets, metrics: Metrics, *, log: MasterLog, timing: Timing
    ) -> None:
        self.name = name
        self.started = now()
        self.draining = False
        """The daemon is stopping."""
        self.reloading = False
        self.last_reload: dict[str, Any] | None = None
        self.confirm_by: float | None = None
        """The deadline of the trial, by trio's clock, if the configuration in force is on trial"""
        self.metrics_address: str | None = None
        self._timing = timing
        self._log = log
        self._crew = crew
        self._sockets = sockets
        self._metrics = metrics
        metrics.gauges("build_info", "The version of the master", "version").labels(__version__).value = 1
        self._reloads = metrics.counters("reloads_total", "Tries to reload the configuration", "result")
        for result in ("ok", "failed"):
            self._reloads.labels(result)
        self._last_ok = metrics.gauge("config_last_reload_successful", "Whether the last reload or the start went well")
        self._last_ok.value = 1
        self._loaded = metrics.gauge(
            "config_last_reload_success_timestamp_seconds", "When the configuration in force was loaded"
        )
        self._generation = metrics.gauge("config_generation", "How many configurations have been in force")
        self._workers = metrics.gauges("workers", "Worker processes", "state")
        for state in WorkerState:
            self._workers.labels(state.value)
        self._queue = metrics.gauge("accept_queue_length", "Connections that wait to be accepted")
        self._queue_limit = metrics.gauge("accept_queue_limit", "Connections that may wait to be accepted")
        self._own_failing = metrics.gauge("log_failing", LOG_FAILING)
        self._own_dropped = metrics.counter("log_records_dropped_total", "Log records that were never written")

    def reloaded(self, error: Error | None) -> None:
        """Note the result of a reload."""
        faults = str(error).split("\n")
        self.last_reload = {"at": _text(time.time()), "ok": error is None, "faults": faults if error else []}
        self._reloads.labels("failed" if error else "ok").value += 1
        self._last_ok.value = 0 if error else 1

    @property
    def live(self) -> int:
        """Connections, those that drain included"""
        return sum(worker.live for worker in self._crew.workers)

    async def live_now(self) -> int:
        """The same, asked from the workers: `live` may be half a second old."""
        asked = await self._measure()
        return sum(int(asked.get(worker.pid, {"live": worker.live})["live"]) for worker in self._crew.workers)

    @property
    def health(self) -> str:
        """ready, draining or broken"""
        if self.draining:
            return "draining"
        return "ready" if self._crew.serving else "broken"

    @property
    def state(self) -> str:
        """The same, or "reloading" during a reload"""
        return "reloading" if self.reloading else self.health

    @property
    def confirm_within(self) -> float | None:
        """Seconds left of the trial, if there is one"""
        return None if self.confirm_by is None else max(self.confirm_by - trio.current_time(), 0.0)

    @property
    def line(self) -> str:
        """The state in a line, for the service manager"""
        crew = self._crew
        number = crew.generation.number if crew.generation else 0
        drain = f", generations that drain: {', '.join(map(str, crew.draining))}" if crew.draining else ""
        workers, connections = counted(len(crew.serving), "worker"), counted(self.live, "connection")
        return f"{self.health}: generation {number}, {workers}, {connections}{drain}"

    def collect(self) -> Snapshot:
        """All metrics, of this process and its workers, those that have ended included."""
        crew = self._crew
        if crew.generation is not None:
            self._generation.value = crew.generation.number
            self._loaded.value = crew.generation.since
        for state in WorkerState:
            self._workers.labels(state.value).value = sum(worker.state is state for worker in crew.workers)
        self._queue.value, self._queue_limit.value = self._sockets.queues()
        self._own_dropped.value = self._log.dropped
        self._own_failing.value = int(self._log.current.failing is not None)
        return total([crew.retired, *(worker.metrics for worker in crew.workers), self._metrics.snapshot()])

    async def status(self) -> dict[str, Any]:
        """The answer to the verb `status`."""
        crew = self._crew
        generation = crew.generation
        assert generation is not None
        before = await self._measure()
        await trio.sleep(self._timing.rates_over)
        after = await self._measure()
        snapshot = self.collect()
        return {
            "name": self.name,
            "version": __version__,
            "form": form(),
            "pid": os.getpid(),
            "uptime": now() - self.started,
            "state": self.state,
            "config": {
                "file": generation.source,
                "generation": generation.number,
                "since": _text(generation.since),
                "last_reload": self.last_reload,
                "confirm_within": self.confirm_within,
            },
            "listening": self._sockets.listening(),
            "metrics": self.metrics_address,
            "log": {
                "level": self._log.current.level.name.lower(),
                "dropped": self._count(snapshot, "log_records_dropped_total"),
                "failing": self._log_failing,
            },
            "connections": {
                "live": self.live,
                "total": self._count(snapshot, "connections_accepted_total"),
                "limit": generation.plan.connections,
                "per_client": generation.plan.per_client,
                "shed": self._count(snapshot, "connections_shed_total"),
                "turned_away": self._count(snapshot, "connections_turned_away_total"),
            },
            "rates": _rates(before, after),
            "partial": [worker.pid for worker in self._established if worker.pid not in before.keys() & after.keys()],
            "waiting": self._sockets.queues()[0],
            "generations": [self._generation_row(number, generation) for number in self._numbers()],
            "daemon": await self._of_daemon(),
        }

    async def health_of_daemon(self) -> dict[str, Any]:
        """The answer to the verb `health`: `state`, `version` and `daemon` of `status`, without measuring."""
        return {"state": self.state, "version": __version__, "daemon": await self._of_daemon()}

    @property
    def _log_failing(self) -> str | None:
        """Why one of the processes can't write its log at present, or None"""
        failing = [self._log.current.failing, *(worker.alive.get("log_failing") for worker in self._crew.workers)]
        return next((error for error in failing if error is not None), None)

    async def connections(self) -> dict[str, Any]:
        """The answer to the verb `connections`."""
        answers = await self._ask("connections", self._timing.list_within)
        return {
            "connections": [row for answer in answers.values() for row in answer.rows],
            "partial": [worker.pid for worker, answer in answers.items() if not answer.whole],
        }

    async def _of_daemon(self) -> dict[str, Any]:
        """`Application.status` of the first worker that answers, since all know the same"""
        for worker in self._crew.serving:
            for row in (await worker.ask("status", within=self._timing.answer_within)).rows:
                return dict(row)
        return {}

    def _numbers(self) -> list[int]:
        return sorted({worker.generation for worker in self._crew.workers}, reverse=True)

    def _generation_row(self, number: int, current: Generation) -> dict[str, Any]:
        state = "serving" if number == current.number else "draining" if number < current.number else "starting"
        return {
            "generation": number,
            "state": state,
            "workers": [_worker_row(worker) for worker in self._crew.of(number)],
        }

    @property
    def _established(self) -> list[WorkerProcess]:
        """The workers that can be asked"""
        return [worker for worker in self._crew.workers if not worker.coming]

    async def _measure(self) -> dict[int, dict[str, float]]:
        """The traffic of each worker so far, by process id; workers that are late or gone are left out."""
        answers = await self._ask("measure", self._timing.answer_within)
        return {worker.pid: row for worker, answer in answers.items() for row in answer.rows}

    async def _ask(self, question: str, within: float) -> dict[WorkerProcess, WorkerAnswer]:
        """The answers of all workers"""
        answers: dict[WorkerProcess, WorkerAnswer] = {}

        async def ask(worker: WorkerProcess) -> None:
            answers[worker] = await worker.ask(question, within=within)

        async with trio.open_nursery() as nursery:
            for worker in self._established:
                nursery.start_soon(ask, worker)
        return answers

    def _count(self, snapshot: Snapshot, name: str) -> int:
        metric = snapshot.get(f"{self.name}_{name}", {"values": ()})
        return int(sum(numbers[0] for _, numbers in metric["values"]))


def now() -> float:
    """Seconds since the system was started: setting the time does not change it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _rates(before: Mapping[int, Mapping[str, float]], after: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Rates per second, of the workers that have answered both times."""
    pairs = [(before[pid], after[pid]) for pid in before.keys() & after.keys()]
    return {key: sum(max(new[key] - old[key], 0) / (new["at"] - old["at"]) for old, new in pairs) for key in _RATES}


def _worker_row(worker: WorkerProcess) -> dict[str, Any]:
    alive = worker.alive
    return {
        "pid": worker.pid,
        "slot": worker.slot,
        "state": worker.state.value,
        "version": worker.version,
        "live": worker.live,
        "most": alive.get("most", 0),
        "paused": alive.get("paused", False),
        "descriptors": alive.get("descriptors", {"open": 0, "limit": 0}),
        "rss": _rss(worker.pid),
        "cpu": alive.get("cpu", 0.0),
        "silent": max(trio.current_time() - worker.seen, 0.0),
    }


def _rss(pid: int) -> int:
    """Resident memory in bytes, 0 for a process that is gone (proc_pid_statm(5))."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _text(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

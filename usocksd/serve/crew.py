"""The workers of all generations: started, watched, replaced, and drained.

A worker that dies or hangs is replaced. Its siblings accept from the same sockets, so nobody waits for the new one.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import trio

from usocksd.errors import Error
from usocksd.log.metrics import Metrics, Snapshot, lasting, total
from usocksd.net.limits import COLUMNS, clear_column, make_table
from usocksd.serve.channel import Message
from usocksd.serve.coroner import Coroner, ended_children
from usocksd.serve.listening import ListeningSockets
from usocksd.serve.plan import Generation
from usocksd.serve.timing import Timing
from usocksd.serve.worker_process import WorkerProcess, WorkerState
from usocksd.settings.files import NamedFiles
from usocksd.settings.types import LogConfig

log = logging.getLogger(__name__)

# Their descriptors travel in one message (SCM_MAX_FD of unix(7)).
_MOST_ADDRESSES = 200


class Crew:
    """All workers, in the order in which they were started."""

    def __init__(
        self,
        nursery: trio.Nursery,
        sockets: ListeningSockets,
        metrics: Metrics,
        timing: Timing,
        table: int | None = None,
    ) -> None:
        self.workers: list[WorkerProcess] = []
        self.generation: Generation | None = None
        """The generation in force"""
        self.retired: Snapshot = {}
        """The counts of ended workers"""
        self.table = make_table() if table is None else table
        self.stopping = False
        self.level: str | None = None
        """The log level that an operator has set, until the next reload"""
        self.shared: Any = None
        """The latest value that the keeper has shared with all workers, as JSON; None if there is none"""
        self.changed = trio.lowlevel.ParkingLot()
        """Signalled when a worker has ended."""
        self._nursery = nursery
        self._sockets = sockets
        self._timing = timing
        self._coroner = Coroner()
        self._failures: defaultdict[int, int] = defaultdict(int)
        self._restarts = metrics.counters("worker_restarts_total", "Workers that were replaced, by cause", "cause")
        for cause in ("exit", "signal", "hung"):
            self._restarts.labels(cause)

    # Generations: started, and drained

    async def prepare(
        self, number: int, text: str, source: str, log_of: Callable[[LogConfig], LogConfig], kept: NamedFiles | None
    ) -> Generation:
        """Start the workers of a new configuration; returns when all are ready. They accept no connections yet.

        `log_of` opens the log that the configuration wants, and returns where it is. Files in `kept` are not read
        again. Raises ConfigError with every fault, or Error, and then nothing has changed.
        """
        workers: list[WorkerProcess] = []
        with ExitStack() as undo:
            undo.callback(self._give_up, workers)
            try:
                with trio.fail_after(self._timing.ready_within):
                    # Until they have ended, the addresses that only they have are in use.
                    while any(worker.killed for worker in self.workers):
                        await self.changed.park()
                    workers.append(self._start(number, 0))
                    plan, files = await workers[0].plan(text, source, kept)
                    undo.callback(files.close)
                    if (count := len(plan.listen)) > _MOST_ADDRESSES:
                        raise Error(f"too many listening addresses: {count}, expected at most {_MOST_ADDRESSES}")
                    generation = Generation(number, text, source, plan, log_of(plan.log), time.time(), files)
                    self._sockets.open(plan.listen)
                    workers += [self._start(number, slot) for slot in range(1, plan.workers)]
                    await self._serve_all(generation, workers)
            except trio.TooSlowError:
                raise Error(f"the workers were not ready within {self._timing.ready_within:.0f} s") from None
            undo.pop_all()
        return generation

    def dismiss(self, generation: Generation) -> None:
        """End a prepared generation that does not come into force."""
        generation.files.close()
        self._give_up(self.of(generation.number))

    def _give_up(self, workers: Sequence[WorkerProcess]) -> None:
        self._sockets.restore()
        for worker in workers:
            worker.kill()
            self._nursery.start_soon(self._remove, worker)

    async def commit(self, generation: Generation) -> None:
        """Bring a prepared generation into force. Older ones drain."""
        if self.generation is not None:
            self.generation.files.close()
        self.generation = generation
        self.level = None
        self._failures.clear()
        for worker in self.of(generation.number):
            await worker.accept()
            self._nursery.start_soon(self._watch, worker)
        given_up = self._sockets.keep(generation.plan.listen)
        if given_up:  # older workers empty them too, unless they hang
            await self.of(generation.number)[0].send({"type": "empty"}, [sock.fileno() for sock in given_up])
            for sock in given_up:
                sock.close()
        older = [worker for worker in self.workers if worker.generation < generation.number]
        await self.drain(
            [worker for worker in older if worker.state is not WorkerState.DRAINING], generation.plan.drain
        )

    async def drain(self, workers: Sequence[WorkerProcess], within: float) -> None:
        """Have these workers accept no more, and end remaining connections after `within` seconds."""
        for worker in workers:
            if worker.coming:
                worker.kill()
            else:
                worker.state = WorkerState.DRAINING
        await self.tell({"type": "drain", "within": within}, [worker for worker in workers if not worker.coming])

    async def tell(self, message: Message, workers: Sequence[WorkerProcess] | None = None) -> None:
        """Tell these workers, or all that are configured, at the same time, so that one that hangs does not delay the
        others.
        """
        everybody = [worker for worker in self.workers if worker.ordered]
        async with trio.open_nursery() as nursery:
            for worker in everybody if workers is None else workers:
                nursery.start_soon(worker.send, message)

    async def stop(self, within: float) -> None:
        """End all workers; returns when they have ended or been killed."""
        self.stopping = True
        with trio.move_on_after(within + self._timing.last_words):
            await self.drain(self.workers, within)
            while self.workers:
                await self.changed.park()
        for worker in self.workers:
            worker.kill()

    @property
    def draining(self) -> list[int]:
        """The numbers of the generations that drain, the oldest first"""
        return sorted({worker.generation for worker in self.workers if worker.state is WorkerState.DRAINING})

    def of(self, generation: int) -> list[WorkerProcess]:
        """The workers of a generation"""
        return [worker for worker in self.workers if worker.generation == generation]

    @property
    def serving(self) -> list[WorkerProcess]:
        """The workers that accept connections, as far as is known, by slot"""
        number = self.generation.number if self.generation else 0
        serving = [worker for worker in self.of(number) if worker.state is WorkerState.SERVING]
        return sorted(serving, key=lambda worker: worker.slot)

    @property
    def settled(self) -> bool:
        """Whether no worker is starting or ending, and no message is half sent, so that the whole state can be passed
        on.
        """
        return not any(
            worker.coming or worker.channel.sending or worker.exit_status is not None for worker in self.workers
        )

    def go_on(self, generation: Generation, workers: Sequence[WorkerProcess]) -> None:
        """Continue with the workers that an earlier version of this process has started."""
        self.generation = generation
        self.workers += workers
        for worker in workers:
            self._nursery.start_soon(self._watch, worker)
        for slot in set(range(generation.plan.workers)) - {worker.slot for worker in self.of(generation.number)}:
            self._nursery.start_soon(self._replace, generation, slot)

    # A worker's life

    def reap(self) -> None:
        """Take the exit status of every child that has ended."""
        for pid, status in ended_children():
            for worker in self.workers:
                if worker.pid == pid:
                    worker.ended(status, self._coroner.cause(status, killed=worker.killed))

    async def look_after(self) -> None:
        """Find workers that hang, until cancelled."""
        last = trio.current_time()
        while True:
            await trio.sleep(self._timing.look_every)
            self.reap()
            last, before = trio.current_time(), last
            self._coroner.forget(last)
            if last - before > self._timing.suspect_after:
                continue  # this process itself hung
            for worker in self.workers:
                silent = last - worker.seen
                if worker.coming or silent < self._timing.suspect_after:
                    continue
                if worker.state is WorkerState.SERVING:
                    worker.state = WorkerState.SUSPECTED
                    log.warning("a worker is silent", extra={"fields": {"pid": worker.pid, "slot": worker.slot}})
                if silent > self._timing.hung_after and not worker.hung:
                    worker.hung = True
                    log.error("a worker hangs, ending it", extra={"fields": {"pid": worker.pid, "live": worker.live}})
                    worker.kill()

    def _start(self, generation: int, slot: int) -> WorkerProcess:
        taken = {worker.column for worker in self.workers}
        column = next((column for column in range(COLUMNS) if column not in taken), None)
        if column is None:
            raise Error("too many workers at a time: wait until older ones have drained")
        worker = WorkerProcess.start(generation, slot, column, self._timing)
        self.workers.append(worker)
        return worker

    async def _serve_all(self, generation: Generation, workers: Sequence[WorkerProcess]) -> None:
        """Have all workers get ready; the first is configured already. Raises the first error."""
        failure = None
        try:
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(self._serve, generation, worker, worker is workers[0])
        except* Error as errors:
            failure = errors.exceptions[0]
        if failure is not None:
            raise failure

    async def _serve(self, generation: Generation, worker: WorkerProcess, configured: bool = False) -> None:
        plan = generation.plan
        if not configured:
            await worker.configure(generation.text, generation.source, generation.files)
        level = self.level if generation is self.generation else None
        sockets = self._sockets.at(plan.listen)
        order = {
            "log": attrs.asdict(generation.log) | ({"level": level} if level else {}),
            "workers": plan.workers,
            "ports": sorted({sock.getsockname()[1] for sock in sockets}),
            "connections": plan.connections,
            "per_client": plan.per_client,
            "stop": plan.stop,
            "keeper": worker.slot == 0,
            "shared": self.shared,
        }
        await worker.serve(order, [*(sock.fileno() for sock in sockets), self.table])

    async def _watch(self, worker: WorkerProcess) -> None:
        """Listen to a worker until it ends, and replace it if it ended unexpectedly."""
        async for message in worker.listen():
            if worker.state is WorkerState.SUSPECTED:
                worker.state = WorkerState.SERVING
            if message["type"] == "share" and worker.slot == 0 and worker in self.serving:
                self.shared = message["value"]
                await self.tell({"type": "shared", "value": self.shared})
        await self._remove(worker)
        fields = {
            "pid": worker.pid,
            "generation": worker.generation,
            "exit_status": worker.exit_status,
            "cause": worker.cause,
        }
        draining = worker.state is WorkerState.DRAINING
        if draining and worker.exit_status == 0:
            log.log(logging.DEBUG if self.stopping else logging.INFO, "a worker has drained", extra={"fields": fields})
        else:
            log.error("a worker ended", extra={"fields": {**fields, "live": worker.live}})
        generation = self.generation
        if draining or self.stopping or generation is None or worker.generation != generation.number:
            return
        cause = "hung" if worker.hung else "signal" if (worker.exit_status or 0) < 0 else "exit"
        self._restarts.labels(cause).value += 1
        if trio.current_time() - worker.born > self._timing.steady_after:
            self._failures[worker.slot] = 0
        await self._replace(generation, worker.slot)

    async def _remove(self, worker: WorkerProcess) -> None:
        """Forget a worker that has closed its channel, or was killed, when it has ended; keep what it counted."""
        with trio.move_on_after(self._timing.last_words):
            await worker.exited.wait()
        worker.kill()
        await worker.exited.wait()
        worker.close()
        self.retired = total([self.retired, lasting(worker.metrics)], bounded=True)
        self.workers.remove(worker)
        clear_column(self.table, worker.column)
        self.changed.unpark_all()

    async def _replace(self, generation: Generation, slot: int) -> None:
        """Start a worker in place of one that has ended, repeatedly until one gets ready."""
        backoff = self._timing.backoff
        while True:
            delay = backoff[min(self._failures[slot], len(backoff) - 1)]
            await trio.sleep(delay if self.serving else min(delay, self._timing.backoff_alone))
            if not self._wants(generation):
                return
            self._failures[slot] += 1
            worker = None
            try:
                worker = self._start(generation.number, slot)
                with trio.fail_after(self._timing.ready_within):
                    await self._serve(generation, worker)
            except (Error, trio.TooSlowError) as error:
                failure = str(error) or "not ready in time"
            else:
                if self._wants(generation):
                    break
                failure = ""
            if self._wants(generation):
                log.error("a worker can't be replaced", extra={"fields": {"error": failure}})
            if worker is not None:
                worker.kill()
                await self._remove(worker)
        await worker.accept()
        self._nursery.start_soon(self._watch, worker)
        log.info("a worker was replaced", extra={"fields": {"pid": worker.pid, "slot": slot}})

    def _wants(self, generation: Generation) -> bool:
        """Whether workers of this generation are still started."""
        return not self.stopping and self.generation is generation

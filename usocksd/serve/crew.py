"""The workers of all generations: started, watched, replaced, and let go.

A worker that dies or hangs is replaced; until the new one is ready, another one serves its slot as well.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import trio

from usocksd.errors import Error
from usocksd.host.limits import COLUMNS, clear_column, make_table
from usocksd.log.metrics import Metrics, Snapshot, lasting, total
from usocksd.serve.adoption import Adoption
from usocksd.serve.channel import Message
from usocksd.serve.coroner import Coroner
from usocksd.serve.generation import Generation
from usocksd.serve.slots import Slots
from usocksd.serve.worker_process import LAST_WORDS, State, WorkerProcess
from usocksd.settings.files import NamedFiles
from usocksd.settings.types import LogConfig

log = logging.getLogger(__name__)

# So long may a generation take to become ready, in seconds: a cold cache and a million rules.
_READY_WITHIN = 60.0
# Silent for so long, a worker's slot is served by another as well; and then it is taken for hung.
_SUSPECT_AFTER = 2.0
_HUNG_AFTER = 10.0
_LOOK_EVERY = 0.5
# A worker that dies is replaced at once, one that dies again soon ever more slowly; but while nobody serves, soon.
_BACKOFF = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
_BACKOFF_ALONE = 0.5
_STEADY_AFTER = 5.0
# Their descriptors travel in one message (SCM_MAX_FD of unix(7)).
_MOST_ADDRESSES = 200


@attrs.frozen
class Candidate:
    """A generation that is ready to serve, and not in force yet."""

    generation: Generation
    workers: list[WorkerProcess]


class Crew:
    """Every worker there is, in the order in which they were started."""

    def __init__(self, nursery: trio.Nursery, slots: Slots, metrics: Metrics, table: int | None = None) -> None:
        self.workers: list[WorkerProcess] = []
        self.generation: Generation | None = None
        """The one in force."""
        self.retired: Snapshot = {}
        """What ended workers counted."""
        self.table = make_table() if table is None else table
        self.stopping = False
        self.level: str | None = None
        """The log level that an operator has set, until the next reload."""
        self.shared: Any = None
        """What the keeper has last shared with all workers, a JSON value; None if nothing yet."""
        self.changed = trio.Event()
        """Set, and a new one put in its place, when a worker has ended, or `emptying` is over."""
        self.emptying = False
        """Sockets that nobody wants any more are still open, since there may be connections waiting in them."""
        self._nursery = nursery
        self._slots = slots
        self._adoption = Adoption(slots, lambda: self.serving)
        self._coroner = Coroner()
        self._failures: defaultdict[int, int] = defaultdict(int)
        self._born: dict[int, float] = {}
        self._restarts = metrics.counters("worker_restarts_total", "Workers that were replaced, by cause", "cause")
        for cause in ("exit", "signal", "hung"):
            self._restarts.labels(cause)

    # A generation comes, and its predecessors go

    async def prepare(
        self,
        number: int,
        text: str,
        source: str,
        log_order: Callable[[LogConfig], dict[str, str | None]],
        kept: NamedFiles | None = None,
    ) -> Candidate:
        """Start the workers of a new configuration; returns when all are ready. None has accepted anything yet. Files
        that are `kept` are not read again.

        Raises ConfigError with every fault, or Error; then nothing has changed.
        """
        workers: list[WorkerProcess] = []
        files = NamedFiles()
        try:
            with trio.fail_after(_READY_WITHIN):
                # Sockets that are still in their groups: nothing could be opened in their place, nor the others let go.
                while self.emptying:
                    await self.changed.wait()
                workers.append(self._start(number, 0))
                plan, said, files = await workers[0].plan(text, source, kept)
                if len(plan.listen) > _MOST_ADDRESSES:
                    raise Error(f"too many listening addresses: {len(plan.listen)}, expected at most {_MOST_ADDRESSES}")
                generation = Generation(number, text, source, plan, said, log_order(plan.log), time.time(), files)
                self._slots.open(plan.listen, plan.workers)
                workers += [self._start(number, slot) for slot in range(1, plan.workers)]
                await self._serve_all(generation, workers)
        except BaseException as error:
            files.close()
            if workers:
                self._give_up(workers)
            if isinstance(error, trio.TooSlowError):
                raise Error(f"the workers were not ready within {_READY_WITHIN:.0f} s") from None
            raise
        return Candidate(generation, workers)

    def dismiss(self, candidate: Candidate) -> None:
        """It is not to be in force after all."""
        candidate.generation.files.close()
        self._give_up(candidate.workers)

    def _give_up(self, workers: Sequence[WorkerProcess]) -> None:
        for worker in workers:
            worker.kill()
        self.emptying = True
        self._nursery.start_soon(self._take_back, workers)

    async def _take_back(self, workers: Sequence[WorkerProcess]) -> None:
        """Close what was opened for these, when they have: until then it is in its groups, to be kept from choice."""
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(self._bury, worker)
        self._slots.restore()
        self.emptying = False
        self._tell_change()

    async def commit(self, candidate: Candidate) -> None:
        """From now on this one is in force. Older ones drain."""
        if self.generation is not None:
            self.generation.files.close()
        generation = self.generation = candidate.generation
        self.level = None
        self._adoption.begin(generation.plan)
        self._failures.clear()
        for worker in candidate.workers:
            await worker.accept()
            self._nursery.start_soon(self._watch, worker)
        surplus = self._slots.release(generation.plan.listen, generation.plan.workers)
        if surplus:
            self.emptying = True
            self._nursery.start_soon(self._empty, surplus)
        older = [worker for worker in self.workers if worker.generation < generation.number]
        await self.drain([worker for worker in older if worker.state is not State.DRAINING], generation.plan.drain)

    async def drain(self, workers: Sequence[WorkerProcess], within: float) -> None:
        """These accept no more, and end what is left in `within` seconds."""
        for worker in workers:
            if worker.coming:
                worker.kill()
            else:
                worker.state = State.DRAINING
        await self.tell({"type": "drain", "within": within}, [worker for worker in workers if not worker.coming])

    async def tell(self, message: Message, workers: Sequence[WorkerProcess] | None = None) -> None:
        """Tell these, or all that know how to serve, at the same time: one that hangs does not hold up the others."""
        async with trio.open_nursery() as nursery:
            for worker in self.ordered if workers is None else workers:
                nursery.start_soon(worker.send, message)

    async def stop(self, within: float) -> None:
        """End all workers; returns when they have."""
        self.stopping = True
        with trio.move_on_after(within + LAST_WORDS):
            await self.drain(self.workers, within)
            while self.workers:
                await self.changed.wait()
        for worker in self.workers:
            worker.kill()

    @property
    def draining(self) -> list[int]:
        """The numbers of the generations that drain, the oldest first."""
        return sorted({worker.generation for worker in self.workers if worker.state is State.DRAINING})

    def of(self, generation: int) -> list[WorkerProcess]:
        """The workers of a generation."""
        return [worker for worker in self.workers if worker.generation == generation]

    @property
    def serving(self) -> list[WorkerProcess]:
        """The workers that accept connections, as far as one knows."""
        number = self.generation.number if self.generation else 0
        return [worker for worker in self.of(number) if worker.state is State.SERVING]

    @property
    def ordered(self) -> list[WorkerProcess]:
        """The workers that know how to serve, whether they are ready yet or not."""
        return [worker for worker in self.workers if worker.ordered]

    @property
    def settled(self) -> bool:
        """Whether nobody is coming or going, and nothing is half said: what there is can be passed on."""
        return not self.emptying and not any(
            worker.coming or worker.channel.sending or worker.exit_status is not None for worker in self.workers
        )

    def filenos(self) -> list[int]:
        """Every descriptor."""
        files = [] if self.generation is None else self.generation.files.fds
        return [self.table, *files, *(worker.channel.fileno() for worker in self.workers)]

    # A worker's life

    def reap(self) -> None:
        """Take the exit status of every child that has ended: this may be the first process of a container."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            for worker in self.workers:
                if worker.pid == pid:
                    code = os.waitstatus_to_exitcode(status)
                    worker.ended(code, self._coroner.cause(code, killed=worker.killed))
        for worker in self.workers:
            if worker.exit_status is None:
                try:
                    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:  # reaped already, before this process became this version
                    worker.ended(0, "unknown")

    async def look_after(self) -> None:
        """Find those that hang."""
        last = trio.current_time()
        while True:
            await trio.sleep(_LOOK_EVERY)
            self.reap()
            last, before = trio.current_time(), last
            self._coroner.forget(last)
            if last - before > _SUSPECT_AFTER:
                continue  # it was this process that slept
            for worker in self.workers:
                silent = last - worker.seen
                if worker.coming or silent < _SUSPECT_AFTER:
                    continue
                if worker.state is State.SERVING:
                    worker.state = State.SUSPECTED
                    log.warning("a worker is silent", extra={"fields": {"pid": worker.pid, "slot": worker.slot}})
                    self._nursery.start_soon(self._adoption.cover)
                if silent > _HUNG_AFTER and not worker.hung:
                    worker.hung = True
                    log.error("a worker hangs, ending it", extra={"fields": {"pid": worker.pid, "live": worker.live}})
                    worker.kill()

    def take_over(self, generation: Generation, workers: Sequence[WorkerProcess]) -> None:
        """Go on with what an earlier version of this process has started."""
        self.generation = generation
        self._adoption.begin(generation.plan)
        self.workers += workers
        for worker in workers:
            self._nursery.start_soon(self._watch, worker)
        for slot in set(range(generation.plan.workers)) - {worker.slot for worker in self.of(generation.number)}:
            self._nursery.start_soon(self._replace, generation, slot)

    def _start(self, generation: int, slot: int) -> WorkerProcess:
        taken = {worker.column for worker in self.workers}
        column = next((column for column in range(COLUMNS) if column not in taken), None)
        if column is None:
            raise Error("too many workers at a time: wait until older ones have drained")
        worker = WorkerProcess.start(generation, slot, column)
        self.workers.append(worker)
        self._born[worker.pid] = trio.current_time()
        return worker

    async def _serve_all(self, generation: Generation, workers: Sequence[WorkerProcess]) -> None:
        """Raises the first error of any."""
        errors: list[Error] = []

        async def serve(worker: WorkerProcess, *, configured: bool) -> None:
            try:
                await self._serve(generation, worker, configured=configured)
            except Error as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(partial(serve, worker, configured=worker is workers[0]))
        if errors:
            raise errors[0]

    async def _serve(self, generation: Generation, worker: WorkerProcess, *, configured: bool = False) -> None:
        plan = generation.plan
        if not configured:
            await worker.configure(generation.text, generation.source, generation.files)
        order = {
            "log": generation.log | ({"level": self.level} if self.level and generation is self.generation else {}),
            "ports": self._slots.ports(plan.listen),
            "connections": plan.connections,
            "per_client": plan.per_client,
            "stop": plan.stop,
            "keeper": worker.slot == 0,
            "shared": self.shared,
        }
        await worker.serve(order, [*self._slots.of(worker.slot, plan.listen), self.table])

    async def _watch(self, worker: WorkerProcess) -> None:
        async for message in worker.listen():
            if worker.state is State.SUSPECTED:
                worker.state = State.SERVING
                await self._adoption.cover()
            if message["type"] == "share":
                await self._pass_on(worker, message["value"])
            elif message["type"] == "refuse" and worker in self.serving and message["value"] == self.shared:
                self.shared = None
                log.warning("what the workers can't take is not handed on", extra={"fields": {"pid": worker.pid}})
        born = self._born.get(worker.pid, 0.0)
        await self._bury(worker)
        generation = self.generation
        expected = worker.state is State.DRAINING
        fields = {
            "pid": worker.pid,
            "generation": worker.generation,
            "exit_status": worker.exit_status,
            "cause": worker.cause,
        }
        if expected and worker.exit_status == 0:
            log.log(logging.DEBUG if self.stopping else logging.INFO, "a worker has drained", extra={"fields": fields})
        else:
            log.error("a worker ended", extra={"fields": {**fields, "live": worker.live}})
        if expected or self.stopping or generation is None or worker.generation != generation.number:
            return
        cause = "hung" if worker.hung else "signal" if (worker.exit_status or 0) < 0 else "exit"
        self._restarts.labels(cause).value += 1
        if trio.current_time() - born > _STEADY_AFTER:
            self._failures[worker.slot] = 0
        await self._replace(generation, worker.slot)

    async def _pass_on(self, worker: WorkerProcess, value: Any) -> None:
        """What the keeper shares, to all; it hears it too. The keeper is the worker of slot 0 of what is in force."""
        if worker.slot == 0 and worker in self.serving:
            self.shared = value
            await self.tell({"type": "shared", "value": value})

    async def _bury(self, worker: WorkerProcess) -> None:
        """It has closed its channel, or was killed: see it end, and keep what it counted."""
        with trio.move_on_after(LAST_WORDS):
            await worker.exited.wait()
        worker.kill()
        await worker.exited.wait()
        worker.close()
        self.retired = total([self.retired, lasting(worker.metrics)], bounded=True)
        self.workers.remove(worker)
        self._born.pop(worker.pid, None)
        clear_column(self.table, worker.column)
        self._tell_change()

    def _tell_change(self) -> None:
        event, self.changed = self.changed, trio.Event()
        event.set()

    async def _empty(self, surplus: Sequence[socket.socket]) -> None:
        await self._adoption.empty(surplus)
        self._slots.settle()
        self.emptying = False
        self._tell_change()

    async def _replace(self, generation: Generation, slot: int) -> None:
        await self._adoption.cover()
        while True:
            delay = _BACKOFF[min(self._failures[slot], len(_BACKOFF) - 1)]
            await trio.sleep(delay if self.serving else min(delay, _BACKOFF_ALONE))
            if self.stopping or self.generation is not generation:
                return
            self._failures[slot] += 1
            try:
                worker = self._start(generation.number, slot)
            except Error as error:
                log.error("a worker can't be replaced", extra={"fields": {"error": str(error)}})
                continue
            failure = None
            try:
                with trio.fail_after(_READY_WITHIN):
                    await self._serve(generation, worker)
            except (Error, trio.TooSlowError) as error:
                failure = str(error) or "not ready in time"
            except Exception as error:  # it speaks another language: no reason to end the others
                failure = f"internal error: {error}"
                log.exception("internal error")
            wanted = not self.stopping and self.generation is generation
            if wanted and failure is None:
                break
            if wanted:
                log.error("a worker can't be replaced", extra={"fields": {"error": failure}})
            worker.kill()
            await self._bury(worker)
        await worker.accept()
        self._nursery.start_soon(self._watch, worker)
        log.info("a worker was replaced", extra={"fields": {"pid": worker.pid, "slot": slot}})
        await self._adoption.cover()

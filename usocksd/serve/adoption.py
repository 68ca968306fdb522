"""Adoption: while a worker is missing, another one accepts from its listening sockets as well."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import trio

from usocksd.net.tcp_info import accept_queue
from usocksd.serve.plan import Plan
from usocksd.serve.slots import Slots
from usocksd.serve.timing import Timing
from usocksd.serve.worker_process import WorkerProcess


class Adoption:
    """Keeps every slot of the plan in force served, and empties sockets that no plan needs any more.

    `serving` returns the workers that accept connections, as far as is known.
    """

    def __init__(self, slots: Slots, serving: Callable[[], list[WorkerProcess]], timing: Timing) -> None:
        self._slots = slots
        self._serving = serving
        self._timing = timing
        self._plan: Plan | None = None
        self._adopters: dict[int, WorkerProcess] = {}
        self._covering = trio.Lock()

    def begin(self, plan: Plan) -> None:
        """Follow this plan from now on. Present adopters belong to the previous one."""
        self._plan = plan
        self._adopters.clear()

    async def cover(self) -> None:
        """Have every slot served: by its own worker, or by another one until that is ready."""
        async with self._covering:
            plan = self._plan
            if plan is None or self._slots.inherited:
                return
            serving = {worker.slot: worker for worker in self._serving()}
            for slot in range(plan.workers):
                adopter = self._adopters.get(slot)
                if slot in serving:
                    if adopter is not None:
                        del self._adopters[slot]
                        await adopter.send({"type": "release", "id": slot})
                elif serving and (adopter is None or adopter not in serving.values()):
                    adopter = self._adopters[slot] = min(serving.values(), key=lambda worker: worker.live)
                    await adopter.send({"type": "adopt", "id": slot}, self._slots.of(slot, plan.listen))

    async def empty(self, surplus: Sequence[socket.socket]) -> None:
        """Have the connections that wait in these sockets accepted, then close them: closed at once, they would reset
        those connections.
        """
        adopters: list[WorkerProcess] = []
        quiet, step = 0.0, self._timing.quiet / 10
        # Bounded, for hosts where nothing keeps new connections away from a dropped address (see slots.py).
        with trio.move_on_after(self._timing.quiet * 5):
            while quiet < self._timing.quiet:
                serving = self._serving()
                if serving and not any(adopter in serving for adopter in adopters):
                    adopters.append(serving[0])
                    for sock in surplus:
                        await serving[0].send({"type": "adopt", "id": -sock.fileno()}, [sock.fileno()])
                await trio.sleep(step)
                quiet = 0.0 if any(accept_queue(sock)[0] for sock in surplus) else quiet + step
        for adopter in adopters:
            for sock in surplus:
                await adopter.send({"type": "release", "id": -sock.fileno()})
            # The answer confirms it. Until then, the worker's duplicates keep the sockets in their groups.
            await adopter.ask("measure", within=self._timing.send_within)
        for sock in surplus:
            sock.close()

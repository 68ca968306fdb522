"""Who accepts from the listening sockets of a worker that is not there: another one, which adopts them for a while."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import trio

from usocksd.net.listeners import queue_length
from usocksd.serve.plan import Plan
from usocksd.serve.slots import Slots
from usocksd.serve.worker_process import WorkerProcess

# A surplus socket is closed when nobody has waited in it for so long, in seconds: longer than a handshake takes.
_QUIET = 2.0
# So long is waited for one that adopted it to say that it has let go.
_ANSWERS_WITHIN = 2.0


class Adoption:
    """Keeps every slot of the plan in force served, and empties what no plan wants any more.

    `serving` are the workers that accept connections, as far as one knows.
    """

    def __init__(self, slots: Slots, serving: Callable[[], list[WorkerProcess]]) -> None:
        self._slots = slots
        self._serving = serving
        self._plan: Plan | None = None
        self._adopters: dict[int, WorkerProcess] = {}
        self._covering = trio.Lock()

    def begin(self, plan: Plan) -> None:
        """This plan is in force from now on. Who has adopted a slot was a worker of the one before."""
        self._plan = plan
        self._adopters.clear()

    async def cover(self) -> None:
        """Every slot is served: by its own worker, or by another that has adopted it until its own is there."""
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
        """Have what waits in these sockets accepted, then close them: closed at once, they would reset it."""
        adopters: list[WorkerProcess] = []
        quiet = 0.0
        # Bounded, for where nothing keeps new connections away from a dropped address (see slots.py).
        with trio.move_on_after(_QUIET * 5):
            while quiet < _QUIET:
                serving = self._serving()
                if serving and not any(adopter in serving for adopter in adopters):
                    adopters.append(serving[0])
                    for sock in surplus:
                        await serving[0].send({"type": "adopt", "id": -sock.fileno()}, [sock.fileno()])
                await trio.sleep(_QUIET / 10)
                quiet = 0.0 if any(map(queue_length, surplus)) else quiet + _QUIET / 10
        for adopter in adopters:
            for sock in surplus:
                await adopter.send({"type": "release", "id": -sock.fileno()})
            # An answer says that it has: until then they are in their groups, to be kept from choice.
            with trio.move_on_after(_ANSWERS_WITHIN):
                await adopter.ask("measure")
        for sock in surplus:
            sock.close()

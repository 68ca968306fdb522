"""One epoll for all proxied sockets of a process: events, deadlines and turns.

The rules that this file, endpoint.py, flow.py and relay.py keep, each learned from a prototype that broke:

- Every socket is registered once, edge-triggered. Flags of an event are hints: only what recv, send, splice and
  SO_ERROR return decides.
- Nothing is awaited between `poll()` and the end of its batch, and only the session that owns a socket closes it. So
  no descriptor number changes hands within a batch.
- A task is woken through exactly one place, which forgets it first. Cancelling does the same, so a task can't be
  rescheduled twice (trio would end the whole program).
- An exception in one session's step is raised in that session, never in the reactor's task.

Why not trio's own sockets: two tasks and a wait per direction cost 1.5 times the CPU per echo and twice the memory.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

import trio

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
PRI = select.EPOLLPRI
RDHUP = select.EPOLLRDHUP
# With one of these set, a short read does not mean that the socket is dry: an end, an error or data behind the urgent
# mark may already be queued, and no second event comes for it.
MORE = RDHUP | HUP | ERR | PRI
BROKEN = HUP | ERR

# OUT is added at the first send that would block: most connections never have one, and registering for it at once
# costs every accepted connection an event that says "you may write".
_READ_EVENTS = IN | RDHUP | PRI | select.EPOLLET
_ALL_EVENTS = _READ_EVENTS | OUT

# Events in a batch: keeps it in the order of 5 ms.
_BATCH = 256
# Work longer than an event should take waits for the end of the turn; after this many seconds, for the next turn.
_TURN = 0.005
# One buffer serves every receive of the process: bytes stay in it only until they are sent, in the same step.
BUFFER_SIZE = 64 * 1024


class Handler(Protocol):
    """The object behind a registered descriptor: an endpoint, one direction of a relay, or a listener."""

    deadline: float

    def on_event(self, flags: int) -> None:
        """The descriptor is ready, as far as epoll knows. Must neither block nor raise."""

    def on_deadline(self, now: float) -> None:
        """The clock has passed `deadline`."""

    def interrupt(self, reason: BaseException) -> None:
        """End the wait here, because the process stops or needs the descriptor."""


class Resumable(Protocol):
    """Work that continues after the events of a turn."""

    def resume(self) -> None:
        """Continue. Must neither block nor raise."""


class Reactor:
    """Waits for every registered socket of the process in one trio task, `run`.

    `clock` gives seconds and never goes back; tests move it by hand. `sweep_every`: the seconds between two checks of
    all deadlines, and so the most that one may be late.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, sweep_every: float = 0.5) -> None:
        self.handlers: dict[int, Handler] = {}
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.clock = clock
        self.now = clock()
        """When the present batch began: nothing in it reads the clock again."""
        self._sweep_every = sweep_every
        self._epoll = select.epoll()
        self._resume: list[Resumable] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Serve events and deadlines until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweeper)
            task_status.started()
            fd = self._epoll.fileno()
            while True:
                if self._resume:
                    await trio.lowlevel.checkpoint()
                else:
                    # On the epoll's own descriptor: trio wakes this one task, whichever socket is ready.
                    await trio.lowlevel.wait_readable(fd)
                self._turn()

    def close(self) -> None:
        """Give back the epoll descriptor. Sockets belong to their sessions."""
        self._epoll.close()

    def register(self, fd: int, handler: Handler, *, connecting: bool = False) -> None:
        """Watch `fd`, edge-triggered; `connecting` also for the moment at which it becomes writable."""
        self._epoll.register(fd, _ALL_EVENTS if connecting else _READ_EVENTS)
        self.handlers[fd] = handler

    def register_listener(self, fd: int, handler: Handler) -> None:
        """Watch a listening socket, level-triggered: what one batch of accepts left is reported again."""
        self._epoll.register(fd, IN)
        self.handlers[fd] = handler

    def mute(self, fd: int, *, muted: bool) -> None:
        """Stop reporting events of a listening socket, or begin again."""
        self._epoll.modify(fd, 0 if muted else IN)

    def unregister(self, fd: int) -> None:
        """Stop watching `fd`, which stays open."""
        if self.handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def watch_writable(self, fd: int) -> None:
        """Report when `fd` is writable. A further call reports once more if it is writable already."""
        self._epoll.modify(fd, _ALL_EVENTS)

    def forget(self, fd: int) -> None:
        """`fd` is about to be closed, which ends the kernel's watch on it."""
        self.handlers.pop(fd, None)

    def resume_later(self, work: Resumable) -> None:
        """Call `work.resume()` when all events of a turn are served: soon, and once for each time this is called."""
        self._resume.append(work)

    def sweep(self) -> None:
        """Check every deadline once."""
        self.now = now = self.clock()
        late = [handler for handler in self.handlers.values() if handler.deadline <= now]
        for handler in late:
            handler.on_deadline(now)

    def interrupt_all(self, reason: Callable[[], BaseException]) -> None:
        """End everything that is registered; each handler gets an exception of its own."""
        for handler in list(self.handlers.values()):
            handler.interrupt(reason())

    def _turn(self) -> None:
        self.now = self.clock()
        handlers = self.handlers
        for fd, flags in self._epoll.poll(0, _BATCH):
            handler = handlers.get(fd)
            if handler is not None:
                handler.on_event(flags)
        if self._resume:
            self._work_off()

    def _work_off(self) -> None:
        """Bulk comes after quick events, and only until the turn has used its time."""
        resume, self._resume = self._resume, []
        until = self.now + _TURN
        for done, work in enumerate(resume, 1):
            work.resume()
            if self.clock() > until:
                # First in the next turn: they have waited longest.
                self._resume[:0] = resume[done:]
                break

    async def _sweeper(self) -> NoReturn:
        while True:
            await trio.sleep(self._sweep_every)
            self.sweep()

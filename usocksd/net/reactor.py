"""The loop of a process: one epoll for all proxied sockets, and the sessions that wait for them.

The rules that this file, endpoint.py, flow.py and relay.py keep, each learned from a prototype that broke:

- Every socket is registered once, edge-triggered. Flags of an event are hints: only what recv, send, splice and
  SO_ERROR return decides.
- A session is a coroutine. It runs behind the events of a turn, never within them, and only the session that owns a
  socket closes it. So no descriptor number changes hands within a batch of events.
- A session is woken through exactly one place, a Waitable, which forgets it first. So it can't be resumed twice.
- An exception in one session's step is raised in that session, never here.

trio runs as a guest of this loop, and nothing here knows of it: see bridge.py.

Why not trio's own sockets: two tasks and a wait per direction cost 1.5 times the CPU per echo and twice the memory.
"""

from __future__ import annotations

import heapq
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from itertools import count
from typing import Any, Protocol, TypeAlias

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
_LISTENER_EVENTS = IN | select.EPOLLEXCLUSIVE

# Events in a batch: keeps it in the order of 5 ms.
_BATCH = 256
# Work longer than an event should take waits for the end of the turn; after this many seconds, for the next turn.
_TURN = 0.005
# One buffer serves every receive of the process: bytes stay in it only until they are sent, in the same step.
BUFFER_SIZE = 64 * 1024

Session: TypeAlias = Coroutine[Any, Any, None]
"""What the reactor drives: it waits for nothing but a Waitable, and raises nothing."""


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


class _Suspension:
    """Awaited by a session, it hands control back to the reactor until the session is woken."""

    def __await__(self) -> Generator[None, None, None]:
        yield


_SUSPENSION = _Suspension()


class Reactor:
    """Waits for every registered socket of the process and runs its sessions: `turn`, over and over.

    `clock` gives seconds and never goes back; tests move it by hand. `sweep_every`: the seconds between two checks of
    all deadlines, and so the most that one may be late.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, sweep_every: float = 0.5) -> None:
        self.handlers: dict[int, Handler] = {}
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.clock = clock
        self.now = clock()
        """When the present turn began: nothing in it reads the clock again."""
        self.turns = 0
        """How many turns there have been."""
        self.current: Session | None = None
        """The session that runs."""
        self._sweep_every = sweep_every
        self._epoll = select.epoll()
        self._sessions: set[Session] = set()
        self._ready: list[tuple[Session, BaseException | None]] = []
        self._resume: list[Resumable] = []
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._alarm, IN)
        self.call_at(self.now + sweep_every, self._sweep_again)

    def turn(self, patience: float = math.inf) -> None:
        """Wait until there is something to do, at most `patience` seconds, and do it: events first, then sessions, then
        bulk, then calls.
        """
        wait = self.rest()
        events = self._epoll.poll(wait if wait < patience else patience, _BATCH)
        self.now = self.clock()
        self.turns += 1
        try:
            handlers = self.handlers
            for fd, flags in events:
                handler = handlers.get(fd)
                if handler is not None:
                    handler.on_event(flags)
                elif fd == self._alarm:
                    os.eventfd_read(fd)
            timers = self._timers
            while timers[0][0] <= self.now:
                heapq.heappop(timers)[2].fire()
            if self._ready:
                self._run_sessions()
            if self._resume:
                self._work_off()
        finally:
            # Also if a handler fails in every turn: trio needs its calls to end.
            for _ in range(len(self._calls)):
                self._calls.popleft()()

    def rest(self) -> float:
        """How many seconds there is nothing to do, if no event comes."""
        if self._ready or self._resume or self._calls:
            return 0.0
        wait = self._timers[0][0] - self.clock()
        return wait if wait > 0 else 0.0

    def fileno(self) -> int:
        """The epoll descriptor: readable when an event has come."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Give back the loop's own descriptors. Sockets belong to their sessions."""
        self._epoll.close()
        os.close(self._alarm)

    # Descriptors

    def register(self, fd: int, handler: Handler, *, connecting: bool = False) -> None:
        """Watch `fd`, edge-triggered; `connecting` also for the moment at which it becomes writable."""
        self._epoll.register(fd, _ALL_EVENTS if connecting else _READ_EVENTS)
        self.handlers[fd] = handler

    def register_listener(self, fd: int, handler: Handler) -> None:
        """Watch a listening socket, level-triggered: what one batch of accepts left is reported again.

        If processes share the socket, a connection wakes one of them: of those that wait, the one that registered the
        socket first.
        """
        self._epoll.register(fd, _LISTENER_EVENTS)
        self.handlers[fd] = handler

    def register_datagrams(self, fd: int, handler: Handler) -> None:
        """Watch a UDP socket, level-triggered: datagrams that were not received are reported again."""
        self._epoll.register(fd, IN)
        self.handlers[fd] = handler

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

    # Work and time

    def resume_later(self, work: Resumable) -> None:
        """Call `work.resume()` when all events of a turn are served: soon, and once for each time this is called."""
        self._resume.append(work)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call it at the end of this turn."""
        self._calls.append(function)

    def call_soon_threadsafe(self, function: Callable[[], object]) -> None:
        """The same, from any thread, also while this one waits."""
        self._calls.append(function)
        os.eventfd_write(self._alarm, 1)

    def call_at(self, when: float, function: Callable[[], object]) -> Timer:
        """Call it at `when`, on the reactor's clock."""
        timer = Timer(function)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

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

    # Sessions

    def start(self, session: Session) -> None:
        """Run `session`, from the end of this turn on."""
        self._sessions.add(session)
        self._ready.append((session, None))

    def wake(self, session: Session, error: BaseException | None = None) -> None:
        """Resume `session` behind the events of this turn, with `error` raised where it waits, if there is one."""
        self._ready.append((session, error))

    def stop(self, session: Session) -> None:
        """End `session` where it waits: it cleans up at once, without waiting again."""
        if session in self._sessions:
            self._sessions.discard(session)
            session.close()

    def stop_all(self) -> None:
        """End every session."""
        self._run_sessions()  # one that has not begun has a socket to close: it must have begun
        for session in list(self._sessions):
            self.stop(session)

    async def yield_turn(self) -> None:
        """For a session: let others run first."""
        assert self.current is not None
        self.wake(self.current)
        await _SUSPENSION

    async def sleep(self, seconds: float) -> None:
        """For a session: wait this many seconds."""
        await Waitable(self).wait_until(self.clock() + seconds)

    def _run_sessions(self) -> None:
        """Those that are ready now. Others that get ready meanwhile wait for the next turn, behind its events."""
        ready, self._ready = self._ready, []
        sessions = self._sessions
        try:
            for session, error in ready:
                if session not in sessions:
                    continue  # it has been stopped
                self.current = session
                try:
                    awaited = session.send(None) if error is None else session.throw(error)
                except StopIteration:
                    sessions.discard(session)
                else:
                    if awaited is not None:
                        self.wake(session, RuntimeError(f"a session waits for {awaited!r}, which only trio knows"))
        finally:
            self.current = None

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

    def _sweep_again(self) -> None:
        # First, for a handler may fail.
        self.call_at(self.now + self._sweep_every, self._sweep_again)
        self.sweep()


class Waitable:
    """Something that one session at a time waits for."""

    __slots__ = ("_waiting", "reactor")

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self._waiting: Session | None = None

    def wait(self) -> _Suspension:
        """Awaited by a session, it returns when `wake` is called; raises what that was given."""
        # (Not a coroutine itself: that would be one more for each wait.)
        self._waiting = self.reactor.current
        return _SUSPENSION

    async def wait_until(self, when: float) -> None:
        """As `wait`, but only until `when`, on the reactor's clock."""
        timer = self.reactor.call_at(when, self.wake)
        try:
            await self.wait()
        finally:
            timer.cancel()

    def wake(self, error: BaseException | None = None) -> None:
        """Resume the session that waits here, if one does."""
        session, self._waiting = self._waiting, None
        if session is not None:
            self.reactor.wake(session, error)


class Timer:
    """A call at a certain time; see Reactor.call_at."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Don't call it. (The timer stays in the reactor's heap until its time.)"""
        self._function = None

    def fire(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()

"""One epoll for all proxied sockets of a process: who waits for what, and until when.

The rules that this file and relay.py keep, each learned from a prototype that broke:

- Every socket is registered once, edge-triggered. Flags of an event are hints: only what recv, send, splice and
  SO_ERROR return decides.
- Nothing is awaited between `poll()` and the end of its batch, and only the session that owns a socket closes it. So
  no descriptor number changes hands within a batch.
- A task is woken through exactly one place, which forgets it first. Cancelling does the same, so a task can't be
  rescheduled twice (trio would end the whole program).
- What goes wrong in one session's step is delivered into that session, never raised in the reactor's task.

Why not trio's own sockets: two tasks and a wait per direction cost 1.5 times the CPU per echo and twice the memory.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Awaitable, Callable
from math import inf

# The C base class of socket.socket: the same system calls without the Python layer, which costs 3 us per accept.
from socket import SocketType
from typing import NoReturn, Protocol, TypeVar

import outcome
import trio

T = TypeVar("T")

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

# So many events a batch, so that a batch stays in the order of 5 ms.
_BATCH = 256
# What takes longer than an event should waits for the end of the turn, and for the next turn after so many seconds.
_TURN = 0.005
# One buffer serves every receive of the process: bytes stay in it only until they are sent, in the same step.
BUFFER_SIZE = 64 * 1024
# A handshake's worth. What is behind it in the socket stays there.
_RECEIVE_SIZE = 16 * 1024


class Handler(Protocol):
    """What stands behind a registered descriptor: an endpoint, one direction of a relay, or a listener."""

    deadline: float

    def on_event(self, flags: int) -> None:
        """The descriptor is ready, as far as epoll knows. Must neither block nor raise."""

    def on_deadline(self, now: float) -> None:
        """The clock has passed `deadline`."""

    def interrupt(self, reason: BaseException) -> None:
        """End what waits here because the process wants it so: it stops, or needs the descriptor."""


class Resumable(Protocol):
    """Has something left to do when its turn was over."""

    def resume(self) -> None:
        """Go on with it. Must neither block nor raise."""


class DeadlineExpired(Exception):
    """The deadline of an endpoint has passed while a task waited on it."""


class PeerReset(Exception):
    """The client is gone (reset) while its session was busy elsewhere."""


class Reactor:
    """Waits for every registered socket of the process, in one trio task: `run`.

    `clock` gives seconds and never goes back; tests move it by hand. `sweep_every` is how often deadlines are looked
    at, and so how late one may fire, in seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, sweep_every: float = 0.5) -> None:
        self.handlers: dict[int, Handler] = {}
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.clock = clock
        self.now = clock()
        """When the present batch began: what happens in it needs no clock of its own."""
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
        """Report nothing of a listening socket for a while, or again."""
        self._epoll.modify(fd, 0 if muted else IN)

    def unregister(self, fd: int) -> None:
        """Stop watching `fd`, which stays open."""
        if self.handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def watch_writable(self, fd: int) -> None:
        """Report `fd` when it can take more. Said again, it reports once more if the socket is writable already."""
        self._epoll.modify(fd, _ALL_EVENTS)

    def forget(self, fd: int) -> None:
        """`fd` is about to be closed, which is what ends the kernel's watch on it."""
        self.handlers.pop(fd, None)

    def resume_later(self, work: Resumable) -> None:
        """Call `work.resume()` when all events of a turn are served: soon, and once for each time this is called."""
        self._resume.append(work)

    def sweep(self) -> None:
        """Look at every deadline once."""
        self.now = now = self.clock()
        late = [handler for handler in self.handlers.values() if handler.deadline <= now]
        for handler in late:
            handler.on_deadline(now)

    def interrupt_all(self, reason: BaseException) -> None:
        """End everything that is registered, for the process's own reasons."""
        for handler in list(self.handlers.values()):
            handler.interrupt(reason)

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
        """Bulk comes after what is quickly done, and only until the turn has taken its time."""
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


class Endpoint:
    """A connected (or connecting) non-blocking TCP socket of one session: its bytes before and after the relay.

    At most one task waits on an endpoint at a time: its session. While none does, what epoll says is remembered.
    `deadline` (on the reactor's clock) bounds every wait; past it the wait raises DeadlineExpired.
    """

    __slots__ = ("_task", "deadline", "fd", "more", "on_reset", "reactor", "readable", "sock", "writable")

    def __init__(self, reactor: Reactor, sock: SocketType, *, connecting: bool = False) -> None:
        self.reactor = reactor
        self.sock = sock
        self.fd = sock.fileno()
        self.deadline = inf
        self.readable = False
        self.more = False
        """An event told of an end, an error or urgent data: read until there is nothing more to learn."""
        self.writable = not connecting
        self.on_reset: Callable[[], None] | None = None
        """Called when the peer is gone while no task waits here: the session is busy with something else."""
        self._task: trio.lowlevel.Task | None = None
        reactor.register(self.fd, self, connecting=connecting)

    async def receive(self) -> bytes:
        """Up to 16 KiB as soon as there is any; b"" at the end of the stream.

        Raises OSError as recv(2) does, DeadlineExpired, and whatever `interrupt` was given.
        """
        while True:
            if not self.readable:
                await self._wait()
                continue
            try:
                data = self.sock.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                self.readable = self.more = False
                continue
            if len(data) < _RECEIVE_SIZE and not self.more:
                self.readable = False
            return data

    async def send_all(self, data: bytes) -> None:
        """Write all of `data`. Raises as `receive` does."""
        sent = self._send_some(data)
        while sent < len(data):
            self.reactor.watch_writable(self.fd)
            while not self.writable:
                await self._wait()
            sent += self._send_some(data[sent:])

    async def connected(self) -> int:
        """Wait for a connect(2) in progress. Returns 0 or the errno it failed with."""
        while not self.writable:
            await self._wait()
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    async def finish(self, data: bytes, within: float) -> None:
        """Say a last word and let the peer read it: send, end our side, wait `within` seconds for its end, close.

        A close with unread input would reset the connection, and the peer might lose `data`.
        """
        self.deadline = self.reactor.clock() + within
        try:
            await self.send_all(data)
            self.sock.shutdown(socket.SHUT_WR)
            # A peer that sends without a pause keeps neither this session nor the process: no wait, no deadline.
            while self.reactor.clock() < self.deadline and await self.receive():
                await trio.lowlevel.checkpoint()
        except (OSError, DeadlineExpired):
            pass
        finally:
            self.close()

    async def meanwhile(self, deadline: float, work: Callable[[str], Awaitable[T]], argument: str) -> T:
        """Await `work(argument)` on behalf of this endpoint's session, while its peer waits for it.

        Raises what the work does, DeadlineExpired past `deadline`, and PeerReset when the peer is gone.
        """
        self.check_peer()
        gone = False

        def give_up() -> None:
            nonlocal gone
            gone = True
            scope.cancel()

        with trio.move_on_after(max(deadline - self.reactor.clock(), 0)) as scope:
            self.on_reset = give_up
            try:
                return await work(argument)
            finally:
                self.on_reset = None
        raise PeerReset if gone else DeadlineExpired

    def check_peer(self) -> None:
        """Raise PeerReset if the peer's reset came in one event with its last bytes: no other event tells of it."""
        if self.more and self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise PeerReset

    def close(self) -> None:
        """Close the socket: FIN, after what was sent. Only its session calls this; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.reactor.forget(fd)
            self.sock.close()

    def reset(self) -> None:
        """Close the socket with RST: what the peer was sent and has not acknowledged may be lost."""
        if self.fd >= 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self.close()

    def on_event(self, flags: int) -> None:
        if flags & (OUT | BROKEN):
            self.writable = True
        if flags & ~OUT:
            self.readable = True
            if flags & MORE:
                self.more = True
        if self._task is not None:
            self._wake()
        elif flags & BROKEN and self.on_reset is not None:
            self.on_reset()

    def on_deadline(self, now: float) -> None:
        self.interrupt(DeadlineExpired())

    def interrupt(self, reason: BaseException) -> None:
        """Raise `reason` in the task that waits here, if one does."""
        if self._task is not None:
            self._wake(reason)

    def give_up(self) -> None:
        """The client for which this connection was to be made is gone."""
        self.interrupt(PeerReset())

    def _send_some(self, data: bytes) -> int:
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self.writable = sent == len(data)
        return sent

    async def _wait(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self, error: BaseException | None = None) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None) if error is None else outcome.Error(error))


# struct linger { on, 0 seconds }, see socket(7)
_LINGER_ZERO = b"\x01\x00\x00\x00\x00\x00\x00\x00"

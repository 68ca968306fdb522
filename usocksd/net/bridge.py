"""trio as the guest of the reactor's loop, and the one way from a session to trio's tasks and back.

Sessions are driven by the reactor and know nothing of trio: they wait for sockets, relays and times. Everything else
(name servers, password checks, health, the channel to the master) is a task of trio's. Where one side needs the other,
it says so: a session awaits `in_trio`, a task awaits `in_session`.

trio's API is for its own tasks. Only what wakes a task (Event.set, Nursery.start_soon, CancelScope.cancel) may be
called by a session too, and by what the reactor calls: they run in trio's thread, and trio asks its host for a turn.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

import outcome
import trio

from usocksd.net.endpoint import DeadlineExpired, Interruptible
from usocksd.net.reactor import Reactor, Waitable

T = TypeVar("T")

log = logging.getLogger(__name__)


def run(reactor: Reactor, main: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run `main` in trio while the reactor turns, until `main` returns. Returns and raises what it does.

    After an exception in the reactor, which is a bug, sessions are stopped, `main` is cancelled, and that exception is
    raised.
    """
    scope = trio.CancelScope()
    fault: Exception | None = None
    ended: list[outcome.Outcome[Any]] = []

    async def guest() -> T | None:
        with scope:
            return await main(*args)
        return None

    trio.lowlevel.start_guest_run(
        guest,
        run_sync_soon_threadsafe=reactor.call_soon_threadsafe,
        run_sync_soon_not_threadsafe=reactor.call_soon,
        done_callback=ended.append,
    )
    while not ended:
        try:
            reactor.turn()
        except Exception as error:
            if fault is None:  # the same may come again in every turn, until trio has ended
                log.critical("internal error", exc_info=True)
                fault = error
                reactor.call_soon(reactor.stop_all)  # before they see what they wait for end
                scope.cancel()
    if fault is not None:
        raise fault
    result: T = ended[0].unwrap()
    return result


async def in_trio(client: Interruptible, deadline: float, work: Callable[[], Awaitable[T]]) -> T:
    """For the session of `client`: await `work()` in a task of trio's, while the client waits.

    Raises what the work does, DeadlineExpired past `deadline` (on the reactor's clock), PeerReset when the client is
    gone, and whatever the client is interrupted with. The work is cancelled then.
    """
    client.check_peer()
    errand = _Errand(client.reactor, deadline, work)
    client.on_interrupt = errand.give_up
    try:
        return await errand.result()
    finally:
        client.on_interrupt = None


async def in_session(reactor: Reactor, work: Coroutine[Any, Any, T]) -> T:
    """For a task of trio's: await `work`, which waits for endpoints, as a session of the reactor. If the task is
    cancelled, the session is stopped. (If the session is stopped otherwise, this waits to be cancelled.)
    """
    task = trio.lowlevel.current_task()
    cancelled = False

    async def session() -> None:
        result: outcome.Outcome[T]
        try:
            result = outcome.Value(await work)
        except Exception as error:
            if cancelled:
                log.exception("internal error")  # in its clean-up
            result = outcome.Error(error)
        if not cancelled:
            trio.lowlevel.reschedule(task, result)

    def abort(_: object) -> trio.lowlevel.Abort:
        nonlocal cancelled
        cancelled = True
        reactor.stop(driven)
        work.close()  # if it has not begun
        return trio.lowlevel.Abort.SUCCEEDED

    driven = session()
    reactor.start(driven)
    result: T = await trio.lowlevel.wait_task_rescheduled(abort)
    return result


class _Errand(Waitable, Generic[T]):
    """What a session has a task of trio's do, while it waits here."""

    def __init__(self, reactor: Reactor, deadline: float, work: Callable[[], Awaitable[T]]) -> None:
        super().__init__(reactor)
        self._deadline = deadline
        self._work = work
        self._scope = trio.CancelScope()
        self._outcome: outcome.Outcome[T] = outcome.Error(DeadlineExpired())

    async def result(self) -> T:
        trio.lowlevel.spawn_system_task(self._run)
        try:
            await self.wait()
        finally:
            self._scope.cancel()  # it is over, unless the session is stopped
        return self._outcome.unwrap()

    def give_up(self, reason: BaseException) -> None:
        """Cancel it, and raise `reason` in the session."""
        self._outcome = outcome.Error(reason)
        self._scope.cancel()

    async def _run(self) -> None:
        self._scope.deadline = trio.current_time() + max(self._deadline - self.reactor.clock(), 0)
        try:
            # (The scope takes its Cancelled out of an ExceptionGroup. The rest of the group is the session's.)
            with self._scope:
                self._outcome = outcome.Value(await self._work())
        except Exception as error:
            self._outcome = outcome.Error(error)
        self.wake()

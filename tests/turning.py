"""A reactor that turns inside trio, for tests that have it among other tasks. (In a daemon it is the other way round.)"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from math import inf
from typing import Any, TypeVar

import trio

from usocksd.net.bridge import in_session
from usocksd.net.endpoint import Endpoint
from usocksd.net.reactor import Reactor

T = TypeVar("T")


class _Alarm(trio.abc.Instrument):
    """Wakes the reactor when a task has given it something to do: the loop of a daemon looks by itself."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if pending(self.reactor) and not self.reactor._calls:
            self.reactor.call_soon_threadsafe(lambda: None)


def pending(reactor: Reactor) -> bool:
    """Whether it has something to do, whatever events come, and whatever its clock says."""
    return bool(reactor._ready or reactor._resume or reactor._calls)


@asynccontextmanager
async def turning(reactor: Reactor) -> AsyncIterator[Reactor]:
    """The reactor, which turns as long as the block runs; then its sessions are stopped, and it is closed."""
    alarm = _Alarm(reactor)
    trio.lowlevel.add_instrument(alarm)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_turn, reactor)
            try:
                yield reactor
            finally:
                reactor.stop_all()
                nursery.cancel_scope.cancel()
    finally:
        trio.lowlevel.remove_instrument(alarm)
        reactor.close()


async def _turn(reactor: Reactor) -> None:
    while True:
        stands = getattr(reactor.clock, "stands", False)  # then timers wait for the test that moves it
        with trio.move_on_after(inf if stands and not pending(reactor) else reactor.rest()):
            await trio.lowlevel.wait_readable(reactor.fileno())
        reactor.turn(0)


class TaskEndpoint(Endpoint):
    """An endpoint on which a task of trio's may wait too."""

    __slots__ = ()

    async def receive(self) -> bytes:
        return await self._waited(super().receive())

    async def send_all(self, data: bytes) -> None:
        await self._waited(super().send_all(data))

    async def finish(self, data: bytes, within: float) -> None:
        await self._waited(super().finish(data, within))

    async def connected(self) -> int:
        return await self._waited(super().connected())

    def _waited(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        return work if self.reactor.current is not None else in_session(self.reactor, work)


def start(reactor: Reactor, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> trio.Event:
    """Run `work(*args)` as a session; returns what is set at its end."""
    over = trio.Event()

    async def session() -> None:
        try:
            await work(*args)
        finally:
            over.set()

    reactor.start(session())
    return over

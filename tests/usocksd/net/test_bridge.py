"""The real arrangement: `run` turns the reactor in this process, and trio is its guest."""

import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing, suppress
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from daemons import PATIENCE

from usocksd.net.bridge import in_session, in_trio, run
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.net.reactor import Reactor, Waitable

RESET = b"\x01\0\0\0\0\0\0\0"  # struct linger { on, 0 seconds }


class Process:
    """A reactor with trio as its guest, as in a worker."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.left: list[str] = []
        """How sessions and work that did not come to an end were ended, in this order."""
        self._peers: list[socket.socket] = []

    def run(self, main: Callable[..., Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            try:
                with trio.fail_after(PATIENCE):
                    return await main()
            finally:
                self.reactor.stop_all()

        return run(self.reactor, bounded)

    def endpoint(self) -> tuple[Endpoint, socket.socket]:
        """An endpoint of the reactor, and its peer."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
        near.setblocking(False)
        self._peers.append(far)
        return Endpoint(self.reactor, near), far

    async def session(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What a session that does this work returns or raises."""
        ended = trio.Event()
        results: list[Any] = []

        async def session() -> None:
            try:
                results.append(await work)
            except Exception as error:
                results.append(error)
            finally:
                ended.set()

        self.reactor.start(session())
        await ended.wait()
        if not results:
            return None
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    async def stay(self, name: str) -> None:
        """Work for a task of trio's, without end."""
        try:
            await trio.sleep_forever()
        finally:
            self.left.append(name)

    async def turns(self, number: int = 5) -> None:
        for _ in range(number):
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.reactor.close()


@pytest.fixture
def process(nothing_leaks: None) -> Iterator[Process]:
    with closing(Process(Reactor(sweep_every=0.01))) as process:
        yield process


def tasks_of_errands() -> int:
    return sum("_Errand" in task.name for task in trio.lowlevel.current_root_task().child_nurseries[0].child_tasks)


# A session goes to trio


def test_run_returns_and_raises_what_main_does(process: Process) -> None:
    async def main(word: str) -> str:
        await trio.sleep(0.001)
        if word == "no":
            raise KeyError(word)
        return word

    assert run(process.reactor, main, "yes") == "yes"
    with pytest.raises(KeyError):
        run(process.reactor, main, "no")


def test_a_session_goes_to_trio_and_comes_back_with_a_value_or_an_exception(process: Process) -> None:
    async def work(divisor: int) -> float:
        await trio.sleep(0.001)
        return 6 / divisor

    async def main() -> None:
        endpoint, peer = process.endpoint()

        async def session() -> float:
            with suppress(ZeroDivisionError):
                await in_trio(endpoint, process.reactor.clock() + 60, lambda: work(0))
            quotient = await in_trio(endpoint, process.reactor.clock() + 60, lambda: work(2))
            assert await endpoint.receive() == b"as before"
            return quotient

        peer.sendall(b"as before")
        assert await process.session(session()) == 3
        assert endpoint.on_interrupt is None
        endpoint.close()

    process.run(main)


@pytest.mark.parametrize("within", [-1.0, 0.02])
def test_past_its_deadline_the_work_is_cancelled(process: Process, within: float) -> None:
    async def main() -> None:
        endpoint, _ = process.endpoint()
        deadline = process.reactor.clock() + within
        with pytest.raises(DeadlineExpired):
            await process.session(in_trio(endpoint, deadline, lambda: process.stay("work")))
        assert process.left == ["work"]
        assert process.reactor.clock() >= deadline
        endpoint.close()

    process.run(main)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_the_reset_of_the_client_cancels_the_work(process: Process, when: str) -> None:
    async def main() -> None:
        endpoint, peer = process.endpoint()

        def reset() -> None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            peer.close()

        async def work() -> None:
            reset()
            await process.stay("work")

        if when == "before":
            peer.sendall(b"x")
            await trio.sleep(0.02)
            reset()
            await trio.sleep(0.02)
            assert await process.session(endpoint.receive()) == b"x"
        with pytest.raises(PeerReset):
            await process.session(in_trio(endpoint, process.reactor.clock() + 60, work))
        assert process.left == (["work"] if when == "meanwhile" else [])
        endpoint.close()

    process.run(main)


def test_a_session_in_trio_is_interrupted_as_one_that_waits_for_its_client(process: Process) -> None:
    async def main() -> None:
        endpoint, _ = process.endpoint()

        async def work() -> None:
            endpoint.on_deadline(0)  # that of the client: it has none meanwhile
            process.reactor.interrupt_all(KeyError)
            await process.stay("work")

        with pytest.raises(KeyError):
            await process.session(in_trio(endpoint, process.reactor.clock() + 60, work))
        assert process.left == ["work"]
        endpoint.close()

    process.run(main)


@pytest.mark.parametrize("turns", range(1, 6))
def test_a_session_stopped_while_it_is_in_trio_leaves_nothing_running(process: Process, turns: int) -> None:
    """At any moment: on the way, there."""

    async def main() -> None:
        endpoint, _ = process.endpoint()

        async def session() -> None:
            try:
                await in_trio(endpoint, process.reactor.clock() + 60, lambda: process.stay("work"))
            finally:
                process.left.append("session")
                endpoint.close()

        driven = session()
        process.reactor.start(driven)
        await process.turns(turns)
        process.reactor.stop(driven)
        process.reactor.stop(driven)
        assert process.left == ["session"]
        assert endpoint.fd == -1
        await process.turns(10)
        assert process.left in (["session"], ["session", "work"])
        assert not tasks_of_errands()

    process.run(main)


def test_work_that_fails_while_it_is_cancelled(process: Process) -> None:
    """In a nursery, beside work that does not: its session gets the error, and trio goes on."""

    async def fail() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ZeroDivisionError

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(process.stay, "beside")

    async def main() -> None:
        endpoint, _ = process.endpoint()
        with pytest.raises(ExceptionGroup) as caught:
            await process.session(in_trio(endpoint, process.reactor.clock() + 0.01, work))
        assert caught.group_contains(ZeroDivisionError)
        endpoint.close()

    process.run(main)
    assert process.left == ["beside"]


def test_stopped_with_a_result_on_its_way(process: Process) -> None:
    async def main() -> None:
        endpoint, _ = process.endpoint()
        sessions: list[Any] = []

        async def work() -> str:
            process.reactor.stop(sessions[0])
            return "too late"

        async def session() -> None:
            process.left.append(await in_trio(endpoint, process.reactor.clock() + 60, work))

        sessions.append(session())
        process.reactor.start(sessions[0])
        await process.turns(10)
        assert process.left == []
        endpoint.close()

    process.run(main)


# A task awaits a session


def test_a_task_awaits_a_session(process: Process) -> None:
    async def main() -> None:
        endpoint, peer = process.endpoint()
        peer.sendall(b"x")
        assert await in_session(process.reactor, endpoint.receive()) == b"x"
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.close()
        with pytest.raises(ConnectionResetError):
            await in_session(process.reactor, endpoint.receive())
        endpoint.close()

    process.run(main)


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_task_stops_its_session(
    process: Process, caplog: pytest.LogCaptureFixture, turns: int, fails: bool
) -> None:
    """And closes its sockets, at any moment. If its clean-up fails, the log has that."""

    async def main() -> None:
        endpoint, _ = process.endpoint()

        async def work() -> None:
            try:
                await endpoint.receive()
            finally:
                endpoint.close()
                if fails:
                    raise KeyError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_session, process.reactor, work())
            await process.turns(turns)
            nursery.cancel_scope.cancel()
        if turns > 1:  # else it had not begun
            assert [record.message for record in caplog.records] == ["internal error"] * fails
            assert endpoint.fd == -1
        endpoint.close()
        assert not process.reactor.handlers

    process.run(main)


def test_there_and_back_again(process: Process) -> None:
    """A task awaits a session that awaits a task that awaits a session, and all of them end together."""

    async def main() -> None:
        outer, peer = process.endpoint()
        inner, _ = process.endpoint()

        async def innermost() -> None:
            try:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                peer.close()
                await inner.receive()
            finally:
                inner.close()

        work = in_trio(outer, process.reactor.clock() + 60, lambda: in_session(process.reactor, innermost()))
        with pytest.raises(PeerReset):
            await in_session(process.reactor, work)
        assert inner.fd == -1
        outer.close()

    process.run(main)


# Faults


@pytest.mark.parametrize(
    "mistake",
    [
        partial(trio.sleep, 1),
        partial(trio.sleep, 0),
        trio.lowlevel.checkpoint,
        trio.Event().wait,
        partial(trio.lowlevel.wait_task_rescheduled, lambda _: trio.lowlevel.Abort.SUCCEEDED),
        partial(trio.to_thread.run_sync, print),
    ],
    ids=["sleep", "sleep(0)", "checkpoint", "event", "wait_task_rescheduled", "thread"],
)
def test_a_session_that_awaits_trio_gets_an_error_and_no_other(
    process: Process, mistake: Callable[[], Coroutine[Any, Any, Any]]
) -> None:
    async def main() -> None:
        endpoint, peer = process.endpoint()

        async def other() -> bytes:
            return await endpoint.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.session, other())
            with pytest.raises((RuntimeError, AttributeError)):
                await process.session(mistake())
            await trio.sleep(0.001)
            peer.sendall(b"x")
        endpoint.close()

    process.run(main)


class Faulty:
    """A handler with a bug."""

    def __init__(self, name: str, deadline: float = inf) -> None:
        self.name = name
        self.deadline = deadline

    def on_event(self, flags: int) -> None:
        raise KeyError(self.name)

    def on_deadline(self, now: float) -> None:
        raise KeyError(self.name)

    def interrupt(self, reason: BaseException) -> None: ...


async def failing() -> None:
    raise KeyError("session")


@pytest.mark.parametrize("where", ["event", "listener", "deadline", "timer", "call", "session", "before trio"])
def test_a_bug_ends_run_after_trio_was_cancelled(
    process: Process, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    reactor = process.reactor

    def bug() -> None:
        raise KeyError(where)

    async def main() -> None:
        endpoint, peer = process.endpoint()
        waiting, _ = process.endpoint()

        async def session() -> None:
            try:
                await waiting.receive()
            finally:
                process.left.append("session")
                waiting.close()

        reactor.start(session())
        try:
            match where:
                case "event":
                    reactor.handlers[endpoint.fd] = Faulty(where)
                    peer.sendall(b"x")
                case "listener":  # it fails again in every turn
                    sock = socket.create_server(("127.0.0.1", 0))
                    process._peers += [sock, socket.create_connection(sock.getsockname())]
                    reactor.register_listener(sock.fileno(), Faulty(where))
                case "deadline":
                    reactor.handlers[-1] = Faulty(where, deadline=0)
                case "timer":
                    reactor.call_at(reactor.clock(), bug)
                case "call":
                    reactor.call_soon(bug)
                case "session":
                    reactor.start(failing())
            await process.turns(10)
            await trio.sleep_forever()
        finally:
            endpoint.close()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)
            process.left.append("main")

    if where == "before trio":
        reactor.call_soon(bug)
    with pytest.raises(KeyError, match=where):
        process.run(main)
    assert [record.getMessage() for record in caplog.records] == ["internal error"]
    assert process.left == ([] if where == "before trio" and not process.left else ["session", "main"])


# The loop


def test_a_call_from_another_thread_wakes_a_loop_that_sleeps(process: Process) -> None:
    reactor = process.reactor
    called: list[float] = []

    def call() -> None:
        time.sleep(0.02)
        reactor.call_soon_threadsafe(lambda: called.append(time.monotonic()))

    sleepy = Reactor(sweep_every=1e6)
    reactor.close()
    process.reactor = reactor = sleepy
    thread = threading.Thread(target=call)
    thread.start()
    began = time.monotonic()
    while not called:
        reactor.turn(PATIENCE)
    thread.join()
    assert called[0] - began < PATIENCE / 2


def test_timers_fire_in_order_and_cancelled_ones_do_not(process: Process) -> None:
    async def main() -> None:
        reactor = process.reactor
        now = reactor.clock()
        done: list[int] = []
        ended = trio.Event()
        timers = [reactor.call_at(now + at / 1000, lambda at=at: done.append(at)) for at in (5, 1, 3, 2, 4, -1)]
        reactor.call_at(now + 0.003, lambda: done.append(33))
        timers[3].cancel()
        timers[4].cancel()
        reactor.call_at(now + 0.003, timers[0].cancel)
        reactor.call_at(now + 0.02, ended.set)
        await ended.wait()
        timers[0].cancel()
        assert done == [-1, 1, 3, 33]

    process.run(main)


def test_a_session_sleeps_on_the_reactors_clock(process: Process) -> None:
    async def main() -> None:
        began = process.reactor.clock()
        await process.session(process.reactor.sleep(0.02))
        assert process.reactor.clock() - began >= 0.02

    process.run(main)


@pytest.mark.parametrize("wakes", [1, 2, 3])
def test_a_session_woken_twice_is_resumed_once(process: Process, wakes: int) -> None:
    async def main() -> None:
        first, second = Waitable(process.reactor), Waitable(process.reactor)

        async def session() -> None:
            await first.wait()
            process.left.append("first")
            await second.wait_until(process.reactor.clock() + 0.02)
            process.left.append("second")

        process.reactor.start(session())
        await process.turns()
        for _ in range(wakes):
            first.wake()
        await process.turns()
        assert process.left == ["first"]
        await trio.sleep(0.03)
        second.wake()
        await process.turns()
        assert process.left == ["first", "second"]

    process.run(main)


def test_a_woken_session_that_was_stopped_is_not_resumed(process: Process) -> None:
    async def main() -> None:
        place = Waitable(process.reactor)

        async def session() -> None:
            await place.wait()
            process.left.append("resumed")

        driven = session()
        process.reactor.start(driven)
        await process.turns()
        place.wake()
        process.reactor.stop(driven)
        place.wake()
        await process.turns()
        assert process.left == []

    process.run(main)


# Fairness


def test_busy_sessions_do_not_starve_trio_nor_trio_them(process: Process) -> None:
    async def main() -> None:
        rounds = [0, 0]

        async def session() -> None:
            while True:
                rounds[0] += 1
                await process.reactor.yield_turn()

        async def task() -> None:
            while True:
                rounds[1] += 1
                await trio.lowlevel.checkpoint()

        endpoint, peer = process.endpoint()
        driven = session()
        process.reactor.start(driven)
        # trio's timers, threads and sockets beside it.
        near, far = trio.socket.socketpair()
        with near, far:
            await trio.sleep(0.01)
            assert await trio.to_thread.run_sync(lambda: 7) == 7
            await near.send(b"x")
            assert await far.recv(1) == b"x"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)
                before = list(rounds)
                peer.sendall(b"y")
                assert await in_session(process.reactor, endpoint.receive()) == b"y"
                await trio.sleep(0.02)
                assert all(now - then > 10 for now, then in zip(rounds, before, strict=True))
                # A turn of one for a turn of the other.
                assert 0.3 < (rounds[0] - before[0]) / (rounds[1] - before[1]) < 3
                nursery.cancel_scope.cancel()
        process.reactor.stop(driven)
        endpoint.close()

    process.run(main)

"""The tasks of sessions, which serve one connection after another."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from usocksd.log.metrics import Metrics
from usocksd.net.endpoint import Endpoint
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import Tally
from usocksd.net.listeners import listen
from usocksd.serve.service import Service
from usocksd.serve.timing import Timing


class Served:
    """A service with sessions that receive once; `by` are the tasks that they ran in."""

    def __init__(self, lab: Any, sessions: trio.Nursery) -> None:
        self.by: list[trio.lowlevel.Task] = []
        self.fault: Exception | None = None
        # (Without limits nothing is counted, and no table needed.)
        tally = Tally(-1, 0, most=0, per_client=0)
        self.service = Service(
            lab.reactor,
            self._session,
            sessions,
            most=1000,
            tally=tally,
            metrics=Metrics("tiny"),
            keepalive=KeepAlive(),
            timing=Timing(idle_tasks=2),
        )
        self._sock = listen("127.0.0.1", 0)
        self._address = self._sock.getsockname()
        self._listeners = self.service.listen([self._sock])

    async def _session(self, endpoint: Endpoint, host: str, port: int) -> None:
        self.by.append(trio.lowlevel.current_task())
        await endpoint.receive()
        if self.fault is not None:
            raise self.fault

    @contextmanager
    def clients(self, count: int) -> Iterator[list[socket.socket]]:
        socks = [socket.create_connection(self._address) for _ in range(count)]
        try:
            yield socks
        finally:
            for sock in socks:
                sock.close()

    def close(self) -> None:
        self.service.close(self._listeners)


@pytest.fixture
async def served(lab: Any) -> Any:
    async with trio.open_nursery() as sessions:
        served = Served(lab, sessions)
        yield served
        served.close()
        await lab.settle()
        # Those without a connection wait for the next; nothing but this ends them.
        sessions.cancel_scope.cancel()


async def test_one_after_another(lab: Any, served: Served) -> None:
    for _ in range(5):
        with served.clients(1):
            await lab.settle()
        await lab.settle()
    assert len(served.by) == 5
    assert len(set(served.by)) == 1
    assert served.service.live == 0


async def test_at_once(lab: Any, served: Served) -> None:
    with served.clients(5):
        await lab.settle()
        assert len(set(served.by)) == 5
    await lab.settle()
    assert served.service.live == 0
    with served.clients(3):
        await lab.settle()
        assert len(served.by) == 8
        assert len(set(served.by)) == 6


async def test_a_fault_in_one_connection_ends_no_other(lab: Any, served: Served) -> None:
    served.fault = ValueError("a bug")
    with served.clients(1):
        await lab.settle()
    await lab.settle()
    served.fault = None
    with served.clients(1) as (client,):
        await lab.settle()
        client.sendall(b"x")
        await lab.settle()
        assert client.recv(1) == b""
    assert len(served.by) == 2


class Numbered:
    """A session's description of its connection."""

    def __init__(self, number: int) -> None:
        self.number = number

    def describe(self) -> dict[str, Any]:
        return {"number": self.number}


async def test_connections_that_end_while_they_are_listed(lab: Any, served: Served) -> None:
    """A long list is made in parts, and others go on meanwhile."""
    rigs = [lab.rig() for _ in range(6)]
    for number, rig in enumerate(rigs):
        rig.near.about = Numbered(number)
        if number < 4:
            lab.start(rig)
    await lab.settle()
    rows = served.service.connections()
    assert next(rows)["number"] == 0
    for rig in rigs[1:3]:
        rig.client.close()
        rig.upstream.close()
    await lab.settle()
    rigs[4].near.close()
    assert [(row["number"], row["state"]) for row in rows] == [(3, "relay"), (5, "handshake")]


async def test_a_stop_with_a_connection_in_the_accept_queue(lab: Any) -> None:
    """A task that was given a connection in this very moment closes it."""
    async with trio.open_nursery() as sessions:
        served = Served(lab, sessions)
        with served.clients(1):
            await lab.settle()
        await lab.settle()
        with served.clients(1):
            served.close()
            sessions.cancel_scope.cancel()
    assert len(served.by) == 2
    assert served.service.live == 0

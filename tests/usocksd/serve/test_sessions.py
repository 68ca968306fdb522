"""The sessions of a worker's connections: none suffers from another."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from usocksd.log.metrics import Metrics
from usocksd.net.endpoint import Endpoint
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import Tally
from usocksd.net.listeners import listen
from usocksd.serve.associations import Associations
from usocksd.serve.service import Service
from usocksd.serve.timing import Timing


class Served:
    """A service with sessions that receive once."""

    def __init__(self, lab: Any) -> None:
        self.received: list[bytes | None] = []
        """What each session did, in the order in which they ended; None: it was stopped."""
        self.fault: Exception | None = None
        # (Without limits nothing is counted, and no table needed.)
        tally = Tally(-1, 0, most=0, per_client=0)
        metrics = Metrics("tiny")
        self.service = Service(
            lab.reactor,
            self._session,
            most=1000,
            tally=tally,
            associations=Associations(metrics),
            metrics=metrics,
            keepalive=KeepAlive(),
            timing=Timing(session_ends=0),
        )
        self._sock = listen("127.0.0.1", 0)
        self._address = self._sock.getsockname()
        self.service.listen([self._sock])

    async def _session(self, endpoint: Endpoint, host: str, port: int) -> None:
        received = None
        try:
            received = await endpoint.receive()
            if self.fault is not None:
                raise self.fault
        finally:
            self.received.append(received)

    @contextmanager
    def clients(self, count: int) -> Iterator[list[socket.socket]]:
        socks = [socket.create_connection(self._address) for _ in range(count)]
        try:
            yield socks
        finally:
            for sock in socks:
                sock.close()

    def close(self) -> None:
        self.service.close()


@pytest.fixture
async def served(lab: Any) -> Any:
    served = Served(lab)
    yield served
    served.close()
    await lab.settle()


async def test_connections_one_after_another_and_at_once(lab: Any, served: Served) -> None:
    for count in (1, 1, 5, 3):
        with served.clients(count):
            await lab.settle()
            assert served.service.live == count
        await lab.settle()
        assert served.service.live == 0
    assert served.received == [b""] * 10


async def test_a_fault_in_one_connection_ends_no_other(
    lab: Any, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with served.clients(2) as (faulty, client):
        await lab.settle()
        served.fault = ValueError("a bug")
        faulty.sendall(b"x")
        await lab.settle()
        assert faulty.recv(1) == b""
        assert [record.getMessage() for record in caplog.records] == ["session failed"]
        assert served.service.live == 1
        served.fault = None
        client.sendall(b"y")
        await lab.settle()
        assert client.recv(1) == b""
    assert served.received == [b"x", b"y"]
    assert served.service.live == 0


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
    """Its session has not begun: it begins, to close the connection."""
    served = Served(lab)
    with served.clients(1):
        await lab.settle()
        with served.clients(1) as (client,):
            served.close()
            assert served.service.live == 2
            lab.reactor.stop_all()
            assert served.received == [None, None]
            assert served.service.live == 0
            assert client.recv(1) == b""
            await lab.settle()


async def test_drained_sessions_end_at_last(lab: Any) -> None:
    """One waits, and one is elsewhere, where no interrupt reaches it."""
    served = Served(lab)
    with served.clients(2) as clients:
        await lab.settle()
        lab.reactor.interrupt_all = lambda reason: None
        await served.service.drain(0)
        lab.reactor.stop_all()
        assert served.service.live == 0
        assert served.received == [None, None]
        assert [client.recv(1) for client in clients] == [b"", b""]

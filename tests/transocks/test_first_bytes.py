"""The wait for the first bytes of a client, over real sockets; time is short or trio's own."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from socket import SocketType
from socket import socket as Socket
from typing import TypeAlias

import pytest
import trio
import trio.testing
from daemons import PATIENCE, loopback
from turning import TaskEndpoint, turning

from transocks.first_bytes import NOTHING, First, FirstBytes
from transocks.route_settings import NamesConfig
from transocks.sniff import OTHER, Opening, Protocol
from usocksd.names.match import parse_network
from usocksd.net.address import HostPort
from usocksd.net.bridge import in_session
from usocksd.net.endpoint import Endpoint, PeerReset
from usocksd.net.reactor import Reactor

WEB = HostPort("203.0.113.80", 80)
REQUEST = b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n"
NAMED = Opening(Protocol.HTTP, "www.example.com")
LONG = PATIENCE  # what no test waits for

Read: TypeAlias = Callable[[Endpoint, HostPort], Awaitable[First]]


def connected_pair() -> tuple[SocketType, Socket]:
    """A connection: the accepted end, as the listener gives it, and the client's."""
    with loopback() as listener:
        client = socket.create_connection(listener.getsockname())
        fd, _ = listener._accept()  # type: ignore[attr-defined]
        return SocketType(fileno=fd), client


@asynccontextmanager
async def reading(wait: float = LONG, **settings: object) -> AsyncIterator[tuple[Read, Socket, Endpoint]]:
    """What reads in a session, the client's socket, and the endpoint of that session."""
    first_bytes = FirstBytes(NamesConfig(wait=wait, **settings))  # type: ignore[arg-type]
    async with turning(Reactor(clock=trio.current_time)) as reactor:

        async def read(endpoint: Endpoint, destination: HostPort) -> First:
            return await in_session(reactor, first_bytes.read(endpoint, destination))

        ours, theirs = connected_pair()
        ours.setblocking(False)
        endpoint = TaskEndpoint(reactor, ours)
        with closing(endpoint), theirs, trio.fail_after(PATIENCE):
            yield read, theirs, endpoint


async def test_bytes_that_are_there_already() -> None:
    async with reading() as (read, client, endpoint):
        client.sendall(REQUEST)
        assert await read(endpoint, WEB) == First(REQUEST, NAMED)


async def test_bytes_that_come_in_time_and_in_pieces() -> None:
    async with reading() as (read, client, endpoint), trio.open_nursery() as nursery:

        async def talk() -> None:
            for byte in REQUEST:
                client.sendall(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(talk)
        assert (await read(endpoint, WEB)).opening == NAMED
        nursery.cancel_scope.cancel()


OTHER_PORT = HostPort(WEB.host, 2500)


@pytest.mark.parametrize(
    ("destination", "said", "short", "long"),
    [
        (OTHER_PORT, b"", 0.05, LONG),
        (OTHER_PORT, b"GET / HTTP/1.1\r\nHos", LONG, 0.05),
        (WEB, b"", LONG, 0.05),
        (WEB, b"GET / HTTP/1.1\r\nHos", LONG, 0.05),
    ],
)
async def test_clients_that_send_nothing_or_too_little_go_on(
    destination: HostPort, said: bytes, short: float, long: float
) -> None:
    """Soon if the server may have to begin; later on ports where clients speak first."""
    async with reading(short, long_wait=long) as (read, client, endpoint):
        client.sendall(said)
        began = trio.current_time()
        found = await read(endpoint, destination)
        assert found.data == said
        assert found.opening.name is None
        assert 0.05 <= trio.current_time() - began < LONG
        # Then the endpoint reads on.
        client.sendall(b"t: x")
        assert await endpoint.receive() == b"t: x"


async def test_the_rest_of_a_request_has_the_long_wait(mock_clock: trio.testing.MockClock) -> None:
    """Its second segment was lost, say, and is sent again after a second."""
    async with reading(0.3, long_wait=5) as (read, client, endpoint), trio.open_nursery() as nursery:

        async def talk() -> None:
            await trio.testing.wait_all_tasks_blocked(0.005)
            for part, seconds in ((REQUEST[:0], 0.29), (REQUEST[:20], 4.9), (REQUEST[20:], 0)):
                client.sendall(part)
                await trio.testing.wait_all_tasks_blocked(0.005)
                mock_clock.jump(seconds)

        nursery.start_soon(talk)
        assert await read(endpoint, OTHER_PORT) == First(REQUEST, NAMED)
        nursery.cancel_scope.cancel()


async def test_a_trickle_has_one_wait() -> None:
    async with reading(LONG, long_wait=0.05) as (read, client, endpoint), trio.open_nursery() as nursery:

        async def trickle() -> None:
            while True:
                client.sendall(b"A")
                await trio.sleep(0.001)

        client.sendall(b"GET /")
        nursery.start_soon(trickle)
        found = await read(endpoint, WEB)
        nursery.cancel_scope.cancel()
    assert found.data.startswith(b"GET /A")
    assert found.opening == OTHER


async def test_waits_end_one_by_one() -> None:
    """A wait that is over early neither ends nor delays another."""
    async with reading(0.1, long_wait=0.1) as (read, quick, quick_endpoint):
        reactor = quick_endpoint.reactor
        pairs = [connected_pair() for _ in range(3)]
        for ours, _ in pairs:
            ours.setblocking(False)
        endpoints = [TaskEndpoint(reactor, ours) for ours, _ in pairs]
        ended: list[float] = []

        async def wait(number: int) -> None:
            began = trio.current_time()
            assert (await read(endpoints[number], WEB)).data == b""
            ended.append(trio.current_time() - began)

        async def speak() -> None:
            quick.sendall(REQUEST[10:])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, 0)
            await trio.testing.wait_all_tasks_blocked()
            quick.sendall(REQUEST[:10])
            nursery.start_soon(speak)
            assert (await read(quick_endpoint, WEB)).opening == NAMED
            for number in (1, 2):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            # The quick one waits for something else now, and its first wait does not end that.
            with trio.move_on_after(0.2) as scope:
                await quick_endpoint.receive()
            assert scope.cancelled_caught
        assert len(ended) == 3
        assert min(ended) >= 0.1
        for endpoint, (_, theirs) in zip(endpoints, pairs, strict=True):
            endpoint.close()
            theirs.close()


@pytest.mark.parametrize("said", [b"", REQUEST[:10], REQUEST])
@pytest.mark.parametrize("early", [True, False])
async def test_the_end_of_a_client_is_seen_again(said: bytes, early: bool) -> None:
    async with reading() as (read, client, endpoint), trio.open_nursery() as nursery:

        def end() -> None:
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)

        async def end_later() -> None:
            await trio.testing.wait_all_tasks_blocked()
            end()

        if early:
            end()
        else:
            nursery.start_soon(end_later)
        found = await read(endpoint, WEB)
        assert found.data == said
        assert (found.opening == NAMED) == (said == REQUEST)
        for _ in range(2):
            assert await endpoint.receive() == b""


@pytest.mark.parametrize("early", [True, False])
async def test_a_client_that_is_gone(early: bool) -> None:
    async with reading() as (read, client, endpoint), trio.open_nursery() as nursery:

        def reset() -> None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            client.close()

        async def reset_later() -> None:
            await trio.testing.wait_all_tasks_blocked()
            reset()

        if early:
            reset()
        else:
            nursery.start_soon(reset_later)
        with pytest.raises(PeerReset):
            await read(endpoint, WEB)


async def test_no_more_than_the_size() -> None:
    async with reading(size=1024) as (read, client, endpoint):
        data = b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 171  # 1042 bytes
        client.sendall(data)
        assert await read(endpoint, WEB) == First(data, Opening(Protocol.HTTP))


@pytest.mark.parametrize("settings", [{"skip_ports": [(79, 81)]}, {"skip_networks": [parse_network("203.0.113.0/24")]}])
async def test_skipped_ports_and_networks(settings: dict[str, object]) -> None:
    async with reading(**settings) as (read, client, endpoint):
        client.sendall(REQUEST)
        assert await read(endpoint, WEB) == NOTHING
        assert (await read(endpoint, HostPort("2001:db8::1", 82))).data == REQUEST


async def test_no_wait_at_all() -> None:
    async with reading(0) as (read, client, endpoint):
        assert await read(endpoint, WEB) == NOTHING
        client.sendall(REQUEST)
        assert (await read(endpoint, WEB)).opening == NAMED

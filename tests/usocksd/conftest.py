"""A reactor over real sockets on loopback, with a clock that tests move by hand."""

import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from math import inf
from random import Random
from typing import Any

import daemons
import pytest
import trio
from daemons import PATIENCE, Served
from trio.testing import wait_all_tasks_blocked
from turning import TaskEndpoint, turning

from usocksd.net.ending import Limits, RelayResult
from usocksd.net.endpoint import Endpoint
from usocksd.net.pipes import PipePool
from usocksd.net.reactor import Reactor
from usocksd.net.relay import close_pair, relay

LINGER_ZERO = b"\x01\0\0\0\0\0\0\0"
_NOISE = Random(2).randbytes(1_000_003) * 2


def noise(size: int, at: int = 0) -> bytes:
    """Bytes `at` to `at + size` of an endless stream that repeats only after a million bytes and some."""
    at %= 1_000_003
    start = _NOISE[at : at + min(size, 1_000_003)]
    return start if len(start) == size else start + noise(size - len(start), at + len(start))


class Clock:
    """Stands still until a test moves it, or lets it run."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.stands = True
        self._since = 0.0

    def __call__(self) -> float:
        return self.now if self.stands else self.now + time.monotonic() - self._since

    def run(self) -> None:
        """Tell the time from now on."""
        self.stands = False
        self._since = time.monotonic()


class Peer:
    """The far end of a connection that the reactor serves: a client, or a destination."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._trio = trio.socket.from_stdlib_socket(sock)

    def push(self, data: bytes) -> int:
        """Send what the kernel takes now; returns how much that was."""
        sent = 0
        with suppress(BlockingIOError):
            while sent < len(data):
                sent += self.sock.send(data[sent:])
        return sent

    def pull(self) -> bytes:
        """Receive what is there now."""
        data = b""
        with suppress(BlockingIOError):
            while more := self.sock.recv(1 << 20):
                data += more
        return data

    async def send(self, data: bytes) -> None:
        with trio.fail_after(PATIENCE):
            while data:
                data = data[await self._trio.send(data) :]

    async def receive(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the stream."""
        chunks = []
        with trio.fail_after(PATIENCE):
            while size and (data := await self._trio.recv(min(size, 1 << 20))):
                chunks.append(data)
                size -= len(data)
        return b"".join(chunks)

    async def rest(self) -> tuple[bytes, bool]:
        """Everything up to the end, and whether that was a clean one (FIN) or a reset."""
        chunks = []
        with trio.fail_after(PATIENCE):
            try:
                while data := await self._trio.recv(1 << 20):
                    chunks.append(data)
            except ConnectionResetError:
                return b"".join(chunks), False
        return b"".join(chunks), self.error() == 0

    def error(self) -> int:
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    async def broken(self) -> bool:
        """Wait for the reset that shows as an error behind the end of the stream."""
        with trio.fail_after(PATIENCE):
            while not self.error():
                await trio.lowlevel.checkpoint()
        return True

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
        self.close()

    def close(self) -> None:
        # On the trio socket, so that a task that waits on it is told.
        self._trio.close()


def connected_sockets(*, buffers: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection on loopback; `buffers` bounds the kernel's, in bytes (which it doubles)."""
    near = socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for sock in (listener, near):
            if buffers is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    return near, far


class Rig:
    """One relayed pair: its two peers, our endpoints, and what becomes of its session."""

    def __init__(self, client: Peer, upstream: Peer, near: Endpoint, far: Endpoint) -> None:
        self.client = client
        self.upstream = upstream
        self.near = near
        self.far = far
        self.session: Any = None
        self.begun = False
        self.outcome: RelayResult | BaseException | None = None
        self.done = trio.Event()

    async def result(self) -> RelayResult:
        """How the relay ended; raises what its session raised."""
        with trio.fail_after(PATIENCE):
            await self.done.wait()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def stop(self) -> None:
        """Stop the session; one that has not begun yet begins first, since it has sockets to close."""
        if not self.begun:
            self.near.reactor.turn(0)
        self.near.reactor.stop(self.session)

    @property
    def pair(self) -> Any:
        """The relay's own state, while it runs."""
        flow: Any = self.near.reactor.handlers[self.near.fd]
        return flow.pair


class Lab:
    """A running reactor and everything that is connected to it."""

    def __init__(self, reactor: Reactor, clock: Clock, nursery: trio.Nursery) -> None:
        self.reactor = reactor
        self.clock = clock
        self.nursery = nursery
        self.pipes = PipePool(1024)
        self.rigs: list[Rig] = []
        self._open: list[Peer | Endpoint] = []

    def endpoint(self, **buffers: int | None) -> tuple[Endpoint, Peer]:
        """An endpoint of the reactor, and the peer that it is connected to."""
        near, far = connected_sockets(**buffers)
        near.setblocking(False)
        endpoint, peer = TaskEndpoint(self.reactor, near), Peer(far)
        self._open += [endpoint, peer]
        return endpoint, peer

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """A connection that the reactor knows nothing of."""
        return connected_sockets()

    def peer(self, sock: socket.socket) -> Peer:
        """`sock` as a peer that is closed in the end."""
        peer = Peer(sock)
        self._open.append(peer)
        return peer

    def rig(self, **buffers: int | None) -> Rig:
        """Two connections, not relayed yet."""
        near, client = self.endpoint(**buffers)
        far, upstream = self.endpoint(**buffers)
        rig = Rig(client, upstream, near, far)
        self.rigs.append(rig)
        return rig

    def start(self, rig: Rig, *, limits: Limits | None = None, **leftovers: bytes) -> Rig:
        """Run the session of `rig` as the daemons do: relay, then close."""

        async def session() -> None:
            rig.begun = True
            try:
                result = await relay(rig.near, rig.far, pipes=self.pipes, limits=limits or Limits(), **leftovers)
                await close_pair(rig.near, rig.far, result, deliver=(limits or Limits()).deliver)
                rig.outcome = result
            except Exception as error:
                rig.outcome = error
            finally:
                rig.near.close()
                rig.far.close()
                rig.done.set()

        rig.session = session()
        self.reactor.start(rig.session)
        return rig

    def relay(self, *, limits: Limits | None = None, **buffers: int | None) -> Rig:
        """A relayed pair of connections."""
        return self.start(self.rig(**buffers), limits=limits)

    def count_turns(self) -> Callable[[], int]:
        """From now on; the number of the reactor's turns, whenever it is asked for."""
        turns = 0
        real = self.reactor.turn

        def turn(patience: float = inf) -> None:
            nonlocal turns
            turns += 1
            real(patience)

        self.reactor.turn = turn  # type: ignore[method-assign]
        return lambda: turns

    async def settle(self) -> None:
        """Return when nothing moves any more: every task waits, and no socket is ready."""
        with trio.fail_after(PATIENCE):
            await wait_all_tasks_blocked(0.003)

    async def pass_time(self, seconds: float) -> None:
        """Move the clock, look at the deadlines and fire the timers."""
        await self.settle()
        self.clock.now += seconds
        self.reactor.sweep()
        self.reactor.turn(0)
        await self.settle()

    def close(self) -> None:
        for each in self._open:
            each.close()
        self.pipes.close()


@asynccontextmanager
async def open_lab() -> AsyncIterator[Lab]:
    """A lab for as long as the block runs. Deadlines are looked at only when a test says so."""
    clock = Clock()
    reactor = Reactor(clock=clock, sweep_every=1e6)
    async with turning(reactor), trio.open_nursery() as nursery:
        lab = Lab(reactor, clock, nursery)
        try:
            yield lab
        finally:
            nursery.cancel_scope.cancel()
    lab.close()
    assert lab.pipes.lent == 0


@pytest.fixture
async def lab(nothing_leaks: None) -> AsyncIterator[Lab]:
    async with open_lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def new_lab() -> Callable[[], Any]:
    """For tests that run trio themselves: `async with new_lab() as lab`."""
    return open_lab


def open_descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {each for each in found if "/proc/" not in each}


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Fails the test when it leaves a descriptor open."""
    before = open_descriptors()
    yield
    assert open_descriptors() - before == set()


@pytest.fixture
def no_more_descriptors() -> Callable[[], AbstractContextManager[None]]:
    """A block in which the process has used up its file descriptors."""

    @contextmanager
    def block() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return block


@pytest.fixture(scope="module")
def destination() -> Iterator[Served]:
    """An echo on 127.0.0.1."""
    with Served(daemons.loopback(), daemons.echo) as server:
        yield server

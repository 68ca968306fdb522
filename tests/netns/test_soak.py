"""Mixed load through both daemons: the memory and the descriptors of every process stay as they are.

    TRANSOCKS_SOAK_SECONDS=1800 ./test tests/netns/test_soak.py -s

is the long form; without the variable it takes 9 seconds. Beside the transfers of load.py there are clients that are
long, slow, silent, half-closed and reset, and the log is rotated.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import daemons
import lab
import trio
from daemons import GREETING, Daemon
from load import Load
from observe import sockets
from test_service import both

SECONDS = float(os.environ.get("TRANSOCKS_SOAK_SECONDS", "9"))
# Caches, pools and the allocator's arenas fill up first.
WARM_UP = max(min(SECONDS / 6, 300.0), 5.0)
ODD_CLIENTS = 10  # of each kind
SILENCE = min(SECONDS / 10, 60.0)
ROTATE_EVERY = max(SECONDS / 30, 5.0)
# How much memory may grow between the first and the last third after the warm-up, in bytes.
GROWTH = 4 << 20
# The same for descriptors: the number of pipes depends on the load.
MORE_DESCRIPTORS = 16

Connect = Callable[[], Awaitable[trio.SocketStream]]


class Sample(NamedTuple):
    """One process at one time."""

    memory: int
    sockets: int
    others: int


# ---- the far end: the first byte says what it does


async def serve(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            match await stream.receive_some(1):
                case b"e":  # echoes
                    async for data in stream:
                        await stream.send_all(data)
                case b"p":  # pours
                    await stream.send_all(bytes(2 << 20))
                case b"f":  # ends first, and hears the rest
                    await stream.send_eof()
                    async for _ in stream:
                        pass
                case b"r":
                    reset(stream)


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"it ended after {len(data)} of {size} bytes"
        data += more
    return data


# ---- odd clients; each call is one connection


async def long_and_quiet(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        await stream.send_all(b"e")
        for _ in range(5):
            await trio.sleep(SILENCE * rng.random())
            byte = rng.randbytes(1)
            await stream.send_all(byte)
            assert await receive_exactly(stream, 1) == byte


async def slow_writer(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        for byte in b"e" + bytes(range(20)):
            await stream.send_all(bytes((byte,)))
            await trio.sleep(0.2 * rng.random())
        assert await receive_exactly(stream, 20) == bytes(range(20))


async def slow_reader(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        await stream.send_all(b"p")
        count = 0
        while data := await stream.receive_some(1 << 16):
            count += len(data)
            await trio.sleep(0.1 * rng.random())
        assert count == 2 << 20


async def half_closed(connect: Connect, rng: random.Random) -> None:
    data = rng.randbytes(rng.randrange(100_000))
    async with await connect() as stream:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(b"e" + data)
                await stream.send_eof()

            nursery.start_soon(send)
            assert await receive_exactly(stream, len(data)) == data
        assert await stream.receive_some(1) == b""


async def half_closed_from_afar(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        await stream.send_all(b"f")
        assert await stream.receive_some(1) == b""
        await stream.send_all(rng.randbytes(rng.randrange(100_000)))


async def resets(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        await stream.send_all(b"e" + rng.randbytes(rng.randrange(100_000)))
        reset(stream)


async def is_reset(connect: Connect, rng: random.Random) -> None:
    async with await connect() as stream:
        await stream.send_all(b"r")
        try:
            assert await stream.receive_some(1) == b"", rng
        except trio.BrokenResourceError:
            return
        raise AssertionError("a reset has become an end")


ODD = (long_and_quiet, slow_writer, slow_reader, half_closed, half_closed_from_afar, resets, is_reset)


async def impatient(connect: Connect, rng: random.Random) -> None:
    """Of the SOCKS server: leaves in the middle of the handshake."""
    async with await connect() as stream:
        said = GREETING + daemons.request(lab.WEB_V4, 80)
        await stream.send_all(said[: rng.randrange(len(said))])
        if rng.random() < 0.5:
            reset(stream)


# ---- the soak


@contextlib.asynccontextmanager
async def odd_load(net: lab.Net) -> AsyncIterator[None]:
    """All the odd clients, again and again, until the context ends."""
    listener = trio.socket.from_stdlib_socket(net.outside.listen(backlog=1024))
    port = listener.getsockname()[1]

    def connector(family: int, host: str, at: int) -> Connect:
        async def connect() -> trio.SocketStream:
            sock = trio.socket.from_stdlib_socket(net.client.socket(family))
            try:
                await sock.connect((host, at))
            except BaseException:
                sock.close()
                raise
            return trio.SocketStream(sock)

        return connect

    async def repeat(kind: Callable[[Connect, random.Random], Awaitable[None]], connect: Connect, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            await kind(connect, rng)
            await trio.sleep(rng.random())

    async with trio.open_nursery() as servers:
        await servers.start(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        async with trio.open_nursery() as clients:
            for number in range(ODD_CLIENTS):
                family, host = ((socket.AF_INET, lab.WEB_V4), (socket.AF_INET6, lab.WEB_V6))[number % 2]
                for kind in ODD:
                    clients.start_soon(repeat, kind, connector(family, host, port), number)
                clients.start_soon(repeat, impatient, connector(socket.AF_INET, "127.0.0.1", 1080), number)
            yield
            clients.cancel_scope.cancel()
        servers.cancel_scope.cancel()


def processes(daemon: Daemon) -> dict[str, int]:
    """Name and pid, master first."""
    return {f"{daemon.name} master": daemon.pid} | {
        f"{daemon.name} worker {number}": pid for number, pid in enumerate(sorted(daemon.workers()), 1)
    }


def sample(pid: int) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    connected = len(sockets(pid))
    return Sample(pages * os.sysconf("SC_PAGE_SIZE"), connected, len(os.listdir(f"/proc/{pid}/fd")) - connected)


def rotate(daemon: Daemon) -> None:
    """As logrotate does, keeping only the last file."""
    daemon.log.rename(daemon.log.with_suffix(".old"))
    daemon.signal(signal.SIGUSR1)


async def test_soak(host_net: lab.Net, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(both(host_net, tmp_path))
        pids = processes(pair[0]) | processes(pair[1])
        idle = {name: len(sockets(pid)) for name, pid in pids.items()}
        listener = stack.enter_context(host_net.outside.listen(backlog=1024))
        port = listener.getsockname()[1]
        places = [f"{lab.WEB_V4}:{port}", f"[{lab.WEB_V6}]:{port}"]
        load = stack.enter_context(
            Load(tmp_path, listener, places, clients=30, largest=3_000_000, popen=host_net.client.popen)
        )
        samples = defaultdict(list)
        async with odd_load(host_net):
            await trio.sleep(WARM_UP)
            end = trio.current_time() + SECONDS - WARM_UP
            next_rotation = 0.0
            while (now := trio.current_time()) < end:
                if now >= next_rotation:
                    next_rotation = now + ROTATE_EVERY
                    for daemon in pair:
                        rotate(daemon)
                for name, pid in pids.items():
                    samples[name].append(sample(pid))
                await trio.sleep(0.5)
        await trio.to_thread.run_sync(load.stop)
        assert load.failures() == []
        assert processes(pair[0]) | processes(pair[1]) == pids, "nobody has died"
        grown = [row for row in map(compare, samples.items()) if row]
        assert grown == []
        for name, pid in pids.items():
            daemons.wait_until(
                lambda: len(sockets(pid)) <= idle[name],
                lambda: f"{name}: {len(sockets(pid))} sockets, {idle[name]} before",
            )


def compare(item: tuple[str, list[Sample]]) -> str:
    """Compare the first third with the last; prints the result (with -s), and returns it if it has grown."""
    name, found = item
    third = max(len(found) // 3, 1)
    early, late = (
        Sample(*(int(median(values)) for values in zip(*part, strict=True))) for part in (found[:third], found[-third:])
    )
    row = (
        f"{name}: {early.memory / 2**20:.1f} -> {late.memory / 2**20:.1f} MiB,"
        f" {early.sockets} -> {late.sockets} sockets, {early.others} -> {late.others} other descriptors"
    )
    print(row)
    # Sockets follow the load, and which worker has them is by chance; in the end they are counted.
    flat = late.memory - early.memory <= GROWTH and late.others - early.others <= MORE_DESCRIPTORS
    return "" if flat else row

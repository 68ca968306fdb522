"""Load for the daemons: many clients, each with one transfer after the other, that verify every byte of them.

Two separate processes (so that the test does not disturb them): this file is their program too.

    python load.py serve FD                                     accepts from an inherited listening socket
    python load.py hammer CLIENTS LARGEST PAUSE TO PLACE ...    connects to the places until stdin ends

A transfer: the client says its number and two sizes; the server answers with one byte, and from then on both send each
other as many bytes of a pattern that depends on the number; at last the server says whether what it got was right. For
each transfer `hammer` writes one line: see Transfer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daemons
import trio

# Transfers send parts of this, each from its own offset, so that they differ.
_BLOCK = random.Random(1080).randbytes(1 << 20)
_PIECE = 1 << 18
_HELLO = struct.Struct("!IQQ")
_WELCOME, _RIGHT, _WRONG = b"w", b"r", b"x"
# So much is taken by any socket's buffer.
_FITS = 1 << 13
# A transfer that takes longer, in seconds, has failed.
_PATIENCE = 60.0
_FAILURES = (OSError, EOFError, trio.BrokenResourceError, trio.TooSlowError, ExceptionGroup)


class Transfer(NamedTuple):
    """One transfer; times are of time.monotonic(), which all processes share."""

    began: float
    first: float | None
    """When the first byte came from the destination."""
    ended: float
    place: str
    """Where the client connected to."""
    client: str
    """The client's own address, as records have it."""
    error: str | None
    refused: bool
    """Nobody listens there: connect(2) failed with ECONNREFUSED."""


class Load(contextlib.AbstractContextManager["Load"]):
    """The two processes. `places` are ADDRESS:PORT; with `socks` they are SOCKS servers, and `listener` is the destination.

    `pause` is the mean of what a client waits between two transfers, in seconds. `popen` starts the clients
    (lab.Host.popen). The listener is not closed.
    """

    def __init__(
        self,
        folder: Path,
        listener: socket.socket,
        places: Sequence[str],
        *,
        clients: int = 200,
        largest: int = 300_000,
        pause: float = 0.4,
        socks: bool = False,
        popen: Callable[..., subprocess.Popen[Any]] = daemons._popen,
    ) -> None:
        self._lines = folder / "transfers"
        self._read: list[Transfer] = []
        self._at = 0
        program = (sys.executable, __file__)
        destination = f"{listener.getsockname()[0]}:{listener.getsockname()[1]}" if socks else "-"
        words = (str(clients), str(largest), str(pause), destination, *places)
        # Safe path or not (PYTHONSAFEPATH), they find what this file imports.
        path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        with contextlib.ExitStack() as stack:
            self._server = subprocess.Popen(
                [*program, "serve", str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                env=environment,
            )
            stack.callback(self._end, self._server)
            output = stack.enter_context(self._lines.open("wb"))
            self._hammer = popen(*program, "hammer", *words, stdin=subprocess.PIPE, stdout=output, env=environment)
            stack.callback(self._end, self._hammer)
            self._processes = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_PATIENCE + daemons.PATIENCE)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def stop(self) -> list[Transfer]:
        """Begin no more transfers; those under way end. All of them."""
        self._end(self._hammer)
        assert self._hammer.returncode == 0
        return self.transfers()

    def transfers(self) -> list[Transfer]:
        """The transfers that have ended."""
        with self._lines.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                self._read.append(Transfer(*json.loads(line)))
        return self._read

    def failures(self) -> list[Transfer]:
        """The transfers that were neither right nor refused."""
        return [transfer for transfer in self.transfers() if transfer.error and not transfer.refused]

    def go_on(self, transfers: int = 100) -> None:
        """Wait until this many more have begun and succeeded."""
        now = time.monotonic()
        daemons.wait_until(
            lambda: sum(1 for t in self.transfers() if t.began > now and not t.error) >= transfers,
            lambda: f"transfers go on: {self.transfers()[-3:]}",
            _PATIENCE,
        )


# ---- both processes


def _pieces(number: int, size: int) -> Iterator[memoryview]:
    block = memoryview(_BLOCK)
    at = number * 7919 % len(block)
    while size:
        piece = block[at : at + min(size, _PIECE)]
        yield piece
        size -= len(piece)
        at = (at + len(piece)) % len(block)


async def _send(stream: trio.SocketStream, number: int, size: int) -> None:
    for piece in _pieces(number, size):
        await stream.send_all(piece)


async def _receive(stream: trio.SocketStream, number: int, size: int) -> bool:
    """Whether what came was right."""
    right = True
    pieces = _pieces(number, size)
    wanted = memoryview(b"")
    while size:
        data = memoryview(await stream.receive_some(min(size, 1 << 17)))
        if not data:
            raise EOFError(f"{size} bytes are missing")
        size -= len(data)
        while data:
            wanted = wanted or next(pieces)
            length = min(len(wanted), len(data))
            right = right and data[:length] == wanted[:length]
            data, wanted = data[length:], wanted[length:]
    return right


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += more
    return data


async def _exchange(stream: trio.SocketStream, sent: tuple[int, int], expected: tuple[int, int]) -> bool:
    """Send and receive at the same time: (number, size) each. Returns whether the received bytes are right."""
    if sent[1] <= _FITS:
        await _send(stream, *sent)
        return await _receive(stream, *expected)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send, stream, *sent)
        return await _receive(stream, *expected)


async def _stdin_ends() -> None:
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for _ in stdin:
            pass


# ---- the server


async def _serve(fd: int) -> None:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _answer, [listener])
        await _stdin_ends()
        nursery.cancel_scope.cancel()


async def _answer(stream: trio.SocketStream) -> None:
    # A failure here is a failure of the client too, which reports it.
    with contextlib.suppress(*_FAILURES):
        async with stream:
            number, out, back = _HELLO.unpack(await _receive_exactly(stream, _HELLO.size))
            await stream.send_all(_WELCOME)
            right = await _exchange(stream, (number + 1, back), (number, out))
            await stream.send_all(_RIGHT if right else _WRONG)


# ---- the clients


class _Clients:
    def __init__(self, places: Sequence[str], to: str | None, largest: int, pause: float) -> None:
        self._places = [(address.strip("[]"), int(port)) for address, _, port in (p.rpartition(":") for p in places)]
        self._to = to
        self._largest = largest
        self._pause = pause
        self._stop = trio.Event()

    async def run(self, clients: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(self._client, number)
            await _stdin_ends()
            self._stop.set()

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            with trio.move_on_after(rng.expovariate(1 / self._pause)):
                await self._stop.wait()
                return
            transfer = await self._transfer(rng)
            print(json.dumps(transfer), flush=True)

    def _size(self, rng: random.Random) -> int:
        return rng.choice((0, rng.randrange(1000), rng.randrange(30_000), rng.randrange(self._largest)))

    async def _transfer(self, rng: random.Random) -> Transfer:
        host, port = rng.choice(self._places)
        began, first, client, refused = time.monotonic(), None, "", False
        step, error = "connecting", None
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            with trio.fail_after(_PATIENCE):
                sock.setblocking(False)
                sock.connect_ex((host, port))
                # After a reset, which may come before this line, the socket no longer has a name.
                client = daemons.name_of(*sock.getsockname()[:2])
                await trio.lowlevel.wait_writable(sock)
                if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(number, os.strerror(number))
                async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                    number, out, back = rng.getrandbits(31), self._size(rng), self._size(rng)
                    step = "first byte"
                    await self._begin(stream, _HELLO.pack(number, out, back))
                    first = time.monotonic()
                    step = f"transfer of {out} and {back} bytes"
                    right = await _exchange(stream, (number, out), (number + 1, back))
                    if not right or await _receive_exactly(stream, 1) != _RIGHT:
                        raise EOFError("other bytes than were sent")
                    if await stream.receive_some(1):
                        raise EOFError("more bytes than were sent")
        except ConnectionRefusedError as failure:
            error, refused = repr(failure), step == "connecting"
        except _FAILURES as failure:
            while isinstance(failure, ExceptionGroup):
                failure = failure.exceptions[0]
            error = f"{step}: {failure!r}" + (f" from {failure.__cause__!r}" if failure.__cause__ else "")
        finally:
            sock.close()
        return Transfer(began, first, time.monotonic(), daemons.name_of(host, port), client, error, refused)

    async def _begin(self, stream: trio.SocketStream, hello: bytes) -> None:
        if self._to is not None:
            host, _, port = self._to.rpartition(":")
            await stream.send_all(daemons.GREETING + daemons.request(host.strip("[]"), int(port)))
            reply = await _receive_exactly(stream, 6)
            if reply[:4] != b"\x05\x00\x05\x00":
                raise EOFError(f"the SOCKS server says {reply!r}")
            await _receive_exactly(stream, 6 if reply[5] == 1 else 18)
        await stream.send_all(hello)
        if await _receive_exactly(stream, 1) != _WELCOME:
            raise EOFError("another first byte")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", fd]:
            trio.run(_serve, int(fd))
        case ["hammer", clients, largest, pause, to, *places]:
            hammer = _Clients(places, None if to == "-" else to, int(largest), float(pause))
            trio.run(hammer.run, int(clients))
        case _:
            sys.exit(__doc__)

"""A server for operators: one request and one answer for each connection. No client can block another.

The control socket (control.py) and the metrics endpoint (exporter.py) are such servers. A client has a limited time to
send its request, and to take the answer. When there are too many connections, the client that has the most of them
loses its oldest one, so silent connections keep nobody out.
"""

from __future__ import annotations

import errno
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence

import attrs
import trio

# Seconds until the next try when no connection can be accepted, for want of descriptors for example.
_PAUSE = 0.2


@attrs.frozen(kw_only=True)
class ServerLimits:
    """Limits for clients. Times are in seconds."""

    clients: int
    """The most at a time"""
    request: int
    """The most bytes of a request"""
    ask_within: float
    take_within: float


@attrs.frozen
class Peer:
    """The identity of a client. Connections with the same `owner` belong to one client."""

    owner: Hashable
    pid: int = 0
    refusal: bytes = b""
    """The answer to a client that may not ask; b"": it may"""


@attrs.define(eq=False)
class _Client:
    owner: Hashable
    wait: trio.CancelScope | None = None
    """The wait for its request, cancelled to make room for others"""
    asked: bool = False


class BoundedServer(ABC):
    """Serves connections to listening sockets, which it owns from now on, until it is closed."""

    finishes = False
    """A complete request is answered, even if `serve` is cancelled or many more clients connect."""

    def __init__(self, sockets: Sequence[socket.socket], limits: ServerLimits) -> None:
        self.sockets = list(sockets)
        self._limits = limits
        self._accepting = trio.CancelScope()
        self._clients: dict[_Client, None] = {}
        """The oldest first"""

    @abstractmethod
    def identify(self, sock: trio.socket.SocketType) -> Peer:
        """Identify the client. Raises OSError if it is gone."""

    @abstractmethod
    def is_whole(self, data: bytes) -> bool:
        """Whether this is a whole request."""

    @abstractmethod
    async def answer(self, request: bytes, peer: Peer) -> bytes:
        """The answer to a request, which may be cut off at the limit of bytes, or where the client ended it."""

    def too_late(self) -> bytes:
        """The answer to a client whose request took too long."""
        return b""

    def busy(self) -> bytes:
        """The answer to a client when too many others are being answered."""
        return b""

    def filenos(self) -> list[int]:
        """The descriptors of the listening sockets, which are not inheritable"""
        return [sock.fileno() for sock in self.sockets]

    def close(self) -> None:
        """Accept no more. Complete requests are answered."""
        self._accepting.cancel()
        for sock in self.sockets:
            sock.close()
        for client in self._clients:
            if not client.asked and client.wait is not None:
                client.wait.cancel()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until cancelled or closed; after a close, finish those that have arrived."""
        async with trio.open_nursery() as clients:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    await trio.lowlevel.checkpoint_if_cancelled()  # closed already
                    for sock in self.sockets:
                        accepting.start_soon(self._accept, trio.socket.from_stdlib_socket(sock), clients)
                    task_status.started()

    async def _accept(self, listener: trio.socket.SocketType, clients: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = await listener.accept()
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    self._make_room()
                    await trio.sleep(_PAUSE)
            else:
                clients.start_soon(self._serve_client, sock)

    async def _serve_client(self, sock: trio.socket.SocketType) -> None:
        client = None
        with sock:
            try:
                peer = self.identify(sock)
                client = _Client(peer.owner)
                if peer.refusal:
                    answer = peer.refusal
                elif len(self._clients) >= self._limits.clients and not self._make_room():
                    answer = self.busy()
                else:
                    self._clients[client] = None
                    request = await self._receive(sock, client)
                    answer = self.too_late() if request is None else await self._answer(request, client, peer)
                await self._send(sock, client, answer)
            except (OSError, trio.ClosedResourceError):
                pass  # the client has gone
            finally:
                if client is not None:
                    self._clients.pop(client, None)

    def _make_room(self) -> bool:
        """Drop the oldest waiting connection of the client that has the most. False if none waits."""
        waiting = [client for client in self._clients if client.wait is not None]
        if not waiting:
            return False
        ((owner, _),) = Counter(client.owner for client in waiting).most_common(1)
        oldest = next(client for client in waiting if client.owner == owner)
        del self._clients[oldest]
        assert oldest.wait is not None
        oldest.wait.cancel()
        return True

    async def _receive(self, sock: trio.socket.SocketType, client: _Client) -> bytes | None:
        """A request; None if that takes too long."""
        data = b""
        with trio.move_on_after(self._limits.ask_within) as client.wait:
            while len(data) < self._limits.request and not self.is_whole(data):
                more = await sock.recv(self._limits.request - len(data))
                if not more:
                    break
                data += more
        client.asked = not client.wait.cancelled_caught
        return data if client.asked else None

    async def _answer(self, request: bytes, client: _Client, peer: Peer) -> bytes:
        with trio.CancelScope() as scope:
            client.wait = None if self.finishes else scope
            return request and await self.answer(request, peer)
        return b""

    async def _send(self, sock: trio.socket.SocketType, client: _Client, answer: bytes) -> None:
        rest = memoryview(answer)
        deadline = trio.current_time() + self._limits.take_within
        with trio.CancelScope(deadline=deadline, shield=self.finishes) as client.wait:
            while rest:
                rest = rest[await sock.send(rest) :]
            sock.shutdown(socket.SHUT_WR)

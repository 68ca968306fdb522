"""Messages between master and worker: JSON objects, file descriptors alongside, over a Unix stream socket."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import trio

Message: TypeAlias = dict[str, Any]

_HEAD = struct.Struct("!IH")  # length of the JSON text, number of descriptors
_RECEIVE_SIZE = 64 * 1024
# How many seconds the other side has to take the rest of a message whose sender is cancelled.
_REST_WITHIN = 5.0
# How many descriptors fit into one message: SCM_MAX_FD of unix(7).
_MOST_FDS = 253


def restore_socket(fd: int) -> socket.socket:
    """The socket of a descriptor that this process has inherited."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


class Channel:
    """One end of the channel. Both sides are this program, so messages are well-formed.

    Sending waits for room, one message at a time; receiving is for one task.
    """

    def __init__(self, sock: trio.socket.SocketType, unread: bytes = b"") -> None:
        self._sock = sock
        self._sending = trio.Lock()
        self._buffer = bytearray(unread)
        self._fds: deque[int] = deque()

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message; the other side gets duplicates of `fds`. Raises OSError when it is gone."""
        assert len(fds) <= _MOST_FDS
        text = json.dumps(message, separators=(",", ":")).encode()
        data = memoryview(_HEAD.pack(len(text), len(fds)) + text)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        async with self._sending:
            # The descriptors travel with the first bytes.
            data = data[await self._sock.sendmsg([data], rights) :]
            try:
                while data:
                    data = data[await self._sock.send(data) :]
            except trio.Cancelled:
                # The message must be complete, or the other side can't tell where the next one begins.
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _REST_WITHIN):
                    while data:
                        data = data[await self._sock.send(data) :]
                if data:
                    self.close()
                raise

    async def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which are the caller's to close; None when a side is closed."""
        while self._sock.fileno() >= 0:
            if len(self._buffer) >= _HEAD.size:
                size, fds = _HEAD.unpack_from(self._buffer)
                end = _HEAD.size + size
                if len(self._buffer) >= end and len(self._fds) >= fds:
                    try:
                        message: Message = json.loads(self._buffer[_HEAD.size : end])
                    except (ValueError, RecursionError):
                        return None  # the other side ended in the middle of a message
                    del self._buffer[:end]
                    return message, [self._fds.popleft() for _ in range(fds)]
            try:
                room = socket.CMSG_SPACE(_MOST_FDS * 4)
                data, rights, _, _ = await self._sock.recvmsg(_RECEIVE_SIZE, room, socket.MSG_CMSG_CLOEXEC)
            except (ConnectionResetError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._buffer += data
            for _, _, raw in rights:
                received = array.array("i")
                received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                self._fds.extend(received)
        return None

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def unread(self) -> bytes:
        """The received part of an incomplete message."""
        return bytes(self._buffer)

    @property
    def sending(self) -> bool:
        """Whether a part of a message has not been sent yet."""
        return self._sending.locked()

    def close(self) -> None:
        """Close this end, and descriptors that have arrived and were not taken."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

"""The control socket, where the operator's verbs reach a running daemon: one line of JSON in, one out.

Who may: the daemon's own user and root. The permissions of the socket's file say so, and so do the credentials of
each connection, which count if somebody has changed the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeAlias

import trio

from usocksd.errors import ConfigError, Error
from usocksd.settings.control_path import NotPrivate, make_folder

log = logging.getLogger(__name__)

Message: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Message], Awaitable[Message]]
"""Gets the whole request, returns what the answer has besides "ok"."""
Handlers: TypeAlias = Mapping[str, Handler]
"""By verb"""

MOST_CLIENTS: Final = 16
MOST_BYTES: Final = 64 * 1024
"""of a request"""
REQUEST_WITHIN: Final = 5.0
ANSWER_WITHIN: Final = 5.0
"""Seconds that a client has to send its request, and to take the answer."""

_BACKLOG = 64
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): process, user, group


class ControlError(Error):
    """The control socket could not be opened."""


class ControlSocket:
    """A listening Unix socket at `path`; see `open`.

    A process that this one becomes by exec goes on with `ControlSocket(path, sock, inode)`, from `path`, `fileno()`
    and `inode` here.
    """

    def __init__(self, path: str, sock: socket.socket, inode: tuple[int, int]) -> None:
        self.path = path
        self.inode = inode
        """Device and inode number of the socket's file."""
        self._sock = sock
        self._listener: trio.SocketListener | None = None
        self._clients = 0
        self._silent: dict[trio.CancelScope, None] = {}
        """Those who have not asked yet, the oldest first: where they are waited for."""

    @classmethod
    def open(cls, path: str, name: str) -> ControlSocket:
        """Make the socket `path`, its folder too, in place of one that a daemon has left behind. `name` is for errors.

        Raises ControlError when that can't be done, or another process listens there.
        """
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise ControlError(f"can't open the control socket {path}: {error.strerror}") from None
        try:
            # The file gets the mode that the socket has before bind(), so at no moment can others connect.
            os.fchmod(sock.fileno(), stat.S_IRUSR | stat.S_IWUSR)
            make_folder(path)
            with _locked(os.path.dirname(path) or "."):
                _remove_stale(path, name)
                sock.bind(path)
                found = os.lstat(path)
                sock.listen(_BACKLOG)
        except ControlError:
            sock.close()
            raise
        except NotPrivate as error:
            sock.close()
            raise ControlError(f"can't open the control socket {path}: {error}") from None
        except OSError as error:
            sock.close()
            raise ControlError(f"can't open the control socket {path}: {error.strerror or error}") from None
        return cls(path, sock, (found.st_dev, found.st_ino))

    def fileno(self) -> int:
        """The descriptor, which is not inheritable."""
        return self._sock.fileno()

    def close(self) -> None:
        """Listen no more, and remove the socket's file if that is still the one. Who has connected is answered."""
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.inode:
                os.unlink(self.path)
        self._sock.close()
        if self._listener is not None:
            self._listener.socket.close()

    async def serve(self, handlers: Handlers, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until cancelled; or until closed, and then those that have come.

        What a handler returns is sent with "ok": true, and an Error that it raises with "ok": false; the faults of a
        ConfigError go along. Handlers run at the same time, for at most MOST_CLIENTS clients.
        """
        # A duplicate, since trio closes what it serves in the end.
        listener = self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sock.dup()))
        async with trio.open_nursery() as clients:

            async def accept(*, task_status: trio.TaskStatus[object]) -> None:
                serve = partial(self._serve_client, handlers)
                try:
                    await trio.serve_listeners(serve, [listener], handler_nursery=clients, task_status=task_status)
                except* trio.ClosedResourceError:
                    pass  # by `close`

            await clients.start(accept)
            task_status.started()

    async def _serve_client(self, handlers: Handlers, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            async with stream:
                pid, uid, _ = _CREDENTIALS.unpack(
                    stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                )
                answer: bytes | None
                if uid not in (0, os.geteuid()):
                    answer = _refusal(f"permission denied: only root and user {os.geteuid()} may ask")
                elif self._clients > MOST_CLIENTS and not self._silent:
                    answer = _refusal(f"busy: {MOST_CLIENTS} others are being answered")
                else:
                    if self._clients > MOST_CLIENTS:
                        self._make_room()
                    line = await self._receive_request(stream)
                    answer = await _answer(handlers, line, pid, uid)
                if answer is not None:
                    # Shielded, so that the verb that ends the daemon has its answer too.
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_WITHIN):
                        await stream.send_all(answer)
        except (trio.BrokenResourceError, OSError):
            pass  # the client does not want to know
        finally:
            self._clients -= 1

    def _make_room(self) -> None:
        """Wait no longer for the one who has been silent longest."""
        scope = next(iter(self._silent))
        del self._silent[scope]
        scope.cancel()

    async def _receive_request(self, stream: trio.SocketStream) -> bytes | None:
        """None if it takes too long."""
        with trio.move_on_after(REQUEST_WITHIN) as patience:
            self._silent[patience] = None
            try:
                return await _receive_line(stream)
            finally:
                self._silent.pop(patience, None)
        return None


async def _answer(handlers: Handlers, line: bytes | None, pid: int, uid: int) -> bytes | None:
    """The answer to a client's request, encoded; None for one who never asks."""
    if line is None:
        return _refusal(f"no request within {REQUEST_WITHIN:.0f} s, or too many others came meanwhile")
    if not line:
        return None
    if len(line) > MOST_BYTES:
        return _refusal(f"a request of more than {MOST_BYTES} bytes")
    try:
        request = json.loads(line.decode())
    except (ValueError, RecursionError):
        return _refusal("the request is not JSON in UTF-8")
    verb = request.get("verb") if isinstance(request, dict) else None
    handler = handlers.get(verb) if isinstance(verb, str) else None
    if handler is None:
        return _refusal(f"no such verb: expected one of {', '.join(handlers)}")
    log.debug("control request", extra={"fields": {"verb": verb, "pid": pid, "uid": uid}})
    try:
        return _encode({"ok": True, **await handler(request)})
    except ConfigError as error:
        return _refusal(f"bad configuration {error.source}", faults=[fault.at(error.source) for fault in error.faults])
    except Error as error:
        return _refusal(str(error))
    except Exception:
        log.error("internal error", exc_info=True, extra={"fields": {"verb": verb}})
        return _refusal("internal error")


async def _receive_line(stream: trio.SocketStream) -> bytes:
    """Up to the end of the line or of the stream, or MOST_BYTES and one more."""
    data = bytearray()
    while len(data) <= MOST_BYTES:
        more = await stream.receive_some(MOST_BYTES + 1 - len(data))
        data += more
        if not more or b"\n" in more:
            break
    return bytes(data.partition(b"\n")[0])


def _refusal(error: str, **more: object) -> bytes:
    return _encode({"ok": False, "error": error, **more})


def _encode(answer: Message) -> bytes:
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode() + b"\n"


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """While one process looks at what is there and replaces it, no other does. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Not waited for: who can read the folder can lock it for good. Doors are tried again.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str, name: str) -> None:
    """Remove a socket's file that nobody listens on. Raises ControlError if somebody does, or it is no socket."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ControlError(f"can't open the control socket {path}: there is something else of that name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # many wait to be answered, so somebody listens
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return
    raise ControlError(f"another {name} runs: it has the control socket {path}")

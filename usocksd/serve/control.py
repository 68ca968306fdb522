"""The control socket, where the operator's verbs reach a running daemon: one line of JSON in, one out.

Only the daemon's own user and root may ask. The permissions of the socket's file exclude others; in case somebody
changes them, the credentials of each connection are checked too.
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
from typing import Any, Final, TypeAlias

import trio

from usocksd.errors import ConfigError, Error
from usocksd.serve.server import BoundedServer, Peer, ServerLimits
from usocksd.settings.control_path import NotPrivate, make_folder

log = logging.getLogger(__name__)

Message: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Message], Awaitable[Message]]
"""Gets the whole request, and returns the answer but for "ok"."""
Handlers: TypeAlias = Mapping[str, Handler]
"""By verb"""

LIMITS: Final = ServerLimits(clients=16, request=64 * 1024 + 1, ask_within=5.0, take_within=5.0)
MOST_BYTES: Final = LIMITS.request - 1

_BACKLOG = 64
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): process, user, group


class ControlError(Error):
    """The control socket could not be opened."""


class Control(BoundedServer):
    """The control socket at `path`; see `open`. `inode` is the device and inode number of the socket's file.

    What a handler returns is sent with "ok": true; if it raises Error, that is sent with "ok": false, and with the
    faults of a ConfigError. Handlers run at the same time.
    """

    finishes = True  # so that the verb that ends the daemon gets its answer

    def __init__(
        self, path: str, sock: socket.socket, inode: tuple[int, int], handlers: Handlers, limits: ServerLimits = LIMITS
    ) -> None:
        super().__init__([sock], limits)
        self.path = path
        self.inode = inode
        self._handlers = handlers

    @classmethod
    def open(cls, path: str, name: str, handlers: Handlers) -> Control:
        """Make the socket `path`, and its folder, in place of one that a daemon has left behind. `name` is for errors.

        Raises ControlError if that can't be done, or another process listens there.
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
        return cls(path, sock, (found.st_dev, found.st_ino), handlers)

    def close(self) -> None:
        """Accept no more, and remove the socket's file if it is still ours. Complete requests are answered."""
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.inode:
                os.unlink(self.path)
        super().close()

    def identify(self, sock: trio.socket.SocketType) -> Peer:
        """The process and user at the other end."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        own = os.geteuid()
        refusal = b"" if uid in (0, own) else _refusal(f"permission denied: only root and user {own} may ask")
        return Peer(uid, pid, refusal)

    def is_whole(self, data: bytes) -> bool:
        """A line."""
        return b"\n" in data

    async def answer(self, request: bytes, peer: Peer) -> bytes:
        """A line of JSON, in UTF-8."""
        line = request.partition(b"\n")[0]
        if len(line) > MOST_BYTES:
            return _refusal(f"a request of more than {MOST_BYTES} bytes")
        return await answer_line(self._handlers, line, peer)

    def too_late(self) -> bytes:
        within = self._limits.ask_within
        return _refusal(f"no request within {within:.0f} s, or too many others came meanwhile")

    def busy(self) -> bytes:
        return _refusal(f"busy: {self._limits.clients} others are being answered")


async def answer_line(handlers: Handlers, line: bytes, peer: Peer) -> bytes:
    """The answer to a request, encoded."""
    try:
        request = json.loads(line.decode())
    except (ValueError, RecursionError):
        return _refusal("the request is not JSON in UTF-8")
    verb = request.get("verb") if isinstance(request, dict) else None
    handler = handlers.get(verb) if isinstance(verb, str) else None
    if handler is None:
        return _refusal(f"no such verb: expected one of {', '.join(handlers)}")
    log.debug("control request", extra={"fields": {"verb": verb, "pid": peer.pid, "uid": peer.owner}})
    try:
        return _encode({"ok": True, **await handler(request)})
    except ConfigError as error:
        return _refusal(f"bad configuration {error.source}", faults=[fault.at(error.source) for fault in error.faults])
    except Error as error:
        return _refusal(str(error))
    except Exception:
        log.error("internal error", exc_info=True, extra={"fields": {"verb": verb}})
        return _refusal("internal error")


def _refusal(error: str, **more: object) -> bytes:
    return _encode({"ok": False, "error": error, **more})


def _encode(answer: Message) -> bytes:
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode() + b"\n"


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep other processes from replacing the socket at the same time. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Without waiting, since anybody who can read the folder can lock it for ever. doors.py tries again.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str, name: str) -> None:
    """Remove a socket's file if nobody listens on it. Raises ControlError if somebody does, or if it is no socket."""
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
            pass  # its queue is full, so somebody listens
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return
    raise ControlError(f"another {name} runs: it has the control socket {path}")

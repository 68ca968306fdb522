"""The control socket, with clients that behave and others."""

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from usocksd.errors import ConfigError, Error, Fault
from usocksd.serve.control import LIMITS, MOST_BYTES, Control, ControlError, Message

PATIENCE = 20.0
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"heard": request}


async def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise Error("not today")


async def find_faults(request: dict[str, Any]) -> dict[str, Any]:
    raise ConfigError("a.toml", [Fault("port", "0", "expected more"), Fault("file", "", "expected one")])


async def break_down(request: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError


async def answer_nonsense(request: dict[str, Any]) -> dict[str, Any]:
    return {"rate": float("inf")}


HANDLERS = {"echo": echo, "fail": fail, "faults": find_faults, "break": break_down, "nonsense": answer_nonsense}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may read, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def exists(path: str) -> bool:
    return os.path.lexists(path)


@asynccontextmanager
async def serving(path: str, handlers: Any = HANDLERS, **limits: Any) -> Any:
    first = Control.open(path, "usocksd", handlers)
    sock = Control(path, *first.sockets, first.inode, handlers, attrs.evolve(LIMITS, **limits))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: sock.serve(task_status=task_status))
            yield sock
            nursery.cancel_scope.cancel()
    finally:
        sock.close()


async def connect(path: str) -> trio.SocketStream:
    return await trio.open_unix_socket(path)


async def receive_all(stream: trio.SocketStream) -> bytes:
    data = b""
    # Unread bytes of ours make the end a reset; the answer comes before that.
    with trio.fail_after(PATIENCE), suppress(trio.BrokenResourceError):
        async for more in stream:
            data += more
    return data


async def ask(path: str, request: bytes) -> Any:
    """The answer, which is one line and the end."""
    async with await connect(path) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request)
        data = await receive_all(stream)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    return json.loads(data)


async def test_a_request_and_its_answer(path: str) -> None:
    async with serving(path):
        assert await ask(path, b'{"verb": "echo", "x": [1]}\n') == {"ok": True, "heard": {"verb": "echo", "x": [1]}}


async def test_a_request_in_pieces_and_without_its_last_newline(path: str) -> None:
    async with serving(path):
        async with await connect(path) as stream:
            for byte in b'{"verb": "echo"}':
                await stream.send_all(bytes([byte]))
                await trio.lowlevel.checkpoint()
            await stream.send_eof()
            assert json.loads(await receive_all(stream))["ok"]


async def test_a_large_answer_arrives_whole(path: str) -> None:
    async def much(request: dict[str, Any]) -> dict[str, Any]:
        return {"text": "x" * 5_000_000}

    async with serving(path, {"much": much}):
        assert len((await ask(path, b'{"verb": "much"}\n'))["text"]) == 5_000_000


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"hello\n", "the request is not JSON in UTF-8"),
        (b"\xff\xfe\n", "the request is not JSON in UTF-8"),
        (b"[" * 60_000 + b"\n", "the request is not JSON in UTF-8"),
        (b"[]\n", "no such verb: expected one of echo, fail, faults, break, nonsense"),
        (b"{}\n", "no such verb: expected one of echo, fail, faults, break, nonsense"),
        (b'{"verb": ["echo"]}\n', "no such verb: expected one of echo, fail, faults, break, nonsense"),
        (b'{"verb": "stop"}\n', "no such verb: expected one of echo, fail, faults, break, nonsense"),
        (b'{"verb": "echo", "x": "' + b"x" * MOST_BYTES + b'"}\n', "a request of more than 65536 bytes"),
        (b"x" * 5_000_000, "a request of more than 65536 bytes"),
        (b'{"verb": "fail"}\n', "not today"),
    ],
)
async def test_what_is_refused(path: str, request_line: bytes, error: str) -> None:
    async with serving(path):
        assert await ask(path, request_line) == {"ok": False, "error": error}
        assert (await ask(path, b'{"verb": "echo"}\n'))["ok"]


async def test_every_fault_of_a_configuration(path: str) -> None:
    async with serving(path):
        assert await ask(path, b'{"verb": "faults"}\n') == {
            "ok": False,
            "error": "bad configuration a.toml",
            "faults": ["a.toml: port: 0: expected more", "a.toml: file: expected one"],
        }


@pytest.mark.parametrize("verb", ["break", "nonsense"])
async def test_a_bug_is_logged_and_ends_nothing(path: str, caplog: pytest.LogCaptureFixture, verb: str) -> None:
    async with serving(path):
        assert await ask(path, json.dumps({"verb": verb}).encode() + b"\n") == {"ok": False, "error": "internal error"}
        assert (await ask(path, b'{"verb": "echo"}\n'))["ok"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None


async def test_clients_that_go_away_without_their_answer(path: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = trio.Event()

    async def big(request: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        return {"text": "x" * 5_000_000}

    async with serving(path, {"big": big} | HANDLERS):
        (await trio.to_thread.run_sync(_connect_and_close, path)).close()
        stream = await connect(path)
        await stream.send_all(b'{"verb": "big"}\n')
        with trio.fail_after(PATIENCE):
            await asked.wait()
        await stream.aclose()
        assert (await ask(path, b'{"verb": "echo"}\n'))["ok"]
    assert caplog.records == []


def _connect_and_close(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.close()
    return sock


async def test_silent_clients_block_nobody(path: str) -> None:
    """The oldest of them make room, and none may be silent for long."""
    async with serving(path, ask_within=0.5):
        silent = [await connect(path) for _ in range(2 * LIMITS.clients)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await ask(path, b'{"verb": "echo"}\n'))["ok"]
        for stream in silent:
            assert b"no request within" in await receive_all(stream)
            await stream.aclose()


async def test_more_verbs_at_a_time_than_there_may_be(path: str) -> None:
    go = trio.Event()

    async def wait(_: Message) -> Message:
        await go.wait()
        return {}

    async with serving(path, {"wait": wait}), trio.open_nursery() as nursery:
        for _ in range(LIMITS.clients):
            nursery.start_soon(ask, path, b'{"verb": "wait"}\n')
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await ask(path, b'{"verb": "wait"}\n'))["error"] == "busy: 16 others are being answered"
        go.set()


async def test_the_verb_that_ends_the_daemon_is_answered(path: str) -> None:
    async def end(request: dict[str, Any]) -> dict[str, Any]:
        scope.cancel()
        return {}

    with trio.CancelScope() as scope:
        stream = None
        async with serving(path, {"end": end}):
            stream = await connect(path)
            await stream.send_all(b'{"verb": "end"}\n')
            await trio.sleep(PATIENCE)
    assert stream is not None
    assert json.loads(await receive_all(stream)) == {"ok": True}
    await stream.aclose()


async def test_closing_leaves_nobody_without_an_answer(path: str) -> None:
    """As when a reload, asked for here, puts the socket elsewhere."""

    async def move(request: dict[str, Any]) -> dict[str, Any]:
        sock.close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        return {}

    sock = Control.open(path, "usocksd", {"move": move})
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: sock.serve(task_status=task_status))
            assert await ask(path, b'{"verb": "move"}\n') == {"ok": True}
    assert not exists(path)


# ---- who may, and the socket's file


def test_the_file_is_its_owners_whatever_the_umask(path: str) -> None:
    before = os.umask(0)
    try:
        sock = Control.open(path, "usocksd", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    sock.close()
    assert not exists(path)


ASK = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(999).decode())"


async def _as_nobody(path: str) -> subprocess.CompletedProcess[bytes]:
    command = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", _any_python(), "-c", ASK]
    return await trio.run_process([*command, path], capture_stdout=True, capture_stderr=True, check=False)


def _any_python() -> str:
    """An interpreter that other users may run, too."""
    return shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable


@as_root
async def test_others_cannot_connect(public_folder: Path) -> None:
    path = str(public_folder / "control.sock")
    async with serving(path):
        result = await _as_nobody(path)
        assert b"PermissionError" in result.stderr


@as_root
async def test_others_are_refused_even_if_the_file_mode_admits_them(public_folder: Path) -> None:
    path = str(public_folder / "control.sock")
    async with serving(path):
        os.chmod(path, 0o666)
        result = await _as_nobody(path)
        assert json.loads(result.stdout) == {
            "ok": False,
            "error": "permission denied: only root and user 0 may ask",
        }


HOLD = """
import sys, time
from usocksd.serve.control import Control
sock = Control.open(sys.argv[1], "usocksd", {})
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the socket."""
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process
        process.kill()


def test_the_socket_of_a_living_daemon_is_not_taken(path: str, other: subprocess.Popen[bytes]) -> None:
    with pytest.raises(ControlError, match="another usocksd runs: it has the control socket"):
        Control.open(path, "usocksd", {})
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(ControlError, match="another usocksd runs"):
        Control.open(path, "usocksd", {})
    # Nor when its queue is so full that connecting fails.
    waiting = []
    with suppress(BlockingIOError):
        while True:
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            waiting[-1].connect(path)
    with pytest.raises(ControlError, match="another usocksd runs"):
        Control.open(path, "usocksd", {})
    for sock in waiting:
        sock.close()


def test_of_many_that_start_at_once_one_has_the_socket(path: str, other: subprocess.Popen[bytes]) -> None:
    """A killed daemon has left its file, and two daemons might replace it at the same time."""
    other.send_signal(signal.SIGKILL)
    other.wait()
    command = [sys.executable, "-c", HOLD, path]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    first = [process.stdout.readline() for process in others if process.stdout is not None]
    assert sorted(first) == [b""] * 5 + [b"open\n"]
    for process in others:
        _, errors = process.communicate()
        # (Two may look at once: then one is told to try again.)
        assert process.returncode == 0 or b"another usocksd runs" in errors or b"temporarily unavailable" in errors


def test_a_folder_that_somebody_has_locked_is_not_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user who can read the folder can lock it."""

    def never(_: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(time, "sleep", never)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH)
        with pytest.raises(ControlError, match="Resource temporarily unavailable"):
            Control.open(path, "usocksd", {})
    finally:
        os.close(folder)
    Control.open(path, "usocksd", {}).close()


def test_close_leaves_the_files_of_others(path: str) -> None:
    sock = Control.open(path, "usocksd", {})
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(path)
        sock.close()
        assert exists(path)


async def test_a_listening_socket_is_handed_on(path: str) -> None:
    """As when the master becomes a new version of itself."""
    first = Control.open(path, "usocksd", HANDLERS)
    second = Control(path, first.sockets[0].dup(), first.inode, HANDLERS)
    assert not any(map(os.get_inheritable, first.filenos()))
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: second.serve(task_status=task_status))
        assert (await ask(path, b'{"verb": "echo"}\n'))["ok"]
        nursery.cancel_scope.cancel()
    second.close()
    assert not exists(path)
    first.close()


Prepare = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("prepare", "place", "error"),
    [
        (lambda folder: None, "much/missing/control.sock", "No such file or directory"),
        (lambda folder: (folder / "control.sock").write_text("mine"), "control.sock", "something else of that name"),
        (lambda folder: (folder / "control.sock").symlink_to("x"), "control.sock", "something else of that name"),
        (lambda folder: (folder / "file").touch(), "file/control.sock", "Not a directory"),
        (lambda folder: None, "x" * 200, "AF_UNIX path too long"),
    ],
)
def test_a_place_where_no_socket_can_be(tmp_path: Path, prepare: Prepare, place: str, error: str) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ControlError, match=error):
        Control.open(str(tmp_path / place), "usocksd", {})
    assert sorted(tmp_path.rglob("*")) == before

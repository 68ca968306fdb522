"""Runs the system's own programs, nft and ip for example: within a time, and one change of the rules at a time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from usocksd.errors import Error

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Searched after PATH, which has none of these for ordinary users of Debian."""
WITHIN, GRACE = 20.0, 3.0
"""Seconds that a program may take (nft takes one for 50,000 rules), and that it may still take after a signal to stop.
"""
LOCK, LOCK_WITHIN = "/run/transocks-rules.lock", 30.0
"""Only root may hold the lock, since it keeps others from changing rules. The file stays, as /run/xtables.lock does.
Then the seconds for which others may hold it.
"""

_LOOK_EVERY = 0.1  # seconds between two looks for a signal, or for a free lock
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # linux/capability.h
_PR_SET_PDEATHSIG = 1  # prctl(2)


class FirewallError(Error):
    """Rules could not be loaded, read or removed. If a program failed, the message has the command and its error
    output.
    """


def which(program: str) -> str | None:
    """The path of a program; None if it is not installed."""
    return shutil.which(program, path=_search_path())


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])


def lacking(*needed: str) -> str:
    """The names of the capabilities among these that this process lacks in its user namespace; "" if none."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        (effective,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return " and ".join(name for name in needed if not effective >> _CAPABILITIES[name] & 1)


def run(*argv: str, stdin: str = "") -> str:
    """Run a program; returns its standard output. It is killed after WITHIN, and when this process ends.

    Bytes that are not UTF-8 become surrogates, and the same bytes again in `stdin`: rules of others have such comments.
    Raises FirewallError.
    """
    program, command = which(argv[0]), " ".join(argv)
    if program is None:
        raise FirewallError(f"{argv[0]} is not installed")
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, executable=program, env={**os.environ, "PATH": _search_path()}, stdin=pipe, stdout=pipe, stderr=pipe,
            # In a process group of its own: signals of the terminal go to us, and we end the tool.
            process_group=0, preexec_fn=die_with_parent(), encoding="utf-8", errors="surrogateescape",  # noqa: PLW1509
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError(f"{command}: {getattr(error, 'strerror', None) or error}") from None
    try:
        out, err = _communicate(process, command, stdin)
    except BaseException:
        _kill(process)
        raise
    if status := process.returncode:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise FirewallError(f"{command}: {err.strip() or how}")
    return out


def run_json(*argv: str) -> Any:
    """As `run`, for a program that answers in JSON; None if there is no output."""
    answer = run(*argv)
    try:
        return json.loads(answer) if answer.strip() else None
    except ValueError as error:
        raise FirewallError(f"{' '.join(argv)}: not JSON: {error}") from None


def complaint(*argv: str, stdin: str = "") -> str | None:
    """Run a program; returns its error message, None if it has succeeded."""
    try:
        run(*argv, stdin=stdin)
    except FirewallError as error:
        return str(error)
    return None


def _communicate(process: subprocess.Popen[str], command: str, stdin: str) -> tuple[str, str]:
    started = time.monotonic()
    feed: str | None = stdin
    while True:
        stop = _Stop.asked_at
        until = started + WITHIN if stop is None else min(started + WITHIN, max(started, stop) + GRACE)
        try:
            return process.communicate(feed, timeout=max(0.0, min(_LOOK_EVERY, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            feed = None  # input that was not taken yet is remembered
        if time.monotonic() >= until and stop is None:
            raise FirewallError(
                f"{command}: did not end within {WITHIN:g} s, and was killed: another program may keep the rules"
                " locked, or the kernel be in trouble (dmesg tells); try again"
            )
        if time.monotonic() >= until:
            raise FirewallError(f"{command}: did not end within {GRACE:g} s of the signal, and was killed")


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]
    with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for the kernel, and can't be killed
        process.wait(_LOOK_EVERY)


def die_with_parent() -> Callable[[], None]:
    """For preexec_fn: have the kernel kill the child when this thread ends."""
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(125)

    return arrange


# ---- changes


class _Stop:
    """When a signal to stop came during a change. Global, as signal handlers are."""

    asked_at: float | None = None


@contextlib.contextmanager
def one_change() -> Iterator[None]:
    """A change of the rules, one at a time on this host. Signals such as Ctrl-C take effect when it is over. Two
    changes at once would each remove the rules that the other has just loaded. The lock ends with the process. Programs
    that run when a signal comes go on for GRACE seconds at most: then they are killed, and the FirewallError makes the
    block undo what it has begun. Signals are held back by handlers, not by a mask, which programs would inherit. Only
    for the main thread. Raises FirewallError if others hold the lock for too long.
    """
    numbers: list[int] = []

    def note(number: int, _: object) -> None:
        _Stop.asked_at = _Stop.asked_at or time.monotonic()
        numbers.append(number)

    with _open_lock() as file:
        deadline = time.monotonic() + LOCK_WITHIN
        while not _is_locked(file):
            if time.monotonic() > deadline:
                raise FirewallError(f"another `transocks rules` has been at work for {LOCK_WITHIN:.0f} s")
            time.sleep(_LOOK_EVERY)
        ignored = (signal.SIG_IGN, None)  # as by nohup(1)
        before = {number: found for number in _STOPPING if (found := signal.getsignal(number)) not in ignored}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            _Stop.asked_at = None
            for number, handler in before.items():
                signal.signal(number, handler)
            if numbers:
                signal.raise_signal(numbers[0])


def _is_locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_lock() -> IO[bytes]:
    def for_root(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    try:
        # Opened for reading, which is enough if /run is read-only (in a service, for example) and the file exists.
        return open(LOCK, "rb", opener=for_root)
    except OSError:
        # /run is read-only without the file, or another user's: lock the network namespace itself, which all can open.
        return open("/proc/self/ns/net", "rb")

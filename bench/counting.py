"""What a proxy does, counted instead of timed: instructions in user space, and system calls.

A count is taken of a proxy that runs and is warm, from `begin` to `end`, of all processes in its sessions. So its start
and end do not count, and other load on the machine changes nothing but the duration.

Each tool has a `key` for its figure, the Debian `package` with its `programs`, and a `prefix` for the command line of
the proxy. It writes its files to a folder.
"""

import re
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from .accounting import processes
from .places import find_program

# Operations counted, by kind of measure.
LENGTHS = {"connect": 1000, "echo": 5000, "udp": 20000}
QUICK_LENGTHS = {"connect": 100, "echo": 200, "udp": 500}
# Seconds after which fewer operations have to do.
COUNTED_WITHIN = 60.0
# Seconds for a proxy to start, to answer and to stop.
PATIENCE = 120.0


class CountingError(Exception):
    """A tool did not count; the text says why."""


class Instructions:
    """Counts with valgrind's callgrind, off until `begin`: a proxy starts five times faster so."""

    key = "instructions"
    package = "valgrind"
    programs = ("valgrind", "vgdb")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pipes = f"--vgdb-prefix={folder}/vgdb"
        self._sessions: Collection[int] = ()
        # The order of a set, and so the path taken through it, must not vary between runs.
        self.prefix = ["env", "PYTHONHASHSEED=0", "valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
        self.prefix += ["--trace-children=yes", f"--callgrind-out-file={folder}/callgrind.%p", self._pipes]

    def begin(self, sessions: Collection[int]) -> None:
        """Start at zero. Raises CountingError."""
        self._sessions = sessions
        for path in self._folder.glob("callgrind.*"):
            path.unlink()
        self._tell("instrumentation on", "zero")

    def end(self) -> dict[str, int]:
        """The count since `begin` of each process. Raises CountingError."""
        self._tell("dump")
        # A process that has ended meanwhile wrote its file by itself.
        texts = {path.name.split(".")[1]: path.read_text() for path in self._folder.glob("callgrind.*")}
        totals = {pid: re.search(r"^totals: (\d+)", text, re.MULTILINE) for pid, text in texts.items()}
        return {pid: int(total[1]) for pid, total in totals.items() if total}

    def _tell(self, *commands: str) -> None:
        options = [word for command in commands for word in ("-c", *command.split())]
        for pid in processes(self._sessions, zombies=False):
            done = subprocess.run(
                ["vgdb", f"--pid={pid}", self._pipes, *options], capture_output=True, text=True, check=False
            )
            if done.returncode and pid in processes(self._sessions, zombies=False):
                raise CountingError(f"vgdb: {done.stderr.strip()}")


class Calls:
    """Counts with strace, attached from `begin` to `end`."""

    key = "calls"
    package = "strace"
    programs = ("strace",)

    def __init__(self, folder: Path) -> None:
        self._summary = folder / "strace"
        self._messages = folder / "strace.err"
        self._strace: subprocess.Popen[bytes] | None = None
        self.prefix: list[str] = []

    def begin(self, sessions: Collection[int]) -> None:
        """Start at zero. Raises CountingError."""
        pids = processes(sessions, zombies=False)
        command = ["setpriv", "--pdeathsig", "KILL", "--", "strace", "-f", "-c", "-o", str(self._summary)]
        for pid in pids:
            command += ["-p", str(pid)]
        with self._messages.open("wb") as messages:
            self._strace = subprocess.Popen(command, stderr=messages)
        while self._messages.read_text().count("attached") < len(pids):
            if self._strace.poll() is not None:
                raise CountingError(self._messages.read_text().strip())
            time.sleep(0.01)

    def end(self) -> dict[str, int]:
        """The count since `begin`, of all processes together."""
        assert self._strace is not None
        self._strace.send_signal(signal.SIGINT)
        self._strace.wait(PATIENCE)
        total = re.search(r"^100\.00 +\S+ +\d+ +(\d+) .*total$", self._summary.read_text(), re.MULTILINE)
        return {"all": int(total[1])} if total else {}


def without_clock(loaded: Mapping[str, int], idle: Mapping[str, int], ratio: float) -> float:
    """The count under load without what the processes do by the clock; `ratio` is of the times, loaded to idle.

    On a busy machine they do less by the clock than the time allows. No process has done more of it than its whole
    count. So a process that has no connections, as our masters, tells how much it was.
    """
    ratios = [loaded[process] / idle[process] for process in loaded.keys() & idle.keys() if idle[process]]
    return sum(loaded.values()) - sum(idle.values()) * min([ratio, *ratios])


Counter = Instructions | Calls
COUNTERS: tuple[type[Counter], ...] = (Instructions, Calls)


def missing() -> str | None:
    """Which tools are not installed, or None."""
    absent = [each.package for each in COUNTERS if not all(find_program(program) for program in each.programs)]
    return f"not installed: {', '.join(absent)} (Debian packages of these names)" if absent else None

"""CPU time and memory of a proxy, over all its processes.

Every proxy is started as leader of a session of its own, so its processes, forked ones too, are those of that
session.
"""

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat (proc_pid_stat(5)) from the third on; the command's name may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def processes(sessions: Collection[int], *, zombies: bool = True) -> list[int]:
    """Ids of all processes in these sessions; zombies still have CPU time to tell."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile
                state, _parent, _group, session, *_ = _stat(int(name))
                if int(session) in sessions and (zombies or state != "Z"):
                    found.append(int(name))
    return found


def cpu_seconds(sessions: Collection[int]) -> float:
    """CPU time of the sessions' processes so far: all threads, and ended children that were waited for.

    Live processes are read from their CPU clock, exact to the nanosecond; only what ended children used is
    counted in ticks of 10 ms.
    """
    total = 0.0
    for pid in processes(sessions):
        with contextlib.suppress(OSError):
            # clock_getcpuclockid(3), which Python has for threads only: the scheduler's clock of a process.
            total += time.clock_gettime((~pid << 3) | 2)
            children_user, children_system = _stat(pid)[13:15]
            total += (int(children_user) + int(children_system)) * TICK
    return total


def settled_cpu_seconds(sessions: Collection[int], quiet: float) -> float:
    """The CPU time once it hardly moves for `quiet` seconds: connections just closed still cost their end."""
    before = cpu_seconds(sessions)
    for _ in range(20):
        time.sleep(quiet)
        after = cpu_seconds(sessions)
        if after - before < quiet * 0.02:
            return after
        before = after
    return before


def memory_bytes(sessions: Collection[int]) -> int:
    """Proportional set size of the sessions' processes: what they share among themselves counts once.

    Raises PermissionError where the kernel doesn't show it (processes of another user).
    """
    total = 0
    for pid in processes(sessions):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total

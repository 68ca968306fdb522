"""The control groups of this process (cgroups(7), version 1 and 2): their CPU quota, and their count of kills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import ceil, inf
from pathlib import Path

from usocksd.host.mounts import PROC, Mount, lines, mounts


def usable_cpus(proc: Path = PROC) -> int:
    """How many CPUs this process may use, at least 1: those it may run on, or fewer where a quota of its group, or of
    one above, allows less time. Half a CPU counts as one.
    """
    quotas = [_quota(group) for group in _groups("cpu", proc)]
    return max(min([len(os.sched_getaffinity(0)), *(ceil(quota) for quota in quotas if quota < inf)]), 1)


def oom_kills(proc: Path = PROC) -> int | None:
    """How many processes the kernel has killed so far because memory ran out: in this process's control group, or in
    the whole system if that has no counter. None if there is no counter at all.
    """
    for group in _groups("memory", proc):
        for name in ("memory.events", "memory.oom_control"):
            count = _value(group / name, "oom_kill")
            if count is not None:
                return count
        break
    return _value(proc / "vmstat", "oom_kill")


def _quota(group: Path) -> float:
    """The CPUs that this group by itself allows."""
    with suppress(OSError, ValueError):  # cpu.max of version 2: "max 100000", or "50000 100000"
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return inf if int(quota) < 0 else int(quota) / int(period)
    return inf


def _value(file: Path, key: str) -> int | None:
    """A number of a file that has a key and a number a line."""
    with suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            name, _, number = line.partition(" ")
            if name == key:
                return int(number)
    return None


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in by `controller`, each before the one above it."""
    with suppress(OSError):
        for path, mounted in hierarchies(controller, proc):
            for mount in mounted[:1]:
                top = Path(mount.point)
                # In a container the path may be the host's, and then the mount begins at it.
                inside = Path(path).relative_to(mount.root) if Path(path).is_relative_to(mount.root) else Path()
                folder = top if ".." in inside.parts else top / inside
                yield folder
                while folder != top:
                    folder = folder.parent
                    yield folder


def hierarchies(controller: str, proc: Path = PROC) -> Iterator[tuple[str, list[Mount]]]:
    """The path of this process's group in the hierarchy of version 1 that has this controller, and in that of version
    2, which may have it; and where each is mounted. Raises OSError.
    """
    mounted = list(mounts("cgroup", "cgroup2", proc=proc))
    for line in lines(proc / "self/cgroup"):
        _, controllers, path = os.fsdecode(line).split(":", 2)
        if not controllers:
            yield path, [mount for mount in mounted if mount.kind == "cgroup2"]
        elif controller in controllers.split(","):
            yield path, [mount for mount in mounted if mount.kind == "cgroup" and controller in mount.options]

"""A control group for one command and everything that it starts, by which rules recognise its connections.

Unlike a group id, it holds processes that change their user and group (su, sudo). A rule binds to the directory that
exists when it is loaded; here both are made and removed together. See cgroups(7), and net_cls.rst of the kernel for
version 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from transocks.rules.redirection import CGROUPS, Redirection
from usocksd.host.cgroup import hierarchies
from usocksd.host.mounts import Mount

_WITHIN, _EVERY = 5.0, 0.02  # seconds for killed processes to end
_TRIAL = ("203.0.113.1", 9)  # nobody: a documentation address
_TRIAL_WITHIN = 1.0  # seconds, on this host


@attrs.frozen
class Cgroup:
    """An existing cgroup: of version 1 if it has a class id (net_cls), else of version 2."""

    folder: str
    path: str
    """in its hierarchy"""
    mount: str
    classid: int | None = None

    def select(self, redirection: Redirection) -> Redirection:
        """The same redirection, for this cgroup's connections only."""
        if self.classid is not None:
            return attrs.evolve(redirection, classids=(self.classid,))
        return attrs.evolve(redirection, cgroups=(self.path,), cgroups_at=os.path.relpath(self.mount, CGROUPS))

    def enter(self) -> None:
        """Move this process into it, and so everything that it will start. Raises OSError."""
        Path(self.folder, "cgroup.procs").write_text("0", encoding="ascii")

    def is_redirected_to(self, port: int) -> bool:
        """Whether the rules redirect a connection of this cgroup to this port, on which this process listens.

        A trial tells, since it may fail in many ways: in a container, or on older kernels with both versions in use.
        The connection is bound to `lo`, so that it leads nowhere if it is not redirected.
        """
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.enter()
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                    sock.bind(("127.0.0.1", 0))
                    sock.settimeout(_TRIAL_WITHIN)
                    sock.connect(_TRIAL)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(pid, 0)[1] == 0


def members_of(gid: int, cgroup: Cgroup | None) -> dict[int, str]:
    """The processes with this effective group, or in this cgroup, and their names."""
    inside = set() if cgroup is None else _members(cgroup.folder)
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            fields = dict(line.partition(":")[::2] for line in status.read_text("utf-8", "replace").split("\n"))
            pid, mine = int(status.parent.name), fields["Gid"].split()[1] == str(gid)
            if (mine or pid in inside) and fields["State"].split()[0] not in "ZX":
                found[pid] = fields["Name"].strip()
    return found


def _members(folder: str) -> set[int]:
    found = set()
    for at, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            found |= set(map(int, Path(at, "cgroup.procs").read_text("ascii").split()))
    return found


def end(folder: str) -> None:
    """Kill all processes in it, and remove it."""
    deadline = time.monotonic() + _WITHIN
    while os.path.exists(folder) and time.monotonic() < deadline:
        for pid in _members(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for at, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):  # busy while a process in it is about to end
                os.rmdir(at)
        if os.path.exists(folder):
            time.sleep(_EVERY)


def make(name: str, number: int) -> Iterator[Cgroup]:
    """Make a cgroup of each version that this host has, version 2 first, below the cgroup of this process: so its
    limits apply, and for systemd it belongs to the same session. number: the class id for version 1.
    """
    for mount, path in mounted():
        folder = os.path.normpath(f"{mount.point}/{os.path.relpath(path, mount.root)}/{name}")
        classid = None if mount.kind == "cgroup2" else number
        try:
            os.mkdir(folder)
            if classid is not None:
                Path(folder, "net_cls.classid").write_text(str(classid), encoding="ascii")
        except OSError:  # for example read-only
            continue
        yield Cgroup(folder, f"{path}/{name}".strip("/"), mount.point, classid)


def mounted() -> list[tuple[Mount, str]]:
    """Mounts of version 2 and of net_cls, and the cgroup there that this process is in."""
    found = [
        (mount, path)
        for path, there in hierarchies("net_cls")
        for mount in there
        if f"{path}/".startswith(f"{mount.root.rstrip('/')}/")
    ]
    # Version 2 first, and where others look for it; there may be more mounts of it.
    return sorted(found, key=lambda each: (each[0].kind != "cgroup2", not each[0].point.startswith(CGROUPS)))

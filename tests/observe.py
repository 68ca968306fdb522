"""Observes daemons from outside: /proc, their metrics, and their messages to a service manager."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import socket
import stat
from pathlib import Path
from socket import socket as Socket

import daemons
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from usocksd.log.access import pair_member

_ACCEPT = "application/openmetrics-text; version=1.0.0"
Series = tuple[str, frozenset[tuple[str, str]]]

# ---- processes (proc_pid_stat(5), proc_pid_net(5))

_LISTEN = "0A"
# pidfd_getfd(2), the same number everywhere; Python has no name for it.
_PIDFD_GETFD = 438
_LIBC = ctypes.CDLL(None, use_errno=True)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def cpu_seconds(pid: int) -> float:
    """The CPU time of all its threads."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_until_stopped(pid: int) -> None:
    """SIGSTOP has arrived, in all threads."""
    tasks = Path(f"/proc/{pid}/task")
    daemons.wait_until(
        lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()),
        f"{pid} is stopped",
    )


def sockets(pid: int) -> set[str]:
    """The inodes of its sockets."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def carried(pid: int) -> set[str]:
    """The peers of the TCP connections that a process has, as records name them."""
    # /proc/net/tcp would take its time, and while others change the table it misses some.
    peers = set()
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            fd = _LIBC.syscall(_PIDFD_GETFD, process, int(name), 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.close(fd)
                continue
            with Socket(fileno=fd) as sock, contextlib.suppress(OSError):  # ENOTCONN: it listens, or was reset
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    peers.add(pair_member(*sock.getpeername()[:2]))
    finally:
        os.close(process)
    return peers


def listening(pid: int) -> set[int]:
    """The ports that are listened on in the network namespace in which a process is, of both families."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTEN:
                found.add(int(local.rpartition(":")[2], 16))
    return found


def drops(pid: int) -> int:
    """How many SYNs and connections listeners have dropped in the network namespace in which a process is."""
    names, values = (
        line.split()[1:]
        for line in Path(f"/proc/{pid}/net/netstat").read_text(encoding="ascii").splitlines()
        if line.startswith("TcpExt:")
    )
    return int(dict(zip(names, values, strict=True))["ListenDrops"])


# ---- metrics


def scrape(sock: Socket, port: int) -> list[Sample]:
    """Every sample of the metrics endpoint on this port of loopback; `sock` is a fresh socket, closed in here."""
    with sock:
        sock.settimeout(daemons.PATIENCE)
        sock.connect(("127.0.0.1", port))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = sock
        connection.request("GET", "/metrics", headers={"Accept": _ACCEPT})
        with connection.getresponse() as response:
            assert response.status == 200
            text = response.read().decode()
    families = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    return [sample for family in families if family.type in ("counter", "histogram") for sample in family.samples]


class Counters:
    """Counters over time: they never fall, and never vanish."""

    def __init__(self) -> None:
        self.last: dict[Series, float] = {}

    def see(self, samples: list[Sample]) -> None:
        """The next scrape."""
        now = {(s.name, frozenset(s.labels.items())): float(s.value) for s in samples}
        fallen = {
            series: (value, now.get(series)) for series, value in self.last.items() if now.get(series, -1) < value
        }
        assert fallen == {}
        self.last = now

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels, of at least one."""
        found = [v for (n, have), v in self.last.items() if n == name and labels.items() <= have]
        assert found, f"no {name} {labels}"
        return sum(found)


# ---- sd_notify(3)


def sd_messages(manager: socket.socket, last: str) -> list[str]:
    """The daemon's messages to the service manager, line by line, until one that has the line `last`."""
    said: list[str] = []
    while last not in said:
        said += manager.recv(4096).decode().split("\n")
    return said

"""Command lines of transocks on a host of a lab, each at the price of a fork: most of what one takes is imports.

One process for all tests imports everything, once. It forks for each test that runs commands; the child enters the
namespaces of the host, as nsenter(1) does, and runs `main` for each line that it reads.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import json
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lab


class _Server:
    """The process that forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        atexit.register(self._end)

    def fork(self, end: socket.socket, *arguments: object) -> None:
        socket.send_fds(self._socket, [json.dumps(arguments).encode()], [end.fileno()])
        assert self._socket.recv(1) == b".", "it has forked"

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()


_servers: list[_Server] = []
_lock = threading.Lock()


class Commands:
    """Runs one command line after the other on this host, until it is closed or the lab ends."""

    def __init__(self, host: lab.Host, *, path: str = os.environ["PATH"]) -> None:
        self._socket, theirs = socket.socketpair()
        agent = host.lab.agent_pid
        with theirs, _lock:
            if not _servers:
                _servers.append(_Server())
            _servers[0].fork(theirs, agent, host.lab.rootless, f"/proc/{agent}/root/run/netns/{host.name}", path)
        self._lines = self._socket.makefile("rw")

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self._lines.write(json.dumps(words) + "\n")
        self._lines.flush()
        status, out, err = json.loads(self._lines.readline())
        return status, out, err

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _serve(requests: socket.socket) -> None:
    while True:
        raw, ends, _, _ = socket.recv_fds(requests, 10000, 1)
        if not raw:
            return
        with socket.socket(fileno=ends[0]) as end:
            child = os.fork()
            if child == 0:
                if os.fork() == 0:  # so that no parent has to wait for it
                    requests.close()
                    _enter(*json.loads(raw))
                    _take(end)
                os._exit(0)
            os.waitpid(child, 0)
        requests.send(b".")


def _enter(agent: int, rootless: bool, net: str, path: str) -> None:
    here, libc = os.getcwd(), ctypes.CDLL(None, use_errno=True)
    names = [*([f"/proc/{agent}/ns/user"] if rootless else []), f"/proc/{agent}/ns/mnt", net]
    root, files = os.open(f"/proc/{agent}/root", os.O_PATH), [os.open(name, os.O_RDONLY) for name in names]
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.fchdir(root)
    os.chroot(".")
    os.chdir(here)
    os.environ["PATH"] = path
    transocks.tools.SBIN = ()


def _take(end: socket.socket) -> None:
    lines = end.makefile("rw")
    for line in lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = transocks.cli.main(json.loads(line))
        lines.write(json.dumps([status, out.getvalue(), err.getvalue()]) + "\n")
        lines.flush()


if __name__ == "__main__":
    import transocks.cli
    import transocks.commands.rules.verbs
    import transocks.doctor.checks
    import transocks.tools

    _serve(socket.socket(fileno=int(sys.argv[1])))

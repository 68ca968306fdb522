"""A master becomes the newer version of itself that its workers already are: the same process, another program.

It passes on its descriptors, and in a memory file (memfd_create(2)) what they are and what it knows. Its workers stay
its children and notice nothing.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from collections.abc import Collection, Mapping
from typing import Any

import trio

from usocksd.serve.channel import Channel
from usocksd.serve.slots import restore_socket
from usocksd.serve.worker_process import State, WorkerProcess

_VARIABLE = "TRANSOCKS_HANDOVER"


def received() -> dict[str, Any] | None:
    """What the program that this process was has passed on, if it was one."""
    number = os.environ.pop(_VARIABLE, None)
    if number is None:
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        state: dict[str, Any] = json.load(file)
    return state


def become(
    state: Mapping[str, Any], fds: Collection[int], environment: Mapping[str, str], signals: Collection[signal.Signals]
) -> None:
    """Start the program anew in this process, with `state` (JSON values) and `fds` open; returns only by raising.

    `signals` that come in between wait for the new program to unblock them. Raises OSError.
    """
    memory = os.memfd_create("handover", 0)
    try:
        os.write(memory, json.dumps(state).encode())
        for fd in fds:
            os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        variables = {**os.environ, **environment, _VARIABLE: str(memory)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
    finally:
        # Still here: there is no such program any more.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for fd in fds:
            os.set_inheritable(fd, False)
        os.close(memory)


def worker_state(worker: WorkerProcess) -> dict[str, Any]:
    """A worker, as JSON values."""
    return {
        "generation": worker.generation,
        "slot": worker.slot,
        "column": worker.column,
        "pid": worker.pid,
        "channel": worker.channel.fileno(),
        "received": base64.b64encode(worker.channel.unread()).decode(),
        "state": worker.state.value,
        "version": worker.version,
        "handover": worker.handover,
        "verbs": worker.verbs,
        "alive": worker.alive,
    }


def restore_worker(state: Mapping[str, Any]) -> WorkerProcess:
    """The worker again."""
    sock = trio.socket.from_stdlib_socket(restore_socket(state["channel"]))
    channel = Channel(sock, base64.b64decode(state["received"]))
    worker = WorkerProcess(state["generation"], state["slot"], state["column"], state["pid"], channel)
    worker.state, worker.ordered = State(state["state"]), True
    worker.version, worker.handover, worker.alive = state["version"], state["handover"], state["alive"]
    worker.verbs = state.get("verbs", [])
    return worker

"""Turns a master into the new version that its workers already run: the same process execs the new program. It passes
on its descriptors, and its state in a memory file (memfd_create(2)). Its workers stay its children and notice nothing.
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

from usocksd import __version__
from usocksd.errors import Error
from usocksd.log.metrics import Snapshot, lasting, total
from usocksd.serve.channel import Channel, restore_socket
from usocksd.serve.crew import Crew
from usocksd.serve.plan import PROTOCOL, Generation
from usocksd.serve.timing import Timing
from usocksd.serve.worker_process import WorkerProcess, WorkerState

_VARIABLE = "TRANSOCKS_HANDOVER"


def received() -> dict[str, Any] | None:
    """The state that this process's previous program has passed on, or None. Raises Error if that program had another
    protocol, since yet another version was installed meanwhile.
    """
    number = os.environ.pop(_VARIABLE, None)
    if number is None:
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        state: dict[str, Any] = json.load(file)
    if state["protocol"] != PROTOCOL:
        raise Error(f"version {__version__} can't take over from {state['version']}")
    return state


def become(
    state: Mapping[str, Any], fds: Collection[int], environment: Mapping[str, str], signals: Collection[signal.Signals]
) -> None:
    """Start the program anew in this process, with `state` (JSON values) and `fds` open; returns only by raising.

    `signals` that come in between wait for the new program to unblock them. Raises OSError.
    """
    memory = os.memfd_create("handover", 0)
    try:
        os.write(memory, json.dumps({**state, "protocol": PROTOCOL, "version": __version__}).encode())
        for fd in fds:
            os.set_inheritable(fd, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        variables = {**os.environ, **environment, _VARIABLE: str(memory)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
    finally:  # the program is no longer there
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for fd in fds:
            os.set_inheritable(fd, False)
        os.close(memory)


def crew_state(crew: Crew, own: Snapshot) -> tuple[dict[str, Any], list[int]]:
    """The state for `restore_crew`, as JSON values, and the descriptors in it. `own` are the master's own counts."""
    generation = crew.generation
    assert generation is not None
    state = {
        "table": crew.table,
        "generation": generation.as_json(),
        "retired": total([crew.retired, lasting(own)], bounded=True),
        "level": crew.level,
        "shared": crew.shared,
        "workers": list(map(worker_state, crew.workers)),
    }
    return state, [crew.table, *generation.files.fds, *(worker.channel.fileno() for worker in crew.workers)]


def restore_crew(crew: Crew, state: Mapping[str, Any], timing: Timing) -> Generation:
    """Have a new crew continue with the workers of this process's previous program. Returns the generation in force."""
    generation = Generation.from_json(state["generation"])
    for fd in (crew.table, *generation.files.fds):
        os.set_inheritable(fd, False)
    crew.retired, crew.level, crew.shared = state["retired"], state["level"], state["shared"]
    crew.go_on(generation, [restore_worker(worker, timing) for worker in state["workers"]])
    return generation


def worker_state(worker: WorkerProcess) -> dict[str, Any]:
    """The state for `restore_worker`, as JSON values."""
    return {
        "generation": worker.generation,
        "slot": worker.slot,
        "column": worker.column,
        "pid": worker.pid,
        "channel": worker.channel.fileno(),
        "unread": base64.b64encode(worker.channel.unread()).decode(),
        "state": worker.state.value,
        "version": worker.version,
        "alive": worker.alive,
    }


def restore_worker(state: Mapping[str, Any], timing: Timing) -> WorkerProcess:
    """A worker of this process's previous program."""
    sock = trio.socket.from_stdlib_socket(restore_socket(state["channel"]))
    channel = Channel(sock, base64.b64decode(state["unread"]))
    worker = WorkerProcess(state["generation"], state["slot"], state["column"], state["pid"], channel, timing=timing)
    worker.state, worker.ordered = WorkerState(state["state"]), True
    worker.version, worker.alive = state["version"], state["alive"]
    return worker

"""A master becomes the new version of itself that its workers already are: the same process, another program.

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
    """What the program that this process was has passed on, if it was one. Raises Error if that had another protocol:
    then still another version was installed in between.
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
    finally:  # there is no such program any more
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for fd in fds:
            os.set_inheritable(fd, False)
        os.close(memory)


def crew_state(crew: Crew, own: Snapshot) -> tuple[dict[str, Any], list[int]]:
    """What `restore_crew` needs, as JSON values, and the descriptors in it. `own` is what the master has counted."""
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
    """Have a new crew go on with the workers of the program that this process was. Returns the generation in force."""
    generation = Generation.from_json(state["generation"])
    for fd in (crew.table, *generation.files.fds):
        os.set_inheritable(fd, False)
    crew.retired, crew.level, crew.shared = state["retired"], state["level"], state["shared"]
    crew.go_on(generation, [restore_worker(worker, timing) for worker in state["workers"]])
    return generation


def worker_state(worker: WorkerProcess) -> dict[str, Any]:
    """What `restore_worker` needs, as JSON values."""
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
    """A worker of the program that this process was."""
    sock = trio.socket.from_stdlib_socket(restore_socket(state["channel"]))
    channel = Channel(sock, base64.b64decode(state["unread"]))
    worker = WorkerProcess(state["generation"], state["slot"], state["column"], state["pid"], channel, timing=timing)
    worker.state, worker.ordered = WorkerState(state["state"]), True
    worker.version, worker.alive = state["version"], state["alive"]
    return worker

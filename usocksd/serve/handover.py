"""A master becomes the new version of itself that its workers already are: the same process, another program.

It passes on its descriptors, and in a memory file (memfd_create(2)) what they are and what it knows. Its workers stay
its children and notice nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Collection, Mapping
from typing import Any

from usocksd import __version__
from usocksd.errors import Error
from usocksd.serve.plan import PROTOCOL

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

"""Signals of `transocks exec`: which go to the command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable

from transocks.commands.exec.daemons import ExecError


class Signals:
    """While in use the terminal's signals are the command's, which is in our process group; others are passed on."""

    _terminal = (signal.SIGINT, signal.SIGQUIT)
    _passed_on = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._held: list[int] | None = None
        self._others: Callable[[], set[int]] | None = None
        self._asked = False

    def __enter__(self) -> Signals:
        # Handlers, not SIG_IGN: that the command would inherit.
        handlers = dict.fromkeys(self._terminal, self._on_terminal) | dict.fromkeys(self._passed_on, self._pass)
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals go to the command, which is about to start; before that, they end the set-up."""
        self._held = []

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        """This is the command; it gets the signals that came while it started."""
        self._child = child
        for number in self._held or ():
            child.send_signal(number)

    def end(self, others: Callable[[], set[int]]) -> None:
        """The command has ended: from now on a signal ends these processes, and the next one kills them."""
        self._others = others

    def _on_terminal(self, number: int, _: object) -> None:
        if self._held is None:
            raise ExecError(f"interrupted ({signal.Signals(number).name})")
        if self._others is not None:
            self._end(self._others())

    def _end(self, pids: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if self._asked else signal.SIGTERM)
        self._asked = True

    def _pass(self, number: int, _: object) -> None:
        if self._held is None:
            raise ExecError(f"interrupted ({signal.Signals(number).name})")
        if self._others is not None:
            self._end(self._others())
        elif self._child is None:
            self._held.append(number)
        else:
            self._child.send_signal(number)

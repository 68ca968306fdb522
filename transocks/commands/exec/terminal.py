"""Signals of `transocks exec`: which go to the command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Collection

from transocks.commands.exec.daemons import ExecError

_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """While in use, the terminal's signals are the command's, which is in our process group; others are passed on."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] | None = None
        self._left_behind: Callable[[], Collection[int]] | None = None
        self._kill = False

    def __enter__(self) -> Signals:
        # Handlers, not SIG_IGN, which the command would inherit.
        self._before = {number: signal.signal(number, self._handle) for number in (*_TERMINAL, *_OTHERS)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals go to the command, which is about to start; before that, they end the set-up."""
        self._early = []

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        """The command has started: pass it the signals that came meanwhile."""
        self._child = child
        for number in self._early or ():
            child.send_signal(number)

    def end(self, left_behind: Callable[[], Collection[int]]) -> None:
        """The command has ended: from now on the first signal ends the processes that it left behind, and the next one
        kills them.
        """
        self._left_behind = left_behind

    def _handle(self, number: int, _: object) -> None:
        if self._early is None:
            raise ExecError(f"interrupted ({signal.Signals(number).name})")
        if self._left_behind is not None:
            for pid in self._left_behind():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if self._kill else signal.SIGTERM)
            self._kill = True
        elif number in _TERMINAL:
            return  # the command has got it too
        elif self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)

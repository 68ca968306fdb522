"""Says what ended a process: by its exit status, and by the kernel's count of processes killed for memory."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from usocksd.host.cgroup import oom_kills

# A killed process is gone within this many seconds; a kill counted earlier belongs to another process.
_GONE_WITHIN = 5.0


def ended_children() -> Iterator[tuple[int, int]]:
    """Process id and status (as subprocess.Popen.returncode) of each ended child, even if another process started it:
    this may be the first process of a container.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            yield pid, os.waitstatus_to_exitcode(status)


class Coroner:
    """Says what ended a process. `oom_kills` counts the processes that the kernel has killed for want of memory."""

    def __init__(self, oom_kills: Callable[[], int | None] = oom_kills) -> None:
        self._oom_kills = oom_kills
        self._told = self._seen = oom_kills() or 0
        """How many kills are explained, and how many there were at `_seen_at`"""
        self._seen_at = 0.0

    def forget(self, now: float) -> None:
        """Forget old kills, so that they explain no later death. `now` is in seconds. Call it now and then."""
        if now - self._seen_at > _GONE_WITHIN:
            self._told, self._seen, self._seen_at = max(self._told, self._seen), self._oom_kills() or 0, now

    def cause(self, status: int, *, killed: bool) -> str:
        """The cause of an end with this status, as subprocess.Popen.returncode; `killed`: by this daemon itself."""
        if status >= 0:
            return f"exit status {status}"
        if -status != signal.SIGKILL:
            try:
                return f"signal {-status} ({signal.Signals(-status).name})"
            except ValueError:
                return f"signal {-status}"
        if killed:
            return "killed by the daemon"
        now = self._oom_kills()
        if now is None:
            return "killed by signal 9: out of memory?"
        if now > self._told:
            self._told += 1  # each explains one: several workers may have been killed
            return "killed by signal 9: out of memory, as the kernel has counted"
        return "killed by signal 9, and not by the kernel: by an administrator, systemd-oomd or the like"

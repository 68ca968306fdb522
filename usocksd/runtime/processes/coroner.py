"""What ended a process, in words: from its exit status, and from the kernel's count of those killed for memory."""

from __future__ import annotations

import signal
from collections.abc import Callable

from usocksd.runtime.cgroup import oom_kills


class Coroner:
    """Tells deaths apart. `oom_kills` counts the processes that the kernel has killed for want of memory, if it can."""

    def __init__(self, oom_kills: Callable[[], int | None] = oom_kills) -> None:
        self._oom_kills = oom_kills
        self._told = oom_kills()
        """How many of them are accounted for."""

    def cause(self, status: int, *, killed: bool) -> str:
        """Of an end with this status, as subprocess.Popen.returncode has it; `killed`: by this daemon itself."""
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
        if now is None or self._told is None:
            return "killed by signal 9: out of memory?"
        if now > self._told:
            self._told += 1  # one each: there may be several to tell
            return "killed by signal 9: out of memory, as the kernel has counted"
        return "killed by signal 9, and not by the kernel: by an administrator, systemd-oomd or the like"

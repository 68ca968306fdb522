"""Where a measure takes place: this host's loopback, or a network namespace that redirects connections.

Neither changes anything of the host: the namespace has its own loopback and its own rules, and is gone with
its last process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

MARK = 0x7A  # the load generator's connections carry it, so that the rule leaves the proxies' own alone
REDIRECT_PORT = 12345

SETUP = """
ip link set lo up &&
iptables -w -t nat -A OUTPUT -p tcp -m mark --mark {mark} -j REDIRECT --to-ports {port} &&
echo ready && exec cat
"""


class PlaceError(Exception):
    """The place can't be made here; the text says why."""


def find_program(name: str) -> str | None:
    """Path of a program; system programs count although an ordinary user's PATH leaves them out."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


class Loopback:
    """The host's own loopback, as it is."""

    name = "loopback"
    title = "SOCKS5 over loopback"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix: list[str] = []
        self._ends: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._ends = self.popen([sys.executable, "-m", "bench.ends"], "ends")
        assert self._ends.stdout is not None
        self.target_port = int(self._ends.stdout.readline())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self._ends)

    def popen(self, command: Sequence[str], log: str) -> subprocess.Popen[str]:
        """Start a command here; its pipes are ours, its complaints go to a file `log` of the directory."""
        # A bench that is killed takes everything with it: the kernel kills what lost its parent.
        program = [*self.prefix, "setpriv", "--pdeathsig", "KILL", "--", *command]
        with (self.directory / f"{log}.err").open("ab") as err:
            return subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )


class Namespace(Loopback):
    """A network namespace (inside a user namespace when not root) where marked connections are redirected."""

    name = "namespace"
    title = "iptables REDIRECT in a network namespace"

    def __enter__(self) -> Self:
        if find_program("iptables") is None:
            raise PlaceError("iptables is not installed")
        root = os.geteuid() == 0
        unshare = ["unshare", "--net"] if root else ["unshare", "--net", "--user", "--map-root-user"]
        script = SETUP.format(mark=MARK, port=REDIRECT_PORT)
        os.environ["XTABLES_LOCKFILE"] = str(self.directory / "xtables.lock")  # /run isn't everyone's
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self._holder = self.popen([*unshare, "env", f"PATH={path}", "sh", "-c", script], "namespace")
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            end(self._holder)
            reason = (self.directory / "namespace.err").read_text(errors="replace").strip()
            raise PlaceError(reason.splitlines()[-1] if reason else "can't make a network namespace")
        enter = ["nsenter", f"--target={self._holder.pid}", "--net"]
        self.prefix = enter if root else [*enter, "--user", "--preserve-credentials"]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        end(self._holder)


def end(process: subprocess.Popen[str] | None) -> None:
    """End a helper: it stops when its standard input closes, and is killed if it doesn't."""
    if process is None:
        return
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

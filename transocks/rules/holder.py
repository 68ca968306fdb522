"""A process that holds firewall rules: applied while somebody has the other end of its standard input open.

`python -m transocks.rules.holder` reads a rule set as one line of JSON, applies it, answers with one line ("" or
the complaint), and removes the rules at end of file: when they are no longer wanted, or when the process that asked was
killed. Since one process does both, they stay in order even if that happens in the middle of loading.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from types import TracebackType

import cattrs

from transocks.rules import cgroups
from transocks.rules.apply import apply, remove
from transocks.rules.render import Commands
from transocks.tools import FirewallError


class Held:
    """Rules in force for the time of a `with` block, or of this process's life if that is shorter.

    folder is deleted with them. cgroup: the folder of one that is ended before them; "": none. Entering raises
    FirewallError when the rules can't be loaded.
    """

    def __init__(self, rules: Commands, folder: str, cgroup: str = "") -> None:
        self._rules = rules
        self._folder = folder
        self._cgroup = cgroup

    def __enter__(self) -> Held:
        # A session of its own: what the terminal sends is for the command.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__ if __name__ != "__main__" else "transocks.rules.holder"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        order = {"rules": cattrs.unstructure(self._rules), "folder": self._folder, "cgroup": self._cgroup}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BaseException:
            self._release()
            raise
        if answer != b'""\n':
            self._release()
            raise FirewallError(json.loads(answer) if answer else "the process that holds the rules ended")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    @property
    def pid(self) -> int:
        """The holder's process id."""
        return self._process.pid

    def _release(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        if self._process.wait() != 0:  # it was killed itself: then this is left to us
            _end(self._rules, self._folder, self._cgroup)


def _end(rules: Commands | None, folder: str, cgroup: str) -> None:
    if cgroup:
        cgroups.end(cgroup)  # first: without the rules it would connect directly
    if rules is not None:
        remove(rules)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The holder process; see above."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # only end of file ends it, so that nothing is left behind
    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    rules = cattrs.structure(order["rules"], Commands)
    try:
        apply(rules)
        answer = ""
    except FirewallError as error:
        answer = str(error)
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it ends
    sys.stdin.read()
    _end(None if answer else rules, order["folder"], order["cgroup"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

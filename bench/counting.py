"""What a proxy does, counted instead of timed: instructions in user space, and system calls.

A count comes from two runs of different length: their difference, divided by the difference of the lengths. Start,
warm-up and end cancel out, and other load on the machine changes nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .places import find_program

# Operations of the two runs by kind of measure. With fewer, the count shows what varies from start to start, about 10
# million instructions of our daemons.
LENGTHS = {"connect": (400, 2400), "echo": (1000, 21000)}
QUICK_LENGTHS = {"connect": (50, 250), "echo": (50, 250)}
# Seconds for a proxy to start, to answer and to stop. In valgrind it takes about fifty times as long as otherwise, and
# the machine may be busy.
PATIENCE = 300.0
# Seconds for all operations of a count.
COUNTED_WITHIN = 900.0


@dataclass(frozen=True)
class Counter:
    """A tool that runs a program and counts for it and its children. `package` is Debian's.

    In `options`, {file} is where the tool writes; `total` finds the count in a file that it wrote.
    """

    key: str
    package: str
    program: str
    options: Sequence[str]
    total: re.Pattern[str]

    def prefix(self, folder: Path) -> list[str]:
        """What stands before the command line of the program."""
        file = str(folder / self.key)
        # The order of a set, and so the path taken through it, must not vary between the runs.
        return ["env", "PYTHONHASHSEED=0", self.program, *(option.format(file=file) for option in self.options)]

    def read(self, folder: Path) -> int:
        """The count of all processes; raises ValueError if the tool wrote none."""
        files = [path.read_text() for path in folder.glob(f"{self.key}*")]
        counts = [int(count) for text in files for count in self.total.findall(text)]
        if not counts:
            raise ValueError(f"{self.program} counted nothing")
        return sum(counts)


COUNTERS = (
    Counter(
        "instructions",
        "valgrind",
        "valgrind",
        ("-q", "--tool=cachegrind", "--cache-sim=no", "--trace-children=yes", "--cachegrind-out-file={file}.%p"),
        re.compile(r"^summary: (\d+)", re.MULTILINE),
    ),
    # With -D the program is the child of the bench, not of strace, and gets its signals.
    Counter(
        "calls",
        "strace",
        "strace",
        ("-D", "-f", "-c", "-o", "{file}"),
        re.compile(r"^100\.00 +\S+ +\d+ +(\d+) .*total$", re.MULTILINE),
    ),
)


def missing() -> str | None:
    """Which tools are not installed, or None."""
    absent = [counter.package for counter in COUNTERS if find_program(counter.program) is None]
    return f"not installed: {', '.join(absent)} (Debian packages of these names)" if absent else None

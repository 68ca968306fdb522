"""From results of many rounds to tables: medians, and ratios to a reference within the same round."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Result = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One column: `key` of a result times `scale`, with this many decimals; `ratio` adds its ratios."""

    key: str
    title: str
    scale: float = 1.0
    decimals: int = 0
    ratio: bool = False


@dataclass(frozen=True)
class Table:
    """The results of one measure: contender -> its result of each round, None where a round failed."""

    title: str
    figures: Sequence[Figure]
    results: Mapping[str, Sequence[Result | None]]
    reference: str


def median(results: Sequence[Result | None], key: str) -> float | None:
    """Median over the rounds that have this figure, or None."""
    values = [result[key] for result in results if result is not None and key in result]
    return statistics.median(values) if values else None


def ratios(results: Sequence[Result | None], reference: Sequence[Result | None], key: str) -> list[float]:
    """The ratio of each round in which both have the figure: drift of the machine hits both alike."""
    return [
        mine[key] / other[key]
        for mine, other in zip(results, reference, strict=False)
        if mine is not None and other is not None and key in mine and other.get(key)
    ]


def cells(table: Table, name: str) -> list[str]:
    """One row: the medians, each followed by its ratio (and the range over the rounds) where it has one."""
    row = [name]
    for figure in table.figures:
        value = median(table.results[name], figure.key)
        row.append("-" if value is None else f"{value * figure.scale:,.{figure.decimals}f}")
        if figure.ratio:
            found = ratios(table.results[name], table.results.get(table.reference, ()), figure.key)
            if not found or name == table.reference:
                row += ["1" if found else "-", ""]
            else:
                row += [f"{statistics.median(found):.2f}", f"{min(found):.2f}-{max(found):.2f}"]
    return row


def render(table: Table) -> str:
    """The table as text, columns aligned."""
    header = [""]
    for figure in table.figures:
        header += [figure.title, "ratio", "(range)"] if figure.ratio else [figure.title]
    rows = [header, *(cells(table, name) for name in table.results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [table.title]
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Where this ran: absolute figures mean nothing without it."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} x {model or platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }

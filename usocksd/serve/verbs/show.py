"""Tables and units for people: styled on terminals, plain text elsewhere. Texts that clients chose are never markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from usocksd.serve.verbs.client import visible


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    number: bool = False
    """It has numbers, so it is aligned to the right."""
    keep: int = 0
    """On a narrow terminal, columns with the least of this are left out first."""
    text: bool = False
    """Its texts may be cut off, unlike numbers, addresses and ports."""


# The width of a pipe or a file: wider than any table, so nothing is cut.
_ENDLESS = 100_000
# Texts are not cut below this width; lines of addresses are not broken below that of an IPv4 address.
_SHORTEST, _UNBROKEN = 12, 21
_GAP = 2


def make_console() -> Console:
    """Standard output. On a terminal, tables have its width, and colours unless NO_COLOR is set."""
    if sys.stdout.isatty():
        return Console(highlight=False, markup=False, emoji=False)
    return Console(highlight=False, markup=False, emoji=False, force_terminal=False, width=_ENDLESS)


def put(console: Console, what: RenderableType = "") -> None:
    """Print; to a pipe or file without the spaces that rich puts at the ends of lines."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as capture:
        console.print(what)
    for line in capture.get().splitlines():
        print(line.rstrip())


def cell(value: object, style: str = "") -> Text:
    """A value as text; "-" if there is none."""
    return Text("-" if value is None or value == "" else visible(value), style)


def make_table(columns: Sequence[Column], rows: Iterable[Sequence[Text]], room: int) -> Table:
    """A table for a terminal that is `room` wide, with the columns that fit."""
    rows = list(rows)
    widths = [
        max(cell_len(column.heading), *(cells[at].cell_len for cells in rows), 0) for at, column in enumerate(columns)
    ]
    shown = fitting(columns, widths, room)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for at, width in shown.items():
        column = columns[at]
        justify: Literal["left", "right"] = "right" if column.number else "left"
        overflow: Literal["ellipsis", "fold"] = "ellipsis" if column.text else "fold"
        table.add_column(column.heading, justify=justify, no_wrap=column.text, overflow=overflow, width=width)
    for cells in rows:
        table.add_row(*(cells[at] for at in shown))
    return table


def fitting(columns: Sequence[Column], widths: Sequence[int], room: int) -> dict[int, int]:
    """The indexes of the columns that fit, and the width of each; `widths` is what they need.

    Numbers keep their width, texts are cut, and addresses take several lines.
    """
    shown = {}
    for at, (column, width) in enumerate(zip(columns, widths, strict=True)):
        least = width if column.number else _SHORTEST if column.text else _UNBROKEN
        shown[at] = min(width, max(least, len(column.heading)))

    def left() -> int:
        return room - sum(shown.values()) - _GAP * (len(shown) - 1)

    while left() < 0 and len(shown) > 1:
        del shown[min(shown, key=lambda at: columns[at].keep)]
    for at in sorted(shown, key=lambda at: -columns[at].keep):
        shown[at] += max(min(widths[at] - shown[at], left()), 0)
    return shown


def plain_table(columns: Iterable[Column], rows: Iterable[Sequence[Text]]) -> Iterator[str]:
    """The table as plain lines, for any number of rows: rich takes half a millisecond for each."""
    headings, numbers = zip(*(column[:2] for column in columns), strict=True)
    lines = [headings, *([text.plain for text in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = zip(line, widths, numbers, strict=True)
        yield "  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in aligned).rstrip()


def duration(seconds: float) -> str:
    """3.2s, 59s, 3m 05s, 1h 02m, 2d 03h: the two largest units."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m {rest:02}s"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}h {minutes:02}m"


def size(count: float) -> str:
    """Bytes: 512 B, 1.5 KiB, 20 MiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if round(count) < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f} {unit}" if unit != "B" and count < 9.95 else f"{count:.0f} {unit}"


def rate(per_second: float) -> str:
    """Bytes per second."""
    return f"{size(per_second)}/s"

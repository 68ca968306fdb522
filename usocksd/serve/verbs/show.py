"""Tables and units for people: plain text where nobody looks on, and what clients chose is never markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from usocksd.serve.verbs.client import visible

KEEP: Final = 10
"""Columns that are of more use than addresses on one line have at least this much `keep`."""


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    number: bool = False
    """It holds numbers, which go to the right."""
    keep: int = 0
    """Where a terminal is too narrow, columns with the least go first, those from KEEP on last."""
    text: bool = False
    """It holds texts that are still of use when their end is cut off. Numbers, addresses and ports are not."""


# Wider than any table: what is piped or kept is not cut.
_ENDLESS = 100_000
# A text is cut to no less than this, and the lines of addresses are broken at no less than what an IPv4 one takes.
_SHORTEST, _UNBROKEN = 12, 21
_GAP = 2


def make_console() -> Console:
    """Standard output: cut to its width and with colours if it is a terminal (and NO_COLOR is not set)."""
    if sys.stdout.isatty():
        return Console(highlight=False, markup=False, emoji=False)
    return Console(highlight=False, markup=False, emoji=False, force_terminal=False, width=_ENDLESS)


def put(console: Console, what: RenderableType = "") -> None:
    """Print; without the spaces that rich puts at the ends of lines, where somebody may keep them."""
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
    """A table for a terminal of this width: with as many of the columns as have room."""
    rows = list(rows)
    widths = [
        max(cell_len(column.heading), *(cells[at].cell_len for cells in rows), 0) for at, column in enumerate(columns)
    ]
    shown = fitting(columns, widths, room)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for at, width in shown.items():
        column = columns[at]
        table.add_column(
            column.heading, justify="right" if column.number else "left", no_wrap=True, overflow="ellipsis", width=width
        )
    for cells in rows:
        table.add_row(*(cells[at] if columns[at].text else _broken(cells[at], width) for at, width in shown.items()))
    return table


def fitting(columns: Sequence[Column], widths: Sequence[int], room: int) -> dict[int, int]:
    """Which of the columns fit beside each other, by their places, and the width of each; `widths` are what they need.

    Numbers keep theirs, texts are cut, and addresses take several lines where nothing less important is left.
    """
    least = {
        at: min(width, max(_SHORTEST, len(column.heading))) if column.text else width
        for at, (column, width) in enumerate(zip(columns, widths, strict=True))
    }

    def left() -> int:
        return room - sum(least.values()) - _GAP * (len(least) - 1)

    def drop(below: int) -> None:
        while left() < 0 and (candidates := [at for at in least if columns[at].keep < below]):
            del least[min(candidates, key=lambda at: columns[at].keep)]

    drop(below=KEEP)
    if left() < 0:
        for at, width in least.items():
            if not (columns[at].number or columns[at].text):
                least[at] = min(width, max(_UNBROKEN, len(columns[at].heading)))
        drop(below=max(column.keep for column in columns))
    more = left()
    for at in sorted(least, key=lambda at: -columns[at].keep):
        grown = min(least[at] + max(more, 0), widths[at])
        more -= grown - least[at]
        least[at] = grown
    return least


def _broken(address: Text, width: int) -> Text:
    """An address on as many lines as it needs, its port whole."""
    text = address.plain
    if len(text) <= width:
        return address
    host, colon, port = text.rpartition(":")
    pieces = [host[at : at + width] for at in range(0, len(host), width)]
    if len(pieces[-1] + colon + port) <= width:
        pieces[-1] += colon + port
    else:
        pieces.append(colon + port)
    return Text("\n".join(pieces), address.style)


def plain_table(columns: Iterable[Column], rows: Iterable[Sequence[Text]]) -> Iterator[str]:
    """The same as lines of any length, and any number of them: rich takes half a millisecond for each."""
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

"""Tables and units for people: plain text where nobody looks on, and what clients chose is never markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from usocksd.runtime.verbs.client import visible

Column: TypeAlias = tuple[str, bool]
"""Heading, and whether it holds numbers, which go to the right."""

# Wider than any table: what is piped or kept is not cut.
_ENDLESS = 100_000


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


def make_table(columns: Iterable[Column], rows: Iterable[Sequence[Text]]) -> Table:
    """A table for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, number in columns:
        table.add_column(heading, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


def plain_table(columns: Iterable[Column], rows: Iterable[Sequence[Text]]) -> Iterator[str]:
    """The same as lines of any length, and any number of them: rich takes half a millisecond for each."""
    headings, numbers = zip(*columns, strict=True)
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

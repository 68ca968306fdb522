"""Tables on terminals of any width: columns are left out, numbers and addresses stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from usocksd.serve.verbs.show import Column, cell, fitting, make_table

COLUMNS = (
    Column("client", keep=5),
    Column("name", keep=3, text=True),
    Column("age", number=True, keep=2),
    Column("rx/s", number=True, keep=4),
    Column("worker", number=True, keep=1),
)
ROWS = {
    "IPv4": ("198.51.100.110:54692", "www.beyond.example", "12h 00m", "999 KiB/s", "4711"),
    "IPv6": ("[2001:db8:1111:2222:3333:4444:5555:6666]:54692", "www.beyond.example", "12h 00m", "999 KiB/s", "4711"),
}


def lines(row: tuple[str, ...], width: int) -> list[str]:
    """The table as a terminal of this width shows it; nothing is wider."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(make_table(COLUMNS, [[cell(text) for text in row]], width))
    shown = out.getvalue().splitlines()
    assert max(map(len, shown)) <= width
    return shown


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("width", range(48, 130))
def test_what_is_shown_is_whole(row: tuple[str, ...], width: int) -> None:
    heading, *below = lines(row, width)
    client, name, age, rate, worker = row
    for title, number in (("age", age), ("rx/s", rate), ("worker", worker)):
        assert (title in heading) == (number in below[0]), below
    assert "rx/s" in heading
    start = heading.find("name") if "name" in heading else heading.index("rx/s") - len(rate) + len("rx/s")
    assert "".join(line[:start].strip() for line in below) == client
    if "name" in heading:
        assert name in below[0] or f"{name[:11]}" in below[0]


@pytest.mark.parametrize(("width", "titles"), [(130, 5), (72, 5), (71, 5), (60, 4), (57, 4), (48, 3), (40, 2)])
def test_the_least_important_columns_go_first(width: int, titles: int) -> None:
    heading, *_ = lines(ROWS["IPv4"], width)
    by_keep = [column.heading for column in sorted(COLUMNS, key=lambda column: -column.keep)]
    assert set(heading.split()) == set(by_keep[:titles])


def test_a_column_is_left_on_any_terminal() -> None:
    assert fitting(COLUMNS, [20, 18, 7, 9, 6], 1) == {0: 20}

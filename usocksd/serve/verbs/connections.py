"""NAME connections: the live connections, as a table, once or again and again like top."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from usocksd.serve.verbs.client import ControlClient, print_json
from usocksd.serve.verbs.selection import Connection, select
from usocksd.serve.verbs.show import Column, cell, duration, make_console, make_table, plain_table, rate, size
from usocksd.settings.loader import counted

SAMPLE = 0.5
"""Seconds over which rates are taken."""

# Between these columns are optional ones: the requested name, and what only one of the daemons has.
_FIRST = (Column("client", keep=13), Column("destination", keep=12))
_OPTIONAL = {
    "peer": Column("peer", keep=1),
    "name": Column("name", keep=9, text=True),
    "user": Column("user", keep=4, text=True),
    "rule": Column("rule", keep=3, text=True),
    "egress": Column("egress", keep=2),
    "route": Column("route", keep=3, text=True),
    "upstream": Column("upstream", keep=2, text=True),
}
_LAST = (
    Column("state", keep=1),
    Column("age", number=True, keep=8),
    Column("idle", number=True, keep=7),
    Column("tx", number=True, keep=5),
    Column("rx", number=True, keep=6),
    Column("tx/s", number=True, keep=10),
    Column("rx/s", number=True, keep=11),
    Column("worker", number=True, keep=0),
)


def run(client: ControlClient, args: argparse.Namespace) -> None:
    """Ask and print, once or until Ctrl-C."""
    samples = _samples(client, args.watch)
    console = make_console()
    if args.watch is None:
        _print(next(samples), args, console)
        return
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the way to end this
        if args.json or not console.is_terminal:
            for answer in samples:
                _print(answer, args, console)
        else:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for answer in samples:
                    live.update(_render(answer, args, console), refresh=True)


def _samples(client: ControlClient, every: float | None) -> Iterator[dict[str, Any]]:
    """Answers with rates: the first after SAMPLE seconds, the others every `every` seconds."""
    before, taken = client.ask("connections"), time.monotonic()
    wait = SAMPLE
    while True:
        time.sleep(max(taken + wait - time.monotonic(), 0.0))
        answer, now = client.ask("connections"), time.monotonic()
        _add_rates(answer, before)
        yield answer
        before, taken, wait = answer, now, every or SAMPLE


def _add_rates(answer: dict[str, Any], before: dict[str, Any]) -> None:
    """Add rates; None for a connection that the answer before has left out."""
    earlier = {(connection["worker"], connection["id"]): connection for connection in before["connections"]}
    for connection in answer["connections"]:
        then = earlier.get((connection["worker"], connection["id"]))
        if then is not None:
            seconds = connection["at"] - then["at"]
        else:  # all bytes of a new connection are since the answer before
            then = {"tx_bytes": 0, "rx_bytes": 0}
            seconds = 0.0 if connection["worker"] in before["partial"] else max(connection["age"], SAMPLE)
        for way in ("tx", "rx"):
            moved = connection[f"{way}_bytes"] - then[f"{way}_bytes"]
            connection[f"{way}_rate"] = round(moved / seconds, 1) if seconds > 0 else None


def _print(answer: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    if args.json:
        print_json(answer | {"connections": select(answer["connections"], args)[: args.limit]})
        return
    title, columns, rows = _tabulate(answer, args)
    print(title)
    if console.is_terminal:
        console.print(make_table(columns, rows, console.width))
    else:
        print("\n".join(plain_table(columns, rows)))
    if args.watch:
        print(flush=True)


def _render(answer: dict[str, Any], args: argparse.Namespace, console: Console) -> Group:
    """The table below its title, on one screen."""
    title, columns, rows = _tabulate(answer, args, console.height - 2)
    return Group(Text(title, no_wrap=True), make_table(columns, rows, console.width))


def _tabulate(
    answer: dict[str, Any], args: argparse.Namespace, room: int | None = None
) -> tuple[str, list[Column], list[list[Text]]]:
    """Title, columns and at most `room` rows."""
    everything = answer["connections"]
    found = select(everything, args)
    shown = found[: args.limit][:room]
    tx, rx = (sum(connection[f"{way}_rate"] or 0 for connection in found) for way in ("tx", "rx"))
    title = f"{time.strftime('%H:%M:%S')}  " if args.watch else ""
    title += f"{len(found):,} of " if args.filters else ""
    title += f"{counted(len(everything), 'connection')}, tx {rate(tx)}, rx {rate(rx)}"
    title += f"; {len(shown)} shown" if len(shown) < len(found) else ""
    if late := answer["partial"]:
        title += f"; not all: no whole answer in time from {counted(len(late), 'worker')}"
    optional = [key for key in _OPTIONAL if any(connection.get(key) is not None for connection in shown)]
    columns = [*_FIRST, *(_OPTIONAL[key] for key in optional), *_LAST]
    return title, columns, [_row(connection, optional) for connection in shown]


def _row(connection: Connection, optional: Sequence[str]) -> list[Text]:
    return [
        cell(connection["client"]),
        cell(connection["destination"]),
        *(cell(connection.get(key)) for key in optional),
        cell(connection["state"]),
        cell(duration(connection["age"])),
        cell(duration(connection["idle"])),
        cell(size(connection["tx_bytes"])),
        cell(size(connection["rx_bytes"])),
        *(cell(None if connection[way] is None else rate(connection[way])) for way in ("tx_rate", "rx_rate")),
        cell(connection["worker"]),
    ]

"""NAME status: the state of the daemon and its workers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from usocksd.serve.verbs.client import Answer, ControlClient, print_json
from usocksd.serve.verbs.show import Column, cell, duration, make_console, make_table, put, rate, size
from usocksd.settings.loader import counted

# How many of the addresses or upstreams with problems are named.
_MOST_NAMED = 4
_HEALTHY = {"ready", "reloading"}
_COLUMNS = (
    Column("generation", keep=3),
    Column("worker", number=True, keep=9),
    Column("slot", number=True, keep=0),
    Column("state", keep=8),
    Column("version", keep=1),
    Column("connections", number=True, keep=7),
    Column("files", number=True, keep=2),
    Column("memory", number=True, keep=6),
    Column("cpu", number=True, keep=5),
    Column("silent", number=True, keep=4),
)


def run(client: ControlClient, args: argparse.Namespace) -> None:
    """Ask, and print."""
    answer = client.ask("status")
    if args.json:
        print_json(answer)
        return
    console = make_console()
    put(console, _summary(answer))
    if answer["generations"]:
        put(console)
        put(console, make_table(_COLUMNS, _workers(answer), console.width))


def _summary(answer: Answer) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text, bad in _facts(answer):
        table.add_row(cell(label, "bold") if label else "", cell(text, "bold red" if bad else ""))
    return table


def _facts(answer: Answer) -> Iterator[tuple[str, str, bool]]:
    """Label, text, and whether it needs attention"""
    state, up = answer["state"], duration(answer["uptime"])
    version = f"version {answer['version']} ({answer['form']})"
    yield answer["name"], f"{state}, {version}, pid {answer['pid']}, up {up}", state not in _HEALTHY
    config = answer["config"]
    yield (
        "configuration",
        f"{config['file'] or 'no file'}, generation {config['generation']} since {config['since']}",
        False,
    )
    if (last := config["last_reload"]) is not None:
        yield "last reload", f"{last['at']}, {'done' if last['ok'] else 'refused:'}", not last["ok"]
        for fault in last["faults"]:
            yield "", fault, True
    if (left := config.get("confirm_within")) is not None:
        yield "on trial", f"for {left:.0f} s more, unless `{answer['name']} confirm` comes before", True
    yield "listening", ", ".join(answer["listening"]) or "nowhere", not answer["listening"]
    yield "metrics", answer["metrics"] or "nowhere", False
    dropped, failing = answer["log"]["dropped"], answer["log"]["failing"]
    text = f"level {answer['log']['level']}, {counted(dropped, 'record')} dropped"
    yield "log", text + (f"; can't be written: {failing}" if failing else ""), bool(dropped or failing)
    connections = answer["connections"]
    limits = [f"limit {connections['limit']}"] if connections["limit"] else []
    limits += [f"limit per client {connections['per_client']}"] if connections["per_client"] else []
    yield "connections", ", ".join([f"{connections['live']} live", f"{connections['total']} in all", *limits]), False
    lost = connections["shed"] + connections["turned_away"]
    yield "under pressure", f"{connections['shed']} shed, {connections['turned_away']} turned away", bool(lost)
    yield "waiting", f"{answer['waiting']} to be accepted", False
    rates = answer["rates"]
    text = f"{rates['connections']:.1f} connections/s, tx {rate(rates['tx_bytes'])}, rx {rate(rates['rx_bytes'])}"
    if late := answer["partial"]:
        text += f"; without {counted(len(late), 'worker')} too busy to answer"
    yield "rates", text, bool(late)

    for name, pool in answer["daemon"].get("pools", {}).items():
        if pool["addresses"]:
            yield f"egress {name}", *_egress(pool)
    for name, group in answer["daemon"].get("upstreams", {}).items():
        yield f"upstreams {name}", *_upstreams(group, udp=answer["daemon"].get("udp", False))


def _egress(pool: dict[str, Any]) -> tuple[str, bool]:
    """Which egress addresses of a pool are missing or on a block list"""
    addresses, local = pool["addresses"], pool["local"]
    absent = [address for address in addresses if address not in local]
    listed = [f"{address} ({', '.join(domains)})" for address, domains in pool["listed"].items()]
    parts = [counted(len(addresses), "address", "addresses")]
    parts += [f"{what}: {_few(some)}" for what, some in (("not on this host", absent), ("listed", listed)) if some]
    return "; ".join(parts), bool(absent or listed)


def _upstreams(group: dict[str, Any], *, udp: bool) -> tuple[str, bool]:
    """How many upstreams of a group are up, what is wrong with those that are down or slow, and where datagrams are
    taken (`udp`), which have no UDP
    """
    upstreams = group["upstreams"]
    down = [f"{each['upstream']} ({each['why']})" for each in upstreams if not each["up"]]
    slow = [f"{each['upstream']} ({each['latency']:.1f} s)" for each in upstreams if each["up"] and each.get("slow")]
    parts = [f"{len(upstreams) - len(down)} of {len(upstreams)} up"]
    parts += [group["policy"]] if len(upstreams) > 1 else []
    without = [each["upstream"] for each in upstreams if udp and each["udp"] is False]
    listed = (("down", down), ("slow", slow), ("without UDP", without))
    parts += [f"{what}: {_few(some)}" for what, some in listed if some]
    # (That is no fault where others have it, or datagrams go directly.)
    return "; ".join(parts), bool(down or slow or (len(without) == len(upstreams) and group["when_no_udp"] == "refuse"))


def _few(texts: list[str]) -> str:
    more = [] if len(texts) <= _MOST_NAMED else [f"{len(texts) - _MOST_NAMED} more"]
    return ", ".join(texts[:_MOST_NAMED] + more)


def _workers(answer: Answer) -> Iterator[list[Text]]:
    for generation in answer["generations"]:
        for worker in generation["workers"]:
            state = worker["state"] + (", paused" if worker["paused"] else "")
            files = worker["descriptors"]
            yield [
                cell(f"{generation['generation']} {generation['state']}"),
                cell(worker["pid"]),
                cell(worker["slot"]),
                cell(state, "bold red" if worker["state"] == "suspected" or worker["paused"] else ""),
                cell(worker["version"]),
                cell(f"{worker['live']} of {worker['most']}"),
                cell(f"{files['open']} of {files['limit']}"),
                cell(size(worker["rss"])),
                cell(duration(worker["cpu"])),
                cell(duration(worker["silent"])),
            ]

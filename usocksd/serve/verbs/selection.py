"""Selects and sorts the live connections to list."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any, TypeAlias

from usocksd.net.address import IPAddress, IPNetwork

Connection: TypeAlias = dict[str, Any]
"""As the daemon describes it, with "tx_rate" and "rx_rate" in bytes per second, None where they are not known"""
Filter: TypeAlias = Callable[[Connection], bool]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
# The sort keys, and whether the largest come first.
_SORTS: dict[str, tuple[Callable[[Connection], Any], bool]] = {
    "age": (lambda connection: connection["age"], True),
    "idle": (lambda connection: connection["idle"], True),
    "rate": (lambda connection: (connection["tx_rate"] or 0) + (connection["rx_rate"] or 0), True),
    "bytes": (lambda connection: connection["tx_bytes"] + connection["rx_bytes"], True),
    "client": (lambda connection: _address_key(connection["client"]), False),
    "destination": (lambda connection: (connection["name"] or "", _address_key(connection["destination"])), False),
    "worker": (lambda connection: connection["worker"], False),
}


def add_options(parser: argparse.ArgumentParser, columns: Sequence[str]) -> None:
    """Add the options that `select` reads. `columns`: what these connections have besides what all have."""
    order = parser.add_argument_group("order")
    order.add_argument(
        "--sort",
        choices=[*_SORTS, *columns],
        default="rate",
        metavar="BY",
        help=f"{', '.join([*_SORTS, *columns])}; numbers with the largest first (default: rate, then age)",
    )
    order.add_argument("--reverse", action="store_true", help="in reverse order")
    order.add_argument("--limit", type=_count, metavar="N", help="only the first N")
    only = parser.add_argument_group("only connections (all that are given must match)")
    only.set_defaults(filters=[])
    add = partial(only.add_argument, action="append", dest="filters")
    add("--client", type=partial(_within, "client"), metavar="NET", help="from this address or network")
    add(
        "--destination",
        type=_to,
        metavar="DEST",
        help="to this address or network, to this name or one below it, to this port (:PORT), or both (DEST:PORT)",
    )
    add("--min-age", type=partial(_at_least, "age"), metavar="TIME", help="at least this old: 90, 90s, 5m, 2h or 1d")
    add("--min-idle", type=partial(_at_least, "idle"), metavar="TIME", help="silent for at least this long")
    for column in columns:
        kind, metavar, text = _COLUMNS[column]
        add(f"--{column}", type=kind, metavar=metavar, help=text)


def select(connections: Iterable[Connection], args: argparse.Namespace) -> list[Connection]:
    """The connections that match all filters, in order; the limit is not applied."""
    found = [connection for connection in connections if all(fits(connection) for fits in args.filters)]
    key, largest_first = _SORTS.get(args.sort) or (lambda connection: connection.get(args.sort) or "", False)
    found.sort(key=lambda connection: connection["age"], reverse=not args.reverse)
    # Sorting is stable, so connections with the same key stay in this order.
    found.sort(key=key, reverse=largest_first is not args.reverse)
    return found


def parse_interval(text: str) -> float:
    """A positive number of seconds."""
    seconds = _seconds(text)
    if seconds < 0.1:
        raise argparse.ArgumentTypeError("expected at least 0.1 seconds")
    return seconds


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text, re.ASCII)
    if match is None or not math.isfinite(float(match[1])):
        raise argparse.ArgumentTypeError(f"expected a time as 90, 90s, 5m, 2h or 1d, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}")
    return int(text)


def _network_or_none(text: str) -> IPNetwork | None:
    try:
        return ip_network(text.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        return None


def _inside(address: IPAddress | None, network: IPNetwork) -> bool:
    return address is not None and address in network


def _at_least(key: str, text: str) -> Filter:
    seconds = _seconds(text)
    return lambda connection: bool(connection[key] >= seconds)


def _within(key: str, text: str) -> Filter:
    network = _network_or_none(text)
    if network is None:
        raise argparse.ArgumentTypeError(f"expected an address or a network, not {text!r}")
    return lambda connection: _inside(_split(connection.get(key))[0], network)


def _to(text: str) -> Filter:
    host, port, network = text, None, _network_or_none(text)
    if network is None and (match := re.fullmatch(r"(.*):([0-9]{1,5})", text)) is not None:
        # An IPv6 address without brackets has no port: it was one as a whole.
        host, port = match[1], int(match[2])
        network = _network_or_none(host)
    name = host.lower().strip(".")
    strange = re.search(r"[:/\s]", name) or name.isdigit() or not (name or port)
    if (network is None and strange) or (port or 0) > 65535:
        raise argparse.ArgumentTypeError(f"expected an address, a network, a name or :PORT, not {text!r}")

    def fits(connection: Connection) -> bool:
        address, number = _split(connection["destination"])
        if port is not None and number != port:
            return False
        if network is not None:
            return _inside(address, network)
        asked = (connection["name"] or "").lower().rstrip(".")
        return not name or asked == name or asked.endswith(f".{name}")

    return fits


def _is(key: str, text: str) -> Filter:
    return lambda connection: connection[key] == text


def _contains(key: str, text: str) -> Filter:
    wanted = text.lower()
    return lambda connection: wanted in (connection[key] or "").lower()


_COLUMNS: dict[str, tuple[Callable[[str], Filter], str, str]] = {
    "peer": (partial(_within, "peer"), "NET", "made for its client by a proxy at this address or network"),
    "user": (partial(_is, "user"), "NAME", "of this user"),
    "rule": (partial(_contains, "rule"), "TEXT", "let through by a rule with this text in it"),
    "egress": (partial(_within, "egress"), "NET", "leaving from this address or network"),
    "route": (partial(_contains, "route"), "TEXT", "by a route with this text in its name"),
    "upstream": (partial(_contains, "upstream"), "TEXT", "through an upstream with this text in it"),
}


def _split(place: str | None) -> tuple[IPAddress | None, int | None]:
    """Address (IPv4-mapped as IPv4) and port of "address:port"."""
    host, _, port = (place or "").rpartition(":")
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
        return getattr(address, "ipv4_mapped", None) or address, int(port)
    except ValueError:
        return None, None


def _address_key(place: str | None) -> tuple[int, int, int]:
    address, port = _split(place)
    return (0, 0, 0) if address is None else (address.version, int(address), port or 0)

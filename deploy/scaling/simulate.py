"""What a region of 1,000 hosts and 50 proxies does when proxies fail, leave, come, and are restarted in waves.

    python3 deploy/scaling/simulate.py [--plot docs/scaling.svg]

The choice of a proxy is that of transocks itself, from `usocksd.names.match`, with the keys that a "sticky" group has:
a client and a destination. Each result is printed beside its formula. docs/scaling.md says what follows from it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from usocksd.names.match import weighted_rendezvous

HOSTS, DESTINATIONS, PROXIES = 1000, 20, 50
TTL = 60.0
"""of the SRV records, in seconds"""
KEYS = [
    f"10.{host // 250}.{host % 250}.1 site{number}.example".encode()
    for host in range(HOSTS)
    for number in range(DESTINATIONS)
]
NAMES = [f"socks5h://proxy{number}.egress.example:1080" for number in range(PROXIES)]


class Result(NamedTuple):
    """One line of the report."""

    what: str
    found: float
    formula: float
    within: float


def order_of(key: bytes) -> list[str]:
    """The proxies as this client prefers them; it takes the first that is there."""
    return weighted_rendezvous(key, NAMES, str.encode, lambda _: 1.0)


ORDERS = {key: order_of(key) for key in KEYS}


def choices(there: Collection[str]) -> dict[bytes, str]:
    """The proxy of each client, when only these are there."""
    return {key: next(name for name in order if name in there) for key, order in ORDERS.items()}


def moved(before: dict[bytes, str], after: dict[bytes, str]) -> float:
    """The share of the clients that have another proxy than before."""
    return sum(before[key] != after[key] for key in before) / len(before)


def without(number: int) -> set[str]:
    """All but the first few."""
    return set(NAMES[number:])


def failures() -> list[tuple[int, float]]:
    """How many proxies are gone, and the share of the clients that has moved."""
    all_there = choices(without(0))
    return [(gone, moved(all_there, choices(without(gone)))) for gone in range(11)]


def overload(gone: int) -> float:
    """The clients of the busiest proxy, by the mean."""
    counts = Counter(choices(without(gone)).values())
    return max(counts.values()) / (len(KEYS) / (PROXIES - gone))


def overload_by_chance(gone: int) -> float:
    """The same by formula: the largest of n Poisson numbers with this mean, about mean + sqrt(2 mean ln n)."""
    mean, left = len(KEYS) / (PROXIES - gone), PROXIES - gone
    return 1 + math.sqrt(2 * math.log(left) / mean)


def learned(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """How many of the hosts know of a change of the records after so many seconds: each looks when its TTL is over."""
    chance = random.Random(1)
    looks = sorted(chance.uniform(0, TTL) for _ in range(HOSTS))
    return [(at, sum(look <= at for look in looks) / HOSTS) for at in seconds]


def waves(size: int) -> tuple[float, float]:
    """All proxies are restarted, so many at a time: the share of the clients that the largest wave moves, and the share
    that has another proxy in the end.
    """
    first = choices(without(0))
    worst = 0.0
    for start in range(0, PROXIES, size):
        down = set(NAMES[start : start + size])
        worst = max(worst, moved(first, choices(set(NAMES) - down)))
    return worst, moved(first, choices(without(0)))


def report() -> list[Result]:
    """All results. One that is farther from its formula than `within` is a fault of the code."""
    found = dict(failures())
    one_more = moved(choices(without(1)), choices(without(0)))
    worst, lasting = waves(5)
    half = dict(learned([TTL / 2]))[TTL / 2]
    return [
        Result("one of 50 proxies leaves: share of clients that move", found[1], 1 / 50, 0.003),
        Result("ten of 50 leave: share of clients that move", found[10], 10 / 50, 0.01),
        Result("one comes back to 49: share of clients that move", one_more, 1 / 50, 0.003),
        Result("busiest proxy of 50, by the mean", overload(0), overload_by_chance(0), 0.06),
        Result("busiest proxy of 40, by the mean", overload(10), overload_by_chance(10), 0.06),
        Result("restarts in waves of 5: share that the largest wave moves", worst, 5 / 50, 0.012),
        Result("restarts in waves of 5: share that has moved in the end", lasting, 0.0, 0.0),
        Result("hosts that know of new SRV records after half a TTL", half, 0.5, 0.05),
    ]


def plot(path: Path) -> None:
    """Two diagrams: clients that move, by proxies that are gone; hosts that know, by seconds since the change."""
    gone = [(x / 10, y / 0.2) for x, y in failures()]
    known = [(x / TTL, y) for x, y in learned([TTL * step / 24 for step in range(25)])]
    parts = [
        _diagram(20, "clients that move (of 20,000)", "proxies of 50 that are gone", ("10", "20%"), gone),
        _diagram(380, "hosts that know of new records", "seconds, at a TTL of 60", ("60", "100%"), known),
    ]
    style = (
        "text{font:13px sans-serif;fill:#888}.m{fill:none;stroke:#888}.f{stroke:#888;stroke-dasharray:4 4}.p{fill:#2a7}"
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 290" width="720" height="290"><style>{style}</style>'
        f"{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )


def _diagram(left: int, title: str, below: str, ends: tuple[str, str], points: Sequence[tuple[float, float]]) -> str:
    x0, y0, width, height = left + 45, 240, 260, 190
    place: Callable[[float, float], tuple[float, float]] = lambda x, y: (x0 + x * width, y0 - y * height)  # noqa: E731
    dots = "".join('<circle class="p" cx="{:.1f}" cy="{:.1f}" r="3.5"/>'.format(*place(x, y)) for x, y in points)
    texts = [(x0, 30, title), (x0, 282, below), (x0, 258, "0"), (x0 + width - 12, 258, ends[0])]
    texts += [(left + 25, y0, "0"), (left, 55, ends[1])]
    words = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in texts)
    return (
        f'<path class="m" d="M{x0} {y0 - height}V{y0}H{x0 + width}"/>'
        f'<path class="f" d="M{x0} {y0}L{x0 + width} {y0 - height}"/>{dots}{words}'
    )


def main() -> int:
    """Exit status 0 if every result agrees with its formula."""
    parser = argparse.ArgumentParser(description="Simulate a region of hosts and proxies.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the diagrams, as SVG")
    args = parser.parse_args()
    results = report()
    for each in results:
        print(f"{each.what:<62} {each.found:8.4f}   formula {each.formula:8.4f} ± {each.within}")
    if args.plot is not None:
        plot(args.plot)
    return int(any(abs(each.found - each.formula) > each.within for each in results))


if __name__ == "__main__":
    sys.exit(main())

"""Counters of one process, cheap to add to; snapshots of them, and their sums over all processes.

A class that counts something declares its metrics, with the `Metrics` that it is given.

A snapshot is plain JSON. A worker sends its own to the master, which adds them to what ended workers have counted
(`lasting`) and to its own, with `total`. exporter.py renders the sum.

prometheus-client's own counters are not used: they lock, and in multiprocess mode they leave files behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from operator import add
from typing import Any, Generic, TypeAlias, TypeVar

Labels: TypeAlias = tuple[str, ...]
Snapshot: TypeAlias = dict[str, dict[str, Any]]
"""For each metric, its description, and its values by label values. As JSON it travels from worker to master."""

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Bounds for times, from a lookup on this host to a connection of hours."""
BYTES = tuple(float(4**power) for power in range(3, 18))
"""Bounds for sizes: 64 bytes to 16 GiB."""

OTHER = "other"
"""The label value for everything beyond a metric's maximum number of children."""


class MetricKind(Enum):
    """How the values of processes are combined."""

    COUNTER = "counter"
    """Never falls: the counts of ended workers stay."""
    GAUGE = "gauge"
    """The present value, summed up over the workers."""
    MINIMUM = "minimum"
    """The present value of the worker with the smallest. Shown as a gauge."""
    HISTOGRAM = "histogram"


_LASTING = (MetricKind.COUNTER.value, MetricKind.HISTOGRAM.value)


class Counter:
    """One number. A counter is added to, `counter.value += 1`; a gauge may be set, too."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0.0

    def dump(self) -> list[float]:
        return [self.value]


class Histogram:
    """How often an observation fell at or below each bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def dump(self) -> list[float]:
        """The count of each bucket by itself, and the sum of the observations behind them."""
        return [*self._counts, self._sum]


M = TypeVar("M", Counter, Histogram)


class Family(Generic[M]):
    """A metric with labels: one child for each combination of their values, made when it is first asked for.

    Ask for known children in advance: they then start with 0, so that rate() sees the first event. With `most` children
    there, all other label values share one more child, OTHER.
    """

    def __init__(self, make: Callable[[], M], most: int | None = None) -> None:
        self._make: Callable[[], M] = make
        self._most = most
        self.children: dict[Labels, M] = {}

    def labels(self, *values: str) -> M:
        """The child with these label values, in the order of the label names."""
        child = self.children.get(values)
        if child is None:
            values = _key(values, self.children, self._most)
            child = self.children.get(values) or self._make()
            self.children[values] = child
        return child


class Metrics:
    """The metrics of one process. `prefix` is the daemon's name, the first part of each metric's.

    The name of a counter ends with _total. Raises ValueError if it does not, and for a name that is taken.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: dict[str, tuple[dict[str, Any], Family[Any]]] = {}
        """By full name: the description in a snapshot, and the children."""

    def counter(self, name: str, help: str) -> Counter:
        """A counter without labels."""
        return self.counters(name, help).labels()

    def counters(self, name: str, help: str, *labels: str, most: int | None = None) -> Family[Counter]:
        """A counter for each value of `labels`, `most` of them at most (see Family)."""
        if not name.endswith("_total"):
            raise ValueError(f"the name of a counter ends with _total: {name}")
        return self._add(name, help, MetricKind.COUNTER, labels, Family(Counter, most), most=most)

    def gauge(self, name: str, help: str) -> Counter:
        """A gauge, summed up over the workers."""
        return self.gauges(name, help).labels()

    def gauges(self, name: str, help: str, *labels: str) -> Family[Counter]:
        """A gauge for each value of `labels`."""
        return self._add(name, help, MetricKind.GAUGE, labels, Family(Counter))

    def minimum(self, name: str, help: str) -> Counter:
        """A gauge that shows the smallest value of all workers."""
        return self.minimums(name, help).labels()

    def minimums(self, name: str, help: str, *labels: str) -> Family[Counter]:
        """Such a gauge for each value of `labels`."""
        return self._add(name, help, MetricKind.MINIMUM, labels, Family(Counter))

    def histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        """A histogram without labels; `bounds` ascend, and the last bucket, for everything above, is not among them."""
        return self.histograms(name, help, bounds).labels()

    def histograms(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> Family[Histogram]:
        """A histogram for each value of `labels`."""
        family = Family(lambda: Histogram(bounds))
        return self._add(name, help, MetricKind.HISTOGRAM, labels, family, bounds=list(bounds))

    def observed(self, name: str) -> float:
        """The sum of what a histogram without labels has observed; 0 if there is no such histogram."""
        family = self._families.get(f"{self._prefix}_{name}")
        total: float = 0.0 if family is None else family[1].labels().dump()[-1]
        return total

    def snapshot(self) -> Snapshot:
        """Every metric as it is now."""
        return {
            name: {**about, "values": [[labels, child.dump()] for labels, child in family.children.items()]}
            for name, (about, family) in self._families.items()
        }

    def _add(self, name: str, help: str, kind: MetricKind, labels: Labels, family: Family[M], **more: Any) -> Family[M]:
        full = f"{self._prefix}_{name}"
        if full in self._families:
            raise ValueError(f"there is a metric of this name: {full}")
        self._families[full] = {"kind": kind.value, "help": help, "labels": list(labels), **more}, family
        return family


def total(snapshots: Iterable[Snapshot], *, bounded: bool = False) -> Snapshot:
    """The sum of snapshots, the `lasting` ones first. `bounded`: it has no more children than one of them may have.

    The latest description of a metric counts: a new version may have changed it. Values with other labels or bounds
    can't be added to it, and are dropped.
    """
    sums: dict[str, tuple[dict[str, Any], dict[Labels, list[float]]]] = {}
    for snapshot in snapshots:
        for name, metric in snapshot.items():
            about, values = sums.get(name, (metric, {}))
            if not _comparable(about, metric):
                values = {}
            combine = min if metric["kind"] == MetricKind.MINIMUM.value else add
            for texts, numbers in metric["values"]:
                labels = _key(tuple(texts), values, metric.get("most") if bounded else None)
                so_far = values.get(labels)
                values[labels] = list(numbers) if so_far is None else list(map(combine, so_far, numbers))
            sums[name] = (metric, values)
    return {
        name: {**about, "values": [[list(labels), numbers] for labels, numbers in values.items()]}
        for name, (about, values) in sums.items()
    }


def lasting(snapshot: Snapshot) -> Snapshot:
    """The counters and histograms of an ended worker's snapshot, without its gauges."""
    return {name: metric for name, metric in snapshot.items() if metric["kind"] in _LASTING}


def _key(labels: Labels, present: Mapping[Labels, object], most: int | None) -> Labels:
    """Under which label values these are counted."""
    if most is None or labels in present or len(present) < most:
        return labels
    return (OTHER,) * len(labels)


def _comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("kind", "labels", "bounds"))

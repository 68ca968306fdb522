"""The measures, and the rounds that take them: all contenders in turn, repeatedly."""

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from . import accounting
from .contenders import Contender, Running
from .counting import COUNTED_WITHIN, COUNTERS, PATIENCE, Counter, CountingError, without_clock
from .opening import Plan
from .places import MARK, Loopback
from .report import Figure, Result

Kind = Literal["connect", "echo", "bulk", "idle", "udp"]
KINDS: tuple[Kind, ...] = ("connect", "echo", "bulk", "idle", "udp")


@dataclass(frozen=True)
class Measure:
    """One table: what the load generator does, and the figures taken from it.

    `length` is the number of operations to count, None if nothing is counted.
    """

    name: str
    kind: Kind
    connections: int
    title: str
    figures: tuple[Figure, ...]
    length: int | None = None
    size: int = 0
    rate: float = 0.0


def measures(kinds: Sequence[str], idle: int, lengths: Mapping[str, int]) -> list[Measure]:
    """The measures of these kinds, in the order of the report; those with `lengths` are counted, too."""
    rate = Figure("rate", "per second")
    counts = (Figure("instructions", "instructions"), Figure("calls", "system calls", decimals=1)) if lengths else ()
    latency = (Figure("p50", "p50 us", 1e6), Figure("p99", "p99 us", 1e6))
    connection = Figure("cpu", "CPU us each", 1e6, ratio=True)
    echo = Figure("cpu", "CPU us each", 1e6, 1, ratio=True)
    bulk = (Figure("rate", "MB/s", 1e-6, ratio=True), Figure("cpu", "CPU s/GB", 1e9, 2, ratio=True))
    memory = Figure("memory", "KB each", 1e-3, 2, ratio=True)
    datagram = Figure("cpu", "CPU us each", 1e6, 2, ratio=True)
    lost = Figure("lost", "% lost", 100, 1)
    every = (
        Measure("connect", "connect", 50, "Connections: open, echo, close; 50 at once", (rate, connection, *counts)),
        Measure("echo-1", "echo", 1, "Echo of 64 bytes on 1 connection", (rate, *latency, echo, *counts)),
        Measure("echo-50", "echo", 50, "Echo of 64 bytes on 50 connections", (rate, *latency, echo, *counts)),
        Measure("bulk-1", "bulk", 1, "Bulk download, 1 stream", bulk),
        Measure("bulk-8", "bulk", 8, "Bulk download, 8 streams", bulk),
        Measure("idle", "idle", idle, f"Memory of {idle} idle connections", (memory,)),
        *(
            Measure(f"udp-{flows}-{size}-{rate}", "udp", flows,
                    f"Datagrams of {size} bytes there and back, {flows} associations, {rate:,} a second each way",
                    (datagram, lost, *counts), size=size, rate=rate)
            for flows, size, rate in ((1, 100, 20_000), (1, 1200, 20_000), (200, 100, 20_000), (1, 100, 50_000))
        ),
    )  # fmt: skip
    return [replace(each, length=lengths.get(each.kind)) for each in every if each.kind in kinds]


# Seconds for the last connections to end, and without load.
CLOSING = 1.0
IDLE = 8.0


class Failure(Exception):
    """One measure of one contender did not work; the text says why."""


class Bench:
    """Takes single measures; keeps what is the same for all of them.

    `directory` holds the proxies' files, `seconds` is the length of the measured part.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory = directory
        self.seconds = seconds
        self.quiet = min(0.05, seconds / 10)
        self._runs = 0

    def measure(self, measure: Measure, contender: Contender, place: Loopback) -> Result:
        """One measure of one contender, freshly started: an earlier measure's heap would hide idle memory."""
        running = Running(contender, place, self._directory())
        with self._ready(measure, running) as load:
            return self._take(measure, load, running)

    def count(self, measure: Measure, contender: Contender, place: Loopback) -> Result:
        """Instructions and system calls of each operation; empty if they are not counted for this measure."""
        if measure.length is None or not contender.parts:
            return {}
        counts = {}
        for tool in COUNTERS:
            directory = self._directory()
            counter = tool(directory)
            running = Running(contender, place, directory, counter.prefix)
            try:
                with self._ready(measure, running, measure.length) as load:
                    counts[counter.key] = self._count(counter, load, running)
            except CountingError as error:
                raise Failure(str(error)) from error
        return counts

    def _count(self, counter: Counter, load: "subprocess.Popen[str]", running: Running) -> float:
        """What an operation costs, without what the proxy does by the clock in the same time."""
        counter.begin(running.sessions)
        start = time.monotonic()
        result = self._go(load, running)
        if result["errors"]:
            raise Failure(f"{result['errors']:.0f} connections refused or reset while counting")
        time.sleep(CLOSING)
        loaded = time.monotonic() - start
        total = counter.end()
        counter.begin(running.sessions)
        start = time.monotonic()
        time.sleep(IDLE)
        idle = time.monotonic() - start
        return without_clock(total, counter.end(), loaded / idle) / result["count"]

    def _directory(self) -> Path:
        self._runs += 1
        directory = self.directory / str(self._runs)
        directory.mkdir()
        return directory

    @contextlib.contextmanager
    def _ready(self, measure: Measure, running: Running, count: int | None = None) -> "Iterator[subprocess.Popen[str]]":
        """Run a contender, warmed up, with a load generator that waits to be told to go.

        The load then lasts `self.seconds`, or `count` operations.
        """
        place = running.place
        # A destination of its own for each run, so that none searches ports among the last one's TIME_WAITs.
        target = f"127.1.{self._runs >> 8 & 255}.{self._runs & 255}"
        if measure.kind == "udp":  # whose answers come from the address that was asked
            target = "127.0.0.1"
        with running:
            plan = Plan(
                measure=measure.kind,
                connections=measure.connections,
                seconds=self.seconds,
                target=(target, place.target_port),
                proxy=running.proxy,
                mark=MARK if running.redirected else 0,
                size=measure.size,
                rate=measure.rate,
            )
            if count is not None:
                plan = replace(plan, seconds=COUNTED_WITHIN, count=count, patience=PATIENCE)
            load = place.popen([sys.executable, "-m", "bench.load", json.dumps(asdict(plan))], "load")
            try:
                first = self._answer(load, running)
                if first != "ready\n":
                    raise Failure(json.loads(first)["failed"])
                yield load
            except Failure as failure:
                words = running.last_words()
                raise Failure(f"{failure}; it wrote: {words}" if words else str(failure)) from failure
            finally:
                load.kill()
                load.communicate()

    def _go(self, load: "subprocess.Popen[str]", running: Running) -> dict[str, float]:
        """Let the load generator do the measured part; returns its result."""
        assert load.stdin is not None
        load.stdin.write("go\n")
        load.stdin.flush()
        result: dict[str, float] = json.loads(self._answer(load, running))
        if "failed" in result:
            raise Failure(result["failed"])
        if not result["count"]:
            raise Failure("nothing got through")
        return result

    def _take(self, measure: Measure, load: "subprocess.Popen[str]", running: Running) -> Result:
        """Read CPU or memory around the measured part, and make the figures."""
        idle = measure.kind == "idle"
        sessions = running.sessions
        cpu = accounting.settled_cpu_seconds(sessions, self.quiet)
        memory = accounting.memory_bytes(sessions) if idle else 0
        result = self._go(load, running)
        count = result["count"]
        if not idle:
            result["rate"] = count / result["seconds"]
        if sessions and idle:
            accounting.settled_cpu_seconds(sessions, self.quiet)
            result["memory"] = (accounting.memory_bytes(sessions) - memory) / count
        elif sessions:
            if measure.kind == "connect":  # closing costs too: complete only once the proxy is quiet
                now = accounting.settled_cpu_seconds(sessions, self.quiet)
            else:
                now = accounting.cpu_seconds(sessions)
            result["cpu"] = (now - cpu) / count
        return result

    @staticmethod
    def _answer(load: "subprocess.Popen[str]", running: Running) -> str:
        """The load generator's next line; it never writes two before it is told to go on."""
        assert load.stdout is not None
        while not select.select([load.stdout], [], [], 0.1)[0]:
            if running.ended:
                raise Failure("it ended")
        if not (line := load.stdout.readline()):
            raise Failure("the load generator ended without a result")
        return line


@dataclass(frozen=True)
class Reporter:
    """Shows the progress of rounds: the next output overwrites `progress`, and leaves `say`."""

    progress: Callable[[str], None]
    say: Callable[[str], None]


def run(
    bench: Bench,
    place: Loopback,
    contenders: Sequence[Contender],
    wanted: Sequence[Measure],
    *,
    rounds: int,
    reporter: Reporter,
) -> Mapping[str, Mapping[str, list[Result | None]]]:
    """All rounds in a place, interleaved (A B C, A B C, ...): measure -> contender -> result of each round.

    Whatever drifts on a shared machine then hits all alike. A failed measure is told and leaves None.
    """
    results: dict[str, dict[str, list[Result | None]]] = {
        measure.name: {each.name: [] for each in contenders if each.parts or measure.kind != "idle"}
        for measure in wanted
    }
    for number in range(1, rounds + 1):
        for measure in wanted:
            for contender in contenders:
                if contender.name not in results[measure.name]:
                    continue
                label = f"{place.name}: round {number} of {rounds}, {measure.name}, {contender.name}"
                reporter.progress(label)
                result: Result | None
                try:
                    result = bench.measure(measure, contender, place)
                    if number == 1:
                        result = {**result, **bench.count(measure, contender, place)}
                except Failure as failure:
                    result = None
                    reporter.say(f"! {label}: {failure}")
                else:
                    if result["errors"]:
                        reporter.say(f"! {label}: {result['errors']:.0f} connections refused or reset")
                results[measure.name][contender.name].append(result)
    return results

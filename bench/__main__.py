"""The benchmark's command line. README.md in this directory tells the method."""

import argparse
import json
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .contenders import CHAINS, SOCKS, STRAIGHT, UDP, Contender, from_command
from .counting import LENGTHS, QUICK_LENGTHS, missing
from .places import Loopback, Namespace, PlaceError
from .report import Result, Table, machine, render
from .rounds import KINDS, Bench, Measure, Reporter, measures, run

DESCRIPTION = """\
Measures usocksd beside other SOCKS servers over loopback, and transocks + usocksd beside redsocks +
microsocks behind an iptables REDIRECT in a network namespace: all in one run, in interleaved rounds.
Nothing of the host is changed."""


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="bench/run", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", metavar="NAME,...", type=names, help="only these contenders (default: all installed)")
    add("--measure", metavar="KIND,...", type=names, help=f"of {','.join(KINDS)} (all; if counted, connect,echo)")
    add("--instructions", action="store_true", help="count instructions and system calls, too (valgrind, strace)")
    add("--rounds", type=int, default=5, metavar="N", help="interleaved repetitions (default: 5)")
    add("--seconds", type=float, default=1.5, metavar="S", help="length of each measure (default: 1.5)")
    add("--idle", type=int, default=3000, metavar="N", help="number of idle connections (default: 3000)")
    server = (
        "one more SOCKS5 server on 127.0.0.1 (may be repeated); in COMMAND {port}, {config} (a usocksd.toml "
        "for that port) and {dir} (for its files) are filled in"
    )
    add("--server", metavar="NAME=COMMAND", action="append", default=[], help=server)
    add("--json", metavar="FILE", type=Path, help="write every single result, and about the machine")
    add("--quick", action="store_true", help="see that all works: one short round, its figures mean nothing")
    options = parser.parse_args(argv)
    if options.instructions and (reason := missing()):
        parser.error(f"--instructions: {reason}")
    options.measure = options.measure or (("connect", "echo") if options.instructions else KINDS)
    options.lengths = LENGTHS if options.instructions else {}
    options.extra = []
    for text in options.server:
        name, equals, command = text.partition("=")
        if not equals or not command.strip():
            parser.error(f"--server {text!r}: expected NAME=COMMAND")
        options.extra.append(from_command(name, command))
    known = dict.fromkeys(each.name for each in (*SOCKS, *options.extra, *CHAINS))
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only {name}: expected one of {', '.join(known)}")
    for kind in options.measure:
        if kind not in KINDS:
            parser.error(f"--measure {kind}: expected one of {', '.join(KINDS)}")
    if options.quick:
        options.rounds, options.seconds, options.idle = 1, 0.1, 50
        options.lengths = QUICK_LENGTHS if options.instructions else {}
    if options.rounds < 1 or options.seconds <= 0 or options.idle < 1:
        parser.error("--rounds, --seconds and --idle must be above zero")
    return options


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    progress("")
    print(text, flush=True)


def present(contenders: Sequence[Contender], only: Sequence[str] | None) -> list[Contender]:
    """The requested contenders that can be measured here; prints which are left out, and why."""
    chosen = []
    for contender in contenders:
        if only is not None and contender.name not in only:
            continue
        if reason := contender.missing():
            say(f"left out: {contender.name}: {reason}")
        else:
            chosen.append(contender)
    return chosen


def show(
    place: Loopback,
    wanted: Sequence[Measure],
    results: Mapping[str, Mapping[str, Sequence[Result | None]]],
    reference: str,
) -> None:
    say(f"\n{place.title}; ratios are to {reference}\n")
    for measure in wanted:
        if results[measure.name]:
            say(render(Table(measure.title, measure.figures, results[measure.name], reference)) + "\n")


def raise_descriptor_limit() -> None:
    """For the ends and the proxies, which inherit it: 3000 idle connections are 6000 descriptors."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a measure failed."""
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # out through all `with` blocks: nothing stays
    raise_descriptor_limit()
    wanted = measures(options.measure, options.idle, options.lengths)
    about = machine()
    say(f"{about['cpu']}, Linux {about['kernel']}, Python {about['python']}")
    record: dict[str, Any] = {"machine": about, "seconds": options.seconds, "results": {}}
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        bench = Bench(Path(name), options.seconds)
        streams = [each for each in wanted if each.kind != "udp"]
        datagrams = [each for each in wanted if each.kind == "udp"]
        for kind, contenders, some, reference in (
            (Loopback, (*SOCKS, *options.extra), streams, "microsocks"),
            (Namespace, CHAINS, streams, "redsocks+microsocks"),
            (Loopback, (*UDP, *options.extra), datagrams, "dante"),
        ):
            if not some:
                continue
            chosen = present(contenders, options.only)
            if not chosen or (kind is Namespace and chosen == [STRAIGHT]):
                continue
            try:
                with kind(Path(name)) as place:
                    results = run(bench, place, chosen, some, rounds=options.rounds, reporter=Reporter(progress, say))
            except PlaceError as error:
                left = ", ".join(each.name for each in chosen if each.parts)
                say(f"left out: {left}: {error}")
                continue
            show(place, some, results, reference)
            record["results"][f"{place.name}, UDP" if some is datagrams else place.name] = results
            failed |= any(None in rounds for rows in results.values() for rounds in rows.values())
    say(f"Medians of {options.rounds} rounds; a ratio is taken within a round, its range is over the rounds.")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""usocksd diff OLD NEW: which recorded requests another configuration would decide differently. See docs/explain.md."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import json
import lzma
import os
import re
import shlex
import sys
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import IO, Any, Final, TypeAlias

from usocksd.config import Config
from usocksd.errors import Error
from usocksd.log.words import counted
from usocksd.net.address import join_port
from usocksd.records import AccessRecord, Skipped, lines_of
from usocksd.replay import Change, Group, Outcome, Replay
from usocksd.serve.verbs.client import visible
from usocksd.settings import loader as configuration

_SAME, _DIFFERENT, _TROUBLE, _INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = """\
Tell which of the connections in an access log would be decided differently if OLD were replaced by NEW:
denied or allowed, sent out through another pool, or able to reach other addresses of their name; by rule, with an
example of each. Denied connections are among them. What the log can't tell is unknown, and counted as that.

Both files are judged on this host, as it is now: run this where the daemon runs.

Exit status: 0 if nothing would be decided differently, 1 if something would be or is unknown, 2 for trouble (a
faulty file, no log, no request in it)."""

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_OPENERS: Final[dict[str, Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_TITLES: Final = {
    Change.DENIED: "would be denied",
    Change.ALLOWED: "would be allowed",
    Change.POOL: "would leave from another pool",
    Change.ADDRESSES: "could reach other addresses of their name",
    Change.UNKNOWN: "unknown",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb to the command line."""
    parser = subparsers.add_parser(
        "diff",
        help="tell what a change of the configuration would do, by the connections of an access log",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("old", metavar="OLD", help="the configuration under which the log was written")
    parser.add_argument("new", metavar="NEW", help="the configuration that is to replace it")
    parser.add_argument(
        "--log",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="access logs, also .gz, .bz2 and .xz; - is standard input (default: [log] filename of OLD)",
    )
    parser.add_argument(
        "--since",
        metavar="WHEN",
        type=_parse_since,
        help="leave out what is older: 90m, 12h, 7d, 2w, or a time like 2026-11-20 or 2026-11-20T08:00 (local time)",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_parse_limit,
        default=5,
        help="show at most so many groups of each kind, the largest (default 5; 0: all)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all groups")
    parser.set_defaults(run=_run)


def _parse_since(text: str) -> str:
    """As the log writes times."""
    if match := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        moment = datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
    else:
        try:
            moment = datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"expected 12h, 7d or a time like 2026-11-20, not {text!r}") from None
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z"


def _parse_limit(text: str) -> int | None:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}")
    return int(text) or None


def _run(args: argparse.Namespace) -> int:
    try:
        return _diff(args)
    except Error as error:
        trouble = str(error).split("\n")
    except KeyboardInterrupt:
        return _INTERRUPTED
    for line in trouble:
        print(f"usocksd diff: {visible(line)}", file=sys.stderr)
    return _TROUBLE


def _diff(args: argparse.Namespace) -> int:
    # Not for the command lines of other verbs: trio and what it needs take a tenth of a second to load.
    from usocksd.commands.parts import make_policy, make_users  # noqa: PLC0415
    from usocksd.host.addresses import HostAddresses  # noqa: PLC0415

    old, new = (configuration.load(Config, path) for path in (args.old, args.new))
    logs: list[str] = args.log or ([old.log.filename] if old.log.filename else [])
    if not logs:
        raise Error(
            f"{args.old} has no [log] filename: name the access log with --log, or have it on standard input, as in"
            f" journalctl -u usocksd -o cat | usocksd diff {shlex.join([args.old, args.new])} --log -"
        )
    is_local = HostAddresses().is_local
    before, after = (make_policy(config, make_users(config), is_local) for config in (old, new))
    replay = Replay(before, after)
    for path in logs:
        with _open(path) as file:
            replay.read(lines_of(file.readline), since=args.since or "")
    if not replay.requests:
        raise Error(_nothing(replay, args.since))
    pools = _changed_pools(old, new, replay)
    places = _places(old), _places(new)
    if args.json:
        print(json.dumps(_as_json(replay, args, logs, pools, places)), flush=True)
    else:
        print("\n".join(_as_text(replay, args, pools, places)), flush=True)
    return _SAME if replay.same == replay.requests and not pools else _DIFFERENT


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    opener = _OPENERS.get(os.path.splitext(path)[1], open)
    try:
        if path == "-":
            yield sys.stdin.buffer
        else:
            with opener(path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Error(f"{path}: {reason}") from None


def _nothing(replay: Replay, since: str | None) -> str:
    """Why there is nothing to decide."""
    text = "no request is recorded in the log"
    if since:
        text += f" since {since}"
    if unreadable := replay.skipped[Skipped.UNREADABLE]:
        text += f"; {counted(unreadable, 'line')} could not be read (a journal has to be printed with -o cat)"
    return text


_Places: TypeAlias = dict[str, int | None]


def _places(config: Config) -> _Places:
    """The lines of the rules, by name."""
    return {rule.name or f"rule {at + 1}": config.line_of_rule(at) for at, rule in enumerate(config.rule)}


def _named(rule: str, places: _Places) -> str:
    line = places.get(rule)
    return rule if line is None else f"{rule} (line {line})"


def _changed_pools(old: Config, new: Config, replay: Replay) -> dict[str, int]:
    """The pools that are not what they were and requests leave from, with the number of these."""
    before, after = old.pools(), new.pools()
    return {
        name: count
        for name, count in sorted(replay.leaving.items())
        if name in before and name in after and before[name] != after[name]
    }


# ---- for people


def _as_text(
    replay: Replay, args: argparse.Namespace, pools: dict[str, int], places: tuple[_Places, _Places]
) -> Iterator[str]:
    unknown = replay.count(Change.UNKNOWN)
    different = replay.requests - replay.same - unknown
    yield f"{visible(args.old)} -> {visible(args.new)}"
    first, last = _until_second(replay.first), _until_second(replay.last)
    yield f"{counted(replay.requests, 'request')}, recorded {first} to {last}"
    yield f"{replay.same:,} decided the same, {different:,} differently, {unknown:,} unknown"
    for change in Change:
        yield from _section(change, replay.groups(change), args.limit, places)
    yield from _notes(replay, args, pools)


def _section(
    change: Change, groups: Sequence[Group], limit: int | None, places: tuple[_Places, _Places]
) -> Iterator[str]:
    if not groups:
        return
    total = sum(group.count for group in groups)
    yield ""
    yield f"{total:,} {_TITLES[change]}"
    for group in groups[:limit]:
        yield f"{group.count:>10,}  {visible(_rules(group, *places))}"
        yield f"{'':>10}  e.g. {visible(_example(group))}"
    if rest := groups[len(groups[:limit]) :]:
        yield f"{sum(group.count for group in rest):>10,}  in {counted(len(rest), 'more group')} (--limit 0 shows all)"


def _rules(group: Group, old: _Places, new: _Places) -> str:
    change, rule, other, old_pool, new_pool = group.difference
    before, after = _named(rule, old), _named(other, new)
    match change:
        case Change.POOL:
            return f"{before}, pool {old_pool} -> {after}, pool {new_pool}"
        case Change.UNKNOWN:
            return f"{_verdict(group.old, old)} -> {_verdict(group.new, new)}: {group.new.why or group.old.why}"
    return f"{before} -> {after}"


def _verdict(outcome: Outcome, places: _Places) -> str:
    rule = _named(outcome.rule, places)
    match outcome.allowed:
        case None if outcome.rule:
            return f"name allowed by {rule}"
        case None:
            return "unknown"
        case True:
            return f"allowed by {rule}"
    return f"denied by {rule}"


def _example(group: Group) -> str:
    text = _request(group.example)
    if group.difference.change is Change.ADDRESSES:
        before, after = group.old.reach, group.new.reach
        lost, won = [each for each in before if each not in after], [each for each in after if each not in before]
        text += f", without {', '.join(lost)}" if lost else ""
        text += f", with {', '.join(won)}" if won else ""
    return text


def _request(record: AccessRecord) -> str:
    request = record.request
    who = request.client if request.user is None else f"{request.client} ({request.user})"
    to = "" if request.host is None else f" to {join_port(request.host, request.port)}"
    return f"{who}{to}, {_until_second(record.at)}"


def _until_second(at: str) -> str:
    """2026-11-23T09:47:58.777489Z without its fraction."""
    return re.sub(r"\.[0-9]+", "", at)


def _notes(replay: Replay, args: argparse.Namespace, pools: dict[str, int]) -> Iterator[str]:
    notes = [
        f"pool {name} is another one in {args.new}: {count:,} of the requests would leave from it"
        for name, count in pools.items()
    ]
    if replay.disagreement is not None:
        notes.append(
            f"{replay.disagreeing:,} were decided otherwise than {args.old} decides now (e.g. "
            f"{_request(replay.disagreement)}): it was not in force then, or the host had other addresses"
        )
    if unasked := replay.skipped[Skipped.NO_REQUEST]:
        notes.append(f"{counted(unasked, 'connection')} came to no request")
    if unreadable := replay.skipped[Skipped.UNREADABLE]:
        notes.append(f"{counted(unreadable, 'line')} could not be read")
    if notes:
        yield ""
        for note in notes:
            yield visible(f"note: {note}")


# ---- for programs


def _as_json(
    replay: Replay,
    args: argparse.Namespace,
    logs: Sequence[str],
    pools: dict[str, int],
    places: tuple[_Places, _Places],
) -> dict[str, Any]:
    unknown = replay.count(Change.UNKNOWN)
    return {
        "old": args.old,
        "new": args.new,
        "logs": list(logs),
        "first": replay.first,
        "last": replay.last,
        "requests": replay.requests,
        "same": replay.same,
        "different": replay.requests - replay.same - unknown,
        "unknown": unknown,
        "disagreeing": replay.disagreeing,
        "no_request": replay.skipped[Skipped.NO_REQUEST],
        "unreadable": replay.skipped[Skipped.UNREADABLE],
        "pools_changed": pools,
        "changes": [
            {
                "change": change.value,
                "count": group.count,
                "old": _outcome(group.old, group.difference.old, places[0]),
                "new": _outcome(group.new, group.difference.new, places[1]),
                "example": _record(group.example),
            }
            for change in Change
            for group in replay.groups(change)
        ],
    }


def _outcome(outcome: Outcome, rule: str, places: _Places) -> dict[str, Any]:
    return {
        "allowed": outcome.allowed,
        "rule": rule or None,
        "line": places.get(rule),
        "pool": outcome.pool or None,
        "addresses": list(outcome.reach),
        "unknown": outcome.why or None,
    }


def _record(record: AccessRecord) -> dict[str, Any]:
    request = record.request
    return {
        "at": record.at,
        "client": request.client,
        "user": request.user,
        "host": request.host,
        "port": request.port,
        "candidates": None if request.candidates is None else list(request.candidates),
        "allowed": record.allowed,
    }

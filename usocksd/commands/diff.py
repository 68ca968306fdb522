"""usocksd diff OLD NEW: which recorded requests another configuration would decide differently. See docs/explain.md."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import lzma
import os
import re
import shlex
import sys
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import IO, Any, Final

from usocksd.acl import CONNECT
from usocksd.config import UsocksdConfig
from usocksd.errors import Error
from usocksd.net.address import join_port
from usocksd.records import AccessRecord, Skipped, lines_of
from usocksd.replay import Change, Outcome, Replay
from usocksd.serve.verbs.client import add_verb, print_json, run_verb, visible
from usocksd.settings import loader as configuration
from usocksd.settings.loader import counted

Json = dict[str, Any]

_DESCRIPTION = """\
Tell which requests in an access log would be decided differently if NEW replaced OLD: denied or allowed, leaving from
another pool, or able to reach other addresses of their name; by rule, with an example of each. Denied requests are
included. What the log can't tell is unknown, and counted as that.

Both files are judged on this host as it is now: run this where the daemon runs.

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
    what = "tell what a change of the configuration would do to the requests in an access log"
    parser = add_verb(subparsers, "diff", what, _DESCRIPTION)
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
        help="how many groups of each kind to show, the largest first (default 5; 0: all)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all groups")
    parser.set_defaults(run=lambda args: run_verb("usocksd diff: ", lambda: _diff(args), failed=2))


def _parse_since(text: str) -> str:
    """A time as the log writes it."""
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


def _diff(args: argparse.Namespace) -> int:
    # Imported here: trio takes a tenth of a second to load, which other verbs do not need.
    from usocksd.commands.serve import make_policy, make_users  # noqa: PLC0415
    from usocksd.host.addresses import HostAddresses  # noqa: PLC0415

    old, new = (configuration.load(UsocksdConfig, path) for path in (args.old, args.new))
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
        since = f" since {args.since}" if args.since else ""
        unread = counted(replay.skipped[Skipped.UNREADABLE], "line")
        hint = f"; {unread} could not be read (a journal has to be printed with -o cat)"
        raise Error(f"no request is recorded in the log{since}{hint if replay.skipped[Skipped.UNREADABLE] else ''}")
    answer = {"old": args.old, "new": args.new, "logs": logs, **_summary(replay, old, new)}
    if args.json:
        print_json(answer)
    else:
        print("\n".join(map(visible, _as_text(answer, replay.disagreement, args.limit))), flush=True)
    return 0 if replay.same == replay.requests and not answer["pools_changed"] else 1


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


# ---- for programs


def _summary(replay: Replay, old: UsocksdConfig, new: UsocksdConfig) -> Json:
    unknown = replay.count(Change.UNKNOWN)
    lines = [
        {rule.name or f"rule {at + 1}": config.line_of_rule(at) for at, rule in enumerate(config.rule)}
        for config in (old, new)
    ]
    pools = old.pools(), new.pools()
    return {
        "first": replay.first,
        "last": replay.last,
        "requests": replay.requests,
        "same": replay.same,
        "different": replay.requests - replay.same - unknown,
        "unknown": unknown,
        "disagreeing": replay.disagreeing,
        "no_request": replay.skipped[Skipped.NO_REQUEST],
        "unreadable": replay.skipped[Skipped.UNREADABLE],
        "pools_changed": {
            name: count
            for name, count in sorted(replay.leaving.items())
            if name in pools[0] and name in pools[1] and pools[0][name] != pools[1][name]
        },
        "changes": [
            {
                "change": change.value,
                "count": group.count,
                "old": _outcome(group.old, lines[0]),
                "new": _outcome(group.new, lines[1]),
                "example": _record(group.example),
            }
            for change in Change
            for group in replay.groups(change)
        ],
    }


def _outcome(outcome: Outcome, lines: Mapping[str, int | None]) -> Json:
    return {
        "allowed": outcome.allowed,
        "rule": outcome.rule or None,
        "line": lines.get(outcome.rule),
        "pool": outcome.pool or None,
        "addresses": list(outcome.reach),
        "unknown": outcome.why or None,
    }


def _record(record: AccessRecord) -> Json:
    request = record.request
    return {
        "at": record.at,
        "client": request.client,
        "user": request.user,
        "host": request.host,
        "port": request.port,
        "command": request.command,
        "candidates": None if request.candidates is None else list(request.candidates),
        "allowed": record.allowed,
    }


# ---- for people


def _as_text(answer: Json, disagreement: AccessRecord | None, limit: int | None) -> Iterator[str]:
    first, last = _until_second(answer["first"]), _until_second(answer["last"])
    yield f"{answer['old']} -> {answer['new']}"
    yield f"{counted(answer['requests'], 'request')}, recorded {first} to {last}"
    yield f"{answer['same']:,} decided the same, {answer['different']:,} differently, {answer['unknown']:,} unknown"
    for kind, title in _TITLES.items():
        groups = [group for group in answer["changes"] if group["change"] == kind.value]
        if not groups:
            continue
        yield ""
        yield f"{sum(group['count'] for group in groups):,} {title}"
        for group in groups[:limit]:
            yield f"{group['count']:>10,}  {_rules(group)}"
            yield f"{'':>10}  e.g. {_example(group)}"
        if rest := groups[len(groups[:limit]) :]:
            count = sum(group["count"] for group in rest)
            yield f"{count:>10,}  in {counted(len(rest), 'more group')} (--limit 0 shows all)"
    if notes := list(_notes(answer, disagreement)):
        yield ""
        yield from (f"note: {note}" for note in notes)


def _rules(group: Json) -> str:
    """The rules that differ."""
    old, new = group["old"], group["new"]
    match group["change"]:
        case Change.POOL.value:
            return f"{_rule(old)}, pool {old['pool']} -> {_rule(new)}, pool {new['pool']}"
        case Change.UNKNOWN.value:
            return f"{_verdict(old)} -> {_verdict(new)}: {new['unknown'] or old['unknown']}"
    return f"{_rule(old)} -> {_rule(new)}"


def _rule(outcome: Json) -> str:
    rule = outcome["rule"] or ""
    return rule if outcome["line"] is None else f"{rule} (line {outcome['line']})"


def _verdict(outcome: Json) -> str:
    if outcome["allowed"] is None:
        return f"name allowed by {_rule(outcome)}" if outcome["rule"] else "unknown"
    return f"{'allowed' if outcome['allowed'] else 'denied'} by {_rule(outcome)}"


def _example(group: Json) -> str:
    text = _request(group["example"])
    if group["change"] == Change.ADDRESSES.value:
        before, after = group["old"]["addresses"], group["new"]["addresses"]
        lost, won = [each for each in before if each not in after], [each for each in after if each not in before]
        text += f", without {', '.join(lost)}" if lost else ""
        text += f", with {', '.join(won)}" if won else ""
    return text


def _request(record: Json) -> str:
    client = record["client"] if record["user"] is None else f"{record['client']} ({record['user']})"
    to = "" if record["host"] is None else f" to {join_port(record['host'], record['port'])}"
    how = "" if record["command"] == CONNECT else f" by {record['command']}"
    return f"{client}{to}{how}, {_until_second(record['at'])}"


def _until_second(at: str) -> str:
    """2026-11-23T09:47:58.777489Z without its fraction."""
    return re.sub(r"\.[0-9]+", "", at)


def _notes(answer: Json, disagreement: AccessRecord | None) -> Iterator[str]:
    for name, count in answer["pools_changed"].items():
        yield f"pool {name} is another one in {answer['new']}: {count:,} of the requests would leave from it"
    if disagreement is not None:
        yield (
            f"{answer['disagreeing']:,} were decided otherwise than {answer['old']} decides now (e.g. "
            f"{_request(_record(disagreement))}): it was not in force then, or the host had other addresses"
        )
    if answer["no_request"]:
        yield f"{counted(answer['no_request'], 'connection')} came to no request"
    if answer["unreadable"]:
        yield f"{counted(answer['unreadable'], 'line')} could not be read"

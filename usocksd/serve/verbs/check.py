"""NAME check: the faults and warnings of a configuration, for an editor, a pipeline, or a unit before the start.

It prints every fault, then every warning, then the settings in force. It only opens the files that loading opens: it
binds no socket, writes no log, and asks no name server.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import attrs

from usocksd.errors import ConfigError, Fault
from usocksd.net.address import join_port
from usocksd.serve.daemon import Daemon, Remarks, Subparsers
from usocksd.serve.verbs.client import visible
from usocksd.settings import loader as configuration
from usocksd.settings.common import CommonConfig
from usocksd.settings.loader import counted

_DESCRIPTION = """\
Check a configuration on this host, as this user, and change nothing. Print every fault (the daemon would not start),
every warning (a setting would not work here, or is hardly meant), and the settings in force, defaults included.
Passwords are never shown.

Faults, warnings and notes go to stderr, one a line, in the form that compilers use and editors know:
    FILE:LINE: error: KEY: VALUE: what is expected
    FILE:LINE: warning: KEY: VALUE: what is wrong with it: what would be right
    FILE:LINE: note: KEY: VALUE: what it does to everybody, which may be intended
    FILE:LINE:COLUMN: error: what is not TOML
LINE is 1 if the file does not have the key. The settings go to stdout. With --json all goes to stdout: an object
with "file", "ok", "faults", "warnings" and "notes" (lists of "file", "line", "column", "key", "value" and
"expected"), and "settings" (null when there are faults).

Exit status: 0 if there are no faults, and with --strict no warnings; else 1; 2 for a wrong command line."""


@attrs.frozen
class Diagnostic:
    """A fault or a warning, and where to go to mend it."""

    file: str
    line: int
    column: int | None
    key: str
    value: str
    expected: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.key, self.value, self.expected)))

    @property
    def place(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


def add_parser(subparsers: Subparsers, daemon: Daemon[Any]) -> None:
    """Add this verb to a command line that has an option -f, the configuration."""
    parser = subparsers.add_parser(
        "check",
        help="look for faults of a configuration, and for what it can't do on this host",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-f", metavar="CONFIG", default=argparse.SUPPRESS, help="the same as FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--strict", action="store_true", help="warnings count as faults")
    parser.add_argument("-q", "--quiet", action="store_true", help="print faults and warnings only")
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help=f"the configuration (default: that of -f, or else {daemon.file})"
    )
    parser.set_defaults(run=partial(_run, daemon))


def _run(daemon: Daemon[Any], args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    path: str | None = args.file or args.f
    source, file = daemon.source(path), path or daemon.file
    found: dict[str, list[Diagnostic]] = {"fault": [], "warning": [], "note": []}
    settings: dict[str, object] | None = None
    if source is None:
        found["warning"].append(Diagnostic(file, 1, None, "file", "", "there is none, so the defaults are judged"))
    try:
        text, file = daemon.text(path)
        config = configuration.parse(daemon.config, text, file)
        remarks: Remarks = daemon.call(daemon.examine, config, source)
        found["warning"] += _diagnostics(file, remarks.warnings)
        found["note"] += _diagnostics(file, remarks.notes)
        if remarks.error is not None:
            raise remarks.error
        settings = effective(config)
    except ConfigError as error:
        found["fault"] += _diagnostics(error.source, error.faults)
    ok = not found["fault"] and not (args.strict and found["warning"])
    if args.json:
        lists = {f"{kind}s": [attrs.asdict(each) for each in some] for kind, some in found.items()}
        print(json.dumps({"file": file, "ok": ok, **lists, "settings": settings}, indent=2))
        return 0 if ok else 1
    for kind, diagnostics in found.items():
        for each in diagnostics:
            print(f"{visible(each.place)}: {'error' if kind == 'fault' else kind}: {visible(each)}", file=sys.stderr)
    if not args.quiet:
        counts = [counted(len(found[kind]), kind) for kind in ("fault", "warning")]
        _print_settings(f"{file}: {', '.join(counts)}", settings or {})
    return 0 if ok else 1


def _diagnostics(file: str, faults: Iterable[Fault]) -> list[Diagnostic]:
    return sorted((_locate(fault, file) for fault in faults), key=lambda diagnostic: diagnostic.line)


def _locate(fault: Fault, file: str) -> Diagnostic:
    """With its place. Syntax errors, and those of files that are not TOML, have a place instead of a key."""
    if match := re.fullmatch(r"line (\d+)(?:, column (\d+))?", fault.path):
        column = None if match[2] is None else int(match[2])
        return Diagnostic(file, int(match[1]), column, "", fault.value, fault.expected)
    return Diagnostic(file, fault.line or 1, None, fault.key, fault.value, fault.expected)


def effective(config: CommonConfig) -> dict[str, object]:
    """The settings in force that matter, as JSON values, by the key path that the file would have"""
    # Not for the command lines of other verbs: this loads trio, which takes a tenth of a second.
    from usocksd.settings.warnings import HostFacts, connections_of_descriptors  # noqa: PLC0415

    host = HostFacts.here(())
    port = config.metrics_default if config.metrics_port is None else config.metrics_port
    return {
        "listen": [str(listen) for _, listen in config.listen_keys],
        "metrics": [join_port(address, port) for address in config.metrics_address] if port else None,
        "metrics_if_port_is_free": config.metrics_port is None,
        "control": config.control_here,
        "workers": config.workers or host.cpus,
        "limits.connections": config.limits.connections,
        "limits.connections_by_descriptors": connections_of_descriptors(config, host),
        "limits.per_client": config.limits.per_client,
        **{f"timeouts.{name}": value for name, value in attrs.asdict(config.timeouts).items()},
        "log.filename": config.log.filename,
        config.mark_key: config.mark,
        **config.shown,
    }


def _print_settings(title: str, settings: Mapping[str, object]) -> None:
    print(visible(title))
    width = max(map(len, settings), default=0)
    for key, value in settings.items():
        print(f"  {key:{width}}  {visible(_text(key, value))}")


def _text(key: str, value: object) -> str:
    match value:
        case None | [] | ():
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g} s"
        case int() if key.startswith("timeouts."):
            return f"{value} s"
        case 0 if key.startswith("limits."):
            return "no limit of its own"
        case list() | tuple():
            return ", ".join(map(str, value))
    return str(value)

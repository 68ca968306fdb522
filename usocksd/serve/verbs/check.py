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
from usocksd.serve.verbs.client import add_file, add_verb, visible
from usocksd.settings import loader as configuration
from usocksd.settings.common import CommonConfig
from usocksd.settings.loader import counted

Json = dict[str, Any]

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


def add_parser(subparsers: Subparsers, daemon: Daemon[Any]) -> None:
    """Add this verb to a command line that has an option -f, the configuration."""
    parser = add_verb(
        subparsers, "check", "look for faults of a configuration, and for what it can't do on this host", _DESCRIPTION
    )
    add_file(parser, daemon.file)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--strict", action="store_true", help="warnings count as faults")
    parser.add_argument("-q", "--quiet", action="store_true", help="print faults and warnings only")
    parser.set_defaults(run=partial(_run, daemon))


def _run(daemon: Daemon[Any], args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    path: str | None = args.file or args.f
    source, file = daemon.source(path), path or daemon.file
    found: dict[str, list[Json]] = {"faults": [], "warnings": [], "notes": []}
    settings: Json | None = None
    if source is None:
        found["warnings"] += _locate(file, [Fault("file", "", "there is none, so the defaults are judged")])
    try:
        text, file = daemon.text(path)
        config = configuration.parse(daemon.config, text, file)
        remarks: Remarks = daemon.call(daemon.examine, config, source)
        found["warnings"] += _locate(file, remarks.warnings)
        found["notes"] += _locate(file, remarks.notes)
        if remarks.error is not None:
            raise remarks.error
        settings = effective(config)
    except ConfigError as error:
        found["faults"] += _locate(error.source, error.faults)
    ok = not found["faults"] and not (args.strict and found["warnings"])
    if args.json:
        print(json.dumps({"file": file, "ok": ok, **found, "settings": settings}, indent=2))
        return 0 if ok else 1
    for severity, kind in (("error", "faults"), ("warning", "warnings"), ("note", "notes")):
        for each in found[kind]:
            place = [str(each[key]) for key in ("file", "line", "column") if each[key] is not None]
            text = ": ".join(filter(None, (severity, each["key"], each["value"], each["expected"])))
            print(visible(f"{':'.join(place)}: {text}"), file=sys.stderr)
    if not args.quiet:
        counts = [counted(len(found[kind]), kind.removesuffix("s")) for kind in ("faults", "warnings")]
        _print_settings(f"{file}: {', '.join(counts)}", settings or {})
    return 0 if ok else 1


def _locate(file: str, faults: Iterable[Fault]) -> list[Json]:
    """The faults with their places. Syntax errors, and faults of files that are not TOML, have a place instead of a
    key.
    """
    found = []
    for fault in faults:
        line, column, key = fault.line or 1, None, fault.key
        if match := re.fullmatch(r"line (\d+)(?:, column (\d+))?", fault.path):
            line, column, key = int(match[1]), match[2] and int(match[2]), ""
        about = {"key": key, "value": fault.value, "expected": fault.expected}
        found.append({"file": file, "line": line, "column": column, **about})
    return sorted(found, key=lambda each: each["line"])


def effective(config: CommonConfig) -> Json:
    """The important settings in force, as JSON values, by their key path in a file"""
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

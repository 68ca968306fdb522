"""The verbs that ask a running daemon: their command lines, and those of which the answer is a line or two.

status and connections are files of their own, loaded when they are run: they take rich.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from usocksd.log.log import LEVELS
from usocksd.serve.daemon import Daemon, Subparsers
from usocksd.serve.verbs import selection
from usocksd.serve.verbs.client import (
    Answer,
    ControlClient,
    Refused,
    add_config,
    find_control,
    print_json,
    run_verb,
    say,
)

_DAY = 86400
_RELOAD_WITHIN = 120.0
"""Seconds: new workers have to start, and a reload may be under way."""

Ask: TypeAlias = Callable[[ControlClient, argparse.Namespace], None]
"""Asks and prints. Raises Error."""


def add_parsers(subparsers: Subparsers, daemon: Daemon[Any]) -> None:
    """Add all verbs to a command line that has an option -f, the configuration file."""

    def add(verb: str, ask: str | Ask, *, help: str, description: str) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(verb, help=help, description=description, allow_abbrev=False)
        parser.add_argument(
            "--control",
            metavar="PATH",
            help=f"control socket of the daemon (default: that of its configuration, or {daemon.control}; for users who"
            " can't write there, in $XDG_RUNTIME_DIR or /tmp)",
        )
        add_config(parser, "configuration file of the daemon")
        parser.add_argument(
            "--json", action="store_true", help="print the daemon's answer: one JSON object on one line"
        )
        parser.set_defaults(run=partial(_run, daemon, verb, ask))
        return parser

    add(
        "status",
        "status",
        help="tell what the running daemon does",
        description="Tell what the running daemon does: its configuration and the result of the last reload, where it"
        " listens, its connections and their rates over half a second, and the state of each worker.",
    )
    connections = add(
        "connections",
        "connections",
        help="list the live connections",
        description="List the live connections, with their rates over half a second. tx is towards the destination.",
    )
    selection.add_options(connections, daemon.columns)
    connections.add_argument(
        "--watch",
        nargs="?",
        type=selection.parse_interval,
        const=2.0,
        metavar="SECONDS",
        help="show them again every SECONDS (2), until Ctrl-C; rates are over that time",
    )
    reload = add(
        "reload",
        _reload,
        help="read the configuration again",
        description="Read the configuration again, as SIGHUP does, and wait until the new one is in force; existing"
        " connections go on. If it has faults, print all of them: the daemon keeps the old configuration. Warnings are"
        " printed too. Exit status: 0 if the new configuration is in force, else 1.",
    )
    reload.add_argument(
        "--confirm",
        metavar="SECONDS",
        type=_parse_seconds,
        help=f"go back to the previous configuration after SECONDS, unless `{daemon.name} confirm` comes first",
    )
    add(
        "confirm",
        _confirm,
        help="keep a configuration that is on trial",
        description="Keep the configuration that `reload --confirm` has put into force for a time.",
    )
    add(
        "drain",
        _drain,
        help="stop gracefully",
        description="Stop gracefully, as SIGTERM does: accept no more connections, and end when the existing ones have"
        " ended, or after [timeouts] stop. This verb does not wait for the end.",
    )
    level = add(
        "log-level",
        _log_level,
        help="tell or change the log level",
        description="Tell which records are written: those of this level and worse. With LEVEL, change it in all"
        " processes, until the daemon reloads or ends.",
    )
    level.add_argument("level", nargs="?", choices=list(LEVELS), metavar="LEVEL", help=", ".join(LEVELS))


def _parse_seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _DAY):
        raise argparse.ArgumentTypeError(f"expected seconds, from 1 to {_DAY}, not {text!r}")
    return int(text)


def _run(daemon: Daemon[Any], verb: str, ask: str | Ask, args: argparse.Namespace) -> int:
    prefix = f"{daemon.name} {verb}: "

    def run() -> int:
        client = ControlClient(daemon.name, find_control(daemon, args, prefix))
        function: Ask = pkgutil.resolve_name(f"{__package__}.{ask}:run") if isinstance(ask, str) else ask
        try:
            function(client, args)
        except Refused as error:
            if args.json:
                print_json(error.answer)
            raise
        return 0

    return run_verb(prefix, run)


def _reload(client: ControlClient, args: argparse.Namespace) -> None:
    trial = {} if args.confirm is None else {"confirm": args.confirm}
    answer = client.ask("reload", timeout=_RELOAD_WITHIN, **trial)
    if not args.json:
        for warning in answer["warnings"]:
            say(f"{client.name} reload: ", f"warning: {warning}")
    text = f"{client.name} has reloaded: generation {answer['generation']} serves"
    if (left := answer["confirm_within"]) is not None:
        text += (
            f"\nfor {left:.0f} s: then the previous configuration comes back, unless `{client.name} confirm` comes"
            " first. Open a new connection now, to see whether it works"
        )
    _print(text, answer, args)


def _confirm(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("confirm")
    stays, none = "confirmed: the configuration stays", "nothing to confirm: no configuration is on trial"
    _print(stays if answer["confirmed"] else none, answer, args)


def _drain(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("drain")
    text = f"{client.name} accepts no more connections, and ends when those that there are have ended"
    _print(text, answer, args)


def _log_level(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("log-level", **({} if args.level is None else {"level": args.level}))
    _print(answer["level"], answer, args)


def _print(text: str, answer: Answer, args: argparse.Namespace) -> None:
    if args.json:
        print_json(answer)
    else:
        print(text)

"""The command lines of the verbs that ask a running daemon. The code of a verb is loaded when it is run."""

from __future__ import annotations

import argparse
import pkgutil
from typing import Any

from usocksd.log.log import LEVELS
from usocksd.serve.daemon import Daemon, Subparsers
from usocksd.serve.verbs import selection
from usocksd.serve.verbs.client import ControlClient, Refused, add_config, find_control, print_json, run_verb

_DAY = 86400


def add_parsers(subparsers: Subparsers, daemon: Daemon[Any]) -> None:
    """Add all verbs to a command line that has an option -f, the configuration file."""

    def add(verb: str, function: str, *, help: str, description: str) -> argparse.ArgumentParser:
        def run(args: argparse.Namespace) -> int:
            prefix = f"{daemon.name} {verb}: "

            def ask() -> int:
                client = ControlClient(daemon.name, find_control(daemon, args, prefix))
                try:
                    pkgutil.resolve_name(f"{__package__}.{function}")(client, args)
                except Refused as error:
                    if args.json:
                        print_json(error.answer)
                    raise
                return 0

            return run_verb(prefix, ask)

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
        parser.set_defaults(run=run)
        return parser

    add(
        "status",
        "status:run",
        help="tell what the running daemon does",
        description="Tell what the running daemon does: its configuration and the result of the last reload, where it"
        " listens, its connections and their rates over half a second, and the state of each worker.",
    )
    connections = add(
        "connections",
        "connections:run",
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
        "orders:reload",
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
        "orders:confirm",
        help="keep a configuration that is on trial",
        description="Keep the configuration that `reload --confirm` has put into force for a time.",
    )
    add(
        "drain",
        "orders:drain",
        help="stop gracefully",
        description="Stop gracefully, as SIGTERM does: accept no more connections, and end when the existing ones have"
        " ended, or after [timeouts] stop. This verb does not wait for the end.",
    )
    level = add(
        "log-level",
        "orders:log_level",
        help="tell or change the log level",
        description="Tell which records are written: those of this level and worse. With LEVEL, change it in all"
        " processes, until the daemon reloads or ends.",
    )
    level.add_argument("level", nargs="?", choices=list(LEVELS), metavar="LEVEL", help=", ".join(LEVELS))


def _parse_seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _DAY):
        raise argparse.ArgumentTypeError(f"expected seconds, from 1 to {_DAY}, not {text!r}")
    return int(text)

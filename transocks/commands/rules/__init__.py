"""transocks rules VERB: the redirect rules of this host, as [rules] of the configuration says. See docs/firewall.md."""

from __future__ import annotations

import argparse
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from transocks.tools import lacking
from usocksd.errors import Error
from usocksd.serve.verbs.client import visible

FAILED = 1
ADMIN = ("CAP_NET_ADMIN",)

HELP = {
    "render": "print what `apply` would load, and run nothing",
    "apply": "load the rules, in place of those of ours that are loaded",
    "confirm": "after `apply --confirm`: keep the rules",
    "verify": "say which rules are missing, changed or reordered, and which rules of others take connections before"
    " ours",
    "remove": "remove everything: rules of every mode and tool, and TPROXY's routing; reset connections that came by"
    " them",
    "hold": "with nft: apply, and load the rules again when somebody has flushed them; in the foreground, until a"
    ' signal comes. With when_down = "open" they are in force only while transocks accepts, and end with this; with'
    ' "closed", they stay',
}
NEEDS = {"render": (), "verify": (*ADMIN, "CAP_SYS_ADMIN")}
"""The capabilities of root that a verb needs, if not ADMIN."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb, which has verbs of its own, to the command line."""
    parser = subparsers.add_parser(
        "rules",
        help="render, apply, verify and remove the redirect rules",
        description="The rules that redirect connections to transocks, as [rules] of the configuration says. All but"
        " `render` need root. Exit status: 0 if all is well; 1 if not; 128 + N if signal N came.",
    )
    verbs = parser.add_subparsers(title="verbs", required=True)
    parsers = {name: _add(verbs, name) for name in HELP}
    parsers["apply"].add_argument(
        "--confirm",
        type=_seconds,
        metavar="SECONDS",
        help="the kernel ends the rules after SECONDS, unless `transocks rules confirm` comes first",
    )
    parsers["apply"].add_argument(
        "--yes",
        action="store_true",
        help="keep them without asking. Otherwise, on a terminal and without --confirm, they are on trial for a minute,"
        " and stay if you answer y",
    )
    parsers["apply"].add_argument(
        "--force",
        action="store_true",
        help="load them even if transocks does not accept connections, if none of its upstreams answers, or if its own"
        " connections, or those of an upstream on this host, would come back to it",
    )
    parsers["remove"].add_argument(
        "--keep-connections",
        action="store_true",
        help="do not reset the connections that the rules have redirected, and leave what those by nft need to go on; a"
        " later remove takes that away",
    )


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> argparse.ArgumentParser:
    def say(line: str) -> None:
        print(f"transocks rules {name}: {visible(line)}", file=sys.stderr)

    def run(args: argparse.Namespace) -> int:
        # Imported here: a daemon has the same command line, and does not need it.
        module = "hold" if name == "hold" else "verbs"
        verb: Callable[[argparse.Namespace], int] = pkgutil.resolve_name(f"{__name__}.{module}:{name}")
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _interrupt)
        try:
            if missing := lacking(*NEEDS.get(name, ADMIN)):
                raise Error(f"needs {missing}: run it as root, with sudo for example")
            return verb(args)
        except Error as error:
            for line in str(error).splitlines():
                say(line)
        except KeyboardInterrupt as interrupt:  # a change under way has been completed or undone by now
            undone = interrupt.__context__
            say(f"interrupted: {undone}" if isinstance(undone, Error) else "interrupted")
            return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        # A service manager can tell that it makes no sense to start `hold` again.
        return os.EX_CONFIG if name == "hold" else FAILED

    words = HELP[name]
    parser = verbs.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.", allow_abbrev=False)
    # The same option may stand before the verb, so here it has no default, which would replace it.
    parser.add_argument("-f", metavar="CONFIG", default=argparse.SUPPRESS, help="configuration file")
    parser.set_defaults(run=run)
    return parser


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(number)


def _seconds(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 86400:
        raise argparse.ArgumentTypeError("expected seconds, from 1 to 86400 (a day)")
    return int(value)

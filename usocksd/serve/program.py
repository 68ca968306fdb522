"""Runs the command line of a daemon: the master if there is no verb, else the verb. Exit statuses tell what failed."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from usocksd import __version__
from usocksd.errors import ConfigError
from usocksd.log.formats import FORMATS
from usocksd.log.log import LEVELS
from usocksd.serve.daemon import Daemon, Subparsers, form
from usocksd.settings.flags import SOURCE, add_flags, given, text_of
from usocksd.settings.types import LogConfig

# Errors of writing only: in verbs, of writing to standard output.
_NOT_WRITTEN = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_TROUBLE = 2


def main(daemon: Daemon[Any], add_verbs: Callable[[Subparsers], None], argv: Sequence[str] | None = None) -> int:
    """Run the command line; `add_verbs` adds the daemon's verbs, each of which sets `run`. Returns the exit status."""
    parser = make_parser(daemon, add_verbs)
    args = parser.parse_args(argv)
    flags = given(args, daemon.flags)
    if flags and "run" in args:
        parser.error(f"{flags[0]} is for the daemon, not for its verbs, which read the configuration file")
    if flags and args.f is not None:
        parser.error(f"{flags[0]} and -f: expected one of them (--print-config prints a file for the flags)")
    if not flags:
        return run_verb(daemon.name, args.run, args) if "run" in args else _run_master(daemon, args)
    try:
        text = text_of(args, daemon.flags, daemon.config)
    except ConfigError as error:
        parser.error(str(error))
    if args.print_config:
        return run_verb(daemon.name, lambda _: print(text, end="") or 0, args)
    return _run_master(daemon, args, text)


def make_parser(daemon: Daemon[Any], add_verbs: Callable[[Subparsers], None]) -> argparse.ArgumentParser:
    """The parser of the daemon's command line."""
    # Flags of the originals have one dash; two are accepted too.
    parser = argparse.ArgumentParser(daemon.name, description=daemon.description, allow_abbrev=False)
    need = "required" if daemon.file_required else "optional"
    parser.add_argument("-f", metavar="CONFIG", help=f"configuration file (default {daemon.file}, which is {need})")
    parser.add_argument("-logfile", "--logfile", metavar="FILE", help="write the log to FILE, not to stderr")
    parser.add_argument("-loglevel", "--loglevel", choices=list(LEVELS), metavar="LEVEL", help=", ".join(LEVELS))
    parser.add_argument("-logformat", "--logformat", choices=list(FORMATS), metavar="FORMAT", help=", ".join(FORMATS))
    add_flags(parser, daemon.flags)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__} ({form()})")
    add_verbs(parser.add_subparsers(title="verbs (without one, the daemon runs in the foreground)"))
    return parser


def _run_master(daemon: Daemon[Any], args: argparse.Namespace, text: str | None = None) -> int:
    """Run the daemon with its file, or with this text instead."""
    from usocksd.serve import master  # noqa: PLC0415  (4 MB that verbs have no use for)

    flags = LogConfig(filename=args.logfile, level=args.loglevel, format=args.logformat)
    read = partial(daemon.text, args.f) if text is None else lambda: (text, SOURCE)
    return master.main(daemon, read, flags)


def run_verb(program: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a verb. Returns its exit status, or 2 if its output can't be written; 1 is an answer of some verbs."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    try:
        status = run(args)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NOT_WRITTEN or error.filename is not None:
            raise
        # Python flushes the rest of the buffer at exit, so give it somewhere to go.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # as `| head` causes
            print(f"{program}: can't write to standard output: {error.strerror}", file=sys.stderr)
        return _TROUBLE
    return status

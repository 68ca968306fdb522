"""What every start of either daemon does: command line, then master, worker or verb, and an exit status that tells."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from usocksd import __version__
from usocksd.log.formats import FORMATS
from usocksd.log.log import LEVELS
from usocksd.serve import worker
from usocksd.serve.invocation import Invocation
from usocksd.serve.plan import Daemon
from usocksd.settings import loader as configuration

AddVerb = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]

# What only writing can end in; with verbs, to standard output.
_NOT_WRITTEN = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_TROUBLE = 2


class Program:
    """One of the daemons, as its command line sees it.

    A missing `default` file is an error if it is `required`. `verbs` add subcommands: each gets the subparsers, and
    sets `run` on its own.
    """

    def __init__(
        self, daemon: Daemon[Any], description: str, *, default: str, required: bool, verbs: Sequence[AddVerb] = ()
    ) -> None:
        self._daemon = daemon
        self._default = default
        self._required = required
        self._parser = self._make_parser(description, verbs)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run with the arguments of the command line; returns the exit status."""
        status = worker.run_if_told(self._daemon)
        if status is not None:
            return status
        args = self._parser.parse_args(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args) if run == self._run_daemon else run_printing(self._daemon.name, run, args)

    def _make_parser(self, description: str, verbs: Sequence[AddVerb]) -> argparse.ArgumentParser:
        # Flags of the originals have one dash; two are taken as well.
        parser = argparse.ArgumentParser(self._daemon.name, description=description, allow_abbrev=False)
        need = "required" if self._required else "optional"
        parser.add_argument(
            "-f", metavar="CONFIG", help=f"configuration file (default {self._default}, which is {need})"
        )
        parser.add_argument("-logfile", "--logfile", metavar="FILE", help="write the log to FILE, not to stderr")
        parser.add_argument("-loglevel", "--loglevel", choices=list(LEVELS), metavar="LEVEL", help=", ".join(LEVELS))
        parser.add_argument(
            "-logformat", "--logformat", choices=list(FORMATS), metavar="FORMAT", help=", ".join(FORMATS)
        )
        parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        parser.set_defaults(run=self._run_daemon)
        if verbs:
            subparsers = parser.add_subparsers(title="verbs (without one, the daemon runs in the foreground)")
            for add in verbs:
                add(subparsers)
        return parser

    def _run_daemon(self, args: argparse.Namespace) -> int:
        from usocksd.serve import master  # noqa: PLC0415  (4 MB that workers and verbs have no use for)

        def read() -> tuple[str, str]:
            if args.f is None and not self._required and not Path(self._default).exists():
                return "", self._default
            path = args.f or self._default
            return configuration.read(path), path

        return master.main(Invocation(self._daemon.name, read, args.logfile, args.loglevel, args.logformat))


def run_printing(program: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a verb; returns its exit status, or that of trouble when what it says can't be written: not 1, which is an
    answer of some verbs.
    """
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself
    try:
        status = run(args)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NOT_WRITTEN or error.filename is not None:
            raise
        # What is left in the buffer has nowhere to go when Python flushes it at exit.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # as `| head` does
            print(f"{program}: can't write to standard output: {error.strerror}", file=sys.stderr)
        return _TROUBLE
    return status

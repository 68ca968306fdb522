"""What every start of either daemon does: command line, configuration, log, and an exit status that tells."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error
from usocksd.runtime import config as configuration
from usocksd.runtime.formats import FORMATS
from usocksd.runtime.log import LEVELS, Log, setup
from usocksd.runtime.settings import LogConfig


class HasLog(Protocol):
    """A configuration with a [log] table."""

    @property
    def log(self) -> LogConfig: ...


C = TypeVar("C", bound=HasLog)


class Program(Generic[C]):
    """One of the daemons, as its command line sees it.

    `serve` runs it with a configuration until it is told to stop. A missing `default` file is an error if it
    is `required`. `verbs` add subcommands: each gets the subparsers, and sets `run` on its own.
    """

    def __init__(
        self,
        name: str,
        description: str,
        config: type[C],
        serve: Callable[[C, Log], Awaitable[None]],
        *,
        default: str,
        required: bool,
        verbs: Sequence[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None]] = (),
    ) -> None:
        self._name = name
        self._config = config
        self._serve = serve
        self._default = default
        self._required = required
        self._parser = self._make_parser(description, verbs)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run with the arguments of the command line; returns the exit status."""
        args = self._parser.parse_args(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)

    def _make_parser(
        self,
        description: str,
        verbs: Sequence[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None]],
    ) -> argparse.ArgumentParser:
        # Flags of the originals have one dash; two are taken as well.
        parser = argparse.ArgumentParser(self._name, description=description, allow_abbrev=False)
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
        try:
            config = self._load(args.f)
            log = self._start_log(args, config.log)
        except Error as error:
            # Before there is a log as configured, the fault goes to stderr in the form that was asked for.
            return self._refuse(args, error)
        try:
            trio.run(self._serve, config, log)
        except Error as error:
            _complain(error)
            return 1
        except Exception:
            logging.getLogger(__package__).critical("internal error", exc_info=True)
            return 1
        finally:
            log.close()
        return 0

    def _load(self, path: str | None) -> C:
        if path is None and not self._required and not Path(self._default).exists():
            return configuration.structure(self._config, {}, self._default)
        return configuration.load(self._config, path or self._default)

    def _start_log(self, args: argparse.Namespace, config: LogConfig) -> Log:
        filename = args.logfile or config.filename
        try:
            return setup(
                self._name,
                None if filename is None else str(filename),
                args.loglevel or config.level,
                args.logformat or config.format,
            )
        except OSError as error:
            raise Error(f"can't open the log file {filename}: {error.strerror}") from None

    def _refuse(self, args: argparse.Namespace, error: Error) -> int:
        log = setup(self._name, None, args.loglevel, args.logformat)
        _complain(error)
        log.close()
        return 1


def _complain(error: Error) -> None:
    log = logging.getLogger(__package__)
    if isinstance(error, ConfigError):
        for fault in error.faults:
            log.critical("bad configuration", extra={"fields": {"file": error.source, "error": str(fault)}})
    else:
        log.critical("can't start", extra={"fields": {"error": str(error)}})

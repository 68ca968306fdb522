"""Shared by all verbs: parts of their command lines, the request to the daemon, and the report of errors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
import tomllib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import attrs

from usocksd.errors import Error
from usocksd.serve.daemon import Daemon, Subparsers
from usocksd.settings.control_path import NotPrivate, check_folder, control_path

Answer: TypeAlias = dict[str, Any]

TIMEOUT: Final = 10.0
"""Seconds in which a daemon answers."""

_INTERRUPTED = 130


class VerbError(Error):
    """There is no answer."""


class Refused(Error):
    """The daemon refuses: `answer` is what it has sent."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("\n".join([str(answer.get("error")), *map(str, answer.get("faults", ()))]))
        self.answer = answer


@attrs.frozen
class ControlClient:
    """Asks the daemon `name` at the control socket `path`."""

    name: str
    path: str

    def ask(self, verb: str, *, timeout: float = TIMEOUT, **parameters: object) -> Answer:
        """The answer to one request, within `timeout` seconds. Raises VerbError, or Refused."""
        try:
            line = self._exchange(json.dumps({"verb": verb, **parameters}).encode() + b"\n", timeout)
        except FileNotFoundError:
            raise VerbError(f"no {self.name} runs: there is no control socket {self.path}") from None
        except ConnectionRefusedError:
            raise VerbError(f"no {self.name} runs: nobody listens on its control socket {self.path}") from None
        except PermissionError:
            raise VerbError(f"no permission to use {self.path}: only its owner and root may") from None
        except TimeoutError:
            raise VerbError(f"{self.name} does not answer on {self.path} (waited {timeout:g} s)") from None
        except BlockingIOError:
            raise VerbError(f"{self.name} does not answer on {self.path}, where others wait already") from None
        except OSError as error:
            raise VerbError(f"{self.path}: {error.strerror or error}") from None
        if not line:
            raise VerbError(f"{self.name} closed {self.path} without an answer: it has just ended, or is busy")
        try:
            answer = json.loads(line)
            ok = answer["ok"]
        except (ValueError, TypeError, KeyError):
            raise VerbError(f"what answers on {self.path} is no {self.name}") from None
        if not ok:
            raise Refused(answer)
        return dict(answer)

    def _exchange(self, request: bytes, timeout: float) -> bytes:
        """Send a line, receive a line."""
        deadline = time.monotonic() + timeout
        data = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(self.path)
            # The daemon may answer and close without having read everything: then the answer counts.
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(request)
            with contextlib.suppress(ConnectionResetError):
                while not data.endswith(b"\n"):
                    sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                    more = sock.recv(1 << 20)
                    if not more:
                        break
                    data += more
        return bytes(data)


def add_verb(subparsers: Subparsers, verb: str, help: str, description: str) -> argparse.ArgumentParser:
    """Add a verb to a command line. Its description is printed as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return subparsers.add_parser(
        verb, help=help, description=description, formatter_class=formatter, allow_abbrev=False
    )


def add_config(parser: argparse.ArgumentParser, help: str) -> None:
    """Add -f, which the command line has before the verb too: here it must not set a default over that one."""
    parser.add_argument("-f", metavar="CONFIG", default=argparse.SUPPRESS, help=help)


def add_file(parser: argparse.ArgumentParser, default: str) -> None:
    """Add FILE, and -f for the same."""
    add_config(parser, "the same as FILE")
    help = f"the configuration (default: that of -f, or else {default})"
    parser.add_argument("file", nargs="?", metavar="FILE", help=help)


def run_verb(prefix: str, run: Callable[[], int], failed: int = 1) -> int:
    """Run a verb. Returns its exit status; `failed` if it raises Error, whose lines go to stderr after `prefix`."""
    try:
        return run()
    except Error as error:
        for line in str(error).split("\n"):
            say(prefix, line)
        return failed
    except KeyboardInterrupt:
        return _INTERRUPTED


def say(prefix: str, text: object) -> None:
    """A line on stderr."""
    print(f"{prefix}{visible(text)}", file=sys.stderr, flush=True)


def find_control(daemon: Daemon[Any], args: argparse.Namespace, prefix: str) -> str:
    """The path of the control socket: that of --control, or else of the configuration. Raises VerbError if there is
    none, or another user may have made it.

    If the configuration can't be read, stderr says so after `prefix`, and the path is the default.
    """
    if args.control is not None:
        return str(args.control)
    # Only this setting is read, since an operator may ask for the status because the file is bad.
    config: str = args.f or daemon.file
    try:
        with open(config, "rb") as file:
            control = tomllib.load(file).get("control", daemon.control)
        if not isinstance(control, str):
            raise ValueError("control is not a string")
    except FileNotFoundError as error:
        if args.f is None:
            return _default(daemon)
        fault = str(error.strerror)
    except OSError as error:
        fault = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    else:
        if not control:
            raise VerbError(f"{config} says that there is no control socket")
        return _default(daemon) if control == daemon.control else control
    path = _default(daemon)
    say(prefix, f"{config}: {fault}; trying {path}")
    return path


def _default(daemon: Daemon[Any]) -> str:
    """The default path of this user's daemon, or else of the system's"""
    path = control_path(daemon.control, daemon.control)
    if path == daemon.control or (not os.path.exists(path) and os.path.exists(daemon.control)):
        return daemon.control
    try:
        check_folder(path)
    except NotPrivate as error:
        raise VerbError(str(error)) from None
    return path


def print_json(answer: Answer) -> None:
    """One object on one line."""
    print(json.dumps(answer), flush=True)


def visible(text: object) -> str:
    """Text with everything that is not printable escaped as in Python: a client may have chosen it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))

"""Every error of the two daemons: one root, and below it a class for each cause.

Standard library only, so that `usocksd.socks` stays usable alone.
"""

from __future__ import annotations

import errno as _errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBERED = re.compile(r"^(rule|route)\[(\d+)\](\.?)")


class Error(Exception):
    """The root: `except Error` catches what the daemons raise on purpose, and no bug."""


class ProtocolError(Error):
    """A peer broke the protocol; subclasses say which peer, and which reply it gets."""


class Denied(Error):
    """Policy forbids it. `rule` is the text of the rule that decided, as shown in log records."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"denied by {rule}")
        self.rule = rule


class CommandNotSupported(Error):
    """The client requested a command other than CONNECT."""


class NoEgress(Error):
    """The pool has addresses, but none is usable for the destination's family. No other address is used instead."""


class DialError(Error):
    """A TCP connection could not be made. `errno` is the kernel's (errno(3)); ETIMEDOUT also for our own deadline."""

    def __init__(self, errno: int, address: str, step: str = "connect") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{step} {address}: {os.strerror(errno)} ({name})")
        self.errno = errno
        self.address = address
        self.step = step


class NeedsInterface(DialError):
    """A link-local IPv6 address without a link: it means another host on each."""

    def __init__(self, address: str) -> None:
        super().__init__(_errno.EINVAL, address)
        self.args = (f"connect {address}: a link-local address, and nothing says by which interface (EINVAL)",)


class OutOfPorts(DialError):
    """Every address to leave from has used up its ports towards this destination address and port (EADDRNOTAVAIL).

    `sources` are those addresses, empty if the kernel chose; `time_wait` is how many connections of this host are
    over and keep their ports for a minute (TIME_WAIT), if that is known.
    """

    def __init__(self, address: str, sources: Sequence[str] = (), time_wait: int | None = None) -> None:
        super().__init__(_errno.EADDRNOTAVAIL, address)
        where = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
        waiting = "" if time_wait is None else f"; {time_wait} connections of this host are in TIME_WAIT"
        self.args = (f"out of ports towards {address} on {where or 'this host'} (EADDRNOTAVAIL){waiting}",)
        self.sources = tuple(sources)
        self.time_wait = time_wait


NO_SUCH_NAME = "no such name"
NO_ADDRESS = "no address"


class ResolveError(Error):
    """A name has no address, or no name server has answered in time; `cause` says which in a word or two."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name
        self.cause = cause

    @property
    def absent(self) -> bool:
        """Whether name servers have answered that the name does not exist, or has no address."""
        return self.cause in (NO_SUCH_NAME, NO_ADDRESS)


class UpstreamError(Error):
    """The upstream proxy refused the connection, or did not speak its protocol."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a configuration: where it is, the value, and what would be right."""

    path: str
    """as TOML has it: `rule[0].to[1]` is the second entry of the first rule"""
    value: str
    expected: str
    line: int | None = None

    @property
    def key(self) -> str:
        """The path for people. Rules count from 1, as records name those without a name."""
        return _NUMBERED.sub(lambda match: f"{match[1]} {int(match[2]) + 1}{': ' if match[3] else ''}", self.path)

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.key, self.value, self.expected)))

    def at(self, source: str) -> str:
        """The same with its place, as compilers write it. `source` is the file."""
        place = source if self.line is None else f"{source}:{self.line}"
        return f"{place}: {self}" if source else str(self)


class ConfigError(Error):
    """A configuration that can't be used: every fault of it at once."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(fault.at(source) for fault in faults))
        self.source = source
        self.faults = tuple(faults)

"""What the command line said, and the log that follows from it and the configuration together."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from usocksd.errors import Error
from usocksd.log.log import Log, open_log, setup
from usocksd.settings.types import LogConfig

LogOrder = dict[str, str | None]
"""Arguments for usocksd.log.log.setup, of a process that has the topic already"""


@attrs.frozen
class Invocation:
    """A daemon's command line. Its flags win over [log] of the configuration."""

    name: str
    read: Callable[[], tuple[str, str]]
    """Gives the text of the configuration, and where it is from. Raises Error."""
    logfile: str | None
    loglevel: str | None
    logformat: str | None

    def log_order(self, config: LogConfig) -> LogOrder:
        """How the processes are to log."""
        return {
            "filename": self.logfile or config.filename,
            "level": self.loglevel or config.level,
            "format": self.logformat or config.format,
        }


class MasterLog:
    """The master's own log, which a reload may put elsewhere: opened first, and the old one closed when all is well."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        # Before there is one as configured, what goes wrong is told on stderr, in the form that was asked for.
        self.current = setup(invocation.name, None, invocation.loglevel, invocation.logformat)
        self._order: LogOrder | None = None
        self._coming: tuple[Log, LogOrder] | None = None
        self._dropped = 0

    def prepare(self, config: LogConfig) -> LogOrder:
        """Open the log of a configuration that is to come. Raises Error when that can't be done."""
        order = self._invocation.log_order(config)
        if order != self._order:
            try:
                self._coming = open_log(self._invocation.name, **order), order
            except OSError as error:
                raise Error(f"can't open the log file {order['filename']}: {error.strerror}") from None
            if self._order is None and (early := self.commit()) is not None:
                early.close()
        return order

    def commit(self) -> Log | None:
        """That configuration is in force. Returns the log before, for the caller to close; that may take a second."""
        old = None
        if self._coming is not None:
            old = self.current
            (self.current, self._order), self._coming = self._coming, None
            self.current.attach()
            old.detach()
            self._dropped += old.dropped
        self.current.set_level(self.current.configured)
        return old

    def drop(self) -> None:
        """It will not be."""
        if self._coming is not None:
            self._coming[0].close()
            self._coming = None

    @property
    def dropped(self) -> int:
        """How many records of the master were never written, whatever its log was."""
        return self._dropped + self.current.dropped

    def reopen(self) -> None:
        """Open the one in force again, after it was closed."""
        assert self._order is not None
        self._dropped += self.current.dropped
        self.current = setup(self._invocation.name, **self._order)

"""The master's own log. A reload may move it: the new one is opened first, the old one closed when all is well."""

from __future__ import annotations

import attrs

from usocksd.errors import Error
from usocksd.log.log import Log, open_log, setup
from usocksd.settings.types import LogConfig


class MasterLog:
    """The log of the master of daemon `name`. `flags` of the command line win over [log] of the configuration."""

    def __init__(self, name: str, flags: LogConfig) -> None:
        self._name = name
        self._flags = flags
        # Until a configured log is open, problems go to stderr, in the format of the flags.
        self.current = setup(name, None, flags.level, flags.format)
        self._config: LogConfig | None = None
        self._coming: tuple[Log, LogConfig] | None = None
        self._dropped = 0

    def prepare(self, config: LogConfig) -> LogConfig:
        """Open the log of a configuration before it comes into force. Returns where it is. Raises Error."""
        flags = {key: value for key, value in attrs.asdict(self._flags).items() if value}
        config = attrs.evolve(config, **flags)
        if config != self._config:
            try:
                self._coming = open_log(self._name, config.filename, config.level, config.format), config
            except OSError as error:
                raise Error(f"can't open the log file {config.filename}: {error.strerror}") from None
            if self._config is None and (early := self.commit()) is not None:
                early.close()
        return config

    def commit(self) -> Log | None:
        """Put the prepared log in force. Returns the previous one for the caller to close, which may take a second."""
        old = None
        if self._coming is not None:
            old = self.current
            (self.current, self._config), self._coming = self._coming, None
            self.current.attach()
            old.detach()
            self._dropped += old.dropped
        self.current.set_level(self.current.configured)
        return old

    def drop(self) -> None:
        """Close the prepared log: its configuration does not come into force."""
        if self._coming is not None:
            self._coming[0].close()
            self._coming = None

    @property
    def dropped(self) -> int:
        """How many records of the master were lost, over all its logs"""
        return self._dropped + self.current.dropped

    def reopen(self) -> None:
        """Open the log in force again, after it was closed."""
        assert self._config is not None
        self._dropped += self.current.dropped
        config = self._config
        self.current = setup(self._name, config.filename, config.level, config.format)

"""The log of a daemon: one format, one sink, one level.

Off the hot path, log with the standard library: `logging.getLogger("usocksd.names.resolver").warning("message",
extra={"fields": {"name": name}})`. Access records take the short way:

    fields = Fields(log.formatter, ("request_id", "elapsed"), {"type": "access"})
    ends = Frame(log.formatter, Severity.INFO, "proxy ends")
    if log.enabled(ends.severity):
        log.append(ends.record(time.time(), fields.text((request_id, elapsed))))
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Mapping
from typing import Final

from usocksd.log.formats import FORMATS, MESSAGE_CUT, Formatter, Severity
from usocksd.log.sink import STDERR, Sink

LEVELS: Final[Mapping[str, Severity]] = {
    "critical": Severity.CRITICAL,
    "crit": Severity.CRITICAL,
    "error": Severity.ERROR,
    "warning": Severity.WARNING,
    "warn": Severity.WARNING,
    "information": Severity.INFO,
    "info": Severity.INFO,
    "debug": Severity.DEBUG,
}
"""The names that -loglevel, `[log] level` and CYBOZU_LOG_LEVEL take."""

_LOGGERS: Final = ("usocksd", "transocks")


def _stdlib_level(severity: Severity) -> int:
    level: int = getattr(logging, severity.name)
    return level


def parse_level(name: str) -> Severity:
    """The severity that `name` stands for. Raises ValueError, listing the names."""
    try:
        return LEVELS[name]
    except KeyError:
        raise ValueError(f"no such log level: {name!r} (known are {', '.join(LEVELS)})") from None


class Log:
    """Owns the sink and, while attached, the standard library's loggers of both packages. See `setup`."""

    def __init__(self, formatter: Formatter, sink: Sink, level: Severity) -> None:
        self.formatter = formatter
        self.append = sink.append
        """Hands a finished record to the sink; see `Sink.append`."""
        self.reopen = sink.reopen
        """Opens the log file again (SIGUSR1); see `Sink.reopen`."""
        self.configured = self.level = level
        """The level that it was set up with, and the one in force: records of the same or a worse severity are
        written.
        """
        self._sink = sink
        self._handler = LogHandler(formatter, sink)

    def attach(self) -> None:
        """Receive the standard library's records from now on."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.propagate = False
        self.set_level(self.level)

    def detach(self) -> None:
        """Give the loggers back; records that are appended directly are still written."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(self._handler)
            if not any(isinstance(handler, LogHandler) for handler in logger.handlers):  # else another has taken over
                logger.propagate = True
                logger.setLevel(logging.NOTSET)

    def close(self, timeout: float = 1.0) -> None:
        """Give the loggers back, and write for at most `timeout` seconds. Call it before the process ends, or the
        records of the last moments are lost.
        """
        self.detach()
        self._sink.close(timeout)

    @property
    def dropped(self) -> int:
        """How many records could not be written, ever."""
        return self._sink.dropped

    @property
    def failing(self) -> str | None:
        """Why no records can be written at present; None if all is well."""
        return self._sink.failing

    def enabled(self, severity: Severity) -> bool:
        """Whether a record of this severity is to be written."""
        return severity <= self.level

    def set_level(self, level: Severity) -> None:
        self.level = level
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(_stdlib_level(level))


class LogHandler(logging.Handler):
    """Carries the standard library's records to the sink; `extra={"fields": {...}}` become fields.

    An exception becomes the fields `error` and `traceback`. A record that can't be formatted keeps its
    message, and `log_error` says what was wrong: a mistake in a log call does not raise.
    """

    def __init__(self, formatter: Formatter, sink: Sink) -> None:
        super().__init__()
        self._formatter = formatter
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        severity = next((each for each in Severity if record.levelno >= _stdlib_level(each)), Severity.DEBUG)
        try:
            fields = dict(getattr(record, "fields", {}))
            if record.exc_info and record.exc_info[1] is not None:
                error = record.exc_info[1]
                fields.setdefault("error", error)
                fields["traceback"] = "".join(traceback.format_exception(error))
            line = self._formatter.format(record.created, severity, record.getMessage(), fields)
        except Exception as error:
            complaint = {"log_error": f"{type(error).__name__}: {error}"}
            line = self._formatter.format(record.created, severity, str(record.msg)[:MESSAGE_CUT], complaint)
        self._sink.append(line)


def setup(topic: str, filename: str | None, level: str | None, format: str | None) -> Log:
    """Start logging as program `topic`; see `open_log`."""
    log = open_log(topic, filename, level, format)
    log.attach()
    return log


def open_log(topic: str, filename: str | None, level: str | None, format: str | None) -> Log:
    """The log of program `topic` to `filename`, or to stderr if that is None or empty; not attached yet.

    `level` and `format` are the names of the originals' flags; None or empty mean the environment's
    CYBOZU_LOG_LEVEL, or else info, and plain. A bad name there raises ValueError, but a bad CYBOZU_LOG_LEVEL
    counts as none, as in the originals. Raises OSError when the file can't be opened.
    """
    severity = parse_level(level) if level else LEVELS.get(os.environ.get("CYBOZU_LOG_LEVEL", ""), Severity.INFO)
    try:
        formatter = FORMATS[format or "plain"](topic, os.uname().nodename)
    except KeyError:
        raise ValueError(f"no such log format: {format!r} (known are {', '.join(FORMATS)})") from None
    return Log(formatter, Sink(filename or STDERR, formatter), severity)

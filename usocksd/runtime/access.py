"""Access records: one when a relay starts, one when it ends, and one for each connection that got no relay."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

from usocksd.runtime.ending import Reason, RelayResult
from usocksd.runtime.formats import Severity, Template
from usocksd.runtime.hostport import join_port
from usocksd.runtime.log import Log
from usocksd.runtime.request_id import request_ids

_CONSTANTS = {"type": "access"}
_AT_END = ("tx_bytes", "rx_bytes", "elapsed", "reason", "ended_by", "error")


class AccessRecords:
    """The records of a daemon whose every record carries `keys`; their values are given as one tuple."""

    def __init__(self, log: Log, keys: Sequence[str], logger: logging.Logger) -> None:
        self.next_id = request_ids()
        self._log = log
        self._logger = logger
        self._keys = keys
        self._starts = log.template(Severity.INFO, "proxy starts", _CONSTANTS, keys)
        at_end = (*keys, *_AT_END)
        self._ends = log.template(Severity.INFO, "proxy ends", _CONSTANTS, at_end)
        self._ends_with_error = log.template(Severity.ERROR, "proxy ends with an error", _CONSTANTS, at_end)

    def starts(self, values: tuple[object, ...]) -> None:
        """A relay begins."""
        self._write(self._starts, values)

    def ends(self, values: tuple[object, ...], result: RelayResult, elapsed: float) -> None:
        """A relay is over, after `elapsed` seconds. tx is what went to the destination, rx what came from there."""
        template = self._ends_with_error if result.reason is Reason.ERROR else self._ends
        at_end = (
            result.to_upstream,
            result.to_client,
            round(elapsed, 6),
            result.reason._value_,
            result.by._value_,
            os.strerror(result.errno) if result.errno else None,
        )
        self._write(template, values + at_end)

    def event(self, level: int, message: str, values: tuple[object, ...], **more: object) -> None:
        """Something else happened to a connection; what is not known about it yet is left out."""
        known = {key: value for key, value in zip(self._keys, values, strict=True) if value is not None}
        self._logger.log(level, message, extra={"fields": {**_CONSTANTS, **known, **more}})

    def _write(self, template: Template, values: tuple[object, ...]) -> None:
        if self._log.enabled(template.severity):
            self._log.append(template.render(time.time(), values))


class Connection:
    """The records of one connection, as far as both daemons have them in common; the rest is the subclass's."""

    __slots__ = ("_client", "_id", "_records", "_source", "_started", "client_host")

    def __init__(self, records: AccessRecords, host: str, port: int) -> None:
        self._records = records
        self._id = records.next_id()
        self.client_host = host
        """The client's numeric address."""
        self._client = join_port(host, port)
        self._source: str | None = None
        self._started = 0.0

    def ends(self, result: RelayResult) -> None:
        """The relay is over."""
        self._records.ends(self._values(), result, time.monotonic() - self._started)

    def _begin(self, bound: tuple[str, int]) -> None:
        """The relay begins; `bound` is the address of our own outgoing socket."""
        self._started = time.monotonic()
        self._source = join_port(bound[0], bound[1])
        self._records.starts(self._values())

    def _event(self, level: int, message: str, **more: object) -> None:
        self._records.event(level, message, self._values(), **more)

    def _values(self) -> tuple[object, ...]:
        """The values of the daemon's keys, in their order."""
        raise NotImplementedError

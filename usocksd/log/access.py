"""What both daemons report about each connection: access records, metrics, and the answer to `connections`.

Records: one when a relay starts, one when it ends, and one for each connection that got no relay.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from usocksd.errors import DialError, Error, NoEgress, ResolveError
from usocksd.log.formats import Fields, Formatter, Frame, Severity, number_text
from usocksd.log.log import Log
from usocksd.log.metrics import BYTES, SECONDS, Counter, Histogram, Metrics
from usocksd.net.address import join_port, unmapped
from usocksd.net.ending import Reason, RelayResult, Side

# Members of an Enum are slow to look up: each connection takes these from here.
_CLIENT, _UPSTREAM = Side.CLIENT, Side.UPSTREAM

_CONSTANTS = {"type": "access"}
_NUMBERS_AT_END, _TEXTS_AT_END = ("tx_bytes", "rx_bytes", "elapsed"), ("reason", "ended_by")
_AT_END = (*_NUMBERS_AT_END, *_TEXTS_AT_END, "error")

_BY_ERRNO = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.ETIMEDOUT: "timed_out",
    errno.ENETUNREACH: "network_unreachable",
    errno.EHOSTUNREACH: "host_unreachable",
    errno.EADDRNOTAVAIL: "out_of_ports",
    errno.EMFILE: "out_of_descriptors",
    errno.ENFILE: "out_of_descriptors",
}
_NO_SOURCE, _NO_EGRESS, _UNRESOLVED = "no_source_address", "no_egress", "unresolved"


class AccessRecords:
    """Writes access records and counts connections. Every record has the daemon's own `keys`, whose values come as one
    tuple; records of a relay's start have the keys `at_start` too.

    Most of a relay's two records is the same text. Where the format allows it, that is made once, at the start, and the
    connection keeps it for the end.
    """

    def __init__(
        self,
        log: Log,
        keys: Sequence[str],
        logger: logging.Logger,
        metrics: Metrics,
        *,
        at_start: Sequence[str] = (),
        texts: Collection[str],
        numbers: Collection[str],
        few: Collection[str],
    ) -> None:
        """`texts`, `numbers` and `few` are keys of which the values are that, once a relay begins; see `Fields`."""
        self.ids = request_ids()
        self._log = log
        self._logger = logger
        self._keys = keys
        formatter = log.formatter
        self._starts = Frame(formatter, Severity.INFO, "proxy starts")
        self._sorts = formatter.sorts
        # In a format that sorts, these texts are of all fields of a record.
        before = keys if formatter.sorts else ()
        constants = _CONSTANTS if formatter.sorts else {}
        self._both = Fields(formatter, keys, _CONSTANTS, texts=texts, numbers=numbers, few=few)
        self._at_start = Fields(formatter, (*before, *at_start), constants, texts=texts, numbers=numbers, few=few)
        self._nothing = (None,) * len(at_start)
        self._nothing_text = "" if formatter.sorts else self._at_start.text(self._nothing)
        self._at_end = Fields(
            formatter,
            (*before, *_AT_END),
            constants,
            texts=(*texts, *_TEXTS_AT_END),
            numbers=(*numbers, *_NUMBERS_AT_END),
            few=few,
        )
        self._inflight = metrics.gauge("proxy_inflight_requests", "Relays at present")
        self._tx_bytes = metrics.histogram("proxy_tx_bytes", "Bytes of a relay to its destination", BYTES)
        self._rx_bytes = metrics.histogram("proxy_rx_bytes", "Bytes of a relay from its destination", BYTES)
        self._tx_seconds = metrics.histogram(
            "proxy_tx_seconds", "Duration of a relay until its client finished sending", SECONDS
        )
        self._rx_seconds = metrics.histogram(
            "proxy_rx_seconds", "Duration of a relay until its destination finished sending", SECONDS
        )
        self._by_ending = _endings(formatter, metrics)
        self._dial_errors = metrics.counters(
            "dial_errors_total", "Connections that could not be made to where they should go, by cause", "cause"
        )
        for cause in (*_BY_ERRNO.values(), _NO_SOURCE, _NO_EGRESS, _UNRESOLVED):
            self._dial_errors.labels(cause)

    def starts(self, connection: ConnectionRecords, at_start: tuple[object, ...] | None) -> None:
        """A relay begins; `at_start` are the values of the keys that only its start has. None: all of them are None."""
        self._inflight.value += 1
        if not self._log.enabled(self._starts.severity):
            return
        values = connection.values()
        if self._sorts:
            text = self._at_start.text((*values, *(at_start or self._nothing)))
        else:
            connection.text = both = self._both.text(values)
            text = both + (self._nothing_text if at_start is None else self._at_start.text(at_start))
        self._log.append(self._starts.record(time.time(), text))

    def ends(self, connection: ConnectionRecords, result: RelayResult, elapsed: float) -> None:
        """A relay is over, after `elapsed` seconds. tx is what went to the destination, rx what came from there."""
        to_upstream, to_client, reason, by, error, first, alone = result
        ended, seconds, errors, frame, what = self._by_ending[reason, by]
        if error:
            what = os.strerror(error)
        if self._log.enabled(frame.severity):
            duration = number_text(round(elapsed, 6))
            at_end = (to_upstream, to_client, duration, reason._value_, by._value_, what)
            if self._sorts:
                text = self._at_end.text((*connection.values(), *at_end))
            else:
                text = (connection.text or self._both.text(connection.values())) + self._at_end.text(at_end)
            self._log.append(frame.record(time.time(), text))
        self._inflight.value -= 1
        ended.value += 1
        seconds.observe(elapsed)
        if errors is not None:
            errors.value += 1
        self._tx_bytes.observe(to_upstream)
        self._rx_bytes.observe(to_client)
        self._tx_seconds.observe(elapsed - alone if first is _CLIENT else elapsed)
        self._rx_seconds.observe(elapsed - alone if first is _UPSTREAM else elapsed)

    def not_connected(self, error: Error) -> None:
        """Count a connection that could not be made, if that is what the error means."""
        match error:
            case DialError(errno=errno.EADDRNOTAVAIL) if error.step != "connect":
                cause = _NO_SOURCE
            case DialError():
                cause = _BY_ERRNO.get(error.errno) or errno.errorcode.get(error.errno, str(error.errno))
            case ResolveError():
                cause = _UNRESOLVED
            case NoEgress():
                cause = _NO_EGRESS
            case _:
                return
        self._dial_errors.labels(cause).value += 1

    def event(self, level: int, message: str, values: tuple[object, ...], **more: object) -> None:
        """Another record about a connection; values that are not known yet are left out."""
        known = {key: value for key, value in zip(self._keys, values, strict=True) if value is not None}
        self._logger.log(level, message, extra={"fields": {**_CONSTANTS, **known, **more}})


class ConnectionRecords:
    """The record of one connection, as far as both daemons have it; the subclass adds the rest."""

    __slots__ = ("_client", "_id", "_records", "_since", "_source", "text")

    def __init__(self, records: AccessRecords, host: str, port: int) -> None:
        """`host` is the client's numeric address."""
        self._records = records
        self._id = next(records.ids)
        self._client = pair_member(host, port)
        self._source: str | None = None
        self._since = time.monotonic()
        """When it was accepted; from the start of the relay on, when that was."""
        self.text: str | None = None
        """What the records of the relay's start and end have in common."""

    def ends(self, result: RelayResult) -> None:
        """The relay is over."""
        self._records.ends(self, result, time.monotonic() - self._since)

    def values(self) -> tuple[object, ...]:
        """The values of the daemon's keys, in their order."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Its row of `connections`; `age` is in seconds since its relay began, or else since accept."""
        return {
            "id": self._id,
            "client": self._client,
            **self._details(),
            "age": time.monotonic() - self._since,
        }

    def _begin(self, at_start: tuple[object, ...] | None = None) -> None:
        """The relay begins; see `AccessRecords.starts`."""
        self._since = time.monotonic()
        self._records.starts(self, at_start)

    def event(self, level: int, message: str, **more: object) -> None:
        self._records.event(level, message, self.values(), **more)

    def _details(self) -> dict[str, Any]:
        """The daemon's own columns of `connections`."""
        raise NotImplementedError


def request_ids() -> Iterator[str]:
    """UUIDs that never repeat: 74 random bits of this process, then 48 that count.

    They are of version 8, whose bits are the application's own (RFC 9562, section 5.8). A random UUID for every
    connection would cost a system call each.
    """
    head = int.from_bytes(os.urandom(10))
    text = f"{head >> 32 & 0xFFFFFFFF:08x}-{head >> 16 & 0xFFFF:04x}-8{head & 0xFFF:03x}-{0x8000 | head >> 66:04x}"
    return map(f"{text}-%012x".__mod__, itertools.count(1))


def pair_member(host: str, port: int) -> str:
    """One end of a connection as records show it: the same text in those of both its ends.

    One end of a dual-stack socket sees the other's IPv4 address as ::ffff:192.0.2.1, and the zone of a link-local
    address is what its own host calls the link.
    """
    if ":" in host:
        return join_port(unmapped(host).partition("%")[0], port)
    return f"{host}:{port}"


class _Ending(NamedTuple):
    """A way that a relay can end: what counts it, its record, and the value of `error` if there is no errno."""

    number: Counter
    seconds: Histogram
    errors: Counter | None
    frame: Frame
    error: str | None


def _endings(formatter: Formatter, metrics: Metrics) -> dict[tuple[Reason, Side], _Ending]:
    ended = metrics.counters("relay_ended_total", "Relays that have ended: why, and by whom", "reason", "by")
    elapsed = metrics.histograms(
        "proxy_elapsed_seconds", "Duration of a relay; an error is a reset too", SECONDS, "result"
    )
    errors = {
        Side.CLIENT: metrics.counter(
            "proxy_tx_errors_total", "Relays that a reset or an error of the client has ended"
        ),
        Side.UPSTREAM: metrics.counter(
            "proxy_rx_errors_total", "Relays that a reset or an error of the destination's side has ended"
        ),
    }
    success, error = elapsed.labels("success"), elapsed.labels("error")
    ends = Frame(formatter, Severity.INFO, "proxy ends")
    ends_with_error = Frame(formatter, Severity.ERROR, "proxy ends with an error")

    def ending(reason: Reason, by: Side) -> _Ending:
        broken = reason in (Reason.RESET, Reason.ERROR)
        return _Ending(
            ended.labels(reason.name.lower(), by.value),
            error if broken else success,
            errors.get(by) if broken else None,
            ends_with_error if reason is Reason.ERROR else ends,
            # Without an errno it was a bug in this program, and the log has its traceback.
            "internal error" if reason is Reason.ERROR else None,
        )

    return {(reason, by): ending(reason, by) for reason in Reason for by in Side}

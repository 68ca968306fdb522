"""What the access records of usocksd say about one connection."""

from __future__ import annotations

import logging
import time

from usocksd.errors import CommandNotSupported, Denied, Error
from usocksd.runtime.access import AccessRecords
from usocksd.runtime.dial import Target
from usocksd.runtime.ending import RelayResult
from usocksd.runtime.hostport import join_port
from usocksd.runtime.log import Log
from usocksd.socks import ClientFault, Command, Kind, Request, Version

_KEYS = (
    "request_id",
    "client_addr",
    "protocol",
    "command",
    "dest_host",
    "dest_port",
    "dest_addr",
    "src_addr",
    "user",
    "rule",
)
_COMMANDS = {command: command.name.lower() for command in Command}
_PROTOCOLS = {Version.SOCKS4: "SOCKS4/4a", Version.SOCKS5: "SOCKS5"}


class AccessLog:
    """Starts the records of each connection."""

    def __init__(self, log: Log) -> None:
        self._records = AccessRecords(log, _KEYS, logging.getLogger(__name__))

    def begin(self, host: str, port: int) -> Access:
        """The records of a connection from this client."""
        return Access(self._records, host, port)


class Access:
    """The records of one connection. The session fills in what it learns."""

    __slots__ = (
        "_client",
        "_destination",
        "_id",
        "_records",
        "_request",
        "_source",
        "_started",
        "client_host",
        "rule",
        "user",
    )

    def __init__(self, records: AccessRecords, host: str, port: int) -> None:
        self._records = records
        self._id = records.next_id()
        self.client_host = host
        """The client's numeric address."""
        self._client = join_port(host, port)
        self._request: tuple[str, str, str, int] | tuple[None, None, None, None] = (None, None, None, None)
        self._destination: str | None = None
        self._source: str | None = None
        self._started = 0.0
        self.user: str | None = None
        """Who the client proved to be."""
        self.rule: str | None = None
        """The rule that decided."""

    def requested(self, request: Request) -> None:
        """The client said where it wants to go."""
        command = _COMMANDS[request.command]
        self._request = (_PROTOCOLS[request.version], command, request.host, request.port)

    def starts(self, target: Target, bound: tuple[str, int]) -> None:
        """The destination is connected; `bound` is the outgoing socket's address."""
        self._started = time.monotonic()
        self._destination = join_port(target.host, target.port)
        self._source = join_port(bound[0], bound[1])
        self._records.starts(self._values())

    def ends(self, result: RelayResult) -> None:
        """The relay is over."""
        self._records.ends(self._values(), result, time.monotonic() - self._started)

    def client_denied(self) -> None:
        """The client's address may not use this server."""
        self._records.event(logging.WARNING, "denied access", self._values(), error="not in allow_from")

    def misspoke(self, fault: ClientFault) -> None:
        """The client did not speak SOCKS, or not as it must. A connection closed without a word is no news."""
        level = logging.DEBUG if fault.kind is Kind.EOF else logging.WARNING
        self._records.event(level, "handshake failed", self._values(), error=str(fault))

    def gave_up(self, cause: str) -> None:
        """Nobody waits for this connection any more."""
        self._records.event(logging.INFO, "handshake failed", self._values(), error=cause)

    def refused(self, error: Error) -> None:
        """The client is told that it can't have what it asked for."""
        match error:
            case Denied():
                self.rule = error.rule
                message = "ruleset mismatch"
            case CommandNotSupported():
                message = "command not supported"
            case _:
                message = "dial to destination failed"
        self._records.event(logging.ERROR, message, self._values(), error=str(error))

    def _values(self) -> tuple[object, ...]:
        return (
            self._id,
            self._client,
            *self._request,
            self._destination,
            self._source,
            self.user,
            self.rule,
        )

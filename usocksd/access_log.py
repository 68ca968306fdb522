"""What the access records of usocksd say about one connection."""

from __future__ import annotations

import logging

from usocksd.errors import CommandNotSupported, Denied, Error
from usocksd.runtime.access import AccessRecords, Connection
from usocksd.runtime.dial import Target
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


class Access(Connection):
    """The records of one connection. The session fills in what it learns."""

    __slots__ = ("_destination", "_request", "rule", "user")

    def __init__(self, records: AccessRecords, host: str, port: int) -> None:
        super().__init__(records, host, port)
        self._request: tuple[str, str, str, int] | tuple[None, None, None, None] = (None, None, None, None)
        self._destination: str | None = None
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
        self._destination = join_port(target.host, target.port)
        self._begin(bound)

    def client_denied(self) -> None:
        """The client's address may not use this server."""
        self._event(logging.WARNING, "denied access", error="not in allow_from")

    def misspoke(self, fault: ClientFault) -> None:
        """The client did not speak SOCKS, or not as it must. A connection closed without a word is no news."""
        level = logging.DEBUG if fault.kind is Kind.EOF else logging.WARNING
        self._event(level, "handshake failed", error=str(fault))

    def gave_up(self, cause: str) -> None:
        """Nobody waits for this connection any more."""
        self._event(logging.INFO, "handshake failed", error=cause)

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
        self._event(logging.ERROR, message, error=str(error))

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

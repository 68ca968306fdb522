"""What the access records of transocks say about one connection."""

from __future__ import annotations

import logging

from transocks.original_dst import Destination, Loop, NotRedirected
from usocksd.errors import Error
from usocksd.runtime.access import AccessRecords, Connection
from usocksd.runtime.log import Log

_KEYS = ("request_id", "client_addr", "dest_addr", "upstream", "src_addr")


class AccessLog:
    """Starts the records of each connection."""

    def __init__(self, log: Log) -> None:
        self._records = AccessRecords(log, _KEYS, logging.getLogger(__name__))

    def begin(self, host: str, port: int) -> Access:
        """The records of a connection from this client."""
        return Access(self._records, host, port)


class Access(Connection):
    """The records of one connection. The session fills in what it learns."""

    __slots__ = ("destination", "upstream")

    def __init__(self, records: AccessRecords, host: str, port: int) -> None:
        super().__init__(records, host, port)
        self.destination: Destination | None = None
        """Where the client was going."""
        self.upstream: str | None = None
        """Which proxy carries it there."""

    def starts(self, bound: tuple[str, int]) -> None:
        """The upstream has connected; `bound` is our address towards it, which is the client that it records."""
        self._begin(bound)

    def refused(self, error: Error) -> None:
        """The client is reset."""
        level = logging.ERROR
        match error:
            case NotRedirected():
                # Somebody who looks whether we are there, mostly.
                level, message = logging.WARNING, "not redirected"
            case Loop():
                message = "loop refused"
            case _:
                message = "failed to connect to proxy server"
        self._event(level, message, error=str(error))

    def gave_up(self) -> None:
        """The client is gone before it had a connection."""
        self._event(logging.INFO, "client is gone")

    def _values(self) -> tuple[object, ...]:
        destination = None if self.destination is None else str(self.destination)
        return (self._id, self._client, destination, self.upstream, self._source)

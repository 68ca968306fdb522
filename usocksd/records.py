"""Access records, read back: what the log says that a client asked for, and what became of it. Pure.

The other side is access_log.py; docs/explain.md says what `usocksd diff` goes by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

from attrs import frozen

from usocksd.log_lines import read_fields
from usocksd.net.address import numeric_address


@frozen
class Asked:
    """A request as it was recorded: texts, so that equal ones are quickly found to be equal."""

    client: str
    user: str | None
    host: str | None
    """As the client wrote it; None if it did not get so far."""
    port: int
    name: str | None
    """The name that was judged, if it is known: as written, in canonical form, perhaps with a search domain."""
    candidates: tuple[str, ...] | None
    """The addresses that the name had, none if there was no answer; None if it was denied before it was resolved."""
    dialled: str | None
    """Which of them the connection went to."""
    peer: str | None = None
    """The proxy that has named the client in a PROXY header."""
    own: bool = False
    """The client is that proxy itself."""


@frozen
class Record:
    """One line of the log that says what became of a request."""

    at: str
    """RFC 3339 in UTC, as the log has it."""
    asked: Asked
    allowed: bool


class Skipped(Enum):
    """Lines that say nothing about a request."""

    OTHER = "other"
    """no access record, or the second one of a connection"""
    NO_REQUEST = "no_request"
    """an access record of a connection that came to no request"""
    UNREADABLE = "unreadable"
    """not a record"""


# As JSON, logfmt and plain have it.
_ENDS = (b'"message":"proxy ends', b' message="proxy ends', b' info: "proxy ends')
_CANDIDATE = re.compile(r"(?:^| )([0-9a-f.:]+(?:%\S+)?) (?:allowed|denied) ")


def read_record(line: bytes) -> Record | Skipped:
    """What a line of the log says about a request. The first record of each connection counts."""
    # Half of a busy log: not worth parsing. (Inside of a string the quotes would be escaped.)
    if any(mark in line for mark in _ENDS):
        return Skipped.OTHER
    if not line.strip():
        return Skipped.OTHER
    try:
        record = read_fields(line)
    except ValueError:
        return Skipped.UNREADABLE
    if record.get("type") != "access" or "client_addr" not in record:
        return Skipped.OTHER
    try:
        return _parse(record)
    except (ValueError, TypeError, AttributeError, KeyError):
        return Skipped.UNREADABLE


def _parse(record: Mapping[str, Any]) -> Record | Skipped:
    message = record["message"]
    if message in ("proxy ends", "proxy ends with an error"):
        return Skipped.OTHER
    client, peer, own = _host_of(record["client_addr"]), None, False
    if (said := record.get("peer_addr")) is not None:
        peer, own = _host_of(said), said == record["client_addr"]
    at, user = _text(record["logged_at"]), record.get("user")
    if message == "denied access":
        return Record(at, Asked(client, None, None, 0, None, None, None, peer, own), allowed=False)
    if message == "command not supported" or "dest_host" not in record:
        return Skipped.NO_REQUEST
    host, port = _text(record["dest_host"]), record["dest_port"]
    if type(port) is not int or not (user is None or isinstance(user, str)):
        raise ValueError("not a port or a user")
    dialled = None if record.get("dest_addr") is None else _host_of(record["dest_addr"])
    allowed = message != "ruleset mismatch"
    candidates: tuple[str, ...] | None
    if (found := record.get("candidates")) is not None:
        candidates = tuple(_candidates(found))
    elif dialled is not None:
        candidates = (dialled,)  # by a version that did not record the others
    else:
        candidates = () if allowed else None
    name = None if record.get("dest_name") is None else _text(record["dest_name"])
    return Record(at, Asked(client, user, host, port, name, candidates, dialled, peer, own), allowed)


def _candidates(found: object) -> Iterator[str]:
    """The addresses in ["ADDRESS VERDICT RULE", ...], or in plain: "[ADDRESS VERDICT RULE ADDRESS ...]".

    (Rules have any name. One that is made like the next of the list is the admin's.)
    """
    if isinstance(found, str) and found.startswith("[") and found.endswith("]"):
        found = [f"{match[1]} " for match in _CANDIDATE.finditer(found[1:-1])]
    if not isinstance(found, list):
        raise ValueError("not a list")
    for each in found:
        yield _address(_text(each).partition(" ")[0])


def _host_of(address: str) -> str:
    """The host of "host:port" or "[host]:port"; raises ValueError if it is no address."""
    return _address(_text(address).rpartition(":")[0].removeprefix("[").removesuffix("]"))


def _address(text: str) -> str:
    numeric_address(text)
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


def lines_of(readline: Callable[[int], bytes], longest: int = 1 << 21) -> Iterator[bytes]:
    """The lines of a file, by its `readline`; of more than `longest` bytes, they come in pieces and are no records."""
    return iter(lambda: readline(longest), b"")

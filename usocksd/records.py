"""Reads access records back from a log in any of the three formats: what a client requested, and the result. Pure.

access_log.py and log/formats.py write them; docs/explain.md says what `usocksd diff` goes by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

from attrs import frozen

from usocksd.acl import COMMANDS, CONNECT, UDP_ASSOCIATE
from usocksd.net.address import numeric_address


@frozen
class RecordedRequest:
    """A recorded request, as text, so that equal requests compare quickly."""

    client: str
    user: str | None
    host: str | None
    """As the client wrote it; None if the client was not admitted."""
    port: int
    name: str | None
    """The name that was judged, if it was recorded: canonical, perhaps with a search domain."""
    candidates: tuple[str, ...] | None
    """The addresses that the name had, none if it was not resolved; None if it was denied before."""
    dialled: str | None
    """The address that was connected to."""
    proxy: str | None = None
    """The proxy that has named the client in a PROXY header."""
    local: bool = False
    """The client is that proxy itself."""
    command: str = CONNECT


@frozen
class AccessRecord:
    """A line of the log that has the result of a request."""

    at: str
    """RFC 3339 in UTC, as the log has it."""
    request: RecordedRequest
    allowed: bool


class Skipped(Enum):
    """Lines that say nothing about a request."""

    OTHER = "other"
    """no access record, or not the first one of a connection"""
    NO_REQUEST = "no_request"
    """an access record of a connection without a request"""
    UNREADABLE = "unreadable"
    """no record"""


# As JSON, logfmt and plain write it.
_ENDS = (b'"message":"proxy ends', b' message="proxy ends', b' info: "proxy ends')
_FLOWS = ("udp flow", "udp flow failed", "ruleset mismatch")
_CANDIDATE = re.compile(r"(?:^| )([0-9a-f.:]+(?:%\S+)?) (?:allowed|denied) ")


def read_record(line: bytes) -> AccessRecord | Skipped:
    """Parse a line of the log, for what it says about a request. The first record of each connection counts."""
    # These records are half of a busy log, and need no parsing. (Inside a string, the quotes would be escaped.)
    if any(mark in line for mark in _ENDS) or not line.strip():
        return Skipped.OTHER
    try:
        fields = _fields_of(line)
        if fields.get("type") != "access" or "client_addr" not in fields:
            return Skipped.OTHER
        return _read_access(fields)
    except (ValueError, TypeError, AttributeError, KeyError):
        return Skipped.UNREADABLE


def lines_of(readline: Callable[[int], bytes], longest: int = 1 << 21) -> Iterator[bytes]:
    """The lines of a file, by its `readline`. Longer lines come in pieces, which are no records."""
    return iter(lambda: readline(longest), b"")


def _read_access(fields: Mapping[str, Any]) -> AccessRecord | Skipped:
    message = fields["message"]
    if message in ("proxy ends", "proxy ends with an error"):
        return Skipped.OTHER
    at, user = _text(fields["logged_at"]), fields.get("user")
    client, peer = _host_of(fields["client_addr"]), fields.get("peer_addr")
    proxy, local = None if peer is None else _host_of(peer), peer == fields["client_addr"]
    if message == "denied access":
        return AccessRecord(at, RecordedRequest(client, None, None, 0, None, None, None, proxy, local), allowed=False)
    if message == "command not supported" or "dest_host" not in fields:
        return Skipped.NO_REQUEST
    command = fields.get("command", CONNECT)
    # What the client asked for with the command itself is no destination; and many destinations may share a record.
    if command == UDP_ASSOCIATE and (message not in _FLOWS or "destinations" in fields):
        return Skipped.OTHER
    if command not in COMMANDS:
        raise ValueError("not a command")
    host, port, name = _text(fields["dest_host"]), fields["dest_port"], fields.get("dest_name")
    if type(port) is not int or not isinstance(user, str | None) or not isinstance(name, str | None):
        raise ValueError("not a port, a user or a name")
    allowed = message != "ruleset mismatch"
    listed, dialled = fields.get("candidates"), fields.get("dest_addr")
    candidates = tuple(_candidates(listed)) if listed is not None else () if allowed else None
    connected = None if dialled is None else _host_of(dialled)
    request = RecordedRequest(client, user, host, port, name, candidates, connected, proxy, local, command)
    return AccessRecord(at, request, allowed)


def _candidates(listed: object) -> Iterator[str]:
    """The addresses in ["ADDRESS VERDICT RULE", ...]; in plain that is "[ADDRESS VERDICT RULE ADDRESS ...]".

    (A rule could have a name that looks like the next element of such a list.)
    """
    if isinstance(listed, str) and listed.startswith("[") and listed.endswith("]"):
        listed = [f"{match[1]} " for match in _CANDIDATE.finditer(listed[1:-1])]
    if not isinstance(listed, list):
        raise ValueError("not a list")
    for each in listed:
        yield _address(_text(each).partition(" ")[0])


def _host_of(place: object) -> str:
    """The host of "host:port" or "[host]:port". Raises ValueError if it is no address."""
    return _address(_text(place).rpartition(":")[0].removeprefix("[").removesuffix("]"))


def _address(text: str) -> str:
    numeric_address(text)
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


# ---- the three formats

# A quoted string as Go writes it. In logfmt, lists and maps are taken as they stand.
_STRING = r'"(?:[^"\\]|\\.)*"'
_FIELD = re.compile(
    rf'([_a-z][a-z0-9_]*)=({_STRING}|\[(?:{_STRING}|[^"\]])*\]|{{(?:{_STRING}|[^"}}])*}}|[^ "[{{]\S*)(?: |$)'
)
_PLAIN = re.compile(rf"(\S+) \S+ \S+ [a-z]+: ({_STRING})(?: |$)")
_QUOTED = re.compile(_STRING)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_SHORT = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_CONSTANTS = {"null": None, "true": True, "false": False}


def _fields_of(line: bytes) -> Mapping[str, Any]:
    """The fields of a record in JSON, logfmt or plain, "logged_at" and "message" among them. Raises ValueError if it is
    no record. A list in plain is left as text.
    """
    if line.startswith(b"{"):
        try:
            record = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(record, dict):
            raise ValueError("no record")
        return record
    text = line.decode().rstrip("\n")
    if text.startswith("topic="):
        return _pairs(text, 0)
    head = _PLAIN.match(text)
    if head is None:
        raise ValueError("no record")
    return {"logged_at": head[1], "message": _value(head[2]), **_pairs(text, head.end())}


def _pairs(text: str, start: int) -> dict[str, Any]:
    found = {}
    while start < len(text):
        match = _FIELD.match(text, start)
        if match is None:
            raise ValueError("not a field")
        found[match[1]] = _value(match[2])
        start = match.end()
    return found


def _value(text: str) -> object:
    if text[0] == '"':
        return _ESCAPE.sub(_unescape, text[1:-1])
    if text[0] == "[":
        return [_value(each) for each in _QUOTED.findall(text)]
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        return int(text)
    except ValueError:
        return text


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    return chr(int(code, 16)) if code else _SHORT.get(match[4], match[4])

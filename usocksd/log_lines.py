"""Lines of the log, read back as fields, in each of the three formats that log/formats.py writes. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# A quoted string as Go writes it; lists and maps of logfmt are taken as they stand.
_STRING = r'"(?:[^"\\]|\\.)*"'
_FIELD = re.compile(
    rf'([_a-z][a-z0-9_]*)=({_STRING}|\[(?:{_STRING}|[^"\]])*\]|{{(?:{_STRING}|[^"}}])*}}|[^ "[{{]\S*)(?: |$)'
)
_PLAIN = re.compile(rf"(\S+) (\S+) (\S+) ([a-z]+): ({_STRING})(?: |$)")
_QUOTED = re.compile(_STRING)
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_SHORT = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_CONSTANTS = {"null": None, "true": True, "false": False}


def read_fields(line: bytes) -> Mapping[str, Any]:
    """The fields of a record in JSON, logfmt or plain, with "logged_at" and "message" among them. Raises ValueError
    for what is no record.

    A list in plain is the text that it is there.
    """
    if line.startswith(b"{"):
        try:
            record = json.loads(line)
        except RecursionError:
            raise ValueError("nested without measure") from None
        if not isinstance(record, dict):
            raise ValueError("no record")
        return record
    text = line.decode().rstrip("\n")
    if text.startswith("topic="):
        return _fields(text, 0)
    head = _PLAIN.match(text)
    if head is None:
        raise ValueError("no record")
    at, host, topic, severity, message = head.groups()
    return {
        "logged_at": at,
        "utsname": host,
        "topic": topic,
        "severity": severity,
        "message": _value(message),
        **_fields(text, head.end()),
    }


def _fields(text: str, start: int) -> dict[str, Any]:
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

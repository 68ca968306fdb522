"""The three log formats of the original programs: values in, one finished line out. No I/O.

They are those of github.com/cybozu-go/log (plain.go, logfmt.go, json.go), byte for byte where that library is
deterministic (JSON: where all is printable), so that existing log pipelines keep working. Rules of this file:

- A record is one line, and nothing in it moves a terminal: what is not printable is escaped, in every format.
- What is not UTF-8 becomes U+FFFD. Python says "not UTF-8" with lone surrogates (`surrogateescape`).
- A key that is not allowed is a bug, and a ValueError; no value is an error.
- Fields that are None are left out of plain and logfmt, where people would read "null" in half of a record. In JSON
  they stay: programs look for their key.

Access records go through a `Template`, twice per proxied connection: whatever is known before is formatted
before, so that a record costs one pass over its values and one `%`.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from itertools import compress, repeat
from json.encoder import encode_basestring
from operator import is_not, itemgetter
from typing import Any, ClassVar, Final

from usocksd.log.gotext import go_float, go_quote, go_v, json_quote, timestamp

MAX_RECORD: Final = 1 << 20
"""Bytes in a record, its newline included."""

_RESERVED: Final = frozenset({"topic", "logged_at", "severity", "utsname", "message"})
_KEY = re.compile(r"[_a-z][a-z0-9_]*")
# Keeps an over-long message under MAX_RECORD even when each of its characters needs ten (\U0001f600).
_MESSAGE_CUT: Final = 1 << 16


class Severity(IntEnum):
    """Smaller is worse. The numbers are those of syslog(3)."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


class Formatter(ABC):
    """Makes records of one format for one program on one host.

    `topic` is the program's name, `utsname` the host's; what could break a line in them becomes '-' (in the
    original only the topic's).
    """

    name: ClassVar[str]
    sorts: ClassVar[bool] = False  # fields stand in the order of their keys
    nulls: ClassVar[bool] = False  # fields that are None are there
    end: ClassVar[str] = "\n"

    def __init__(self, topic: str, utsname: str) -> None:
        self.topic = re.sub(r"[^.a-z0-9-]", "-", topic.lower())[:128]
        self.utsname = re.sub(r"[^.a-zA-Z0-9_-]", "-", utsname) or "localhost"
        self._second = (-1, "")

    def format(self, now: float, severity: Severity, message: str, fields: Mapping[str, object] | None = None) -> bytes:
        """One record. `now` is in seconds of the epoch. Raises ValueError for a key that is not allowed.

        The original loses a record of more than `MAX_RECORD` bytes; here its message stays, and a field
        `log_error` stands in for the others.
        """
        return Template(self, severity, message, fields or {}, ()).render(now, ())

    def template(
        self, severity: Severity, message: str, constants: Mapping[str, object], keys: Sequence[str]
    ) -> Template:
        """A record all fixed but its time and the values of `keys`. Raises ValueError as `format` does."""
        return Template(self, severity, message, constants, keys)

    def second(self, second: int) -> str:
        """A record's timestamp up to the fraction. Kept for the other records of the same second."""
        known, text = self._second  # one tuple, replaced as a whole: threads may race here
        if known != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
            self._second = (second, text)
        return text

    @abstractmethod
    def head(self, severity: str, message: str) -> tuple[str, str]:
        """What stands before the timestamp, and what between it and the fields."""

    @abstractmethod
    def key(self, key: str) -> str:
        """`key` with all that stands between the field before it and its value."""

    @abstractmethod
    def mapping(self, value: Mapping[object, object]) -> str: ...

    @abstractmethod
    def sequence(self, value: Iterable[object]) -> str: ...

    def quote(self, text: str) -> str:
        return go_quote(text)

    def number(self, number: float) -> str:
        return go_float(number)

    def time(self, moment: datetime) -> str:
        return timestamp(moment)

    def value(self, value: object) -> str:
        """A field's value: None, bool, int, float, str, datetime, mappings, lists, tuples and sets have a
        form of their own, bytes are text, all else (exceptions, addresses, enums) is the text of its str().
        """
        match value:
            case str():
                text = self.quote(str.__str__(value))  # a StrEnum is its value
            case None:
                text = "null"
            case bool() | int():
                text = go_v(value)
            case float():
                text = self.number(value)
            case datetime():
                text = self.time(value)
            case list() | tuple() | set() | frozenset():
                text = self.sequence(value)
            case Mapping():  # behind all that is cheaper to tell
                text = self.mapping(value)
            case _:
                text = self.quote(go_v(value))
        return text


class Plain(Formatter):
    """2001-12-03T13:45:01.123456Z localhost tag1 debug: "test message" a=1 b="[x y]" c="map[k:1]" """

    name = "plain"
    sorts = True

    def head(self, severity: str, message: str) -> tuple[str, str]:
        return "", f"Z {self.utsname} {self.topic} {severity}: {self.quote(message)}"

    def key(self, key: str) -> str:
        return f" {key}="

    def mapping(self, value: Mapping[object, object]) -> str:
        return self.quote(go_v(value))

    def sequence(self, value: Iterable[object]) -> str:
        return self.quote(go_v(value))


class Logfmt(Formatter):
    """topic=tag1 logged_at=… severity=debug utsname=localhost message="a message" a=1 b=["x" "y"] c={k=1}"""

    name = "logfmt"

    def head(self, severity: str, message: str) -> tuple[str, str]:
        return (
            f"topic={self.topic} logged_at=",
            f"Z severity={severity} utsname={self.utsname} message={self.quote(message)}",
        )

    def key(self, key: str) -> str:
        return f" {key}="

    def mapping(self, value: Mapping[object, object]) -> str:
        keys = ((k if _KEY.fullmatch(k := str(key)) else self.quote(k), item) for key, item in value.items())
        return f"{{{' '.join(f'{key}={self.value(item)}' for key, item in keys)}}}"

    def sequence(self, value: Iterable[object]) -> str:
        return f"[{' '.join(map(self.value, value))}]"


class JSON(Formatter):
    """{"topic":"tag1","logged_at":"…","severity":"debug","utsname":"localhost","message":"text","a":1}"""

    name = "json"
    nulls = True
    end = "}\n"

    def head(self, severity: str, message: str) -> tuple[str, str]:
        return (
            f'{{"topic":"{self.topic}","logged_at":"',
            f'Z","severity":"{severity}","utsname":"{self.utsname}","message":{self.quote(message)}',
        )

    def key(self, key: str) -> str:
        return f',"{key}":'

    def mapping(self, value: Mapping[object, object]) -> str:
        items = (f"{self.quote(str(key))}:{self.value(item)}" for key, item in value.items())
        return f"{{{','.join(items)}}}"

    def sequence(self, value: Iterable[object]) -> str:
        # Of strings mostly, in each connection's record: not by way of `value`, which takes twice as long.
        quote, text = self.quote, self.value
        return f"[{','.join([quote(item) if type(item) is str else text(item) for item in value])}]"

    def quote(self, text: str) -> str:
        return json_quote(text)

    def number(self, number: float) -> str:
        text = go_float(number)
        return f'"{text}"' if text[-1].isalpha() else text  # NaN, +Inf, -Inf

    def time(self, moment: datetime) -> str:
        return f'"{timestamp(moment)}"'


FORMATS: Final[Mapping[str, type[Formatter]]] = {cls.name: cls for cls in (Plain, Logfmt, JSON)}


class Template:
    """A record, formatted but for its time and the values of some keys; see `Formatter.template`."""

    __slots__ = (
        "_constants",
        "_fewer",
        "_format",
        "_formatter",
        "_keys",
        "_message",
        "_number",
        "_order",
        "_quote",
        "_second",
        "_value",
        "severity",
    )

    def __init__(
        self,
        formatter: Formatter,
        severity: Severity,
        message: str,
        constants: Mapping[str, object],
        keys: Sequence[str],
    ) -> None:
        names = [*constants, *keys]
        for name in names:
            if name in _RESERVED or not _KEY.fullmatch(name) or names.count(name) > 1:
                raise ValueError(f"invalid key of a log field: {name!r}")
        if not formatter.nulls:
            names = [name for name in names if name not in constants or constants[name] is not None]
        if formatter.sorts:
            names.sort()
        order = [keys.index(name) for name in names if name not in constants]
        # itemgetter returns no tuple for one index, and takes no empty list: those need no permutation.
        self._order = itemgetter(*order) if order != sorted(order) else None
        before, after = formatter.head(severity.name.lower(), message)
        fields = (
            escaped(formatter.key(name)) + (escaped(formatter.value(constants[name])) if name in constants else "%s")
            for name in names
        )
        self._format = f"{escaped(before)}%s%06d{escaped(after)}{''.join(fields)}{formatter.end}"
        self._formatter = formatter
        self._constants = constants
        self._keys = keys
        self._fewer: dict[tuple[bool, ...], Template] = {}
        """For records of which some values are None: by which of them are not."""
        self._message = message
        self._number = formatter.number
        self._quote = formatter.quote
        self._second = formatter.second
        self._value = formatter.value
        self.severity = severity

    def render(self, now: float, values: tuple[Any, ...]) -> bytes:
        """The record of `now` (seconds of the epoch) with `values` in the order of the template's keys.

        Costs about 3 µs for twelve short values. A record of more than MAX_RECORD loses its fields.
        """
        if None in values and not self._formatter.nulls:
            return self._render_fewer(now, values)
        second = int(now)
        micros = int((now - second) * 1e6 + 0.5)
        texts: list[object] = [self._second(second), micros if micros < 1000000 else 999999]
        append, quote, order = texts.append, self._quote, self._order
        for value in values if order is None else order(values):
            # By type(): isinstance would cost as much here as the quoting. Subclasses take the long way.
            if (kind := type(value)) is str:
                append(encode_basestring(value) if value.isprintable() else quote(value))
            elif kind is int:
                append(value)
            elif value is None:
                append("null")
            elif kind is float:
                append(self._number(value))
            else:
                append(self._value(value))
        record = (self._format % tuple(texts)).encode()
        return record if len(record) <= MAX_RECORD else self._too_large(now, len(record))

    def _render_fewer(self, now: float, values: tuple[Any, ...]) -> bytes:
        there = tuple(map(is_not, values, repeat(None)))
        fewer = self._fewer.get(there)
        if fewer is None:
            keys = list(compress(self._keys, there))
            fewer = self._fewer[there] = Template(self._formatter, self.severity, self._message, self._constants, keys)
        return fewer.render(now, tuple(compress(values, there)))

    def _too_large(self, now: float, size: int) -> bytes:
        error = f"a record of {size} bytes exceeds {MAX_RECORD}"
        return self._formatter.format(now, self.severity, self._message[:_MESSAGE_CUT], {"log_error": error})


def escaped(text: str) -> str:
    """`text` as it has to stand in a %-format."""
    return text.replace("%", "%%")

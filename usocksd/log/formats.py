"""The three log formats of the original programs: values in, one finished line out. No I/O.

They are those of github.com/cybozu-go/log (plain.go, logfmt.go, json.go), so that existing log pipelines keep working:
byte for byte where that library is deterministic and all is printable. Rules of this file:

- A record is one line, and nothing in it controls a terminal: every format escapes characters that are not printable.
- Bytes that are not UTF-8 become U+FFFD. In Python's strings they are lone surrogates (`surrogateescape`).
- A key that is not allowed is a bug, and a ValueError; no value is an error. Values are None, bool, int, float, str
  and lists of these; anything else (exceptions, addresses) is the text of its str().
- Fields that are None are left out of plain and logfmt, where people would read "null" in half of a record. In JSON
  they stay: programs look for their key.

Access records, two for each proxied connection, put `Fields` and a `Frame` together themselves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from enum import IntEnum
from functools import lru_cache, partial
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, ClassVar, Final

MAX_RECORD: Final = 1 << 20
"""Bytes in a record, its newline included."""

MESSAGE_CUT: Final = 1 << 16
"""Characters to which a message is cut so that it fits even if each of them needs ten (\\U0001f600)."""

_RESERVED: Final = frozenset({"topic", "logged_at", "severity", "utsname", "message"})
_MOST_REMEMBERED: Final = 128
_KEY = re.compile(r"[_a-z][a-z0-9_]*")
_SURROGATES = re.compile(r"[\ud800-\udfff]+")
_GO_SHORT: Final = {
    '"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v",
}  # fmt: skip


class Severity(IntEnum):
    """Smaller is worse. The numbers are those of syslog(3)."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


class Formatter:
    """Makes records of one format for one program on one host; the subclasses are the formats.

    `topic` is the program's name, `utsname` the host's; what could break a line in them becomes '-'.
    """

    name: ClassVar[str]
    sorts: ClassVar[bool] = False  # fields stand in the order of their keys
    nulls: ClassVar[bool] = False  # fields that are None are there
    end: ClassVar[str] = "\n"

    def __init__(self, topic: str, utsname: str) -> None:
        self.topic = re.sub(r"[^.a-z0-9-]", "-", topic.lower())[:128]
        self.utsname = re.sub(r"[^.a-zA-Z0-9_-]", "-", utsname) or "localhost"
        self.latest = (-1, "")
        """A second and its text: one tuple, replaced as a whole, since threads may race here."""

    def format(self, now: float, severity: Severity, message: str, fields: Mapping[str, object] | None = None) -> bytes:
        """One record. `now` is in seconds of the epoch. Raises ValueError for a key that is not allowed.

        The original loses a record of more than `MAX_RECORD` bytes; here its message stays, and a field
        `log_error` stands in for the others.
        """
        return Frame(self, severity, message).record(now, Fields(self, (), fields).text(()))

    def second(self, second: int) -> str:
        """A record's timestamp up to the fraction. It is kept for the other records of the same second."""
        text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        self.latest = (second, text)
        return text

    def head(self, severity: str, message: str) -> tuple[str, str]:
        """The text before the timestamp, and the text between it and the fields."""
        raise NotImplementedError

    def key(self, key: str) -> str:
        """`key`, with the separators before and after it."""
        return f" {key}="

    def quote(self, text: str) -> str:
        """A string, as strconv.Quote of Go (fmt's %q) writes it; each run of bytes that are not UTF-8 is one U+FFFD.

        `str.isprintable` and Go's `strconv.IsPrint` both mean "in neither of Unicode's categories C and Z, or the
        space", so the C function behind the json module is right for Go too. (They may know different versions of
        Unicode.)
        """
        if text.isprintable():
            return encode_basestring(text)
        return f'"{"".join(map(_go_escape, _SURROGATES.sub(chr(0xFFFD), text)))}"'

    def sequence(self, value: Iterable[object]) -> str:
        """A list."""
        return f"[{' '.join(map(self.value, value))}]"

    def value(self, value: object) -> str:
        """A field's value."""
        match value:
            case str():
                return self.quote(value)
            case None:
                return "null"
            case bool():
                return "true" if value else "false"
            case int():
                return str(int(value))  # an IntEnum is its number
            case float():
                return number_text(value)
            case list() | tuple():
                return self.sequence(value)
        return self.quote(str(value) or repr(value))  # str(TimeoutError()) is empty


class Plain(Formatter):
    """2001-12-03T13:45:01.123456Z localhost tag1 debug: "test message" a=1 b="[x y]" """

    name = "plain"
    sorts = True

    def head(self, severity: str, message: str) -> tuple[str, str]:
        return "", f"Z {self.utsname} {self.topic} {severity}: {self.quote(message)}"

    def sequence(self, value: Iterable[object]) -> str:
        return self.quote(f"[{' '.join(map(str, value))}]")


class Logfmt(Formatter):
    """topic=tag1 logged_at=… severity=debug utsname=localhost message="a message" a=1 b=["x" "y"]"""

    name = "logfmt"

    def head(self, severity: str, message: str) -> tuple[str, str]:
        return (
            f"topic={self.topic} logged_at=",
            f"Z severity={severity} utsname={self.utsname} message={self.quote(message)}",
        )


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

    def quote(self, text: str) -> str:
        """A string. The original leaves all but ASCII's controls as they are: U+0085 and U+2028, which end lines for
        some readers, and U+009B and U+202E, which terminals obey.
        """
        if text.isprintable():
            return encode_basestring(text)
        return encode_basestring_ascii(_SURROGATES.sub("\ufffd", text))

    def sequence(self, value: Iterable[object]) -> str:
        # Mostly lists of strings, in each connection's record: without `value`, which takes twice as long.
        quote, text = self.quote, self.value
        return f"[{','.join([quote(item) if type(item) is str else text(item) for item in value])}]"


FORMATS: Final[Mapping[str, type[Formatter]]] = {cls.name: cls for cls in (Plain, Logfmt, JSON)}


class Fields:
    """Makes the text of a record's fields from the values of `keys`.

    What is known of values saves a look at each: those of the keys `texts` are text that needs no escaping; those of
    `numbers` are integers, or the text of a number; those of `few` are text or None, mostly one of a few, whose
    escaped text is remembered. `constants` stand first, or where the format sorts them. Raises ValueError for a key
    that is not allowed, or there twice.

    In formats that don't sort, a text of some fields and one of others make a text of all.
    """

    def __init__(
        self,
        formatter: Formatter,
        keys: Sequence[str],
        constants: Mapping[str, object] | None = None,
        *,
        texts: Collection[str] = (),
        numbers: Collection[str] = (),
        few: Collection[str] = (),
    ) -> None:
        constants = constants or {}
        names = [*constants, *keys]
        for name in names:
            if name in _RESERVED or not _KEY.fullmatch(name) or names.count(name) > 1:
                raise ValueError(f"invalid key of a log field: {name!r}")
        if formatter.sorts:
            names.sort()
        order = [keys.index(name) for name in names if name not in constants]
        self._order = order if order != sorted(order) else None
        self._any: list[tuple[int, str]] = []
        """Which values may be anything, and what to write before them."""
        self._few: list[tuple[int, Callable[[str | None], str]]] = []
        """Which are of few, and what gives their text."""
        self._none_text = "null" if formatter.nulls else ""
        self._formatter = formatter
        self._format = ""
        at = 0
        for name in names:
            prefix = formatter.key(name)
            if name in constants:
                if formatter.nulls or constants[name] is not None:
                    self._format += _escape(prefix + formatter.value(constants[name]))
                continue
            if name in texts:
                self._format += f'{_escape(prefix)}"%s"'
            elif name in numbers:
                self._format += f"{_escape(prefix)}%s"
            else:
                # Where fields that are None are left out, their keys are too.
                before = "" if formatter.nulls else prefix
                if name in few:
                    self._few.append((at, lru_cache(_MOST_REMEMBERED)(partial(self._escaped, before))))
                else:
                    self._any.append((at, before))
                self._format += f"{_escape(prefix)}%s" if formatter.nulls else "%s"
            at += 1

    def text(self, values: tuple[Any, ...]) -> str:
        """The text for these values, which are in the order of the keys."""
        texts = list(values) if self._order is None else [values[at] for at in self._order]
        for at, text_of in self._few:
            texts[at] = text_of(texts[at])
        for at, prefix in self._any:
            value = texts[at]
            if value is None:
                texts[at] = self._none_text
            elif type(value) is str and value.isprintable():  # by type(): isinstance costs as much as the quoting
                texts[at] = prefix + encode_basestring(value)
            else:
                texts[at] = prefix + self._formatter.value(value)
        return self._format % tuple(texts)

    def _escaped(self, prefix: str, value: str | None) -> str:
        return self._none_text if value is None else prefix + self._formatter.value(value)


class Frame:
    """A record without its time and fields."""

    def __init__(self, formatter: Formatter, severity: Severity, message: str) -> None:
        self._before, self._after = formatter.head(severity.name.lower(), message)
        self._end = formatter.end
        self._formatter = formatter
        self._message = message
        self.severity = severity

    def record(self, now: float, fields: str) -> bytes:
        """The record of `now` (seconds of the epoch) with a text of `Fields`. If it has more than MAX_RECORD bytes, it
        loses its fields.
        """
        second = int(now)
        micros = min(int((now - second) * 1e6 + 0.5), 999999)
        known, text = self._formatter.latest
        if known != second:
            text = self._formatter.second(second)
        # (format() and not a specification in the text: mypyc makes that a call of str.format, with a parser.)
        record = f"{self._before}{text}{format(micros, '06d')}{self._after}{fields}{self._end}".encode()
        return record if len(record) <= MAX_RECORD else self._too_large(now, len(record))

    def _too_large(self, now: float, size: int) -> bytes:
        error = f"a record of {size} bytes exceeds {MAX_RECORD}"
        return self._formatter.format(now, self.severity, self._message[:MESSAGE_CUT], {"log_error": error})


def number_text(number: float) -> str:
    """The shortest text that reads back as `number`, without an exponent (strconv.FormatFloat 'f', -1)."""
    text = repr(number)
    return f"{Decimal(text):f}" if "e" in text else text.removesuffix(".0")


def _escape(text: str) -> str:
    """`text` escaped for a %-format."""
    return text.replace("%", "%%")


def _go_escape(char: str) -> str:
    code = ord(char)
    if char in _GO_SHORT:
        return _GO_SHORT[char]
    if char.isprintable():
        return char
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

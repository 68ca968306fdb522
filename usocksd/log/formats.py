"""The three log formats of the original programs: values in, one finished line out. No I/O.

They are those of github.com/cybozu-go/log (plain.go, logfmt.go, json.go), so that existing log pipelines keep working:
byte for byte where that library is deterministic and all is printable. Rules of this file:

- A record is one line, and nothing in it controls a terminal: every format escapes characters that are not printable.
- Bytes that are not UTF-8 become U+FFFD. In Python's strings they are lone surrogates (`surrogateescape`).
- A key that is not allowed is a bug, and a ValueError; no value is an error. Values are None, bool, int, float, str
  and lists of these; anything else (exceptions, addresses) is the text of its str().
- Fields that are None are left out of plain and logfmt, where people would read "null" in half of a record. In JSON
  they stay: programs look for their key.

Access records go through a `Template`, twice for each proxied connection.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import IntEnum
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, ClassVar, Final

MAX_RECORD: Final = 1 << 20
"""Bytes in a record, its newline included."""

MESSAGE_CUT: Final = 1 << 16
"""Characters to which a message is cut so that it fits even if each of them needs ten (\\U0001f600)."""

_RESERVED: Final = frozenset({"topic", "logged_at", "severity", "utsname", "message"})
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
        self._second = (-1, "")

    def format(self, now: float, severity: Severity, message: str, fields: Mapping[str, object] | None = None) -> bytes:
        """One record. `now` is in seconds of the epoch. Raises ValueError for a key that is not allowed.

        The original loses a record of more than `MAX_RECORD` bytes; here its message stays, and a field
        `log_error` stands in for the others.
        """
        return Template(self, severity, message, fields or {}, ()).render(now, ())

    def second(self, second: int) -> str:
        """A record's timestamp up to the fraction. Kept for the other records of the same second."""
        known, text = self._second  # one tuple, replaced as a whole: threads may race here
        if known != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
            self._second = (second, text)
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
                return _float(value)
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


class Template:
    """A record template that lacks only the time and the values of `keys`.

    Raises ValueError for a key that is not allowed, or there twice.
    """

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
        if formatter.sorts:
            names.sort()
        order = [keys.index(name) for name in names if name not in constants]
        self._order = order if order != sorted(order) else None
        # Where fields that are None are left out, their keys are too.
        prefixes = {name: formatter.key(name) for name in names}
        self._prefixes = ["" if formatter.nulls else prefixes[keys[at]] for at in order]
        self._null = "null" if formatter.nulls else ""
        fields = ""
        for name in names:
            if name not in constants:
                fields += f"{_escape(prefixes[name])}%s" if formatter.nulls else "%s"
            elif formatter.nulls or constants[name] is not None:
                fields += _escape(prefixes[name] + formatter.value(constants[name]))
        before, after = map(_escape, formatter.head(severity.name.lower(), message))
        self._format = f"{before}%s%06d{after}{fields}{formatter.end}"
        self._formatter = formatter
        self._message = message
        self.severity = severity

    def render(self, now: float, values: tuple[Any, ...]) -> bytes:
        """The record of `now` (seconds of the epoch) with `values` in the order of the template's keys.

        Costs about 3 µs for twelve short values. A record of more than MAX_RECORD loses its fields.
        """
        second = int(now)
        micros = int((now - second) * 1e6 + 0.5)
        formatter = self._formatter
        texts: list[object] = [formatter.second(second), micros if micros < 1000000 else 999999]
        append, quote, null = texts.append, formatter.quote, self._null
        if self._order is not None:
            values = tuple([values[at] for at in self._order])
        for prefix, value in zip(self._prefixes, values, strict=True):
            # By type(): isinstance would cost as much here as the quoting. Subclasses take the long way.
            if (kind := type(value)) is str:
                append(prefix + (encode_basestring(value) if value.isprintable() else quote(value)))
            elif kind is int:
                append(f"{prefix}{value}")
            elif value is None:
                append(null)
            elif kind is float:
                append(prefix + _float(value))
            else:
                append(prefix + formatter.value(value))
        record = (self._format % tuple(texts)).encode()
        return record if len(record) <= MAX_RECORD else self._too_large(now, len(record))

    def _too_large(self, now: float, size: int) -> bytes:
        error = f"a record of {size} bytes exceeds {MAX_RECORD}"
        return self._formatter.format(now, self.severity, self._message[:MESSAGE_CUT], {"log_error": error})


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


def _float(number: float) -> str:
    """The shortest text that reads back as `number`, without an exponent (strconv.FormatFloat 'f', -1)."""
    text = repr(number)
    return f"{Decimal(text):f}" if "e" in text else text.removesuffix(".0")

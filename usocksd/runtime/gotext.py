r"""Values as Go writes them: strconv.Quote, strconv.FormatFloat, fmt's %v. Pure; what `formats` is made of.

Strings are quoted by the C function behind the json module where they are printable. That is right for Go
as well: `str.isprintable` and Go's `strconv.IsPrint` both mean "in neither of Unicode's categories C and Z,
or the space", so that only `"` and `\` are left to escape. (The two may know different versions of Unicode.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Final

_SURROGATES = re.compile(r"[\ud800-\udfff]+")
_JSON_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f\ud800-\udfff]')
_JSON_SHORT: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_GO_SHORT: Final = {**_JSON_SHORT, "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}
_SPECIAL: Final = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}


def go_quote(text: str) -> str:
    """`text` as strconv.Quote (fmt's %q) writes it; each run of what is not UTF-8 is one U+FFFD."""
    if text.isprintable():
        return encode_basestring(text)
    return '"' + "".join(map(_go_escape, _SURROGATES.sub("\ufffd", text))) + '"'


def _go_escape(char: str) -> str:
    code = ord(char)
    if char in _GO_SHORT:
        return _GO_SHORT[char]
    if char.isprintable():
        return char
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_quote(text: str) -> str:
    """`text` as the original's JSON format writes it: ASCII's controls escaped, others as they are."""
    if text.isprintable():
        return encode_basestring(text)
    return '"' + _JSON_ESCAPED.sub(_json_escape, text) + '"'


def _json_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _JSON_SHORT.get(match[0]) or f"\\u{code if code < 0x80 else 0xFFFD:04x}"


def go_float(number: float) -> str:
    """The shortest text that reads back as `number`, without an exponent (strconv.FormatFloat 'f', -1)."""
    text = repr(number)
    if "e" in text:
        return f"{Decimal(text):f}"
    if text.endswith(".0"):
        return text[:-2]
    return _SPECIAL.get(text, text)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds and Z. A `moment` without a zone is taken as UTC."""
    moment = moment.astimezone(UTC) if moment.tzinfo is not None else moment
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z"


def go_v(value: object) -> str:
    """fmt's %v, which the plain format uses for what it has no form of its own for (lists and maps)."""
    match value:
        case None:
            text = "<nil>"
        case bool():
            text = "true" if value else "false"
        case int():
            text = int.__repr__(value)  # an IntEnum is its number
        case float():  # %v turns to an exponent later than Python does, at 1e21
            text = repr(value) if 0 < abs(value) < 1e-4 or 1e21 <= abs(value) < float("inf") else go_float(value)
        case str():
            text = str.__str__(value)  # so is a StrEnum its value
        case bytes() | bytearray():
            text = value.decode("utf-8", "surrogateescape")
        case datetime():
            text = timestamp(value)
        case Mapping():
            text = f"map[{' '.join(f'{go_v(key)}:{go_v(value[key])}' for key in sorted(value, key=str))}]"
        case list() | tuple() | set() | frozenset():
            text = f"[{' '.join(map(go_v, value))}]"
        case _:
            text = str(value) or repr(value)  # str(TimeoutError()) is empty
    return text

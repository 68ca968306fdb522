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
    """`text` as a JSON string, whatever is not printable escaped; what is not UTF-8 is U+FFFD each.

    The original has all but ASCII's controls as they are: U+0085 and U+2028, which end lines for some readers, and
    U+009B and U+202E, which terminals obey.
    """
    if text.isprintable():
        return encode_basestring(text)
    return (
        '"' + "".join([char if char.isprintable() and char not in '"\\' else _json_escape(char) for char in text]) + '"'
    )


def _json_escape(char: str) -> str:
    if short := _JSON_SHORT.get(char):
        return short
    code = ord(char)
    if code >= 0x10000:  # RFC 8259 section 7: as a surrogate pair
        return f"\\u{0xD7C0 + (code >> 10):04x}\\u{0xDC00 | code & 0x3FF:04x}"
    return f"\\u{0xFFFD if 0xD800 <= code < 0xE000 else code:04x}"


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

"""The strict loader: a TOML file in, a frozen attrs object out, or every fault of the file at once, in its order.

The rules that this file keeps:

1. Each type has its own parser: `Port = Annotated[int, integer(1, 65535)]`. types.py has the common ones.
2. A fault is found while a value is read, not in attrs validators: they run when the object is made, and the first to
   raise hides the faults of its neighbours. What concerns several keys of one table stands in `__attrs_post_init__`,
   which may raise `Invalid` with `at` naming the key; or in the class's `check_table`, which sees the table as TOML
   has it, and is called even if some of the table is wrong.
3. Nothing is coerced: true is no port.
4. No fault shows credentials: whatever stands before an "@" is hidden, and the value of a `secret` parser is not shown
   at all. So no exception that leaves this file has another one as its context.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import attrs

from usocksd.errors import ConfigError, Fault
from usocksd.settings.files import read_file
from usocksd.settings.locate import Lines

T = TypeVar("T")

_current: ContextVar[Load] = ContextVar("load")
_NOWHERE: Final = Lines("")
_SHOWN_MAX: Final = 80  # characters of a value that a fault shows


class Invalid(ValueError):
    """A value is invalid. `expected`: what would be right; `shown`: the value as the operator may see it (None: the
    loader shows it); `at`: where below the value's own key path, as "[2]" or "port".
    """

    def __init__(self, expected: str, *, shown: str | None = None, at: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.shown = shown
        self.at = at


@attrs.frozen
class Parser:
    """Parses a TOML value into a typed one: metadata of an Annotated type.

    `parse` raises ValueError for a value that is not as `expected`, `Invalid` for a more precise fault, or a group of
    `Invalid`. The values of a `secret` parser are never shown.
    """

    parse: Callable[[Any], object]
    expected: str
    secret: bool = False

    def read(self, value: Any) -> Any:
        """The result of `parse`. Raises Invalid, with the value in `shown`, or a group."""
        try:
            return self.parse(value)
        except Invalid as error:
            error.shown = "" if self.secret else show(value)
            raise
        except ValueError:
            raise Invalid(f"expected {self.expected}", shown="" if self.secret else show(value)) from None


class Faults:
    """Collects the faults in the parts of a value, so that all are reported at once."""

    def __init__(self, found: Iterable[Invalid] = ()) -> None:
        self.found = list(found)

    def read(self, at: str, read: Callable[[Any], T], value: Any) -> T | None:
        """The result of `read` for the part `at` of the value; None if it raises Invalid or a group of them."""
        try:
            return read(value)
        except (Invalid, ExceptionGroup) as error:
            self.found += _each(error, at)
            return None

    def check(self) -> None:
        """Raise the collected faults, if any."""
        if self.found:
            raise ExceptionGroup("parts of a value", self.found)


def _each(error: Exception, at: str) -> Iterator[Invalid]:
    if isinstance(error, Invalid):
        error.at = _join(at, error.at)
        yield error
    elif isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _each(inner, at)
    else:
        raise error  # a bug, not a fault of the file


@attrs.frozen
class Load:
    """The context of a load, for parsers."""

    folder: Path
    """the folder of the configuration, to which its paths are relative"""
    files: dict[str, Any]
    """the results of parsers for other files, by name, so that a file that is named twice is parsed once"""
    read: Callable[[Path], bytes]
    """reads them, as `read_file` does"""
    lines: Lines


def current_load() -> Load:
    """The load under way."""
    return _current.get()


def current_lines() -> Lines:
    """The places of the keys in the text that is being loaded, if one is."""
    load = _current.get(None)
    return _NOWHERE if load is None else load.lines


def load(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Read the TOML file `path` as a `cls`. Raises ConfigError with every fault, or that it can't be read."""
    return parse(cls, read(path), os.fspath(path))


def read(path: str | os.PathLike[str]) -> str:
    """The text of the file `path`. Raises ConfigError when it can't be read, or is not text."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8-sig")  # editors of another system begin with a byte order mark
    except OSError as error:
        fault = Fault("file", "", f"can't be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = Fault(f"line {line}", f"byte 0x{content[error.start]:02x}", "expected UTF-8")
    raise ConfigError(os.fspath(path), [fault])


def parse(cls: type[T], text: str, source: str, read: Callable[[Path], bytes] = read_file) -> T:
    """Read TOML `text` as a `cls`, an attrs class. `source` is the file that it is from, and `read` reads those that it
    names. Raises ConfigError.
    """
    try:
        table, fault = tomllib.loads(text), None
    except tomllib.TOMLDecodeError as error:
        fault = _syntax_fault(str(error), text)
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets thousands deep
        fault = Fault("file", "", "can't be read: a number is too long, or brackets are nested too deep")
    if fault is not None:
        raise ConfigError(source, [fault])
    return structure(cls, table, source, read, Lines(text, source))


def structure(
    cls: type[T], table: object, source: str, read: Callable[[Path], bytes] = read_file, lines: Lines = _NOWHERE
) -> T:
    """The table that `tomllib` has read from the file `source`, as a `cls`. Raises ConfigError."""
    token = _current.set(Load(Path(source).parent, {}, read, lines))
    try:
        faults = Faults()
        config: T | None = faults.read("", _reader(cls), table)
    finally:
        _current.reset(token)
    if config is None:
        found = (Fault(fault.at, fault.shown or "", fault.expected) for fault in faults.found)
        raise ConfigError(source, sorted(lines.locate(found), key=lambda fault: fault.line or 0))
    return config


def counted(number: int, one: str, many: str = "") -> str:
    """1 fault, 2 faults, 1,204 requests; `many` where an s does not make it so."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def show(value: object) -> str:
    """A TOML value as a fault shows it: one line, bounded, without credentials."""
    match value:
        case bool():
            text = "true" if value else "false"
        case int():
            text = str(value) if value.bit_length() <= 64 else hex(value)  # str() refuses thousands of digits
        case str():
            value = re.sub(r"^(\w+://)?.*@", r"\1***@", value, flags=re.DOTALL)
            text = json.dumps(value, ensure_ascii=not value.isprintable())
        case list():
            items = ("[…]" if isinstance(item, list) else show(item) for item in value[:_SHOWN_MAX])
            text = "[" + ", ".join(items) + "]"
        case dict():
            text = "a table"
        case _:
            text = str(value)
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…"


# Readers: functions from a TOML value to a typed one, which raise Invalid or a group of them. One for each type.


def _exactly(type_: type[Any], expected: str) -> Parser:
    def parse(value: object) -> object:
        if type(value) is not type_:
            raise ValueError
        return value

    return Parser(parse, expected)


_PLAIN: Final = {bool: _exactly(bool, "true or false"), str: _exactly(str, "a string")}


def _reader(type_: Any) -> Callable[[Any], Any]:
    origin, arguments = get_origin(type_), get_args(type_)
    if parser := _parser(type_):
        return parser.read
    if origin in (Union, UnionType):  # with None, which TOML does not have
        return _reader(arguments[0])
    if origin is tuple:
        return _list_reader(arguments[0])
    if origin is Mapping:
        return _tables_reader(*arguments)
    return _table_reader(type_)


def _parser(type_: Any) -> Parser | None:
    if get_origin(type_) is Annotated:
        return next(meta for meta in get_args(type_) if isinstance(meta, Parser))
    return _PLAIN.get(type_)


def _list_reader(item_type: Any) -> Callable[[Any], Any]:
    read_item, parser = _reader(item_type), _parser(item_type)

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            hint = "" if isinstance(value, dict) else _as_list(value, read)
            if not hint and parser is not None:
                hint = f", each item {parser.expected}"
            raise Invalid(f"expected a list{hint}", shown=show(value))
        faults = Faults()
        items = tuple([faults.read(f"[{index}]", read_item, item) for index, item in enumerate(value)])
        faults.check()
        return items

    return read


def _as_list(value: object, read: Callable[[Any], object]) -> str:
    """The list of this one value, if that loads."""
    text = show([value])
    with contextlib.suppress(ExceptionGroup, Invalid, tomllib.TOMLDecodeError):
        if read([value]) and tomllib.loads(f"list = {text}") == {"list": [value]}:
            return f", as in {text}"
    return ""


def _tables_reader(key_type: Any, item_type: Any) -> Callable[[Any], Any]:
    """Tables by name, [egress.NAME]: the operator chooses names that the key's type accepts."""
    read_key, read_item = _reader(key_type), _reader(item_type)

    def read(value: Any) -> Mapping[Any, Any]:
        if type(value) is not dict:
            raise Invalid("expected a table", shown=show(value))
        faults, items = Faults(), {}
        for name, item in value.items():
            at = _quoted(name)
            items[faults.read(at, read_key, name)] = faults.read(at, read_item, item)
        faults.check()
        return MappingProxyType(items)

    return read


def _table_reader(cls: Any) -> Callable[[Any], Any]:
    fields = {_key(field): field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}
    readers = {key: _reader(field.type) for key, field in fields.items()}
    check_table = getattr(cls, "check_table", lambda _: ())

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise Invalid("expected a table", shown=show(value))
        faults, found = Faults(), {}
        for key, field in fields.items():
            if key in value:
                found[field.name] = faults.read(key, readers[key], value[key])
            elif field.default is attrs.NOTHING:
                parser = _parser(field.type)
                what = "a value is required" if parser is None else f"expected {parser.expected}"
                faults.found.append(Invalid(f"missing: {what}", at=key))
        for key in sorted(value.keys() - fields.keys()):
            faults.found.append(Invalid(_unknown(key, fields, value), at=_quoted(key)))
        faults.found += check_table(value)
        faults.check()
        return cls(**found)

    return read


def _key(field: attrs.Attribute[Any]) -> str:
    """The key of this field in the file: its name, or "from" for `from_`, a word of Python."""
    return field.name.removesuffix("_")


def _unknown(key: str, known: Iterable[str], there: Mapping[str, object]) -> str:
    missing = [name for name in known if name not in there]
    if close := difflib.get_close_matches(key.lower(), missing, n=1):
        return f"unknown key, did you mean {close[0]}?"
    return f"unknown key, expected one of {', '.join(known)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key and not key.startswith("[") else path + key


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) and len(key) <= _SHOWN_MAX else show(key)


def _syntax_fault(message: str, text: str) -> Fault:
    """tomllib reports the place only in its message, and not even there if the text ends too early."""
    if match := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL):
        message, line, column = match[1], int(match[2]), int(match[3])
    else:
        message = message.removesuffix(" (at end of document)")
        line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
    return Fault(f"line {line}, column {column}", "", f"not TOML: {message}")

"""The strict loader: a TOML file in, a frozen attrs object out, or every fault of the file at once.

The rules that this file keeps:

1. A fault is found while the value is structured, not in attrs validators: those run when the class is made,
   and the first one to raise hides the faults of its neighbours. (What concerns several keys of one table
   stands in its `__attrs_post_init__`, which may raise `Invalid` with `at` naming the key; what must be told
   even if some of it is wrong for itself, in its `check_table`.)
2. Nothing is coerced. cattrs' stock hooks turn true into port 1, 80.9 into 80 and "abc" into a list of
   characters.
3. A value that is shown never shows credentials: whatever stands before an "@" is hidden, and the value of a
   `secret` parser is not shown at all.

A type says itself how it is read: `Port = Annotated[int, integer(1, 65535)]`. settings.py has the common
ones.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin

import attrs
from cattrs import (
    BaseValidationError,
    ClassValidationError,
    Converter,
    ForbiddenExtraKeysError,
    IterableValidationError,
)
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

from usocksd.errors import ConfigError, Fault
from usocksd.settings.files import read_file
from usocksd.settings.locate import Lines

T = TypeVar("T")

KEY: Final = "key"
"""In the metadata of a field: the key that stands for it in the file, where that is no name in Python ("from")."""

_loading: ContextVar[Loading] = ContextVar("loading")

_NOWHERE: Final = Lines("")

_SHOWN_MAX = 80  # characters of a value that a fault shows


class Invalid(ValueError):
    """A value that won't do.

    `expected`: what would be right; `shown`: the value as the operator may see it (None: the loader shows
    it); `at`: where below the value's own key path, as "[2]" or "port".
    """

    def __init__(self, expected: str, *, shown: str | None = None, at: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.shown = shown
        self.at = at


@attrs.frozen
class Parser:
    """How a TOML value becomes a typed one: metadata of an Annotated type.

    `parse` raises ValueError for what is not `expected`, `Invalid` to say it better, or a group of `Invalid`.
    The values of a `secret` parser are never shown.
    """

    parse: Callable[[Any], object]
    expected: str
    secret: bool = False


@attrs.frozen
class Distinct:
    """Metadata of an Annotated tuple: `check(item, earlier)` raises Invalid when an item clashes with earlier
    ones.
    """

    check: Callable[[Any, Sequence[Any]], None]


class SecretStr:
    """A string that does not print: str(), repr() and format() give "***", `reveal()` gives the string."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, SecretStr) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


@attrs.frozen
class Loading:
    """What a parser may have to know of the load that it is part of."""

    folder: Path
    """of the configuration: what paths in it are relative to"""
    files: dict[Path, Any]
    """other files, as far as they have been made out: those that are named twice are so once"""
    read: Callable[[Path], bytes]
    """how they are read: as named_files.read_file"""
    lines: Lines


def _lines() -> Lines:
    load = _loading.get(None)
    return _NOWHERE if load is None else load.lines


@attrs.frozen(kw_only=True)
class Located:
    """The base of a configuration: it knows where in its text the keys are."""

    lines: Lines = attrs.field(init=False, eq=False, repr=False, factory=_lines)


def loading() -> Loading:
    """The load that is going on."""
    return _loading.get()


def load(cls: type[T], path: str | os.PathLike[str]) -> T:
    """Read the TOML file `path` as a `cls`. Raises ConfigError with every fault, or that it can't be read."""
    return parse(cls, read(path), os.fspath(path))


def read(path: str | os.PathLike[str]) -> str:
    """The text of the file `path`. Raises ConfigError when it can't be read, or is not text."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        # A byte order mark is no fault: editors of another system put it there.
        text, fault = content.decode("utf-8-sig"), None
    except OSError as exc:
        fault = Fault("file", "", f"can't be read: {exc.strerror or exc}")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        fault = Fault(f"line {line}", f"byte 0x{content[exc.start]:02x}", "expected UTF-8")
    if fault is not None:
        raise ConfigError(os.fspath(path), [fault])
    return text


def parse(cls: type[T], text: str, source: str, read: Callable[[Path], bytes] = read_file) -> T:
    """Read TOML `text` as a `cls`, an attrs class. `source` is the file that it is from, and `read` reads those that it
    names. Raises ConfigError.
    """
    # The error is raised outside of the except blocks, else its context carries the values that it hides.
    try:
        table, faults = tomllib.loads(text), []
    except tomllib.TOMLDecodeError as exc:
        faults = [_syntax_fault(str(exc), text)]
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets thousands deep
        faults = [Fault("file", "", "can't be read: a number or a nesting without measure")]
    if faults:
        raise ConfigError(source, faults)
    return structure(cls, table, source, read, Lines(text, source))


def structure(
    cls: type[T], table: object, source: str, read: Callable[[Path], bytes] = read_file, lines: Lines = _NOWHERE
) -> T:
    """What `tomllib` has made of the text of the file `source`, as a `cls`. Raises ConfigError."""
    token = _loading.set(Loading(Path(source).parent, {}, read, lines))
    try:
        return _converter.structure(table, cls)
    except (BaseValidationError, Invalid) as exc:
        faults = lines.locate(_faults(exc, ""))
    finally:
        _loading.reset(token)
    raise ConfigError(source, faults)


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


# What the cattrs converter is made of.


def _structure_annotated(type_: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    base, *metadata = get_args(type_)
    for meta in metadata:
        if isinstance(meta, Parser):
            return _parser_hook(meta)
        if isinstance(meta, Distinct):
            return _tuple_hook(base, converter, meta.check)
    raise TypeError(f"{type_} does not say how it is read")


def _parser_hook(parser: Parser) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        try:
            return parser.parse(value)
        except Invalid as exc:
            if exc.shown is None:
                exc.shown = "" if parser.secret else show(value)
            raise
        except ValueError:
            raise Invalid(f"expected {parser.expected}", shown="" if parser.secret else show(value)) from None

    return structure


def _structure_tuple(type_: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    return _tuple_hook(type_, converter, None)


def _tuple_hook(
    type_: Any, converter: Converter, check: Callable[[Any, Sequence[Any]], None] | None
) -> Callable[[Any, Any], Any]:
    item_type = get_args(type_)[0]

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not list:
            secret = any(isinstance(meta, Parser) and meta.secret for meta in getattr(item_type, "__metadata__", ()))
            hint = "" if secret or isinstance(value, dict) else _as_list(value, lambda items: structure(items, None))
            raise Invalid(f"expected a list{hint or _each(item_type)}", shown="" if secret else show(value))
        items: list[Any] = []
        errors: list[Exception] = []
        for index, found in enumerate(value):
            try:
                item = converter.structure(found, item_type)
                if check is not None:
                    check(item, items)
                items.append(item)
            except (BaseValidationError, ExceptionGroup, Invalid) as exc:
                if isinstance(exc, Invalid) and exc.shown is None:
                    exc.shown = show(found)
                exc.__notes__ = [*getattr(exc, "__notes__", ()), IterableValidationNote("", index, item_type)]
                errors.append(exc)
        if errors:
            raise IterableValidationError("a list", errors, type_)
        return tuple(items)

    return structure


def _as_list(value: object, load: Callable[[list[Any]], object]) -> str:
    """What an operator may have meant by a value that is no list, if there is a list of it that loads."""
    words = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else []
    numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,9}", word)]
    for items in ([value], words, numbers if len(numbers) == len(words) else []):
        text = show(items)
        with contextlib.suppress(BaseValidationError, ExceptionGroup, Invalid, tomllib.TOMLDecodeError):
            if items and load(items) and tomllib.loads(f"list = {text}") == {"list": items}:
                return f", as in {text}"
    return ""


def _each(type_: Any) -> str:
    expected = next((meta.expected for meta in getattr(type_, "__metadata__", ()) if isinstance(meta, Parser)), None)
    return "" if expected is None else f", each item {expected}"


def _structure_mapping(type_: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    """Tables by name, [egress.NAME]: the operator chooses the names, of those that the key's type lets through."""
    key_type, item_type = get_args(type_)

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise Invalid("expected a table", shown=show(value))
        items: dict[Any, Any] = {}
        errors: list[Exception] = []
        for name, found in value.items():
            parts = []
            for part, part_type in ((name, key_type), (found, item_type)):
                try:
                    parts.append(converter.structure(part, part_type))
                except (BaseValidationError, Invalid) as exc:
                    exc.__notes__ = [AttributeValidationNote("", _quoted(name), part_type)]
                    errors.append(exc)
            if len(parts) == 2:
                items[parts[0]] = parts[1]
        if errors:
            raise ClassValidationError("tables", errors, dict)
        return MappingProxyType(items)

    return structure


def _structure_table(cls: Any, converter: Converter) -> Callable[[Any, Any], Any]:
    renamed: dict[str, Any] = {
        field.name: override(rename=_key(field)) for field in attrs.fields(cls) if _key(field) != field.name
    }
    fill = make_dict_structure_fn(
        cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **renamed
    )

    # check_table(table) -> Iterator[Invalid]: as TOML has the table, so anything may be of any type.
    check = getattr(cls, "check_table", None)

    def structure(value: Any, type_: Any) -> Any:
        if type(value) is not dict:
            raise Invalid("expected a table", shown=show(value))
        errors: list[Exception] = [] if check is None else list(check(value))
        try:
            filled = fill(value, type_)
        except ClassValidationError as exc:
            errors = [*exc.exceptions, *errors]
            for error in errors:
                if isinstance(error, ForbiddenExtraKeysError):
                    error.__notes__ = list(value)  # what is there already is not what was meant
        if errors:
            raise ClassValidationError("a table", errors, cls)
        return filled

    return structure


_PLAIN = {bool: "true or false", int: "an integer", float: "a float", str: "a string"}


def _plain_hook(type_: type[Any], expected: str) -> Callable[[Any, Any], Any]:
    def check(value: object) -> object:
        if type(value) is not type_:
            raise ValueError
        return value

    return _parser_hook(Parser(check, expected))


def _is_tuple(type_: Any) -> bool:
    return get_origin(type_) is tuple


def _is_mapping(type_: Any) -> bool:
    return get_origin(type_) is Mapping


def _key(field: attrs.Attribute[Any]) -> str:
    """The key that stands for this field in the file: its name, unless that is a word of Python ("from")."""
    key: str = field.metadata.get(KEY, field.name)
    return key


def _is_annotated(type_: Any) -> bool:
    return get_origin(type_) is Annotated


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)
    for type_, expected in _PLAIN.items():
        converter.register_structure_hook(type_, _plain_hook(type_, expected))
    converter.register_structure_hook_factory(attrs.has, _structure_table)
    converter.register_structure_hook_factory(_is_tuple, _structure_tuple)
    converter.register_structure_hook_factory(_is_mapping, _structure_mapping)
    converter.register_structure_hook_factory(_is_annotated, _structure_annotated)
    return converter


_converter = _make_converter()


# From exceptions to faults.


def _faults(exc: BaseException, path: str) -> Iterator[Fault]:
    """Every fault inside an exception that structuring the value at `path` has raised."""
    match exc:
        case Invalid():
            yield Fault(_join(path, exc.at), exc.shown or "", exc.expected)
        case ForbiddenExtraKeysError():
            known = [_key(field) for field in attrs.fields(exc.cl) if field.init]
            missing = [key for key in known if key not in getattr(exc, "__notes__", ())]
            for key in sorted(exc.extra_fields):
                yield Fault(_join(path, _quoted(key)), "", _unknown(key, known, missing))
        case ClassValidationError() | IterableValidationError():
            noted, bare = exc.group_exceptions()
            for inner, note in noted:
                key = f"[{note.index}]" if isinstance(note, IterableValidationNote) else _key_of(exc.cl, note.name)
                if isinstance(inner, KeyError):
                    yield Fault(_join(path, key), "", f"missing: {_expected(note.type)}")
                else:
                    yield from _faults(inner, _join(path, key))
            for plain in bare:
                yield from _faults(plain, path)
        case BaseExceptionGroup():
            for member in exc.exceptions:
                yield from _faults(member, path)
        case _:
            raise exc  # a bug, not a fault of the file


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key and not key.startswith("[") else path + key


def _key_of(cls: Any, name: str) -> str:
    return _key(getattr(attrs.fields(cls), name)) if attrs.has(cls) else name


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) and len(key) <= _SHOWN_MAX else show(key)


def _unknown(key: str, known: Sequence[str], missing: Sequence[str]) -> str:
    if close := difflib.get_close_matches(key.lower(), missing, n=1):
        return f"unknown key, did you mean {close[0]}?"
    return f"unknown key, expected one of {', '.join(known)}"


def _expected(type_: Any) -> str:
    for meta in getattr(type_, "__metadata__", ()):
        if isinstance(meta, Parser):
            return f"expected {meta.expected}"
    return "a value is required"


def _syntax_fault(message: str, text: str) -> Fault:
    """tomllib tells the place in its message only, and not even there when the text ends too early."""
    if match := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL):
        message, line, column = match[1], int(match[2]), int(match[3])
    else:
        message = message.removesuffix(" (at end of document)")
        line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
    return Fault(f"line {line}, column {column}", "", f"not TOML: {message}")

"""What a fault of a configuration proposes is no fault itself: every setting of both configurations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import attrs
import pytest

from transocks.config import TransocksConfig
from usocksd.config import UsocksdConfig
from usocksd.errors import ConfigError
from usocksd.settings import loader as config
from usocksd.settings.loader import Parser


def types_of(type_: Any, known: set[Any]) -> Iterator[Any]:
    """All types of settings in this one, each once."""
    if type_ in known:
        return
    known.add(type_)
    yield type_
    if attrs.has(type_):
        for field in attrs.fields(attrs.resolve_types(type_)):
            if field.init:
                yield from types_of(field.type, known)
    origin, arguments = get_origin(type_), get_args(type_)
    if any(isinstance(meta, Parser) for meta in arguments):
        return  # that reads the whole
    for inner in arguments[:1] if origin is Annotated else arguments:
        if origin in (tuple, Mapping) or origin is Annotated or attrs.has(inner):
            yield from types_of(inner, known)


KNOWN: set[Any] = set()
TYPES = [type_ for root in (TransocksConfig, UsocksdConfig) for type_ in types_of(root, KNOWN)]
PARSERS = [(type_, meta) for type_ in TYPES for meta in getattr(type_, "__metadata__", ()) if isinstance(meta, Parser)]
LISTS = [
    type_ for type_ in TYPES if get_origin(get_args(type_)[0] if get_origin(type_) is Annotated else type_) is tuple
]
LITERAL = r'"[^"]*"|\b\d+\b'
NO_LISTS = ["25", "80,443", "x.example", "10.0.0.0/8", "a b", "", "bob@x", '"', "é", "x" * 200, 25, -1, 1.5, True]


def load(type_: Any, text: str, folder: Path) -> object:
    one = attrs.make_class("One", {"value": attrs.field(type=type_)}, frozen=True, slots=True)
    return config.parse(one, f"value = {text}\n", str(folder / "one.toml"))


def test_there_are_settings() -> None:
    assert len(PARSERS) > 20
    assert len(LISTS) > 10


@pytest.mark.parametrize(("type_", "parser"), PARSERS, ids=[parser.expected for _, parser in PARSERS])
def test_examples_load(type_: Any, parser: Parser, tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("x.example\n")
    found = re.search(r"\b(?:as in|one of) (.*)", parser.expected)
    for text in re.findall(LITERAL, found[1].split(", from ")[0]) if found else ():
        load(type_, text, tmp_path)


@pytest.mark.parametrize("type_", LISTS)
@pytest.mark.parametrize("value", NO_LISTS)
def test_proposed_lists_load(type_: Any, value: object, tmp_path: Path) -> None:
    try:
        load(type_, config.show(value) if value != "x" * 200 else f'"{value}"', tmp_path)
    except ConfigError as error:
        (fault,) = error.faults
        if found := re.search(r"as in (\[.*\])$", fault.expected):
            load(type_, found[1], tmp_path)


def test_lists_that_are_proposed(tmp_path: Path) -> None:
    def said(type_: Any, text: str) -> str:
        with pytest.raises(ConfigError) as error:
            load(type_, text, tmp_path)
        return error.value.faults[0].expected

    ports = Annotated[int, Parser(lambda value: value if type(value) is int else int("x"), "a port")]
    assert said(tuple[ports, ...], '"25"') == "expected a list, as in [25]"
    assert said(tuple[ports, ...], '"80, 443"') == "expected a list, as in [80, 443]"
    assert said(tuple[ports, ...], "25") == "expected a list, as in [25]"
    assert said(tuple[ports, ...], '"http"') == "expected a list, each item a port"
    assert said(tuple[str, ...], '"x.example"') == 'expected a list, as in ["x.example"]'


def test_keys_that_are_there_are_not_proposed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(UsocksdConfig, "[incoming]\nport = 1080\nports = 1081\n", str(tmp_path / "usocksd.toml"))
    (fault,) = error.value.faults
    assert "did you mean port?" not in fault.expected

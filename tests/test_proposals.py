"""The proposal in each fault of a configuration is valid itself: for every setting of both configurations."""

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
LITERAL = r'"[^"]*"|\b\d+\b'


def load(type_: Any, text: str, folder: Path) -> object:
    one = attrs.make_class("One", {"value": attrs.field(type=type_)}, frozen=True, slots=True)
    return config.parse(one, f"value = {text}\n", str(folder / "one.toml"))


def test_there_are_settings() -> None:
    assert len(PARSERS) > 20


@pytest.mark.parametrize(("type_", "parser"), PARSERS, ids=[parser.expected for _, parser in PARSERS])
def test_examples_load(type_: Any, parser: Parser, tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("x.example\n")
    found = re.search(r"\b(?:as in|one of) (.*)", parser.expected)
    for text in re.findall(LITERAL, found[1].split(", from ")[0]) if found else ():
        load(type_, text, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "proposed"),
    [
        ("deny_ports", "25", ", as in [25]"),
        ("deny_ports", '"25"', ", each item an integer from 0 to 65535"),
        ("addresses", '"192.0.2.1"', ', as in ["192.0.2.1"]'),
        ("addresses", '"here"', ", each item an IP address or network"),
        ("addresses", "{}", ", each item an IP address or network"),
        ("deny_sites", f'"{"x" * 200}"', ", each item a host"),
    ],
)
def test_proposed_lists(key: str, value: str, proposed: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(UsocksdConfig, f"[outgoing]\n{key} = {value}\n", str(tmp_path / "usocksd.toml"))
    assert error.value.faults[0].expected.startswith(f"expected a list{proposed}")


def test_keys_that_are_there_are_not_proposed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(UsocksdConfig, "[incoming]\nport = 1080\nports = 1081\n", str(tmp_path / "usocksd.toml"))
    (fault,) = error.value.faults
    assert "did you mean port?" not in fault.expected

"""The examples of docs/rules.md, held against the evaluator: every configuration with the requests below it."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path

import pytest

from usocksd.acl import AccessRules, Decision
from usocksd.config import Config
from usocksd.names.match import canonical_host
from usocksd.settings.loader import parse
from usocksd.settings.types import split_port

DOC = Path(__file__).parents[2] / "docs" / "rules.md"
BLOCK = re.compile(r"^```(toml|requests)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REQUEST = re.compile(
    r"(?P<client>\S+)(?: (?P<user>\w+))? +(?P<to>\S+:\d+)(?: -> (?P<address>\S+))? +(?P<verdict>allowed|denied) +"
    r"(?P<rule>.+?)(?:  \((?P<pool>\w+)\))?"
)


def examples() -> list[tuple[int, str, str]]:
    """Line, configuration and request of each line."""
    text = DOC.read_text(encoding="utf-8")
    found, config = [], ""
    for block in BLOCK.finditer(text):
        if block[1] == "toml":
            config = block[2]
            continue
        first = text.count("\n", 0, block.start(2)) + 1
        found += [(first + at, config, line) for at, line in enumerate(block[2].splitlines())]
    return found


def rules(config: str) -> AccessRules:
    return parse(Config, config, str(DOC)).access_rules(lambda _: False)


def test_there_are_examples() -> None:
    assert len(examples()) > 30


@pytest.mark.parametrize(("line", "config", "request_"), examples(), ids=[f"line {line}" for line, _, _ in examples()])
def test_an_example(line: int, config: str, request_: str) -> None:
    asked = REQUEST.fullmatch(request_)
    assert asked is not None, f"{DOC}:{line}"
    host, port = split_port(asked["to"])
    assert port is not None
    destination = canonical_host(host)
    client, user = ip_address(asked["client"]), asked["user"]
    access = rules(config)
    if asked["address"] is None:
        decision = access.decide_name(client, user, destination, port)
    else:
        assert isinstance(destination, str)
        # Resolved is only what is allowed as a name.
        assert access.decide_name(client, user, destination, port).allowed
        decision = access.decide_address(client, user, destination, ip_address(asked["address"]), port)
    expected = Decision(asked["verdict"] == "allowed", asked["rule"], asked["pool"] or "default")
    assert decision == expected, f"{DOC}:{line}"

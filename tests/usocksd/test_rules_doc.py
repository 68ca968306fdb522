"""The examples of docs/rules.md, held against the evaluator: every configuration with the requests below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from usocksd.acl import Ruling
from usocksd.clients import Client
from usocksd.config import UsocksdConfig
from usocksd.decision import Decision
from usocksd.net.address import numeric_address
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


@pytest.mark.parametrize(("line", "config", "request_"), examples(), ids=[f"line {line}" for line, _, _ in examples()])
def test_an_example(line: int, config: str, request_: str) -> None:
    asked = REQUEST.fullmatch(request_)
    assert asked is not None, f"{DOC}:{line}"
    host, port = split_port(asked["to"])
    assert port is not None
    rules = parse(UsocksdConfig, config, str(DOC)).access_rules(lambda _: False)
    decision = Decision(rules, Client.at(asked["client"], user=asked["user"]), host, port)
    ruling = decision.ruling or decision.judge_name(decision.sent)
    if asked["address"] is not None:
        assert ruling.allowed  # only names that are allowed are resolved
        decision.resolved([numeric_address(asked["address"])])
        assert decision.candidates
        ruling = decision.candidates[0].ruling
    expected = Ruling(asked["verdict"] == "allowed", asked["rule"], asked["pool"] or "default")
    assert ruling == expected, f"{DOC}:{line}"

"""Configurations with faults, where a comment "# 2" says how many a line has."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from usocksd.errors import ConfigError
from usocksd.settings.loader import parse


def marked_faults(cls: type[object], toml: str) -> list[str]:
    """The faults of this text, in the lines that are marked and no others."""
    marks = {at: re.search(r"# (\d+)$", line) for at, line in enumerate(toml.splitlines(), 1)}
    with pytest.raises(ConfigError) as caught:
        parse(cls, toml, "marked.toml")
    found = [str(fault) for fault in caught.value.faults]
    assert Counter(fault.line for fault in caught.value.faults) == {
        at: int(mark[1]) for at, mark in marks.items() if mark
    }, found
    return found

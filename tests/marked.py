"""Configurations with faults; a comment "# 2" at the end of a line says how many faults the line has."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from usocksd.errors import ConfigError
from usocksd.settings.loader import parse


def marked_faults(cls: type[object], toml: str) -> list[str]:
    """Check that exactly the marked lines have faults; returns these."""
    marks = {at: re.search(r"# (\d+)$", line) for at, line in enumerate(toml.splitlines(), 1)}
    with pytest.raises(ConfigError) as caught:
        parse(cls, toml, "marked.toml")
    found = [str(fault) for fault in caught.value.faults]
    assert Counter(fault.line for fault in caught.value.faults) == {
        at: int(mark[1]) for at, mark in marks.items() if mark
    }, found
    return found

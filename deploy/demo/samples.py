"""Derives configurations from the samples in deploy/: the same text, with a few settings changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping


def derive(sample: str, settings: Mapping[str, object]) -> str:
    """`sample` with these settings in place of the lines that show them, whether commented out or not.

    Keys are "table.key", or "key" for those before the first table. Raises KeyError for a setting that the sample
    does not show: then the sample has changed, and the caller must be changed too.
    """
    left = dict(settings)
    table = ""
    lines = []
    for line in sample.splitlines():
        if header := re.match(r"#?\[([\w.]+)\]", line):
            table = header[1] + "."
            lines.append(f"[{header[1]}]" if any(key.startswith(table) for key in left) else line)
            continue
        shown = re.match(r"#?(\w+) = ", line)
        key = table + shown[1] if shown else ""
        lines.append(f"{shown[1]} = {toml(key, left.pop(key))}" if shown and key in left else line)
    if left:
        raise KeyError(f"not in the sample: {', '.join(left)}")
    return "\n".join(lines) + "\n"


def toml(key: str, value: object) -> str:
    """A setting's value in TOML. JSON's strings, integers and lists are valid TOML."""
    return hex(value) if isinstance(value, int) and key.endswith("mark") else json.dumps(value)

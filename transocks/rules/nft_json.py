"""`nft --json list ruleset`, also where nft spoils it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_WITHOUT_FLAGS = re.compile(r"^table (\w+) (\S+) \{[^\n]*\n(?!\tflags )", re.MULTILINE)
_NAMES = {
    "table": ("family", "name"), "chain": ("family", "table", "name"), "rule": ("family", "table", "chain"),
    "set": ("family", "table", "name"),
}  # fmt: skip


def ruleset_json(ask: Callable[..., str]) -> str:
    """What nft says of the whole ruleset. ask: runs a command, given as words, and returns its output.

    nft 1.0.6 (Debian 12) reads freed memory for the flags of a table, and often enough its JSON ends there. Then this
    is without the tables that have any: dormant ones, which do nothing, and those that belong to a process, as those
    of guard.py do.
    """
    text = ask("nft", "--json", "list", "ruleset")
    try:
        json.loads(text)
    except ValueError:
        tables = _WITHOUT_FLAGS.findall(ask("nft", "list", "ruleset"))
        lists = (json.loads(ask("nft", "--json", "list", "table", *table))["nftables"] for table in tables)
        return json.dumps({"nftables": [entry for entries in lists for entry in entries]})
    return text


def entries(text: str) -> tuple[Mapping[str, Any], ...]:
    """The list in nft's JSON, of which each member is one object in an object. Raises ValueError where what verify and
    others look at is not as libnftables-json(5) has it.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict) or not isinstance(found.get("nftables"), list):
        raise ValueError("expected an object with a list of objects")
    for entry in found["nftables"]:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError("expected an object with one member")
        ((kind, inner),) = entry.items()
        if not isinstance(inner, dict) or not all(isinstance(inner.get(key), str) for key in _NAMES.get(kind, ())):
            raise ValueError(f"expected a {kind} with its names")
        if kind == "rule" and not (type(inner.get("handle")) is int and _objects(inner.get("expr"))):
            raise ValueError("expected a rule with its handle and expressions")
        if kind == "chain" and "hook" in inner and not {"type", "prio"} <= inner.keys():
            raise ValueError("expected a chain with its place")
        if kind == "set" and not isinstance(inner.get("elem", []), list):
            raise ValueError("expected a set with a list of elements")
    return tuple(found["nftables"])


def _objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)

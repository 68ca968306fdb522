"""`nft --json list ruleset`, also where nft spoils it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_WITHOUT_FLAGS = re.compile(r"^table (\w+) (\S+) \{[^\n]*\n(?!\tflags )", re.MULTILINE)


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

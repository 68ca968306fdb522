"""nft's JSON, whole and spoilt."""

from __future__ import annotations

import json
import random

from transocks.rules.nft_json import entries, ruleset_json
from transocks.rules.verify import Loaded, compare, force_nft, from_nft

LISTING = """\
table inet owned { # progname transocks
\tflags owner
}
table inet empty {
}
table ip full {
\tchain c {
\t}
}
"""
SPOILT = '{"nftables": [{"table": {"family": "inet", "name": "owned", "handle": 1, "flags": \n'


def test_of_spoilt_json_the_tables_without_flags_are_asked_for_one_by_one() -> None:
    def ask(*argv: str) -> str:
        match argv:
            case ("nft", "--json", "list", "ruleset"):
                return SPOILT
            case ("nft", "list", "ruleset"):
                return LISTING
            case ("nft", "--json", "list", "table", family, name):
                return json.dumps({"nftables": [{"table": {"family": family, "name": name}}]})
        raise AssertionError(argv)

    assert json.loads(ruleset_json(ask)) == {
        "nftables": [{"table": {"family": "inet", "name": "empty"}}, {"table": {"family": "ip", "name": "full"}}]
    }
    assert ruleset_json(lambda *argv: "{}") == "{}"


GOOD = [
    {"metainfo": {"version": "1"}},
    {"table": {"family": "inet", "name": "transocks", "handle": 1}},
    {"set": {"family": "inet", "table": "transocks", "name": "direct4", "elem": [{"prefix": {"addr": "1.2.3.0", "len": 24}}]}},
    {"set": {"family": "inet", "table": "transocks", "name": "active", "elem": [
        {"elem": {"val": "tcp", "timeout": 10, "expires": 9}}, "udp"]}},
    {"chain": {"family": "inet", "table": "transocks", "name": "c", "type": "nat", "hook": "output", "prio": -90}},
    {"rule": {"family": "inet", "table": "transocks", "chain": "c", "handle": 4, "expr": [{"counter": None}, {"drop": None}]}},
]  # fmt: skip


def test_what_is_not_as_nft_has_it_is_said_to_be_so() -> None:
    """Anything in the place of anything: ValueError, or it is read."""
    source = random.Random(1)
    others: list[object] = [None, True, 0, -1.5, "x", [], {}, [1], {"a": 1}, "inet", "transocks"]

    def spoil(value: object) -> object:
        if source.random() < 0.04:
            return source.choice(others)
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items() if source.random() > 0.02}
        return [spoil(inner) for inner in value] if isinstance(value, list) else value

    read = 0
    for _ in range(5000):
        text = json.dumps(spoil({"nftables": GOOD}))
        try:
            found = entries(text)
        except ValueError:
            continue
        loaded = from_nft(found, "", "transocks")
        list(compare(Loaded("table inet transocks", {}, {}), loaded))
        force_nft(found, "transocks")
        read += 1
    assert 100 < read < 4900

"""nft's JSON, whole and spoilt."""

from __future__ import annotations

import json

from transocks.firewall.nft_json import ruleset_json

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

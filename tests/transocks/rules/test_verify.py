"""What verify says of differences."""

from __future__ import annotations

import json
from typing import Any

import pytest

from transocks.rules.saved import changes, parse_save, select
from transocks.rules.verify import Force, compare, dormant, force_nft, from_nft, from_saved, guards

OWN = ("TRANSOCKS", "TRANSOCKS-UDP")
SAVED = """\
*nat
:OUTPUT ACCEPT [0:0]
:TRANSOCKS - [1:60]
-A OUTPUT -p tcp -j TRANSOCKS
-A TRANSOCKS -d 10.0.0.0/8 -j RETURN
-A TRANSOCKS -d 127.0.0.0/8 -j RETURN
-A TRANSOCKS -p tcp -j REDIRECT --to-ports 1081
COMMIT
"""


def said(live: str) -> list[str]:
    wanted = from_saved(parse_save(SAVED)[0], OWN, "IPv4")
    assert wanted is not None
    return list(compare(wanted, from_saved(parse_save(live)[0], OWN, "IPv4")))


WHERE = "IPv4 table nat, chain"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[1:60]", "[7:420]", []),
        ("-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n", "", [f'missing: {WHERE} TRANSOCKS: "-d 10.0.0.0/8 -j RETURN"']),
        ("--to-ports 1081", "--to-ports 1080",
         [f'changed: {WHERE} TRANSOCKS: "-p tcp -j REDIRECT --to-ports 1080", should be "-p tcp -j REDIRECT --to-ports 1081"']),
        ("-A OUTPUT -p tcp -j TRANSOCKS\n", "", [f"missing: {WHERE} OUTPUT"]),
        ("-A OUTPUT -p tcp -j TRANSOCKS\n", "-A OUTPUT -p tcp -j TRANSOCKS\n" * 2,
         [f'not ours: {WHERE} OUTPUT: "-p tcp -j TRANSOCKS" is there once more']),
        ("-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n-A TRANSOCKS -d 127.0.0.0/8 -j RETURN\n",
         "-A TRANSOCKS -d 127.0.0.0/8 -j RETURN\n-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n",
         [f'reordered: {WHERE} TRANSOCKS: "-d 127.0.0.0/8 -j RETURN" stands where "-d 10.0.0.0/8 -j RETURN" should']),
        (":TRANSOCKS - [1:60]", ":OTHERS - [0:0]", ["missing: IPv4 table nat: nothing of it is loaded"]),
        # What others do is not compared here.
        ("-A OUTPUT", "-A OUTPUT -p tcp -j ACCEPT\n-A OUTPUT", []),
    ],
)  # fmt: skip
def test_differences(old: str, new: str, expected: list[str]) -> None:
    assert old in SAVED
    assert said(SAVED.replace(old, new)) == expected


def nft(*rules: list[Any], elements: list[Any] | None = None, active: list[Any] | None = None) -> list[dict[str, Any]]:
    place = {"family": "inet", "table": "transocks"}
    return [
        {"metainfo": {"version": "1"}},
        {"table": {"family": "inet", "name": "transocks", "handle": 1}},
        {"set": {**place, "name": "direct4", "elem": elements or []}},
        {"set": {**place, "name": "active", "elem": ["tcp", "udp"] if active is None else active}},
        {"chain": {**place, "name": "c", "type": "nat", "hook": "output", "prio": -90, "policy": "accept"}},
        *({"rule": {**place, "chain": "c", "handle": number, "expr": rule}} for number, rule in enumerate(rules)),
    ]


ACCEPT, DROP, COUNT = {"accept": None}, {"drop": None}, {"counter": {"packets": 5, "bytes": 6}}


def test_differences_in_nft() -> None:
    prefix = {"prefix": {"addr": "10.0.0.0", "len": 8}}
    wanted = from_nft(nft([ACCEPT], elements=[prefix, "192.0.2.1"]), "", "transocks")
    assert wanted is not None
    assert not list(compare(wanted, from_nft(nft([COUNT, ACCEPT], elements=["192.0.2.1", prefix]), "", "transocks")))
    listing = "table inet transocks { # handle 1\n\tchain c { # handle 2\n\t\tdrop # handle 0\n\t}\n}\n"
    live = nft([DROP], elements=[prefix], active=[])
    assert list(compare(wanted, from_nft(live, listing, "transocks"))) == [
        'changed: table inet transocks, chain c: "drop", should be "[{"accept": null}]"',
        "missing: table inet transocks, set direct4: 192.0.2.1",
    ]
    live[4]["chain"]["prio"] = 0
    (moved,) = [line for line in compare(wanted, from_nft(live, listing, "transocks")) if "priority" in line]
    assert "is type nat, hook output, priority 0, policy accept, should be type nat, hook output, priority -90" in moved


def test_whether_rules_are_in_force() -> None:
    timed = {"elem": {"val": "tcp", "timeout": 60, "expires": 41}}
    assert force_nft(nft(), "transocks") == Force()
    assert force_nft(nft(active=[timed]), "transocks") == Force(seconds=41)
    assert force_nft(nft(active=[]), "transocks") == Force(over=True)
    guard = "TRANSOCKS -m time --datestart 2026-01-01T00:00:00 --datestop 2038-01-19T03:14:07 -j RETURN"
    live = SAVED.replace("-A TRANSOCKS -d 10", f"-A {guard}\n-A TRANSOCKS -d 10")
    assert guards(parse_save(live)) == [("nat", guard, "2026-01-01T00:00:00")]
    assert said(live) == []


# Rules of others.


def test_changes_from_nothing_and_back() -> None:
    wanted = parse_save(SAVED.replace(":OUTPUT ACCEPT [0:0]\n", ""))
    there = changes(wanted, [])
    assert there.fill.splitlines()[1] == ":TRANSOCKS - [0:0]"
    assert "-A OUTPUT" not in there.fill
    assert there.hook == "*nat\n-A OUTPUT -p tcp -j TRANSOCKS\nCOMMIT\n"
    assert there.drop == ""
    live = select(parse_save(SAVED), OWN)
    assert changes(wanted, live).hook == ""
    assert changes([], live).drop.splitlines()[1:-1] == [
        "-D OUTPUT -p tcp -j TRANSOCKS",
        "-F TRANSOCKS",
        "-X TRANSOCKS",
    ]


def test_a_comment_is_no_jump() -> None:
    rule = '-A OUTPUT -p udp -m comment --comment "say \\"before -j TRANSOCKS \\"" -j ACCEPT\n'
    (table,) = select(parse_save(SAVED.replace("-A TRANSOCKS -d 10", f"{rule}-A TRANSOCKS -d 10")), OWN)
    assert table == select(parse_save(SAVED), OWN)[0]


def test_hooks_are_put_right() -> None:
    wanted = parse_save(SAVED)[:1]
    twice = SAVED.replace("-A OUTPUT -p tcp -j TRANSOCKS\n", "-A OUTPUT -p tcp -j TRANSOCKS\n" * 2)
    assert changes(wanted, select(parse_save(twice), OWN)).hook == "*nat\n-D OUTPUT -p tcp -j TRANSOCKS\nCOMMIT\n"
    other = SAVED.replace("-A OUTPUT -p tcp -j", "-A OUTPUT -o eth0 -p tcp -j")
    assert changes(wanted, select(parse_save(other), OWN)).hook.splitlines()[1:-1] == [
        "-D OUTPUT -o eth0 -p tcp -j TRANSOCKS",
        "-A OUTPUT -p tcp -j TRANSOCKS",
    ]
    # As iptables-save writes it.
    quic = "*filter\n:TRANSOCKS-UDP - [0:0]\n-I OUTPUT -p udp --dport 443 -j TRANSOCKS-UDP\nCOMMIT\n"
    live = quic.replace("-I OUTPUT -p udp", "-A OUTPUT -p udp -m udp")
    assert changes(parse_save(quic), parse_save(live)).hook == ""


def test_json_of_nft_is_read_as_it_comes() -> None:
    text = json.dumps({"nftables": nft([ACCEPT])})
    assert from_nft(json.loads(text)["nftables"], "", "transocks_gateway") is None


def test_tables_of_ours_that_are_switched_off() -> None:
    listing = (
        "table inet transocks { # handle 1\n\tflags dormant\n}\ntable inet transocks_gateway {\n\tset active {\n"
        "\t\tflags dormant\n\t}\n}\ntable ip other {\n\tflags dormant\n}\n"
    )
    assert dormant(listing) == ["transocks"]


def test_rules_that_are_held_are_not_on_trial() -> None:
    def timed(**more: object) -> list[Any]:
        return nft(active=[{"elem": {"val": "tcp", "timeout": 10, "expires": 9, **more}}])

    assert force_nft(timed(), "transocks") == Force(seconds=9)
    assert force_nft(timed(comment="held"), "transocks") == Force(seconds=9, held=True)

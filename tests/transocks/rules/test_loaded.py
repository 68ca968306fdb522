"""Output of nft and iptables-save: parsed, compared, and replaced."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from transocks.rules.loaded import (
    Table,
    compare,
    parse_nft,
    parse_save,
    replacement,
    seconds_left,
    without_term,
)

OWN = ("TRANSOCKS", "TRANSOCKS-UDP")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
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
TERM = "-m time --datestart 2026-01-01T00:01:00 --datestop 2038-01-19T03:14:07 -j RETURN"
LISTING = """\
table inet transocks { # handle 1
	set direct4 {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.0/8, 192.0.2.1,
			192.0.2.3 }
	}

	set active {
		type inet_proto
		flags timeout
		elements = { tcp, udp }
	}

	chain c { # handle 2
		type nat hook output priority -90; policy accept;
		counter packets 5 bytes 6 accept
	}
}
table ip other {
	chain c {
		drop
	}
}
"""


def saved(text: str) -> list[Table]:
    return parse_save(text, OWN)


def nft(text: str) -> Table:
    return parse_nft(text)[0]


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
        # Rules of others are not compared, nor is for how long ours are in force.
        ("-A OUTPUT", "-A OUTPUT -p tcp -j ACCEPT\n-A OUTPUT", []),
        ("-A OUTPUT", '-A OUTPUT -m comment --comment "say \\"before -j TRANSOCKS \\"" -j ACCEPT\n-A OUTPUT', []),
        ("-A TRANSOCKS -d 10", f"-A TRANSOCKS {TERM}\n-A TRANSOCKS -d 10", []),
    ],
)  # fmt: skip
def test_differences_of_iptables(old: str, new: str, expected: list[str]) -> None:
    assert old in SAVED
    (should,), (live,) = saved(SAVED), saved(SAVED.replace(old, new))
    assert list(compare("IPv4 table nat", should, live)) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("counter packets 5 bytes 6 ", "", []),
        ("bytes 6 accept", "bytes 6 drop", ['changed: t, chain c: "drop", should be "accept"']),
        ("priority -90", "priority 0",
         ['changed: t, chain c: "type nat hook output priority 0; policy accept;",'
          ' should be "type nat hook output priority -90; policy accept;"']),
        ("10.0.0.0/8, 192.0.2.1,\n", "192.0.2.1, 10.0.0.0/8,\n", []),
        (", 192.0.2.1,", ", 192.0.2.2,", ['changed: t, set direct4: "192.0.2.2", should be "192.0.2.1"']),
        ("{ tcp, udp }", "{ tcp timeout 1m expires 41s, udp timeout 1m expires 41s }", []),
        ("\tset active {\n", "\tset more {\n\t}\n\tset active {\n", ["not ours: t, set more"]),
        ("\tchain c {", "\tchain d {\n\t}\n\tchain c {", ["not ours: t, chain d"]),
    ],
)  # fmt: skip
def test_differences_of_nft(old: str, new: str, expected: list[str]) -> None:
    assert old in LISTING
    assert list(compare("t", nft(LISTING), nft(LISTING.replace(old, new, 1)))) == expected


def test_nothing_is_loaded() -> None:
    assert list(compare("t", nft(LISTING), None)) == ["missing: t: nothing of it is loaded"]


@pytest.mark.parametrize(
    ("elements", "left"),
    [
        ("elements = { tcp, udp }", None),
        ("elements = { udp, tcp timeout 2m expires 1m1s500ms }", 61.5),
        ('elements = { tcp timeout 10s expires 9s comment "held" }', 9),
        ("elements = { udp }", 0),
        ("", 0),
    ],
)
def test_how_long_rules_of_nft_are_in_force(elements: str, left: float | None) -> None:
    assert seconds_left(nft(LISTING.replace("elements = { tcp, udp }", elements)), NOW) == left


def test_how_long_rules_of_iptables_are_in_force() -> None:
    (for_good,), (timed,) = (
        saved(SAVED),
        saved(SAVED.replace("-A TRANSOCKS -d 10", f"-A TRANSOCKS {TERM}\n-A TRANSOCKS -d 10")),
    )
    assert (seconds_left(for_good, NOW), seconds_left(timed, NOW)) == (None, 60)
    assert seconds_left(timed, NOW.replace(minute=2)) == 0
    assert without_term(timed) == f"*nat\n-D TRANSOCKS {TERM}\nCOMMIT\n"
    assert without_term(for_good) == ""


def test_tables_that_are_switched_off() -> None:
    listing = (
        "table inet a { # handle 1\n\tflags owner,dormant\n}\ntable inet b {\n\tset s {\n\t\tflags dormant\n\t}\n}\n"
    )
    assert [(table.name, table.dormant) for table in parse_nft(listing)] == [("inet a", True), ("inet b", False)]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line[0] not in "*C"]


def test_rules_come_in_the_place_of_others() -> None:
    there = saved(SAVED)
    assert lines(replacement([], there, OWN)) == [
        ":TRANSOCKS - [0:0]",
        "-A TRANSOCKS -d 10.0.0.0/8 -j RETURN",
        "-A TRANSOCKS -d 127.0.0.0/8 -j RETURN",
        "-A TRANSOCKS -p tcp -j REDIRECT --to-ports 1081",
        "-A OUTPUT -p tcp -j TRANSOCKS",
    ]
    assert lines(replacement(there, [], OWN)) == ["-D OUTPUT -p tcp -j TRANSOCKS", "-F TRANSOCKS", "-X TRANSOCKS"]
    twice = saved(SAVED.replace("-A OUTPUT -p tcp", "-A OUTPUT -o eth0 -p tcp -j TRANSOCKS\n-A OUTPUT -p tcp"))
    assert lines(replacement(twice, there, OWN))[:3] == [
        "-D OUTPUT -o eth0 -p tcp -j TRANSOCKS",
        "-D OUTPUT -p tcp -j TRANSOCKS",
        ":TRANSOCKS - [0:0]",
    ]


def test_the_last_jump_that_a_file_inserts_is_the_first() -> None:
    rules = "*filter\n-N TRANSOCKS-UDP\n-I OUTPUT -p udp -j TRANSOCKS-UDP\n-I OUTPUT -p tcp -j TRANSOCKS-UDP\nCOMMIT\n"
    (table,) = saved(rules)
    assert table.chains["OUTPUT"] == ("-p tcp -j TRANSOCKS-UDP", "-p udp -j TRANSOCKS-UDP")
    assert lines(replacement([], [table], OWN))[1:] == [
        "-I OUTPUT -p udp -j TRANSOCKS-UDP",
        "-I OUTPUT -p tcp -j TRANSOCKS-UDP",
    ]

"""Lines of keys: what an editor jumps to."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.settings.locate import Lines

TEXT = """\
# workers = 1
workers = 2
"control" = "/x"
timeouts.idle = 3

[incoming] # port = 1
  addresses = [ "a]", # "no"
    'b',

    "c" ]
port=4
[ outgoing ]
deny_ports = [1, 2,
3]
mark = 5
[[other.table]]
x = "y = 1"
"""


TABLES = """\
[[rule]]
name = "x"
to = [ # all
  "a",
  "b",
]
[[rule]]
[[rule]]
to = ["c"]

[rule.inner]
y = 1
[[rule.deep]]
[[rule.deep]]
z = 1
[egress.partners]
mark = 1
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("rule", 1),
        ("rule[0]", 1),
        ("rule[0].name", 2),
        ("rule[0].to[1]", 5),
        ("rule[0].action", 1),
        ("rule[1]", 7),
        ("rule[1].to[1]", 7),
        ("rule[2].to", 9),
        ("rule[2].inner.y", 12),
        ("rule[2].deep", 13),
        ("rule[2].deep[1].z", 15),
        ("rule[9].to", 1),
        ("egress", 16),
        ("egress.partners.mark", 17),
        ("egress.other", 16),
    ],
)
def test_lines_of_arrays_of_tables(path: str, line: int) -> None:
    assert Lines(TABLES).line_of(path) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("workers", 2),
        ("control", 3),
        ('"control"', 3),
        ("timeouts.idle", 4),
        ("timeouts.stop", 4),
        ("incoming", 6),
        ("incoming.port", 11),
        ("incoming.metrics_port", 6),
        ("incoming.addresses", 7),
        ("incoming.addresses[0]", 7),
        ("incoming.addresses[1]", 8),
        ("incoming.addresses[2]", 10),
        ("incoming.addresses[3]", 7),
        ("outgoing.deny_ports[1]", 13),
        ("outgoing.deny_ports[2]", 14),
        ("outgoing.mark", 15),
        ("outgoing.mark.inner", 15),
        ("other", 16),
        ("other.table", 16),
        ("proxy_url", 1),
        ("", 1),
    ],
)
def test_lines(path: str, line: int) -> None:
    assert Lines(TEXT).line_of(path) == line


SPACE = st.lists(st.sampled_from([" ", "\n", "# [x] = 'y', \"z\"\n", "\t"]), max_size=4).map("".join)
ITEM = st.sampled_from(['"a"', "'b]'", '"\\"#,"', "17", "-1.5e3", "true", '""'])


@given(st.lists(st.tuples(SPACE, ITEM, SPACE), max_size=6), SPACE, st.integers(0, 3))
def test_items_of_any_list(items: list[tuple[str, str, str]], tail: str, before: int) -> None:
    text = "\n" * before + "[t]\nother = [1]\nlisted = ["
    lines = []
    for left, item, right in items:
        lines.append((text + left).count("\n") + 1)
        text += left + item + right + ","
    text += tail + "]\nlast = 1\n"
    assert len(tomllib.loads(text)["t"]["listed"]) == len(items)
    found = Lines(text)
    assert [found.line_of(f"t.listed[{index}]") for index in range(len(items))] == lines
    assert found.line_of("t.last") == text.count("\n")


@given(st.text(st.sampled_from("ab.[]=\"'#\n \\"), max_size=60), st.text(st.sampled_from("ab.[]01"), max_size=8))
def test_any_text_has_a_line_for_any_path(text: str, path: str) -> None:
    assert 1 <= Lines(text).line_of(path) <= text.count("\n") + 1

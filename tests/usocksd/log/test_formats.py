"""Records in the formats of the originals, and what no record may do to a terminal or a line."""

from __future__ import annotations

import ipaddress
import json
import re
from datetime import UTC, datetime
from enum import IntEnum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usocksd.log.formats import FORMATS, JSON, MAX_RECORD, Fields, Formatter, Logfmt, Plain, Severity

NOW = datetime(2001, 12, 3, 13, 45, 1, 123456, UTC).timestamp()


class Color(IntEnum):
    RED = 1


@pytest.fixture(params=FORMATS.values(), ids=list(FORMATS))
def formatter(request: pytest.FixtureRequest) -> Formatter:
    made: Formatter = request.param("tag1", "localhost")
    return made


def field(format: type[Formatter], value: object) -> str:
    """The value of a field, in the format's own notation."""
    text = format("t", "h").format(NOW, Severity.DEBUG, "m", {"k": value}).decode()
    return text.split('"m"', 1)[1].removeprefix(" k=").removeprefix(',"k":').removesuffix("\n").removesuffix("}")


def test_the_lines_that_the_tests_of_the_original_expect() -> None:
    plain, logfmt, as_json = Plain("tag1", "localhost"), Logfmt("tag2", "localhost"), JSON("tag1", "localhost")
    assert plain.format(NOW, Severity.DEBUG, "test message", {"d": 4, "b": 2, "c": 3, "a": 1}) == (
        b'2001-12-03T13:45:01.123456Z localhost tag1 debug: "test message" a=1 b=2 c=3 d=4\n'
    )
    assert logfmt.format(NOW, Severity.DEBUG, "test message", {"secret": True}) == (
        b"topic=tag2 logged_at=2001-12-03T13:45:01.123456Z severity=debug utsname=localhost "
        b'message="test message" secret=true\n'
    )
    assert as_json.format(NOW, Severity.CRITICAL, "hoge", {"b": 123, "_d123": None}) == (
        b'{"topic":"tag1","logged_at":"2001-12-03T13:45:01.123456Z","severity":"critical",'
        b'"utsname":"localhost","message":"hoge","b":123,"_d123":null}\n'
    )


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (Plain, '2001-12-03T13:45:01.123456Z localhost tag info: "m" b=2 d="x"'),
        (Logfmt, 'topic=tag logged_at=2001-12-03T13:45:01.123456Z severity=info utsname=localhost message="m" b=2 d="x"'),
        (
            JSON,
            '{"topic":"tag","logged_at":"2001-12-03T13:45:01.123456Z","severity":"info","utsname":"localhost",'
            '"message":"m","a":null,"b":2,"c":null,"d":"x","e":null}',
        ),
    ],
)  # fmt: skip
def test_none_is_left_out_where_people_read(format: type[Formatter], text: str) -> None:
    fields, formatter = {"a": None, "b": 2, "c": None}, format("tag", "localhost")
    assert Fields(formatter, ("d", "e"), fields).text(("x", None)) == text.partition('"m"')[2].removesuffix("}")
    assert formatter.format(NOW, Severity.INFO, "m", fields | {"d": "x", "e": None}).decode() == text + "\n"


@pytest.mark.parametrize(
    ("value", "plain", "logfmt", "as_json"),
    [
        (True, *["true"] * 3),
        (-12345, *["-12345"] * 3),
        (Color.RED, *["1"] * 3),
        (1.0, *["1"] * 3),
        (-0.1, *["-0.1"] * 3),
        (1e-7, *["0.0000001"] * 3),
        (1.5e22, *["15" + "0" * 21] * 3),
        ('"abc ', *[r'"\"abc "'] * 3),
        ("hello\udc80\udc81", '"hello\ufffd"', '"hello\ufffd"', r'"hello\ufffd"'),
        (ValueError('a", b'), *[r'"a\", b"'] * 3),
        (TimeoutError(), *['"TimeoutError()"'] * 3),
        (ipaddress.ip_address("::1"), *['"::1"'] * 3),
        ([-100, 100], '"[-100 100]"', "[-100 100]", "[-100,100]"),
        (["abc", "d f"], '"[abc d f]"', '["abc" "d f"]', '["abc","d f"]'),
        ([], '"[]"', "[]", "[]"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_values(value: object, plain: str, logfmt: str, as_json: str) -> None:
    assert [field(Plain, value), field(Logfmt, value), field(JSON, value)] == [plain, logfmt, as_json]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\x00\x1b\x7f", r'"\x00\x1b\x7f"'),
        ("\x80\xa0\xad", r'"\u0080\u00a0\u00ad"'),
        ("\u2028\u3000\ufeff", r'"\u2028\u3000\ufeff"'),
        ("\U000e0001\U0010ffff", r'"\U000e0001\U0010ffff"'),
        ("日本語 ☺ \U0001f600", '"日本語 ☺ \U0001f600"'),
        ("\\ \" '", r'''"\\ \" '"'''),
    ],
)
def test_quoting_as_in_go(text: str, quoted: str) -> None:
    assert field(Plain, text) == field(Logfmt, text) == quoted


TEXTS = st.text(st.characters(codec=None, exclude_categories=()))
VALUES = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXTS
FIELDS = st.dictionaries(st.from_regex(r"\A_[a-z0-9_]{0,8}\Z"), VALUES | st.lists(VALUES), max_size=4)


@settings(deadline=None)
@given(TEXTS, FIELDS)
def test_a_record_is_one_line_without_anything_that_a_terminal_obeys_and_json_reads_back(
    message: str, fields: dict[str, object]
) -> None:
    for format in FORMATS.values():
        line = format("t", "h").format(0.0, Severity.INFO, message, fields).decode()
        assert line.endswith("\n")
        assert line[:-1].isprintable(), format.name
    assert json.loads(line).items() >= {"message": readable(message), **readable(fields)}.items()


def readable(value: object) -> object:
    """The text as it is read back: each run of bytes that are not UTF-8 is one replacement character."""
    match value:
        case str():
            return re.sub("[\ud800-\udfff]+", "\ufffd", value)
        case list():
            return [readable(item) for item in value]
        case dict():
            return {key: readable(item) for key, item in value.items()}
    return value


# Keys, names and sizes.


@pytest.mark.parametrize("key", ["", "A", "1a", "a-b", "é", "a\n", "message", "topic", "logged_at", "twice"])
def test_keys_that_are_not_allowed(formatter: Formatter, key: str) -> None:
    with pytest.raises(ValueError, match="invalid key"):
        Fields(formatter, ("ok", key), {"twice": 1})
    if key != "twice":
        with pytest.raises(ValueError, match="invalid key"):
            formatter.format(NOW, Severity.INFO, "m", {key: 1})


def test_names_can_not_break_a_line() -> None:
    formatter = JSON("My Prog", 'ho"st\n%s')
    assert (formatter.topic, formatter.utsname) == ("my-prog", "ho-st--s")
    assert json.loads(formatter.format(NOW, Severity.INFO, "m"))["utsname"] == "ho-st--s"


def test_the_largest_record_and_one_more(formatter: Formatter) -> None:
    empty = len(formatter.format(NOW, Severity.INFO, "m", {"k": ""}))
    assert len(formatter.format(NOW, Severity.INFO, "m", {"k": "x" * (MAX_RECORD - empty)})) == MAX_RECORD
    cut = formatter.format(NOW, Severity.INFO, "m", {"k": "x" * (MAX_RECORD - empty + 1)})
    assert (len(cut) < 300, b'"m"' in cut, b"log_error" in cut, b"xx" in cut) == (True, True, True, False)
    record = formatter.format(NOW, Severity.INFO, "\U000e0001" * MAX_RECORD, {"k": 1})
    assert (len(record) <= MAX_RECORD, b"log_error" in record) == (True, True)


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (1.0, b"1970-01-01T00:00:01.000000Z"),
        (1.9999999, b"1970-01-01T00:00:01.999999Z"),  # never .1000000, never the next second
        (1795392000.000001, b"2026-11-23T00:00:00.000001Z"),
    ],
)
def test_fractions_of_a_second(formatter: Formatter, now: float, text: bytes) -> None:
    assert text in formatter.format(now, Severity.INFO, "m")


# Fields.

KEYS = ("request_id", "dest", "elapsed", "sent", "user", "note", "list")


@pytest.mark.parametrize(
    "values",
    [
        ("id", "192.0.2.1:1", 1.25, 10, None, "", []),
        ("\n", 'q"\x7f', 1e-9, 1 << 65, "%d", "é", ["a"]),
        (True, None, -1, Color.RED, ValueError("x"), "%s", None),
    ],
)
def test_their_text_is_that_of_a_record(formatter: Formatter, values: tuple[object, ...]) -> None:
    constants = {"type": "access", "b": "%s"}
    text = Fields(formatter, KEYS, constants).text(values)
    fields = {**constants, **dict(zip(KEYS, values, strict=True))}
    record = formatter.format(NOW, Severity.INFO, "100% done", fields).decode()
    assert text == record.partition('done"')[2].removesuffix(formatter.end)


def test_values_of_known_types_have_the_same_text(formatter: Formatter) -> None:
    keys, values = ("d", "a", "c", "b"), ("192.0.2.1:1", 7, "1.25", None)
    known = Fields(formatter, keys, {"type": "%s"}, texts=("d",), numbers=("a", "c"))
    assert known.text(values) == Fields(formatter, keys, {"type": "%s"}).text(("192.0.2.1:1", 7, 1.25, None))


@pytest.mark.parametrize("format", [Logfmt, JSON])
def test_without_sorting_two_texts_make_one(format: type[Formatter]) -> None:
    formatter = format("t", "h")
    first, second = Fields(formatter, ("c", "b"), {"type": "x"}), Fields(formatter, ("a",))
    both = Fields(formatter, ("c", "b", "a"), {"type": "x"})
    assert first.text((1, None)) + second.text((2,)) == both.text((1, None, 2))


def test_plain_sorts_the_values_too() -> None:
    assert Fields(Plain("t", "h"), ("c", "a"), {"b": 0}).text((1, 2)) == " a=2 b=0 c=1"


@pytest.mark.parametrize("values", [(1,), (1, 2, 3)])
def test_all_values_are_wanted_and_no_more(values: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, IndexError)):
        Fields(JSON("t", "h"), ("b", "a")).text(values)

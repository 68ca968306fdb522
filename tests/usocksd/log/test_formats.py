import ipaddress
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usocksd.log.formats import FORMATS, JSON, MAX_RECORD, Formatter, Logfmt, Plain, Severity
from usocksd.log.gotext import go_float, go_quote, json_quote

NOW = datetime(2001, 12, 3, 13, 45, 1, 123456, UTC).timestamp()


class Color(IntEnum):
    RED = 1


@pytest.fixture(params=FORMATS.values(), ids=list(FORMATS))
def formatter(request: pytest.FixtureRequest) -> Formatter:
    made: Formatter = request.param("tag1", "localhost")
    return made


def fields_of(formatter: Formatter, **fields: object) -> str:
    """The text of the fields of a record, in the format's own notation."""
    text = formatter.format(NOW, Severity.DEBUG, "m", fields).decode()
    return text.split('"m"', 1)[1].rstrip("\n")


# The lines that the original's own tests expect.


def test_plain() -> None:
    record = Plain("tag1", "localhost").format(NOW, Severity.DEBUG, "test message")
    assert record == b'2001-12-03T13:45:01.123456Z localhost tag1 debug: "test message"\n'


def test_plain_sorts_its_fields() -> None:
    record = Plain("tag3", "localhost").format(NOW, Severity.DEBUG, "test message", {"d": 4, "b": 2, "c": 3, "a": 1})
    assert record == b'2001-12-03T13:45:01.123456Z localhost tag3 debug: "test message" a=1 b=2 c=3 d=4\n'


def test_logfmt() -> None:
    record = Logfmt("tag2", "localhost").format(NOW, Severity.DEBUG, "test message", {"secret": True})
    assert record == (
        b"topic=tag2 logged_at=2001-12-03T13:45:01.123456Z severity=debug utsname=localhost "
        b'message="test message" secret=true\n'
    )


def test_json() -> None:
    record = JSON("tag1", "localhost").format(NOW, Severity.CRITICAL, "hoge", {"b": 123, "_d123": None})
    assert record == (
        b'{"topic":"tag1","logged_at":"2001-12-03T13:45:01.123456Z","severity":"critical",'
        b'"utsname":"localhost","message":"hoge","b":123,"_d123":null}\n'
    )


def test_what_is_none_is_left_out_where_people_read() -> None:
    fields = {"a": None, "b": 2, "c": None}
    for formatter, text in (
        (Plain, '2001-12-03T13:45:01.123456Z localhost tag info: "m" b=2 d="x"'),
        (
            Logfmt,
            'topic=tag logged_at=2001-12-03T13:45:01.123456Z severity=info utsname=localhost message="m" b=2 d="x"',
        ),
        (
            JSON,
            '{"topic":"tag","logged_at":"2001-12-03T13:45:01.123456Z","severity":"info","utsname":"localhost",'
            '"message":"m","a":null,"b":2,"c":null,"d":"x","e":null}',
        ),
    ):
        template = formatter("tag", "localhost").template(Severity.INFO, "m", fields, ("d", "e"))
        assert template.render(NOW, ("x", None)).decode() == text + "\n"
        assert (
            formatter("tag", "localhost").format(NOW, Severity.INFO, "m", fields | {"d": "x", "e": None})
            == (text + "\n").encode()
        )


VALUES = [
    (True, "true", "true", "true"),
    (False, "false", "false", "false"),
    (-12345, "-12345", "-12345", "-12345"),
    (1 << 70, "1180591620717411303424", "1180591620717411303424", "1180591620717411303424"),
    (Color.RED, "1", "1", "1"),
    (1.5, "1.5", "1.5", "1.5"),
    (float("nan"), "NaN", "NaN", '"NaN"'),
    (float("inf"), "+Inf", "+Inf", '"+Inf"'),
    (float("-inf"), "-Inf", "-Inf", '"-Inf"'),
    ('"abc ', r'"\"abc "', r'"\"abc "', r'"\"abc "'),
    ("", '""', '""', '""'),
    (b"12\xc534", '"12\ufffd34"', '"12\ufffd34"', r'"12\ufffd34"'),
    (b"\xff\xfe!", '"\ufffd!"', '"\ufffd!"', r'"\ufffd\ufffd!"'),
    ("hello\udc80", '"hello\ufffd"', '"hello\ufffd"', r'"hello\ufffd"'),
    (ValueError('a", b'), r'"a\", b"', r'"a\", b"', r'"a\", b"'),
    (TimeoutError(), '"TimeoutError()"', '"TimeoutError()"', '"TimeoutError()"'),
    (ipaddress.ip_address("::1"), '"::1"', '"::1"', '"::1"'),
    (
        datetime(2001, 12, 3, 22, 45, 1, 5, timezone(timedelta(hours=9))),
        *["2001-12-03T13:45:01.000005Z"] * 2,
        '"2001-12-03T13:45:01.000005Z"',
    ),
    ([-100, 100], '"[-100 100]"', "[-100 100]", "[-100,100]"),
    (["abc", "d f"], '"[abc d f]"', '["abc" "d f"]', '["abc","d f"]'),
    ([None, 1e-7, 1e20], '"[<nil> 1e-07 100000000000000000000]"', *[None] * 2),
    ([], '"[]"', "[]", "[]"),
    (
        {"def ghi": None, "abc": 123},
        '"map[abc:123 def ghi:<nil>]"',
        '{"def ghi"=null abc=123}',
        '{"def ghi":null,"abc":123}',
    ),
    ({"a": [{"b": ("x",)}]}, '"map[a:[map[b:[x]]]]"', '{a=[{b=["x"]}]}', '{"a":[{"b":["x"]}]}'),
]


@pytest.mark.parametrize(("value", "plain", "logfmt", "as_json"), VALUES, ids=lambda v: repr(v)[:30])
def test_values(value: object, plain: str, logfmt: str | None, as_json: str | None) -> None:
    assert fields_of(Plain("t", "h"), k=value) == f" k={plain}"
    if logfmt is not None:
        assert fields_of(Logfmt("t", "h"), k=value) == f" k={logfmt}"
        assert fields_of(JSON("t", "h"), k=value) == f',"k":{as_json}}}'


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
        ("\ufffd\ud800\udc00", '"\ufffd\ufffd"'),
    ],
)
def test_go_quoting(text: str, quoted: str) -> None:
    assert go_quote(text) == quoted


def test_json_quoting_is_that_of_the_original_but_for_what_is_not_printable() -> None:
    assert json_quote("\b\f\n\r\t\x7f\x00") == r'"\u0008\u000c\n\r\t\u007f\u0000"'
    assert json_quote('日本語 ☺ \U0001f600 \\"\n') == '"日本語 ☺ \U0001f600 \\\\\\"\\n"'
    assert json_quote("\x85\x9b\xa0\u2028\u202e\ufeff") == r'"\u0085\u009b\u00a0\u2028\u202e\ufeff"'
    assert json_quote("\U000e0001\U0010ffff") == r'"\udb40\udc01\udbff\udfff"'
    assert json_quote("\n\ud800\udfff") == r'"\n\ufffd\ufffd"'


@given(st.text())
def test_a_record_has_nothing_in_it_that_a_terminal_obeys_and_json_reads_back(text: str) -> None:
    fields = {"user": text, "of_list": [text], "of_mapping": {text: text}}
    for formatter in (Plain("t", "h"), Logfmt("t", "h"), JSON("t", "h")):
        line = formatter.format(0.0, Severity.INFO, text, fields).decode()
        assert line.endswith("\n")
        assert line[:-1].isprintable(), formatter.name
        assert len(line.splitlines()) == 1
    read = json.loads(line)
    assert read["message"] == read["user"] == re.sub("[\ud800-\udfff]", "\ufffd", text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (-0.0, "-0"),
        (1.0, "1"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (1.5e300, "15" + "0" * 299),
        (123456789.123, "123456789.123"),
        (5e-324, "0." + "0" * 323 + "5"),
    ],
)
def test_floats_have_no_exponent(number: float, text: str) -> None:
    assert go_float(number) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back(number: float) -> None:
    text = go_float(number)
    assert "e" not in text
    assert float(text) == number


# Keys, names and sizes.


@pytest.mark.parametrize("key", ["", "A", "1a", "a-b", "a b", "é", "a\n", "message", "topic", "logged_at"])
def test_bad_keys(formatter: Formatter, key: str) -> None:
    with pytest.raises(ValueError, match="invalid key"):
        formatter.format(NOW, Severity.INFO, "m", {key: 1})
    with pytest.raises(ValueError, match="invalid key"):
        formatter.template(Severity.INFO, "m", {}, ("ok", key))


def test_a_template_has_each_key_once(formatter: Formatter) -> None:
    with pytest.raises(ValueError, match="'a'"):
        formatter.template(Severity.INFO, "m", {"a": 1}, ("a",))


def test_names_can_not_break_a_line() -> None:
    formatter = JSON("My Prog", 'ho"st\n%s')
    assert (formatter.topic, formatter.utsname) == ("my-prog", "ho-st--s")
    assert json.loads(formatter.format(NOW, Severity.INFO, "m"))["utsname"] == "ho-st--s"


def test_the_largest_record_and_one_more(formatter: Formatter) -> None:
    empty = len(formatter.format(NOW, Severity.INFO, "m", {"k": ""}))
    largest = formatter.format(NOW, Severity.INFO, "m", {"k": "x" * (MAX_RECORD - empty)})
    assert len(largest) == MAX_RECORD
    cut = formatter.format(NOW, Severity.INFO, "m", {"k": "x" * (MAX_RECORD - empty + 1)})
    assert len(cut) < 300
    assert b'"m"' in cut
    assert b"log_error" in cut
    assert b"xx" not in cut


def test_a_message_that_is_too_large_is_cut(formatter: Formatter) -> None:
    record = formatter.format(NOW, Severity.INFO, "\U000e0001" * MAX_RECORD, {"k": 1})
    assert len(record) <= MAX_RECORD
    assert b"log_error" in record


def test_fractions_of_a_second(formatter: Formatter) -> None:
    for now, text in [
        (1.0, b"1970-01-01T00:00:01.000000Z"),
        (1.9999999, b"1970-01-01T00:00:01.999999Z"),  # never .1000000, never the next second
        (0.25, b"1970-01-01T00:00:00.250000Z"),
        (1795392000.000001, b"2026-11-23T00:00:00.000001Z"),
    ]:
        assert text in formatter.format(now, Severity.INFO, "m")


# Templates.

KEYS = ("request_id", "dest", "elapsed", "sent", "user", "note", "list")


def test_template_is_the_same_as_format(formatter: Formatter) -> None:
    template = formatter.template(Severity.INFO, "100% done", {"type": "access", "b": "%s"}, KEYS)
    for values in [
        ("id", "192.0.2.1:1", 1.25, 10, None, "", []),
        ("\n", 'q"\x7f', 1e-9, 1 << 65, "%d", "é", ["a"]),
        (b"\xff", True, float("nan"), -1, Color.RED, ValueError("x"), {"a": 1}),
    ]:
        fields = {"type": "access", "b": "%s", **dict(zip(KEYS, values, strict=True))}
        assert template.render(NOW, values) == formatter.format(NOW, Severity.INFO, "100% done", fields)


def test_template_of_one_key(formatter: Formatter) -> None:
    template = formatter.template(Severity.INFO, "m", {}, ("k",))
    assert template.render(NOW, ("v",)) == formatter.format(NOW, Severity.INFO, "m", {"k": "v"})


def test_plain_permutes_values() -> None:
    record = Plain("t", "h").template(Severity.INFO, "m", {"b": 0}, ("c", "a")).render(NOW, (1, 2))
    assert record.endswith(b'"m" a=2 b=0 c=1\n')


def test_template_wants_all_values(formatter: Formatter) -> None:
    with pytest.raises((TypeError, IndexError)):
        formatter.template(Severity.INFO, "m", {}, ("b", "a")).render(NOW, (1,))


# Whatever the values are.

texts = st.text(st.characters(codec=None, exclude_categories=()))
scalars = st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.floats() | texts | st.binary()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
) | st.datetimes(timezones=st.none() | st.timezones())
keys = st.from_regex(r"\A_[a-z0-9_]{0,8}\Z")


@settings(deadline=None)
@given(texts, st.dictionaries(keys, values, max_size=4))
def test_every_record_is_one_line(message: str, fields: dict[str, object]) -> None:
    for cls in FORMATS.values():
        record = cls("t", "h").format(NOW, Severity.INFO, message, fields)
        assert record.endswith(b"\n")
        assert not re.search(rb"[\x00-\x1f\x7f]", record[:-1])
        if cls is not JSON:
            assert record[:-1].decode().isprintable()


def plain_text(text: str) -> str:
    return "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)


@settings(deadline=None)
@given(texts, st.dictionaries(keys, st.none() | st.booleans() | st.integers() | texts | st.lists(texts)))
def test_json_reads_back(message: str, fields: dict[str, object]) -> None:
    got = json.loads(JSON("t", "h").format(NOW, Severity.INFO, message, fields))
    assert got.pop("message") == plain_text(message)
    for key, value in fields.items():
        match value:
            case str():
                assert got[key] == plain_text(value)
            case list():
                assert got[key] == [plain_text(item) for item in value]
            case _:
                assert got[key] == value
                assert type(got[key]) is type(value)

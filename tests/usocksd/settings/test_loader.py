"""The strict loader and the types of single settings, apart from either daemon's configuration."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.errors import ConfigError, Fault
from usocksd.settings.loader import Invalid, current_load, load, parse, show, structure
from usocksd.settings.types import (
    Interface,
    ListenIPsOrNone,
    Mark,
    Port,
    ReadableFile,
    Seconds,
    SecondsOrZero,
    text,
)


def _password(value: str) -> str:
    if len(value) < 8:
        raise ValueError
    return value


@attrs.frozen(kw_only=True)
class Inner:
    port: Port
    flag: bool = False
    limit: Seconds | None = None

    def __attrs_post_init__(self) -> None:
        if self.flag and self.limit is None:
            raise Invalid("expected limit to be set too", shown="true", at="flag")


@attrs.frozen(kw_only=True)
class Outer:
    inner: Inner = attrs.field(factory=lambda: Inner(port=1))
    ports: tuple[Port, ...] = ()
    entries: tuple[Inner, ...] = ()
    addresses: ListenIPsOrNone = ()
    iface: Interface = None
    mark: Mark | None = None
    file: ReadableFile | None = None
    drain: SecondsOrZero = 1.0
    secret: Annotated[str | None, text(_password, "8 characters or more", secret=True)] = None


def faults(toml: str, cls: type[object] = Outer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(cls, toml, "test.toml")
    return [str(fault) for fault in caught.value.faults]


def test_values_are_typed() -> None:
    config = parse(
        Outer,
        """
        ports = [1, 65535]
        addresses = ["127.0.0.1", "::ffff:192.0.2.1", "::"]
        iface = "eth0"
        mark = 0xffffffff
        drain = 0
        secret = "long enough"
        inner = { port = 80, flag = true, limit = 1.5 }
        entries = [{ port = 1 }, { port = 2 }]
        """,
        "test.toml",
    )
    assert config.ports == (1, 65535)
    assert config.addresses == (ip_address("127.0.0.1"), ip_address("192.0.2.1"), ip_address("::"))
    assert config.iface == "eth0"
    assert config.mark == 0xFFFFFFFF
    assert config.drain == 0.0
    assert type(config.drain) is float
    assert config.secret == "long enough"
    assert config.inner == Inner(port=80, flag=True, limit=1.5)
    assert [entry.port for entry in config.entries] == [1, 2]


@attrs.frozen(kw_only=True)
class Tables:
    from_: Port = 1
    by_name: Mapping[Annotated[str, text(str.upper, "any name")], Inner] = attrs.field(factory=dict)


def test_tables_named_by_the_operator_and_a_key_named_from() -> None:
    config = parse(Tables, "from = 3\n[by_name.a]\nport = 1\n[by_name.b]\nport = 2\n", "test.toml")
    assert config.from_ == 3
    assert {name: inner.port for name, inner in config.by_name.items()} == {"A": 1, "B": 2}
    with pytest.raises(TypeError):
        config.by_name["C"] = Inner(port=3)  # type: ignore[index]
    found = faults('from = "x"\nform = 1\n[by_name."a b"]\nprot = 0\n[by_name.c]\nport = "1"\n', Tables)
    assert [fault.partition(": ")[0] for fault in found] == [
        "from",
        "form",
        'by_name."a b".port',
        'by_name."a b".prot',
        "by_name.c.port",
    ]
    assert "form: unknown key, expected one of from, by_name" in found  # from is there already
    assert faults("form = 1", Tables) == ["form: unknown key, did you mean from?"]
    assert faults("by_name = 1", Tables) == ["by_name: 1: expected a table"]
    assert faults("[by_name]\nx = 1", Tables) == ["by_name.x: 1: expected a table"]


def _beside(value: str) -> Path:
    return current_load().folder / value


@attrs.frozen
class Files:
    file: Annotated[Path, text(_beside, "a path")]


def test_parsers_know_the_folder_of_the_file(tmp_path: Path) -> None:
    assert structure(Files, {"file": "x"}, f"{tmp_path}/test.toml").file == tmp_path / "x"
    assert structure(Files, {"file": "x"}, "test.toml").file == Path("x")
    with pytest.raises(LookupError):
        current_load()


def test_every_fault_of_a_text_is_reported_at_once() -> None:
    assert sorted(
        faults(
            """
            colour = "red"
            ports = [1, "80", 70000, true]
            addresses = ["127.0.0.1", "nowhere", "127.0.0.1"]
            entries = [{ port = 1 }, { prt = 2 }, 3]
            mark = 0
            iface = "averylonginterface"
            [inner]
            port = true
            flag = "yes"
            limit = nan
            "odd key" = 1
            """
        )
    ) == sorted(
        [
            "inner.port: true: expected an integer from 1 to 65535",
            'inner.flag: "yes": expected true or false',
            "inner.limit: nan: expected seconds, more than 0 and at most 31536000 (a year)",
            'inner."odd key": unknown key, expected one of port, flag, limit',
            'ports[1]: "80": expected an integer from 1 to 65535',
            "ports[2]: 70000: expected an integer from 1 to 65535",
            "ports[3]: true: expected an integer from 1 to 65535",
            "entries[1].port: missing: expected an integer from 1 to 65535",
            "entries[1].prt: unknown key, did you mean port?",
            "entries[2]: 3: expected a table",
            'addresses[1]: "nowhere": expected an IP address, as in "127.0.0.1" or "::1", or a list of them',
            'addresses[2]: "127.0.0.1": is there already, expected every address once',
            "mark: 0: expected an integer from 1 to 4294967295",
            'iface: "averylonginterface": expected the name of an interface, at most 15 characters, as in "eth0"',
            "colour: unknown key, expected one of inner, ports, entries, addresses, iface, mark, file, drain, secret",
        ]
    )


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        ("inner = 5", "inner: 5: expected a table"),
        ("inner = [{ port = 1 }]", "inner: [a table]: expected a table"),
        ("inner.port = 80.0", "inner.port: 80.0: expected an integer from 1 to 65535"),
        ("inner = { port = 1, flag = 1 }", "inner.flag: 1: expected true or false"),
        ("inner = { port = 1, flag = true }", "inner.flag: true: expected limit to be set too"),
        ('ports = "abc"', 'ports: "abc": expected a list, each item an integer from 1 to 65535'),
        ("ports = { a = 1 }", "ports: a table: expected a list, each item an integer from 1 to 65535"),
        ("ports = [[1]]", "ports[0]: [1]: expected an integer from 1 to 65535"),
        ("drain = true", "drain: true: expected seconds, 0 or more and at most 31536000 (a year)"),
        ("drain = -0.5", "drain: -0.5: expected seconds, 0 or more and at most 31536000 (a year)"),
        (
            'addresses = ["::1", "::"]',
            'addresses[1]: "::": clashes with ::1, expected :: alone since it covers the others',
        ),
        (
            'addresses = ["0.0.0.0", "::1", "127.0.0.1"]',
            'addresses[2]: "127.0.0.1": clashes with 0.0.0.0, expected 0.0.0.0 alone since it covers the others',
        ),
        ('file = "/nonexistent/file"', 'file: "/nonexistent/file": expected a file that exists'),
        ('file = "/"', 'file: "/": expected a regular file'),
    ],
)
def test_fault(toml: str, fault: str) -> None:
    assert faults(toml) == [fault]


def test_a_file_that_can_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("users").touch()
    assert parse(Outer, 'file = "users"', "test.toml").file == Path("users")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # mode bits do not hold root
    assert faults('file = "users"') == ['file: "users": expected a readable file: Permission denied']


# Files that can't be read at all.


@pytest.mark.parametrize(
    ("toml", "place"),
    [
        ("a = 1\nb =\n", "line 2, column 4"),
        ("a = 1\n[", "line 2, column 2"),
        ("a = 1\na = 2", "line 2, column 6"),
    ],
)
def test_syntax_errors_tell_line_and_column(toml: str, place: str) -> None:
    (fault,) = faults(toml)
    assert fault.startswith(f"{place}: not TOML: ")


@pytest.mark.parametrize(
    "value", ["9" * 5000, "[" * 5000, *("[" * depth + "]" * depth for depth in range(50, 1000, 50))]
)
def test_a_number_too_long_and_brackets_nested_too_deep(value: str) -> None:
    assert len(faults(f"mark = {value}")) == 1


def test_a_hexadecimal_number_of_thousands_of_digits() -> None:
    (fault,) = faults("mark = 0x" + "f" * 5000)
    assert fault.startswith("mark: 0xfff")
    assert len(fault) < 160


def test_load_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "test.toml"
    path.write_bytes(b"\xef\xbb\xbfmark = 7\r\n")
    assert load(Outer, path).mark == load(Outer, str(path)).mark == 7
    path.write_text("mark = -1\ndrain = -1\n")
    with pytest.raises(ConfigError) as caught:
        load(Outer, path)
    assert caught.value.source == str(path)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none", "file: can't be read: No such file or directory"),
        (".", "file: can't be read: Is a directory"),
        ("latin1", "line 2: byte 0xff: expected UTF-8"),
    ],
)
def test_files_that_can_not_be_loaded(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "latin1").write_bytes(b"# one\n# two \xff\n")
    with pytest.raises(ConfigError) as caught:
        load(Outer, tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {problem}"


def test_rules_are_named_as_records_name_them() -> None:
    assert str(Fault("rule[0].to[1]", '"x"', "expected another")) == 'rule 1: to[1]: "x": expected another'
    assert str(Fault("route[9]", "", "expected another")) == "route 10: expected another"
    assert str(Fault("outgoing.rule[0]", "", "expected another")) == "outgoing.rule[0]: expected another"


# Secrets.


@pytest.mark.parametrize(
    "toml",
    ['secret = "hunter2"', 'secret = ["hunter2"]', 'secert = "hunter2"', 'ports = "socks5://u:hunter2@h:1"'],
)
def test_a_secret_is_in_no_fault_and_in_no_traceback(toml: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, toml, "test.toml")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", '"plain"'),
        ("tab\tand \x1b[31m", '"tab\\tand \\u001b[31m"'),
        ("münchen", '"münchen"'),
        ("socks5://user:p@ss@host:1", '"socks5://***@host:1"'),
        ("user:pass@host", '"***@host"'),
        (["a:b@c", True, 1.5, [1]], '["***@c", true, 1.5, […]]'),
        ({"a": "b"}, "a table"),
        ("x" * 100, '"' + "x" * 78 + "…"),
    ],
)
def test_show(value: object, shown: str) -> None:
    assert show(value) == shown


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([field.name for field in attrs.fields(Outer)]), VALUES)
def test_any_value_for_any_key_is_accepted_or_a_fault(key: str, value: object) -> None:
    with contextlib.suppress(ConfigError):
        structure(Outer, {key: value}, "test.toml")

"""usocksd check and transocks check, as an operator, a unit and an editor run them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import attrs
import pytest
from daemons import loopback
from hypothesis import given
from hypothesis import strategies as st

import transocks.cli
import usocksd.cli
from usocksd.host.cgroup import usable_cpus
from usocksd.serve.verbs import check as check_verb

PROXY = 'proxy_url = "socks5://127.0.0.1:1080"\n'
SAMPLES = Path(__file__).parents[1] / "deploy"


def check(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The daemon's command line with these arguments, in this process."""
    main = usocksd.cli.main if name == "usocksd" else transocks.cli.main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as wrong_usage:
            status = int(wrong_usage.code or 0)
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "daemon.toml"


@pytest.mark.parametrize("name", ["usocksd", "transocks"])
def test_the_samples_have_no_faults_or_warnings(name: str) -> None:
    done = check(name, "check", "--strict", SAMPLES / f"{name}.toml")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{SAMPLES / name}.toml: 0 faults, 0 warnings"
    shown = dict(line.split(maxsplit=1) for line in lines[1:])
    assert (shown["timeouts.idle"], shown["timeouts.keepalive"]) == ("7440 s", "180 s")
    assert shown["limits.per_client"] == "no limit of its own"
    # An ordinary user has one in a folder of their own.
    assert shown["control"].endswith("/control.sock")
    assert shown["control"] == f"/run/{name}/control.sock" or os.geteuid() != 0
    assert int(shown["workers"]) == usable_cpus()
    assert int(shown["limits.connections_by_descriptors"]) > 0


def test_every_fault_has_its_line(file: Path) -> None:
    file.write_text(
        '[incoming]\nport = 70000\n\nalow_from = 1\n[outgoing]\ndeny_sites = [\n  "ok.example",\n  "a b",\n]\n'
    )
    done = check("usocksd", "check", file)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{file}:2: error: incoming.port: 70000: expected an integer from 0 to 65535",
        f"{file}:4: error: incoming.alow_from: unknown key, did you mean allow_from?",
        f'{file}:8: error: outgoing.deny_sites[1]: "a b": expected a host, ".domain", an address, a network or "" for'
        " requests without a name",
    ]
    assert done.stdout == f"{file}: 3 faults, 0 warnings\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[incoming\nport = 1", ":1:10: error: not TOML: "),
        (b"[incoming]\nport = ", ":2:8: error: not TOML: "),
        (b"\n\n# \xff", ":3: error: byte 0xff: expected UTF-8\n"),
        (None, ":1: error: file: can't be read: No such file or directory\n"),
    ],
)
def test_syntax_errors(file: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        file.write_bytes(content)
    done = check("usocksd", "check", "-q", file)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{file}{said}")
    assert done.stderr.count("\n") == 1


def test_a_missing_key_is_on_the_first_line(file: Path) -> None:
    file.write_text("\n\n[log]\n")
    done = check("transocks", "check", "-q", "-f", file)
    assert done.stderr.startswith(f"{file}:1: error: proxy_url: missing: expected socks5://")
    assert done.returncode == 1


def test_faults_of_the_users_file(file: Path, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("\nme:in-the-clear\n$2y$05$onlyahash\n")
    users.chmod(0o640)
    file.write_text(f'workers = 64\n[auth]\nusers_file = "{users}"')
    done = check("usocksd", "check", "-q", file)
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"{users}:2: error: 'me': expected a bcrypt hash")
    assert second.startswith(f"{users}:3: error: expected")
    assert third.startswith(f"{file}:1: warning: workers: 64: ")
    assert "clear" not in done.stderr
    assert "onlyahash" not in done.stderr


def test_warnings_are_faults_if_strict(file: Path) -> None:
    file.write_text(f"{PROXY}[timeouts]\n# first\nhandshake = 9000\n")
    for arguments, status in (((), 0), (("--strict",), 1)):
        done = check("transocks", "check", *arguments, file)
        assert done.returncode == status
        assert done.stderr.startswith(f"{file}:4: warning: timeouts.handshake: 9000: ")
        assert done.stdout.startswith(f"{file}: 0 faults, 1 warning\n  listen ")


def test_json(file: Path) -> None:
    file.write_text('control = ""\nworkers = 3\n[incoming]\nport = 5\naddresses = ["192.0.2.77"]\nmetrics_port = 0\n')
    done = check("usocksd", "check", "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["file"], answer["ok"], answer["faults"]) == (str(file), True, [])
    assert {
        "file": str(file),
        "line": 5,
        "column": None,
        "key": "incoming.addresses[0]",
        "value": "192.0.2.77",
    }.items() <= answer["warnings"][-1].items()
    settings = answer["settings"]
    assert settings["listen"] == ["192.0.2.77:5"]
    assert (settings["metrics"], settings["control"], settings["workers"]) == (None, None, 3)
    assert settings["timeouts.connect"] == 30

    file.write_text("port = 5\n\n=")
    done = check("usocksd", "check", "--json", file)
    assert (done.returncode, done.stderr) == (1, "")
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["warnings"], answer["settings"]) == (False, [], None)
    (fault,) = answer["faults"]
    assert (fault["line"], fault["column"], fault["key"]) == (3, 1, "")


def test_check_binds_and_creates_nothing(file: Path, tmp_path: Path) -> None:
    with loopback() as taken:
        port = taken.getsockname()[1]
        file.write_text(
            f'control = "{tmp_path}/control.sock"\n[incoming]\nport = {port}\naddresses = ["127.0.0.1"]\n'
            f'[log]\nfilename = "{tmp_path}/daemon.log"\n'
        )
        done = check("usocksd", "check", "--strict", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [file]


def test_warnings_without_privileges(file: Path, tmp_path: Path) -> None:
    """As somebody else than root: no marks, no files in directories that are not ours, few descriptors."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "old.log").touch(0o400)
    closed.chmod(0o555)
    file.write_text(
        f'{PROXY}mark = 1\ncontrol = "{closed}/control.sock"\nworkers = 1\n[limits]\nconnections = 5000\n'
        f'[log]\nfilename = "{closed}/new.log"\n'
    )
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*powerless, "prlimit", "--nofile=1024:1024", sys.executable, "-m", "transocks", "check", "-q", file]

    def said() -> str:
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False).stderr

    keys = [line.split(": ")[2] for line in said().splitlines()]
    assert keys == ["mark", "control", "limits.connections", "log.filename"]
    assert "1 x 1024 file descriptors" in said()
    file.write_text(f'{PROXY}[log]\nfilename = "{closed}/old.log"\n')
    assert "may not write it" in said()


def test_which_file(file: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(PROXY)
    bad.write_text("")
    assert check("transocks", "-f", good, "check").returncode == 0
    assert check("transocks", "-f", bad, "check").returncode == 1
    assert check("transocks", "-f", bad, "check", good).returncode == 0
    assert check("transocks", "check", "--nonsense").returncode == 2
    usage = check("usocksd", "check", "--help").stdout
    assert "FILE:LINE: warning: KEY: VALUE:" in usage
    assert "/etc/usocksd.toml" in usage


# Secrets


@given(
    password=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20).map("s3cret{}".format),
    before=st.sampled_from(["socks5://me:", "http://me:", "htp://me:", "me:", "http://m@e:", ""]),
    after=st.sampled_from(["@127.0.0.1:1081", "@proxy", "@", ":1", "@h:99999", "@h:1/x", ""]),
    quoted=st.booleans(),
    rest=st.sampled_from(["", "x = 1", "[timeouts]\nidle = 0", "[log", "proxy_url = 1", "workers = 64"]),
)
def test_no_output_has_the_password(
    tmp_path_factory: pytest.TempPathFactory, password: str, before: str, after: str, quoted: bool, rest: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "secret.toml"
    url = before + (quote(password, safe="") if quoted else password) + after
    file.write_text(f"proxy_url = {json.dumps(url, ensure_ascii=False)}\n{rest}\n", encoding="utf-8")
    for arguments in (["check"], ["check", "--json"], ["check", "-q", "--strict"]):
        done = check("transocks", *arguments, file)
        assert "s3cret" not in done.stdout + done.stderr


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_is_checked(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Any file gives one line for each fault, and never a traceback."""
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(f"[incoming]\nport = {text}", encoding="utf-8")
    for line in check("usocksd", "check", "-q", file).stderr.splitlines():
        assert re.match(rf"{re.escape(str(file))}:\d+:", line)


@pytest.mark.parametrize("verb", [["check"], ["check", "--json"], ["explain", "--from", "10.0.0.1"]])
@pytest.mark.parametrize("output", ["full", "pipe", "closed"])
def test_output_that_can_not_be_written_is_status_2(
    file: Path, verb: list[str], output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not 1, which means "faults" or "denied". (And a pipe into `head` is no error.)"""
    file.write_text("")
    arguments = [*verb, str(file), *(["192.0.2.1:80"] if verb[0] == "explain" else [])]
    with contextlib.ExitStack() as stack:
        stdout = None
        if output == "full":
            stdout = stack.enter_context(open("/dev/full", "w"))
        elif output == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            stdout = stack.enter_context(open(writer, "w"))
        monkeypatch.setattr(sys, "stdout", stdout)
        assert usocksd.cli.main(arguments) == (0 if output == "closed" else 2)
        if output == "closed":
            sys.stdout.close()  # what stood in for it
    said = "usocksd: can't write to standard output: No space left on device\n" if output == "full" else ""
    assert capsys.readouterr().err == said


def test_without_a_file_the_defaults_are_judged(tmp_path: Path) -> None:
    missing, said = tmp_path / "usocksd.toml", io.StringIO()
    parser = argparse.ArgumentParser()
    parser.add_argument("-f")
    check_verb.add_parser(parser.add_subparsers(), attrs.evolve(usocksd.cli.USOCKSD, file=str(missing)))
    for words, status in ((["check"], 0), (["check", "--strict"], 1)):
        args = parser.parse_args(words)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            assert args.run(args) == status
        assert f"{missing}:1: warning: file: there is none, so the defaults are judged\n" in said.getvalue()

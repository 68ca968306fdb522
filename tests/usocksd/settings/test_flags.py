"""The flags for a first try, of both daemons: the file that they stand for, and what they do."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import daemons
import pytest
from daemons import free_port

from transocks.cli import TRANSOCKS
from transocks.config import TransocksConfig
from transocks.flags import FLAGS
from usocksd.cli import USOCKSD
from usocksd.config import UsocksdConfig
from usocksd.serve import program
from usocksd.settings.loader import parse

BOTH = {"usocksd": USOCKSD, "transocks": TRANSOCKS}
VIA = "--via socks5h://192.0.2.10:1080"


def command(line: str) -> int:
    """The exit status of a command line of a daemon, as far as it starts none."""
    name, *words = line.split()
    try:
        return program.main(BOTH[name], lambda verbs: verbs.add_parser("check").set_defaults(run=lambda _: 0), words)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("usocksd", ""),
        (
            "usocksd --listen 1080 --allow 10.0.0.0/8 --allow ::1 --deny .ads.example",
            '[incoming]\nport = 1080\nallow_from = ["10.0.0.0/8", "::1"]\n\n[outgoing]\ndeny_sites = [".ads.example"]\n',
        ),
        (
            "usocksd --listen 127.0.0.1:1090 --listen [::1]:1090",
            '[incoming]\nport = 1090\naddresses = ["127.0.0.1", "::1"]\n',
        ),
        (f"transocks {VIA}", 'proxy_url = "socks5h://192.0.2.10:1080"\n'),
        (
            f"transocks {VIA} --via http://h:3128",
            'proxy_url = ["socks5h://192.0.2.10:1080", "http://h:3128"]\n',
        ),
        (
            f"transocks {VIA} --mode tproxy",
            'proxy_url = "socks5h://192.0.2.10:1080"\nlisten_tproxy = "localhost:1084"\nmark = 29811\n\n'
            '[rules]\nmode = "tproxy"\n',
        ),
    ],
)
def test_the_file_that_says_the_same(line: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"{line} --print-config") == 0
    assert capsys.readouterr().out == file
    parse(TransocksConfig if line.startswith("transocks") else UsocksdConfig, file, "")  # raises if it is none


@pytest.mark.parametrize("mode", ["host", "gateway", "tproxy"])
def test_each_mode_has_the_listener_that_its_rules_need(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"transocks {VIA} --mode {mode} --print-config") == 0
    config = parse(TransocksConfig, capsys.readouterr().out, "")
    assert config.rules is not None
    assert [each.value for each in config.rules.mode] == [mode]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("usocksd --listen http", "--listen: http: expected PORT or ADDRESS:PORT, with the same port each time"),
        ("usocksd --listen 1080 --listen ::1:1081", "--listen: 1080 ::1:1081: expected PORT or ADDRESS:PORT, with the"),
        ("usocksd --listen 1080 --listen ::1:1080", "PORT alone is all addresses: expected nothing beside it"),
        ("usocksd --listen 70000", "--listen: 70000: expected"),
        ("usocksd --allow 10.x", '--allow: "10.x": expected a network or an IP address'),
        ("usocksd --deny ..", '--deny: "..": expected a host, ".domain"'),
        ("usocksd --deny a -f b", "--deny and -f: expected one of them"),
        ("usocksd --deny a check", "--deny is for the daemon, not for its verbs"),
        ("transocks --mode host", "--via: missing: expected --via URL"),
        ("transocks --print-config", "--via: missing: expected --via URL"),
        ("transocks --via ftp://h", "--via: expected socks5://"),
        (f"transocks {VIA} --mode nat", "--mode: nat: expected one of host, gateway, tproxy"),
    ],
)
def test_errors_name_the_flag(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(line) == 2
    assert error in capsys.readouterr().err


def test_no_flag_without_help_or_a_second_meaning() -> None:
    for flag in (*FLAGS, *USOCKSD.flags):
        assert flag.help
    assert len({flag.name for flag in USOCKSD.flags}) == len(USOCKSD.flags)


def test_a_server_without_a_file(tmp_path: Path) -> None:
    """It is in force, and is read again by a reload."""
    port = free_port()
    words = ["--listen", f"127.0.0.1:{port}", "--allow", "127.0.0.1", "--deny", "denied.test"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([sys.executable, "-m", "usocksd", *words, "-logformat", "json"], stderr=log) as server,
    ):
        try:
            said = (tmp_path / "log").read_text
            daemons.wait_until(lambda: f'"127.0.0.1:{port}"' in said(), said)
            server.send_signal(signal.SIGHUP)
            daemons.wait_until(lambda: '"message":"reloaded"' in said(), said)
            with socket.create_connection(("127.0.0.1", port)) as sock:
                assert daemons.socks5(sock, "denied.test", 80)[0] == 2  # not allowed
        finally:
            server.terminate()
    assert server.returncode == 0

"""Files of destinations."""

from __future__ import annotations

import os
import signal
import socket
from ipaddress import ip_address
from pathlib import Path

import pytest
from daemons import GREETING, Daemon, Served, echo, loopback, receive_exactly, receive_reply, request

from usocksd.clients import Client
from usocksd.config import UsocksdConfig
from usocksd.errors import ConfigError
from usocksd.names.conditions import parse_list
from usocksd.settings.loader import load


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blocked.txt"


def test_the_format_of_a_list() -> None:
    sites = parse_list(
        b"\xef\xbb\xbf# a comment\r\n\r\n  www.Example.com  # another\n.example.org\r\n\n203.0.113.0/24\n127.1\n"
        b"b\xc3\xbccher.example\n2001:db8::/32\n#\nlast.example",
        "file:blocked.txt",
        "",
    )
    assert sorted(map(str, sites.entries())) == [
        ".example.org",
        "127.0.0.1",
        "2001:db8::/32",
        "203.0.113.0/24",
        "last.example",
        "www.example.com",
        "xn--bcher-kva.example",
    ]
    assert sites.label == "file:blocked.txt"


def test_files_are_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc" / "lists").mkdir(parents=True)
    (tmp_path / "etc" / "lists" / "blocked.txt").write_text(".example.org\n")
    (tmp_path / "absolute.txt").write_text("192.0.2.0/24\n")
    file = tmp_path / "etc" / "usocksd.toml"
    blocked = "file:lists/blocked.txt"
    file.write_text(
        f'[[rule]]\naction = "deny"\nto = ["x.example", "{blocked}", "file:{tmp_path}/absolute.txt"]\n'
        f'[[rule]]\naction = "deny"\nports = [25]\nto = ["{blocked}"]\n'
    )
    for folder, name in ((tmp_path, "etc/usocksd.toml"), (tmp_path / "etc", "usocksd.toml"), (Path("/"), str(file))):
        monkeypatch.chdir(folder)
        config = load(UsocksdConfig, name)
        rules = config.access_rules(lambda _: False)
        client = Client.at("10.0.0.1")
        for asked, address in (("x.example", None), ("a.example.org", None), (None, ip_address("192.0.2.7"))):
            assert not rules.judge(client, asked, address, 443).allowed
        assert rules.judge(client, "example.org", None, 443).allowed
        # Read once, however many rules name it.
        assert config.rule[0].to is not None
        assert config.rule[1].to is not None
        assert config.rule[0].to[1] is config.rule[1].to[0]


def test_every_faulty_line_is_reported(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"ok.example\n0.0.0.0 ads.example\n\n*.example.com\n\xff\n10.0.0.0/40 # x\n" + b"a b\n" * 20)
    os.mkfifo(tmp_path / "fifo")
    file = tmp_path / "usocksd.toml"
    names = ", ".join(f'"file:{name}"' for name in ("blocked.txt", "none", "", "fifo", "a\\u0000b"))
    file.write_text(f'[[rule]]\naction = "deny"\nto = ["a", {names}]\n')
    with pytest.raises(ConfigError) as caught:
        load(UsocksdConfig, file)
    faults = [str(fault) for fault in caught.value.faults]
    expected = 'expected a host, ".domain", an address, a network or "" for requests without a name'
    assert [fault.removeprefix(f'rule 1: to[1]: "file:blocked.txt": {path}: ') for fault in faults[:5]] == [
        'line 2: "0.0.0.0 ads.example": expected one entry a line',
        f'line 4: "*.example.com": {expected} (".example.com" for all names below it)',
        f'line 5: "\\\\xff": {expected}',
        f'line 6: "10.0.0.0/40": {expected}',
        'line 7: "a b": expected one entry a line',
    ]
    assert faults[10:] == [
        f'rule 1: to[1]: "file:blocked.txt": {path}: 14 more lines like these',
        'rule 1: to[2]: "file:none": expected a file that exists',
        'rule 1: to[3]: "file:": expected a regular file',
        'rule 1: to[4]: "file:fifo": expected a regular file',
        'rule 1: to[5]: "file:a\\u0000b": expected a file that exists',
    ]


def test_a_reload_reads_them_again_and_a_bad_one_changes_nothing(tmp_path: Path, path: Path) -> None:
    path.write_text("# nothing\n")
    config = """
        [incoming]
        port = 0
        addresses = ["127.0.0.1"]
        [[rule]]
        name = "blocked"
        action = "deny"
        to = ["file:blocked.txt"]
        [[rule]]
        action = "allow"
        to = ["127.0.0.1"]
        """

    def reply(server: Daemon) -> int:
        with socket.create_connection(("127.0.0.1", server.port), 5) as client:
            client.sendall(GREETING + request("127.0.0.1", destination.port))
            assert receive_exactly(client, 2)
            return receive_reply(client)[0]

    with Served(loopback(), echo) as destination, Daemon("usocksd", config, tmp_path) as server:
        assert reply(server) == 0
        path.write_text("127.0.0.0/8\n")
        server.signal(signal.SIGHUP)
        server.record("reloaded", generation=2)
        assert reply(server) == 2
        path.write_text("www.example.com\nnot a host\n")
        server.signal(signal.SIGHUP)
        failed = server.record("bad configuration")
        assert f'rule 1: to[0]: "file:blocked.txt": {path}: line 2: "not a host"' in str(failed)
        assert reply(server) == 2

"""What a file does to everybody, said before it does it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from usocksd.commands.serve import examine
from usocksd.config import UsocksdConfig
from usocksd.settings.loader import parse


def said(toml: str, folder: Path = Path()) -> list[str]:
    config = parse(UsocksdConfig, toml, str(folder / "usocksd.toml"))
    return [note.at("f") for note in examine(config, None).notes]


ONLY = "f:2: incoming.allow_from: {}: admits {}: all others are turned away"


@pytest.mark.parametrize(
    ("incoming", "expected"),
    [
        ('allow_from = ["192.0.2.1"]', ONLY.format('["192.0.2.1/32"]', "one client only, 192.0.2.1")),
        (
            'allow_from = ["127.0.0.0/8", "2001:db8::1"]',
            ONLY.format('["127.0.0.0/8", "2001:db8::1/128"]', "one client only, 2001:db8::1"),
        ),
        ('allow_from = ["127.0.0.1"]', ONLY.format('["127.0.0.1/32"]', "clients on this host only")),
        ('allow_from = ["127.0.0.1"]\naddresses = ["127.0.0.1"]', None),
        ('allow_from = ["192.0.2.0/31"]', None),
        ('allow_from = ["192.0.2.1", "192.0.2.2"]', None),
        ("", None),
    ],
)
def test_notes_on_allow_from(incoming: str, expected: str | None) -> None:
    assert said(f"[incoming]\n{incoming}\n") == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (
            "[outgoing]\ndeny_ports = [25, 443]",
            "f:2: outgoing.deny_ports[1]: 443: denies HTTPS (port 443) to everybody",
        ),
        ('[[rule]]\naction = "deny"\nports = ["1-1023"]', "f:3: rule 1: ports: denies HTTPS (port 443) to everybody"),
        (
            '[[rule]]\nname = "x"\naction = "deny"\nports = [443]\n[outgoing]\ndeny_ports = [443]',
            'f:4: rule 1: ports: "x": denies HTTPS (port 443) to everybody',
        ),
        ('[[rule]]\naction = "deny"\nports = [443]\nfrom = ["192.0.2.1"]', None),
        ('[[rule]]\naction = "allow"\nto = ["a"]\n[outgoing]\ndeny_ports = [443]', None),
        ("[outgoing]\ndeny_ports = [25]", None),
    ],
)
def test_notes_on_port_443(toml: str, expected: str | None) -> None:
    assert said(toml) == ([] if expected is None else [expected])


def records(count: int, **changes: Any) -> str:
    record = {
        "logged_at": "2026-11-30T19:00:00.000000Z",
        "message": "proxy starts",
        "type": "access",
        "client_addr": "10.1.2.3:5000",
        "dest_host": "203.0.113.5",
        "dest_port": 443,
        "dest_addr": "203.0.113.5:443",
        "candidates": ["203.0.113.5"],
        **changes,
    }
    return (json.dumps(record, separators=(",", ":")) + "\n") * count


def test_the_log_tells_how_many_requests_would_be_denied(tmp_path: Path) -> None:
    """And only of what was allowed by then: what was denied is denied for long."""
    log = tmp_path / "log"
    toml = f'[log]\nfilename = "{log}"\nformat = "json"\n'
    assert said(toml) == []  # there is none
    log.write_text(
        records(1500)
        + records(30, client_addr="10.9.9.9:1")
        + records(7, message="ruleset mismatch")
        + records(1500, message="proxy ends")
        + "no record\n"
    )
    assert said(toml) == []
    rule = '[[rule]]\naction = "deny"\nports = [443]\nfrom = ["10.1.0.0/16"]\n'
    place = f'f:2: log.filename: "{log}": of the last 1,537 requests'
    assert said(toml + rule) == [f"{place} 1,500 were allowed and would be denied, by rule 1"]
    allow_from = '[incoming]\nallow_from = ["10.1.0.0/16"]\n'
    assert said(toml + allow_from + rule) == [
        f"{place} 1,530 were allowed and would be denied, 1,500 of them by rule 1"
    ]


def test_only_the_end_of_a_long_log_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(records(20_000) + records(10_000, client_addr="10.9.9.9:1"))
    toml = f'[log]\nfilename = "{log}"\n[incoming]\nallow_from = ["10.1.0.0/16"]\n'
    (line,) = said(toml)
    count = line.partition("of the last ")[2].partition(" ")[0]
    assert 5000 < int(count.replace(",", "")) < 10_000
    assert line.endswith(f"requests {count} were allowed and would be denied, by allow_from")


def test_a_log_that_is_a_fifo_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    assert said(f'[log]\nfilename = "{tmp_path}/log"\n[incoming]\nallow_from = ["10.0.0.0/8"]\n') == []


def test_a_faulty_users_file_gives_no_note(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(records(1))
    (tmp_path / "users").write_text("bad")
    assert said(f'[log]\nfilename = "{tmp_path}/log"\n[auth]\nusers_file = "users"\n', tmp_path) == []

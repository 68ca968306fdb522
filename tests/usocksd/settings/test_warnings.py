"""Warnings about the settings that both daemons have: valid, but not on this host, or not beside each other."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import attrs
import pytest

from usocksd.config import UsocksdConfig
from usocksd.net.address import socket_address
from usocksd.settings.loader import parse
from usocksd.settings.warnings import HostFacts, connections_of_descriptors, lint_common

HOST = HostFacts(
    addresses=frozenset(map(ip_address, ("127.0.0.1", "::1", "192.0.2.1", "10.0.0.1", "8.8.8.8", "fe80::1"))),
    interfaces=("lo", "eth0"),
    ipv6=True,
    nonlocal_bind=(),
    descriptors=20_000,
    cpus=4,
    may_mark=True,
    may_be_transparent=True,
)


def warned(toml: str, host: HostFacts = HOST) -> list[str]:
    """Each warning, after its key."""
    toml = toml if toml.startswith("control") else f'control = ""\n{toml}'
    faults = lint_common(parse(UsocksdConfig, toml, ""), host)
    return [f"{fault.path} {fault.expected}" for fault in faults]


@pytest.mark.parametrize(
    ("toml", "keys"),
    [
        ("[outgoing]\nmark = 9", []),
        ("workers = 4", []),
        ("workers = 5", ["workers"]),
        ("[limits]\nconnections = 10\nper_client = 10", []),
        ("[limits]\nconnections = 0\nper_client = 10", []),
        ("[limits]\nconnections = 10\nper_client = 11", ["limits.per_client"]),
        ("[timeouts]\nidle = 5\nhalf_closed = 5\nhandshake = 5", []),
        ("[timeouts]\nidle = 5", ["timeouts.handshake", "timeouts.half_closed"]),
        ("[timeouts]\nhandshake = 8000", ["timeouts.handshake"]),
        ("[timeouts]\nstop = 601", ["timeouts.drain"]),
        ("[timeouts]\nstop = 0\ndrain = 0", []),
        ('[incoming]\nmetrics_address = "::1"\nmetrics_port = 0', ["incoming.metrics_address"]),
        ("[incoming]\nmetrics_port = 0", []),
        ('[incoming]\nmetrics_address = "0.0.0.0"', ["incoming.metrics_address"]),
        ('[incoming]\nmetrics_address = "192.0.2.77"', ["incoming.metrics_address"]),
        ('[incoming]\nmetrics_address = "127.0.0.2"', []),
        ('[incoming]\nmetrics_address = "10.0.0.1"', []),  # what the setting is for
        ('[incoming]\nmetrics_address = "8.8.8.8"', ["incoming.metrics_address"]),
        ("[incoming]\nmetrics_port = 1080", ["incoming.metrics_port"]),
        ('[incoming]\nmetrics_port = 1080\naddresses = ["127.0.0.1"]', ["incoming.metrics_port"]),
        ('[incoming]\nmetrics_port = 1080\naddresses = ["127.0.0.2"]', []),
        ('[incoming]\nmetrics_port = 1080\nmetrics_address = "::1"\naddresses = ["127.0.0.1"]', []),
    ],
)
def test_settings_that_contradict_each_other_or_the_host(toml: str, keys: list[str]) -> None:
    assert [line.partition(" ")[0] for line in warned(toml)] == keys


def test_the_defaults_do_on_any_host() -> None:
    assert warned("", attrs.evolve(HOST, ipv6=False, may_mark=False, cpus=1, descriptors=64)) == []


def test_connections_for_which_there_are_no_descriptors() -> None:
    most = connections_of_descriptors(UsocksdConfig(workers=2), HOST)
    assert warned(f"workers = 2\n[limits]\nconnections = {most}") == []
    (line,) = warned(f"workers = 2\n[limits]\nconnections = {most + 1}")
    assert f"2 x 20000 file descriptors allow {most}" in line


def test_marks_that_may_not_be_set() -> None:
    host = attrs.evolve(HOST, may_mark=False)
    assert warned("", host) == []
    (line,) = warned("[outgoing]\nmark = 9", host)
    assert line.startswith("outgoing.mark ")


@pytest.mark.parametrize(
    ("address", "changes", "said"),
    [
        ("192.0.2.1", {}, ""),
        ("127.3.4.5", {}, ""),
        ("::", {}, ""),
        ("192.0.2.2", {}, "not an address of this host"),
        ("192.0.2.2", {"nonlocal_bind": (4,)}, ""),
        ("2001:db8::1", {"nonlocal_bind": (4,)}, "set net.ipv6.ip_nonlocal_bind=1"),
        ("2001:db8::1", {"nonlocal_bind": (6,)}, ""),
        ("fe80::1%eth0", {}, ""),
        ("fe80::1%eth1", {}, "no interface eth1"),
        ("fe80::2%eth0", {}, "not an address of this host"),
        ("::", {"ipv6": False}, "has no IPv6"),
    ],
)
def test_listening_addresses(address: str, changes: dict[str, Any], said: str) -> None:
    lines = warned(f'[incoming]\naddresses = ["{address}"]', attrs.evolve(HOST, **changes))
    assert len(lines) == bool(said)
    assert all(line.startswith("incoming.addresses[0] ") and said in line for line in lines)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "192.0.2.77", "fe80::77%lo", "2001:db8::77", "::1"])
def test_warnings_of_addresses_agree_with_bind(address: str) -> None:
    """The warning against bind(2) itself, on this host."""
    here = HostFacts.here(frozenset(map(ip_address, ("127.0.0.1", "::1"))))
    assert "lo" in here.interfaces
    assert here.cpus == len(os.sched_getaffinity(0))
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.bind(socket_address(address, 0))
        refused = False
    except OSError:
        refused = True
    assert bool(warned(f'[incoming]\naddresses = ["{address}"]', here)) == refused


def test_the_control_socket(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return "\n".join(warned(f'control = "{path}"'))

    good = tmp_path / "good"
    good.mkdir(0o750)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(good / "sock"))
        assert said(good / "sock") == ""
    assert said(good / "new") == ""
    (good / "file").touch()
    assert "is no socket" in said(good / "file")
    assert said(tmp_path / "made-by-the-daemon" / "sock") == ""
    assert f"{tmp_path / 'no' / 'ne'} does not exist" in said(tmp_path / "no" / "ne" / "sock")
    assert f"{good / 'file'} is not a directory" in said(good / "file" / "sock")
    good.chmod(0o777)
    assert "everybody may replace it" in said(good / "new")
    good.chmod(0o1777)
    assert said(good / "new") == ""


def test_the_log_file(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return "\n".join(warned(f'[log]\nfilename = "{path}"'))

    assert said(tmp_path / "new.log") == ""
    assert not (tmp_path / "new.log").exists()
    (tmp_path / "there.log").touch()
    assert said(tmp_path / "there.log") == ""
    assert "is a directory" in said(tmp_path)
    assert "create it" in said(tmp_path / "none" / "new.log")
    assert "can't be looked at" in said(tmp_path / ("x" * 300))

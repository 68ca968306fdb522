"""Checks that need no rules, over a /proc of the test's own; and how findings are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from transocks.config import TransocksConfig
from transocks.doctor import State, judge
from transocks.doctor.checks import kernel
from transocks.doctor.finding import Finding, as_json, as_text, fault, fine, unchecked, warning
from transocks.doctor.host import Host
from transocks.upstreams.proxy_url import parse_proxy_url

CONFIG = TransocksConfig(proxy_url=(parse_proxy_url("socks5://192.0.2.1:1080"),))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(config=CONFIG, why="no tracing in this test", proc=tmp_path)


def write(host: Host, **files: str) -> None:
    for name, text in files.items():
        path = host.proc / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("waiting", "reuse", "state"),
    [(9, 2, State.OK), (60, 2, State.WARNING), (95, 2, State.FAULT), (95, 1, State.OK)],
)
def test_ports_in_time_wait(host: Host, waiting: int, reuse: int, state: State) -> None:
    line = " 0: 0A00000A:8000 010200C0:0438 06 more\n 1: 0A00000A:8000 010200C0:0438 01 more\n"
    write(host, net__tcp="  sl local remote st\n" + line * waiting)
    write(host, sys__net__ipv4__tcp_tw_reuse=f"{reuse}\n", sys__net__ipv4__ip_local_port_range="40000\t40099\n")
    finding = only(kernel.ports_in_time_wait(host))
    assert finding.state is state
    assert f"{waiting} of 100 ports" in finding.seen


@pytest.mark.parametrize(
    ("ports", "reserved", "state"),
    [
        ("32768\t60999", "", State.OK),
        ("1024\t65535", "", State.WARNING),
        ("1024\t65535", "1080-1082", State.OK),
        ("50000\t50999", "", State.WARNING),
    ],
)
def test_port_range(host: Host, ports: str, reserved: str, state: State) -> None:
    write(host, sys__net__ipv4__ip_local_port_range=ports, sys__net__ipv4__ip_local_reserved_ports=reserved)
    assert only(kernel.port_range(host)).state is state


@pytest.mark.parametrize(
    ("count", "most", "before", "now", "state"),
    [
        ("10", "100", 0, 0, State.OK),
        ("80", "100", 0, 0, State.WARNING),
        ("99", "100", 0, 0, State.FAULT),
        ("10", "100", 255, 255, State.OK),  # it was full, and is not any more
        ("10", "100", 255, 256, State.OK),  # two packets of a new connection raced for its entry
        ("80", "100", 255, 256, State.FAULT),
        ("10", "0", 0, 0, State.OK),
    ],
)
def test_conntrack(host: Host, count: str, most: str, before: int, now: int, state: State) -> None:
    """Only packets dropped during the check count, not those since the boot."""
    write(host, sys__net__netfilter__nf_conntrack_count=count, sys__net__netfilter__nf_conntrack_max=most)
    write(host, net__stat__nf_conntrack=f"entries drop early_drop\n0 {before:08x} 0\n0 00000000 0\n")
    host = Host(config=CONFIG, proc=host.proc)
    write(host, net__stat__nf_conntrack=f"entries drop early_drop\n0 {now:08x} 0\n0 00000000 0\n")
    assert only(kernel.conntrack(host)).state is state


def test_the_reverse_path_filter_by_two_readings(host: Host) -> None:
    head = "TcpExt: A IPReversePathFilter\n"
    write(host, net__netstat=f"{head}TcpExt: 1 7\nIpExt: B\nIpExt: 3\n")
    host = Host(config=CONFIG, proc=host.proc)
    assert (host.counters, host.since("IPReversePathFilter")) == ({"A": 1, "IPReversePathFilter": 7, "B": 3}, 0)
    write(host, net__netstat=f"{head}TcpExt: 1 9\n")
    assert host.since("IPReversePathFilter") == 2


def test_a_check_that_fails_does_not_hide_the_others(host: Host) -> None:
    def broken(host: Host) -> object:
        raise ExceptionGroup("of a nursery", [RuntimeError("a bug")])

    def sound(host: Host) -> object:
        yield fine("sound", "well")

    first, second = judge(host, (broken, sound))  # type: ignore[arg-type]
    assert (first.check, first.state, second.state) == ("broken", State.UNCHECKED, State.OK)
    assert "RuntimeError: a bug" in first.seen


FINDINGS = [
    fine("a", "well"), unchecked("b", "can't tell", "ask root"), warning("c", "so-so", "mend it"),
    fault("d", "bad\x1b[2J", "mend it now"), fine("d", "half of it"),
]  # fmt: skip


def test_faults_are_told_first() -> None:
    assert list(as_text(FINDINGS)) == [
        "fault: d: bad\\x1b[2J",
        "    mend it now",
        "warning: c: so-so",
        "    mend it",
        "not checked: b: can't tell",
        "    ask root",
        "ok: a",
        "1 fault, 1 warning, 1 not checked",
    ]
    assert list(as_text(FINDINGS, everything=True))[6:8] == ["ok: a: well", "ok: d: half of it"]
    answer = as_json(FINDINGS, "f")
    assert (answer["file"], answer["ok"]) == ("f", False)
    assert answer["findings"][0] == {"check": "d", "state": "fault", "seen": "bad\x1b[2J", "do": "mend it now"}  # type: ignore[index]

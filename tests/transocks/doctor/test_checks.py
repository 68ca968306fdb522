"""Checks that need no rules, over a /proc of the test's own; and how findings are told."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from transocks.config import Config
from transocks.doctor import State, judge
from transocks.doctor.checks import settings, tracking
from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.report import as_json, as_text
from transocks.doctor.seen import Seen, counted
from transocks.doctor.tried import Trials
from transocks.tracing.links import Links
from transocks.tracing.sockets import Identity
from transocks.upstreams.proxy_url import parse_proxy_url

SEEN = Seen(
    config=Config(proxy_url=(parse_proxy_url("socks5://192.0.2.1:1080"),)), config_file="transocks.toml",
    listeners=(), addresses=frozenset(), here=Links((), {}), daemon=Identity(), root=True,
)  # fmt: skip


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    return attrs.evolve(SEEN, proc=tmp_path)


def write(seen: Seen, **files: str) -> None:
    for name, text in files.items():
        path = seen.proc / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def untried(seen: Seen) -> Trials:
    return Trials(seen, None, "no tracing in this test")


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("waiting", "reuse", "state"),
    [(9, 2, State.OK), (60, 2, State.WARNING), (95, 2, State.FAULT), (95, 1, State.OK)],
)
def test_ports_in_time_wait(seen: Seen, waiting: int, reuse: int, state: State) -> None:
    line = " 0: 0A00000A:8000 010200C0:0438 06 more\n 1: 0A00000A:8000 010200C0:0438 01 more\n"
    write(seen, net__tcp="  sl local remote st\n" + line * waiting)
    write(seen, sys__net__ipv4__tcp_tw_reuse=f"{reuse}\n", sys__net__ipv4__ip_local_port_range="40000\t40099\n")
    finding = only(settings.ports_in_time_wait(seen, untried(seen)))
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
def test_port_range(seen: Seen, ports: str, reserved: str, state: State) -> None:
    write(seen, sys__net__ipv4__ip_local_port_range=ports, sys__net__ipv4__ip_local_reserved_ports=reserved)
    assert only(settings.port_range(seen, untried(seen))).state is state


@pytest.mark.parametrize(
    ("count", "most", "before", "now", "state"),
    [
        ("10", "100", 0, 0, State.OK),
        ("80", "100", 0, 0, State.WARNING),
        ("99", "100", 0, 0, State.FAULT),
        ("10", "100", 255, 255, State.OK),  # it was full, and is not any more
        ("10", "100", 255, 256, State.FAULT),
        ("10", "0", 0, 0, State.OK),
    ],
)
def test_conntrack(seen: Seen, count: str, most: str, before: int, now: int, state: State) -> None:
    """What counts is what is dropped while somebody looks, not since the boot."""
    write(seen, sys__net__netfilter__nf_conntrack_count=count, sys__net__netfilter__nf_conntrack_max=most)
    write(seen, net__stat__nf_conntrack=f"entries drop early_drop\n0 {before:08x} 0\n0 00000000 0\n")
    seen = attrs.evolve(seen, counters=counted(seen.proc))
    write(seen, net__stat__nf_conntrack=f"entries drop early_drop\n0 {now:08x} 0\n0 00000000 0\n")
    assert only(tracking.conntrack(seen, untried(seen))).state is state


def test_the_reverse_path_filter_by_two_readings(seen: Seen) -> None:
    head = "TcpExt: A IPReversePathFilter\n"
    write(seen, net__netstat=f"{head}TcpExt: 1 7\nIpExt: B\nIpExt: 3\n")
    seen = attrs.evolve(seen, counters=counted(seen.proc))
    assert (seen.counters, seen.since("IPReversePathFilter")) == ({"A": 1, "IPReversePathFilter": 7, "B": 3}, 0)
    write(seen, net__netstat=f"{head}TcpExt: 1 9\n")
    assert seen.since("IPReversePathFilter") == 2


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    def broken(seen: Seen, trials: Trials) -> object:
        raise ExceptionGroup("of a nursery", [RuntimeError("a bug")])

    def sound(seen: Seen, trials: Trials) -> object:
        yield fine("sound", "well")

    first, second = judge(SEEN, untried(SEEN), (broken, sound))  # type: ignore[arg-type]
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


def test_json() -> None:
    answer = as_json(FINDINGS, "f")
    assert (answer["file"], answer["ok"]) == ("f", False)
    assert answer["findings"][0] == {"check": "d", "state": "fault", "seen": "bad\x1b[2J", "do": "mend it now"}  # type: ignore[index]

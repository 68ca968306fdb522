"""Checks that need no rules, over a /proc of the test's own; and how findings are told."""

from __future__ import annotations

import errno
from ipaddress import ip_address, ip_network
from pathlib import Path

import attrs
import pytest

from transocks.config import Config
from transocks.doctor import State, judge
from transocks.doctor.checks import paths, redirection, settings, tracking
from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import Flows
from transocks.doctor.report import as_json, as_text
from transocks.doctor.seen import Identity, Link, Seen
from transocks.firewall.routing import Route
from transocks.netfilter.iptables import read_iptables
from transocks.netfilter.ruleset import Ruleset
from transocks.proxy_url import parse_proxy_url
from usocksd.match import IPAddress
from usocksd.runtime.settings import ListenAddress

SEEN = Seen(
    config=Config(proxy_url=(parse_proxy_url("socks5://192.0.2.1:1080"),)), config_file="transocks.toml",
    ruleset=Ruleset(()), listeners=(), addresses=frozenset(), links=(), uplinks={}, daemon=Identity(), root=True,
)  # fmt: skip


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    return attrs.evolve(SEEN, proc=tmp_path)


def write(seen: Seen, **files: str) -> None:
    for name, text in files.items():
        path = seen.proc / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("rules", "loose", "said"),
    [
        ("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081", "1", "(those that nothing"),
        ("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -m conntrack --ctstate NEW -j REDIRECT --to-ports 1081", "1", "("),
        ("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081", "0", None),
        ("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp --syn -j REDIRECT --to-ports 1081", "1", None),
        ("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp ! --syn -j RETURN\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081",
         "1", None),
        ("*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m socket -j ACCEPT\n"
         "-A PREROUTING -p tcp -j TPROXY --on-port 1084", "0", "(all)"),
    ],
)  # fmt: skip
def test_old_connections(seen: Seen, rules: str, loose: str, said: str | None) -> None:
    write(seen, sys__net__netfilter__nf_conntrack_tcp_loose=f"{loose}\n")
    config = attrs.evolve(seen.config, listen_tproxy=(ListenAddress(ip_address("0.0.0.0"), 1084),))
    seen = attrs.evolve(seen, config=config, ruleset=read_iptables(f"{rules}\nCOMMIT\n", 4))
    assert [f.mode for f in Flows(seen).arriving], "they are found"
    findings = list(redirection.old_connections(seen, Flows(seen)))
    assert [f.state for f in findings] == ([State.WARNING] if said else [])
    assert said is None or said in findings[0].seen


@pytest.mark.parametrize(
    ("links", "unreachable", "state"),
    [
        ((4, 6), (), State.OK),
        ((4, 6), (4, 6), State.FAULT),
        ((4, 6), (4,), State.WARNING),
        ((4, 6), (6,), State.OK),
        ((4,), (4, 6), State.FAULT),
        ((6,), (4,), State.OK),
    ],
)
def test_a_destination_without_a_route(
    seen: Seen, links: tuple[int, ...], unreachable: tuple[int, ...], state: State
) -> None:
    def route(destination: IPAddress) -> Route:
        if destination.version in unreachable:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return Route(local=False, device="eth0", gateway=None)

    rules = "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n"
    networks = {4: ip_network("192.0.2.0/24"), 6: ip_network("2001:db8::/64")}
    seen = attrs.evolve(
        seen, route=route, links=(Link("eth0", (ip_network("fe80::/64"), *(networks[version] for version in links))),),
        ruleset=Ruleset((*read_iptables(rules, 4).chains, *read_iptables(rules, 6).chains)),
    )  # fmt: skip
    finding = only(paths.way_out(seen, Flows(seen)))
    assert (finding.check, finding.state) == ("routes", state)
    assert state is State.OK or "no rule is asked (Network is unreachable)" in finding.seen


def test_where_ipv6_is_switched_off_its_rules_matter_to_nobody(seen: Seen) -> None:
    rules = "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n"
    both = Ruleset((*read_iptables(rules, 4).chains, *read_iptables(rules, 6).chains))
    found = [
        [flow.version for flow in Flows(attrs.evolve(seen, ruleset=both, ipv6=ipv6)).best] for ipv6 in (True, False)
    ]
    assert found == [[4, 6], [4]]


@pytest.mark.parametrize(
    ("waiting", "reuse", "state"),
    [(9, 2, State.OK), (60, 2, State.WARNING), (95, 2, State.FAULT), (95, 1, State.OK)],
)
def test_ports_in_time_wait(seen: Seen, waiting: int, reuse: int, state: State) -> None:
    line = " 0: 0A00000A:8000 010200C0:0438 06 more\n 1: 0A00000A:8000 010200C0:0438 01 more\n"
    write(seen, net__tcp="  sl local remote st\n" + line * waiting)
    write(seen, sys__net__ipv4__tcp_tw_reuse=f"{reuse}\n", sys__net__ipv4__ip_local_port_range="40000\t40099\n")
    finding = only(settings.ports_in_time_wait(seen, Flows(seen)))
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
    assert only(settings.port_range(seen, Flows(seen))).state is state


@pytest.mark.parametrize(
    ("count", "most", "dropped", "state"),
    [
        ("10", "100", 0, State.OK),
        ("80", "100", 0, State.WARNING),
        ("99", "100", 0, State.FAULT),
        ("10", "100", 255, State.WARNING),
        ("10", "0", 0, State.OK),
    ],
)
def test_conntrack(seen: Seen, count: str, most: str, dropped: int, state: State) -> None:
    write(seen, sys__net__netfilter__nf_conntrack_count=count, sys__net__netfilter__nf_conntrack_max=most)
    write(seen, net__stat__nf_conntrack=f"entries drop early_drop\n0 {dropped:08x} 0\n0 00000000 0\n")
    finding = only(tracking.conntrack(seen, Flows(seen)))
    assert finding.state is state
    assert dropped == 0 or "255 connections dropped" in finding.seen


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    def broken(seen: Seen, flows: Flows) -> object:
        raise RuntimeError("a bug")

    def sound(seen: Seen, flows: Flows) -> object:
        yield fine("sound", "well")

    first, second = judge(SEEN, (broken, sound))  # type: ignore[arg-type]
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

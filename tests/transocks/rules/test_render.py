"""Rendering: what is replaced in the files of iptables/, and that nothing is when they have changed."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

import attrs
import pytest

from transocks.rules import render as rendering
from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection, Selection
from transocks.rules.render import excluded, merged, render_guard, render_iptables, render_nft

HOST = Redirection(mode=Mode.HOST, port=2081)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if not line.lstrip().startswith("# ")]


@pytest.mark.parametrize("mode", list(Mode))
def test_without_wishes_it_is_the_file(mode: Mode) -> None:
    port = 1084 if mode is Mode.TPROXY else 1081
    wanted = Redirection(mode=mode, port=port)
    assert render_nft(wanted) == rendering._template(f"{mode.value}.nft")
    for version in (4, 6):
        file = rendering._template(f"{mode.value}.v{version}")
        assert render_iptables(wanted, version=version) == re.sub(r"^(#.*)?\n", "", file, flags=re.MULTILINE)


def test_port_mark_and_name() -> None:
    wanted = Redirection(mode=Mode.HOST, port=2081, mark=0x99, name="transocks_exec_7")
    text = render_nft(wanted)
    assert "define transocks_port = 2081" in text
    assert "define transocks_mark = 0x99" in text
    assert "inet transocks\n" not in text
    four = render_iptables(wanted, version=4)
    assert "-A TRANSOCKS-EXEC-7 -p tcp -j REDIRECT --to-ports 2081\n" in four
    assert four.count("--mark 0x99 ") == 2
    assert not re.search(r"TRANSOCKS(?!-EXEC-7)", four)


def test_selection_is_alternatives_of_one_kind_and_limits_of_the_others() -> None:
    wanted = Redirection(
        mode=Mode.HOST,
        port=1081,
        selection=Selection(
            users=(7, 8), groups=(9,), to=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")), ports=((443, 443), (80, 82))
        ),
    )  # fmt: skip
    text = lines(render_nft(wanted))
    assert [line for line in text if line.endswith("== syn jump redirect_tcp")] == [
        f"meta {who} {to} tcp dport {{ 80-82, 443 }} tcp flags & (fin | syn | rst | ack) == syn jump redirect_tcp"
        for who in ("skuid { 7, 8 }", "skgid { 9 }")
        for to in ("ip daddr { 192.0.2.0/24 }", "ip6 daddr { 2001:db8::/32 }")
    ]
    assert len([line for line in text if line.endswith("udp dport 443 jump reject_quic")]) == 4
    for version, to in ((4, "192.0.2.0/24"), (6, "2001:db8::/32")):
        found = [
            line
            for line in lines(render_iptables(wanted, version=version))
            if line.endswith("REDIRECT --to-ports 1081")
        ]
        assert found == [
            f"-A TRANSOCKS -p tcp -d {to} -m owner --{who} -m tcp --dport {ports} -j REDIRECT --to-ports 1081"
            for who in ("uid-owner 7", "uid-owner 8", "gid-owner 9")
            for ports in ("80:82", "443")
        ]


def test_a_family_that_is_not_asked_for_is_left_alone() -> None:
    wanted = Redirection(mode=Mode.GATEWAY, port=1081, selection=Selection(from_=(ip_network("10.0.0.0/8"),)))
    assert "ip6 saddr" not in render_nft(wanted)
    assert "REDIRECT" in render_iptables(wanted, version=4)
    assert "REDIRECT" not in render_iptables(wanted, version=6)
    assert "-j REJECT" not in render_iptables(wanted, version=6)
    crossed = Selection(from_=(ip_network("10.0.0.0/8"),), to=(ip_network("2001:db8::/32"),))
    assert "jump redirect_tcp\n" not in render_nft(Redirection(mode=Mode.GATEWAY, port=1081, selection=crossed))


def test_quic_is_refused_where_port_443_is_taken() -> None:
    for ports, refused in (((), True), (((80, 80),), False), (((400, 500),), True)):
        wanted = Redirection(mode=Mode.HOST, port=1081, selection=Selection(ports=ports))
        assert ("udp dport 443 jump reject_quic\n" in render_nft(wanted)) is refused
        assert ("-j REJECT" in render_iptables(wanted, version=4)) is refused
    wanted = Redirection(mode=Mode.HOST, port=1081, reject_quic=False)
    assert "udp dport 443 jump" not in render_nft(wanted)


def test_users_that_are_exempt() -> None:
    wanted = Redirection(mode=Mode.HOST, port=1081, exempt_users=(5, 6))
    assert "meta skuid { 5, 6 } accept" in lines(render_nft(wanted))
    found = [line for line in lines(render_iptables(wanted, version=6)) if "uid-owner" in line]
    assert found == [f"-A TRANSOCKS -m owner --uid-owner {user} -j RETURN" for user in (5, 6)]


def test_networks_to_leave_alone() -> None:
    networks = tuple(map(ip_network, ("10.1.0.0/16", "10.0.0.0/8", "192.0.2.1/32")))
    wanted = Redirection(mode=Mode.HOST, port=1081, exclude=networks)
    text = lines(render_nft(wanted))
    assert "elements = { 10.0.0.0/8, 192.0.2.1/32 }" in text
    assert [line for line in text if line.startswith("elements")] == [
        "elements = { tcp, udp }",
        "elements = { 10.0.0.0/8, 192.0.2.1/32 }",
    ]
    for network in ("10.0.0.0/8", "192.0.2.1/32"):
        assert f"-A TRANSOCKS -d {network} -j RETURN" in lines(render_iptables(wanted, version=4))
    assert "-d " not in render_iptables(wanted, version=6)
    assert excluded(wanted) == list(map(str, networks))
    assert {"10.0.0.0/8", "::/127", "ff00::/8"} <= set(excluded(HOST))


def test_in_force_for_a_time() -> None:
    assert "elements = { tcp timeout 60s, udp timeout 60s }" in lines(render_nft(HOST, seconds=60))
    for mode, position in ((Mode.HOST, 0), (Mode.GATEWAY, 0), (Mode.TPROXY, 2)):
        wanted = Redirection(mode=mode, port=1)
        found = lines(render_iptables(wanted, version=4, until="2030-01-01T00:00:00"))
        for chain, place in ((wanted.chain, position), (f"{wanted.chain}-UDP", 0)):
            rules = [line for line in found if line.startswith(f"-A {chain} ")]
            # Behind what belongs to connections that transocks has.
            assert rules[place] == f"-A {chain} -m time --datestart 2030-01-01T00:00:00 -j RETURN"


@pytest.mark.parametrize("mode", Mode)
def test_closed_refuses_what_is_forgotten(mode: Mode) -> None:
    selection = Selection(interfaces=("lan0",), users=(7,), ports=((443, 443),))
    networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    wanted = Redirection(
        mode=mode, port=1, mark=5, exempt_users=(9,), exclude=networks, closed=True, selection=selection
    )
    narrowed = "meta skuid { 7 } " if mode is Mode.HOST else 'iifname { "lan0" } '
    first = f"{narrowed}tcp dport {{ 443 }} tcp flags & (fin | syn | rst | ack) != syn ct "
    refusing = [f"{first}state != {{ established, related }} jump refuse_unknown"]
    refusing += [f"{first}label 116 jump refuse_unknown"] if mode is Mode.TPROXY else []
    for text in (render_nft(wanted), render_guard(wanted)):
        assert [line for line in lines(text) if line.endswith("jump refuse_unknown")] == refusing
        assert ("ct label set 116" in lines(text)) == (mode is Mode.TPROXY)
    opened = lines(render_nft(attrs.evolve(wanted, closed=False)))
    assert all(line.startswith("#") for line in opened if "jump refuse_unknown" in line or "ct label" in line)
    for version in (4, 6):
        text = render_iptables(wanted, version=version, until="2030-01-01T00:00:00")
        chain = f"{wanted.chain}-TCP"
        found = [line.removeprefix(f"-A {chain} ") for line in lines(text) if line.startswith(f"-A {chain} ")]
        label = " -m connlabel ! --label 116" if mode is Mode.TPROXY else ""
        own = "-m owner --uid-owner 7" if mode is Mode.HOST else "-i lan0"
        assert found == [
            "-m time --datestart 2030-01-01T00:00:00 -j RETURN",
            "-p tcp --syn -j RETURN",
            f"-m conntrack --ctstate RELATED,ESTABLISHED{label} -j RETURN",
            "-m mark --mark 0x5 -j RETURN",
            *(["-m owner --uid-owner 9 -j RETURN"] if mode is Mode.HOST else []),
            "-m addrtype --dst-type LOCAL -j RETURN",
            f"-d {networks[version == 6]} -j RETURN",
            "-p tcp -m multiport --dports 53,853 -j RETURN",
            f"-p tcp {own} -m tcp --dport 443 -j REJECT --reject-with tcp-reset",
        ]
        assert f"-j {chain}" in text.splitlines()[-2]
        assert chain not in render_iptables(attrs.evolve(wanted, closed=False), version=version)


def test_tproxy() -> None:
    addresses = (ip_address("192.0.2.9"), ip_address("2001:db8::9"))
    wanted = Redirection(mode=Mode.TPROXY, port=9, addresses=addresses, tproxy_mark=100, closed=True)
    text = render_nft(wanted)
    assert "tproxy ip to 192.0.2.9:$transocks_port" in text
    assert "tproxy ip6 to [2001:db8::9]:$transocks_port" in text
    assert "meta l4proto tcp reject with tcp reset" in lines(text)
    assert not re.search(r"0x7474|29812", text)
    assert "ip -6 rule add pref 7474 fwmark 0x64 lookup 100" in text
    assert "-j TPROXY --on-ip 2001:db8::9 --on-port 9 --tproxy-mark 0x64\n" in render_iptables(wanted, version=6)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("define transocks_port = 1081", "define transocks_port = 1080 + 1", HOST),
        ("== syn jump redirect_tcp", "== syn tcp dport 1-65535 jump redirect_tcp", HOST),
        ("--to-ports 1081", "--to-port 1081", HOST),
        ("-p tcp -j REDIRECT", "-p tcp -m tcp -j REDIRECT", HOST),
        ("elements = {\n\t\t\t0", "elements={\n\t\t\t0", Redirection(mode=Mode.HOST, port=1, exclude=())),
        ("#-A TRANSOCKS -m owner", "# -A TRANSOCKS -m owner", Redirection(mode=Mode.HOST, port=1, exempt_users=(1,))),
    ],
)
def test_insists(old: str, new: str, wanted: Redirection, monkeypatch: pytest.MonkeyPatch) -> None:
    template = rendering._template
    monkeypatch.setattr(rendering, "_template", lambda file: template(file).replace(old, new))
    with pytest.raises(AssertionError, match="the rule files have changed"):
        render_nft(wanted), render_iptables(wanted, version=4)


def test_merged_ports() -> None:
    assert merged([(80, 80), (81, 90), (85, 87), (100, 200), (95, 98)]) == [(80, 90), (95, 98), (100, 200)]

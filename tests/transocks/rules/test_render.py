"""Rendering: what is replaced in the files of iptables/, and that nothing is when they have changed.

tests/netns/test_firewall_selection.py loads renderings, and tries them with connections.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from typing import Any

import attrs
import pytest

from transocks.rules import render as rendering
from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection
from transocks.rules.render import excluded, merge_ranges, render_guard, render_iptables, render_nft

HOST = Redirection(mode=Mode.HOST, port=2081)
IN_4, IN_6 = ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")
NETWORKS = tuple(map(ip_network, ("10.1.0.0/16", "10.0.0.0/8", "192.0.2.1/32")))
SYN = "tcp flags & (fin | syn | rst | ack) == syn jump redirect_tcp"


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if not line.lstrip().startswith("# ")]


@pytest.mark.parametrize("mode", [Mode.HOST, Mode.TPROXY])
def test_udp(mode: Mode) -> None:
    plain = Redirection(mode=mode, port=1084, udp=True, ports=((53, 53),))
    assert render_nft(plain) == rendering._template(f"{plain.file}.nft")
    for version in (4, 6):
        file = rendering._template(f"{plain.file}.v{version}")
        assert render_iptables(plain, version=version) == re.sub(r"^(#.*)?\n", "", file, flags=re.MULTILINE)
    chain, target = ("TRANSOCKS-DGRAM", "MARK") if mode is Mode.HOST else ("TRANSOCKS-TPROXY-DGRAM", "TPROXY")
    wished = attrs.evolve(plain, ports=((53, 53), (1000, 2000)), to=(IN_4,), closed=True, mark=0x99)
    text = render_nft(wished)
    assert "elements = { 53, 1000-2000 }" in text
    assert "ip daddr { 192.0.2.0/24 } udp dport @ports jump" in text
    assert ("\t\tmeta l4proto udp reject with icmpx port-unreachable" in text) == (mode is Mode.TPROXY)
    found = re.findall(rf"^-A {chain} -p udp -d 192.0.2.0/24 -m udp --dport (\S+) -j {target}",
                       render_iptables(wished, version=4), re.MULTILINE)  # fmt: skip
    assert found == ["53", "1000:2000"]
    assert f"-j {target}" not in render_iptables(wished, version=6).replace("-IN -p udp -j TPROXY", "")
    guard = render_guard(wished)
    assert f"table inet {plain.table}_guard" in guard
    assert "tproxy ip to" not in guard
    assert "reject with icmpx port-unreachable" in guard


@pytest.mark.parametrize("mode", list(Mode))
def test_without_settings_the_file_is_rendered_unchanged(mode: Mode) -> None:
    redirection = Redirection(mode=mode, port=1084 if mode is Mode.TPROXY else 1081)
    assert render_nft(redirection) == rendering._template(f"{mode.value}.nft")
    for version in (4, 6):
        file = rendering._template(f"{mode.value}.v{version}")
        assert render_iptables(redirection, version=version) == re.sub(r"^(#.*)?\n", "", file, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("wishes", "pattern", "nft", "four", "six"),
    [
        ({"mark": 0x99}, r"define transocks_mark|--mark", ["define transocks_mark = 0x99"],
         ["-A TRANSOCKS -m mark --mark 0x99 -j RETURN", "-A TRANSOCKS-UDP -m mark --mark 0x99 -j RETURN"], None),
        ({"name": "transocks_exec_7"}, r"^table .*\{$|REDIRECT", ["table inet transocks_exec_7 {"],
         ["-A TRANSOCKS-EXEC-7 -p tcp -j REDIRECT --to-ports 2081"], None),
        ({"exempt_users": (5, 6)}, "skuid|uid-owner", ["meta skuid { 5, 6 } accept"],
         [f"-A TRANSOCKS -m owner --uid-owner {user} -j RETURN" for user in (5, 6)], None),
        ({"exclude": NETWORKS}, "^elements|TRANSOCKS-UDP -d",
         ["elements = { tcp, udp }", "elements = { 10.0.0.0/8, 192.0.2.1/32 }"],
         [f"-A TRANSOCKS-UDP -d {network} -j RETURN" for network in ("10.0.0.0/8", "192.0.2.1/32")], []),
        # Users and groups are alternatives; all else narrows that.
        ({"users": (7, 8), "groups": (9,), "to": (IN_4, IN_6), "ports": ((443, 443), (80, 82))},
         "(?<!#)== syn jump|REDIRECT",
         [f"meta {who} {to} tcp dport {{ 80-82, 443 }} {SYN}" for who in ("skuid { 7, 8 }", "skgid { 9 }")
          for to in ("ip daddr { 192.0.2.0/24 }", "ip6 daddr { 2001:db8::/32 }")],
         *[[f"-A TRANSOCKS -p tcp -d {to} -m owner --{who} -m tcp --dport {ports} -j REDIRECT --to-ports 2081"
            for who in ("uid-owner 7", "uid-owner 8", "gid-owner 9") for ports in ("80:82", "443")] for to in (IN_4, IN_6)]),
        # A family that is not asked for is left alone.
        ({"to": (IN_4,)}, "jump re|-j RE(JECT|DIRECT)",
         [f"ip daddr {{ 192.0.2.0/24 }} {SYN}", "ip daddr { 192.0.2.0/24 } udp dport 443 jump reject_quic"],
         ["-A TRANSOCKS -p tcp -d 192.0.2.0/24 -j REDIRECT --to-ports 2081",
          "-A TRANSOCKS-UDP -p udp -d 192.0.2.0/24 -j REJECT --reject-with icmp-port-unreachable"], []),
        ({"to": (IN_4,), "from_": (IN_6,)}, "jump re|-j RE(JECT|DIRECT)", [], [], []),
        # QUIC is refused where TCP port 443 is taken.
        ({"ports": ((80, 80),)}, "jump reject_quic|REJECT", [], [], []),
        ({"ports": ((400, 500),)}, "jump reject_quic", ["udp dport 443 jump reject_quic"], [], []),
        ({"reject_quic": False}, "jump reject_quic|REJECT", [], [], []),
    ],
)  # fmt: skip
def test_wishes(
    wishes: dict[str, object], pattern: str, nft: list[str], four: list[str], six: list[str] | None
) -> None:
    """Lines with this pattern, of nft and of iptables; six: None: as four."""
    redirection = attrs.evolve(HOST, **wishes)  # type: ignore[arg-type]
    found = [
        [line for line in lines(text) if re.search(pattern, line) and not line.startswith("#")]
        for text in (render_nft(redirection), *(render_iptables(redirection, version=version) for version in (4, 6)))
    ]
    assert found == [nft, four, four if six is None else six]


def test_networks_to_leave_alone() -> None:
    assert excluded(attrs.evolve(HOST, exclude=NETWORKS)) == list(map(str, NETWORKS))
    assert {"10.0.0.0/8", "::/127", "ff00::/8"} <= set(excluded(HOST))


def test_in_force_for_a_time() -> None:
    assert "elements = { tcp timeout 60s, udp timeout 60s }" in lines(render_nft(HOST, seconds=60))
    for mode, position in ((Mode.HOST, 0), (Mode.GATEWAY, 0), (Mode.TPROXY, 2)):
        redirection = Redirection(mode=mode, port=1)
        found = lines(render_iptables(redirection, version=4, until="2030-01-01T00:00:00"))
        for chain, place in ((redirection.chain, position), (f"{redirection.chain}-UDP", 0)):
            rules = [line for line in found if line.startswith(f"-A {chain} ")]
            # After the rules for connections that transocks has.
            assert rules[place] == f"-A {chain} -m time --datestart 2030-01-01T00:00:00 -j RETURN"


@pytest.mark.parametrize("mode", Mode)
def test_closed_refuses_what_is_forgotten(mode: Mode) -> None:
    own: dict[str, Any] = {"users": (7,), "exempt_users": (9,)} if mode is Mode.HOST else {"interfaces": ("lan0",)}
    networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    redirection = Redirection(mode=mode, port=1, mark=5, exclude=networks, closed=True, ports=((443, 443),), **own)
    narrowed = "meta skuid { 7 } " if mode is Mode.HOST else 'iifname { "lan0" } '
    first = f"{narrowed}tcp dport {{ 443 }} tcp flags & (fin | syn | rst | ack) != syn ct "
    refusing = [f"{first}state != {{ established, related }} jump refuse_unknown"]
    refusing += [f"{first}label 116 jump refuse_unknown"] if mode is Mode.TPROXY else []
    for text in (render_nft(redirection), render_guard(redirection)):
        assert [line for line in lines(text) if line.endswith("jump refuse_unknown")] == refusing
        assert ("ct label set 116" in lines(text)) == (mode is Mode.TPROXY)
    opened = lines(render_nft(attrs.evolve(redirection, closed=False)))
    assert all(line.startswith("#") for line in opened if "jump refuse_unknown" in line or "ct label" in line)
    for version in (4, 6):
        text = render_iptables(redirection, version=version, until="2030-01-01T00:00:00")
        chain = f"{redirection.chain}-TCP"
        found = [line.removeprefix(f"-A {chain} ") for line in lines(text) if line.startswith(f"-A {chain} ")]
        label = " -m connlabel ! --label 116" if mode is Mode.TPROXY else ""
        who = "-m owner --uid-owner 7" if mode is Mode.HOST else "-i lan0"
        assert found == [
            "-m time --datestart 2030-01-01T00:00:00 -j RETURN",
            "-p tcp --syn -j RETURN",
            f"-m conntrack --ctstate RELATED,ESTABLISHED{label} -j RETURN",
            "-m mark --mark 0x5 -j RETURN",
            *(["-m owner --uid-owner 9 -j RETURN"] if mode is Mode.HOST else []),
            "-m addrtype --dst-type LOCAL -j RETURN",
            f"-d {networks[version == 6]} -j RETURN",
            "-p tcp -m multiport --dports 53,853 -j RETURN",
            f"-p tcp {who} -m tcp --dport 443 -j REJECT --reject-with tcp-reset",
        ]
        assert f"-j {chain}" in text.splitlines()[-2]
        assert chain not in render_iptables(attrs.evolve(redirection, closed=False), version=version)


def test_tproxy() -> None:
    addresses = (ip_address("192.0.2.9"), ip_address("2001:db8::9"))
    redirection = Redirection(mode=Mode.TPROXY, port=9, addresses=addresses, tproxy_mark=100, closed=True)
    text = render_nft(redirection)
    assert "tproxy ip to 192.0.2.9:$transocks_port" in text
    assert "tproxy ip6 to [2001:db8::9]:$transocks_port" in text
    assert "meta l4proto tcp reject with tcp reset" in lines(text)
    assert not re.search(r"0x7474|29812", text)
    assert "ip -6 rule add pref 7474 fwmark 0x64 lookup 100" in text
    assert "--on-ip 2001:db8::9 --on-port 9 --tproxy-mark 0x64\n" in render_iptables(redirection, version=6)


@pytest.mark.parametrize(
    ("old", "new", "wishes"),
    [
        ("define transocks_port = 1081", "define transocks_port = 1080 + 1", {}),
        ("== syn jump redirect_tcp", "== syn tcp dport 1-65535 jump redirect_tcp", {}),
        ("--to-ports 1081", "--to-port 1081", {}),
        ("-p tcp -j REDIRECT", "-p tcp -m tcp -j REDIRECT", {}),
        ("elements = {\n\t\t\t0", "elements={\n\t\t\t0", {"exclude": ()}),
        ("#-A TRANSOCKS -m owner", "# -A TRANSOCKS -m owner", {"exempt_users": (1,)}),
    ],
)
def test_insists(old: str, new: str, wishes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    redirection, template = attrs.evolve(HOST, **wishes), rendering._template  # type: ignore[arg-type]
    monkeypatch.setattr(rendering, "_template", lambda file: template(file).replace(old, new))
    with pytest.raises(AssertionError, match="the rule files have changed"):
        render_nft(redirection), render_iptables(redirection, version=4)


def test_merged_ports() -> None:
    assert merge_ranges([(80, 80), (81, 90), (85, 87), (100, 200), (95, 98)]) == [(80, 90), (95, 98), (100, 200)]

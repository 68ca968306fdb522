"""Rules as the tools print them, and what a packet meets in them; what is not understood stays in doubt."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transocks.netfilter.iptables import read_iptables
from transocks.netfilter.nft import iptables_tables, read_nft
from transocks.netfilter.ruleset import UNKNOWN, Kind, Match, Packet, Range, Ruleset, merged
from transocks.netfilter.walk import Way, walk

PACKET = Packet(
    version=4, destination=ip_address("203.0.113.1"), dport=443, oif="eth0", uid=1000, gid=100, source_type="local"
)
PACKET6 = Packet(version=6, destination=ip_address("2001:db8::1"), dport=443, oif="eth0", uid=1000, gid=100)


def nat(*rules: str, chains: str = "") -> Ruleset:
    """The OUTPUT chain of iptables's nat table."""
    lines = "\n".join(f"-A {'' if rule.startswith('X ') else 'OUTPUT '}{rule}" for rule in rules)
    return read_iptables(f"*nat\n:OUTPUT ACCEPT [0:0]\n{chains}{lines}\nCOMMIT\n", 4)


def out(ruleset: Ruleset, packet: Packet = PACKET) -> Way:
    return walk(ruleset, "output", packet)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("-p tcp", True),
        ("-p udp", False),
        ("! -p udp", True),
        ("-d 203.0.113.0/24", True),
        ("! -d 203.0.113.1/32", False),
        ("-d 10.0.0.0/8", False),
        ("-o eth0", True),
        ("-o eth+", True),
        ("-o lo", False),
        ("-i eth0", False),
        ("-p tcp -m tcp --dport 400:500", True),
        ("-p tcp -m multiport --dports 22,80:90", False),
        ("-p tcp -m tcp ! --dport 22", True),
        ("-m mark --mark 0x0/0xff", True),
        ("-m mark ! --mark 0x7473", True),
        ("-m owner --uid-owner 1000", True),
        ("-m owner --uid-owner 0-999", False),
        ("-m owner ! --gid-owner 100", False),
        ("-m owner --uid-owner root", False),
        ("-m owner --uid-owner no.such.user", None),
        ("-m addrtype --dst-type LOCAL", False),
        ("-m addrtype ! --dst-type LOCAL,BROADCAST", True),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", False),
        ("-m state --state NEW", True),
        ("-m conntrack --ctstate DNAT", False),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", True),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", False),
        ("-p tcp -m tcp --tcp-flags ALL NONE", False),
        ("-p tcp -m tcp --tcp-flags SYN,NS SYN", None),
        ("-m socket --transparent", False),
        ('-m comment --comment "-j DROP"', True),
        (r'-m comment --comment "say \"-j DROP\" -d 10.0.0.0/8"', True),
        ("-m set --match-set white dst", None),
        ("-m cgroup --path user.slice", None),
        ("-m connmark --mark 0x1", None),
        ("-m limit --limit 3/min", None),
    ],
)
def test_conditions_of_iptables(condition: str, holds: bool | None) -> None:
    step = out(nat(f"{condition} -j REDIRECT --to-ports 1081")).may(Kind.REDIRECT)
    assert (None if step is None else step.certain) == {True: True, False: None, None: False}[holds]


@pytest.mark.parametrize(
    ("target", "action"),
    [
        ("REDIRECT --to-ports 1081", (Kind.REDIRECT, None, 1081)),
        ("REDIRECT", (Kind.REDIRECT, None, None)),
        ("DNAT --to-destination 127.0.0.1:1081", (Kind.DNAT, "127.0.0.1", 1081)),
        ("DNAT --to-destination 127.0.0.1", (Kind.DNAT, "127.0.0.1", None)),
        ("DNAT --to-destination :1081", (Kind.DNAT, None, 1081)),
        ("DNAT --to-destination [2001:db8::1]:1081", (Kind.DNAT, "2001:db8::1", 1081)),
        ("DNAT --to-destination 2001:db8::1", (Kind.DNAT, "2001:db8::1", None)),
        ("DNAT --to-destination 10.0.0.1-10.0.0.9:80", (Kind.DNAT, None, 80)),
        ("REJECT --reject-with tcp-reset", (Kind.REJECT, None, None)),
        ("NFQUEUE --queue-num 1", (Kind.QUEUE, None, None)),
    ],
)
def test_targets_of_iptables(target: str, action: tuple[Kind, str | None, int | None]) -> None:
    (found,) = nat(f"-p tcp -j {target}").chains[0].rules[0].actions
    assert (found.kind, None if found.address is None else str(found.address), found.port) == action


def test_tproxy_of_iptables_marks_and_ends_the_chain() -> None:
    text = "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j TPROXY --on-port 1084 --on-ip 127.0.0.1"
    ruleset = read_iptables(f"{text} --tproxy-mark 0x10/0xf0\n-A PREROUTING -j DROP\nCOMMIT\n", 4)
    way = walk(ruleset, "prerouting", PACKET)
    assert (way.packet.mark, [step.kind for step in way.steps]) == (0x10, [Kind.TPROXY])


def test_what_may_have_returned_is_in_doubt() -> None:
    way = out(nat("-m set --match-set white dst -j RETURN", "-p tcp -j REDIRECT --to-ports 1081"))
    assert (way.turned, way.certain) == (None, False)
    assert way.may(Kind.REDIRECT) is not None


def test_what_may_have_returned_is_back_in_the_calling_chain() -> None:
    """Whether it was by the end of the chain or before."""
    rules = (
        "-j X",
        "-p tcp -j REDIRECT --to-ports 1081",
        "X -m limit --limit 1/s -j RETURN",
        "X -d 10.0.0.0/8 -j DROP",
    )
    way = out(nat(*rules, chains=":X - [0:0]\n"))
    assert way.turned is not None


def test_what_may_have_been_accepted_below_is_in_doubt_above() -> None:
    rules = ("-j X", "-p tcp -j REDIRECT --to-ports 1081", "X -m limit --limit 1/s -j ACCEPT")
    assert out(nat(*rules, chains=":X - [0:0]\n")).turned is None


def test_a_doubtful_accept_ends_with_its_chain() -> None:
    """An accept lets the packet on to the next hooked chain: there it is in any case."""
    first = read_iptables("*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m limit --limit 1/s -j ACCEPT\nCOMMIT\n", 4)
    assert out(merged([first, nat("-p tcp -j REDIRECT --to-ports 1081")])).turned is not None


def test_a_doubtful_drop_does_not() -> None:
    first = read_iptables("*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m limit --limit 1/s -j DROP\nCOMMIT\n", 4)
    way = out(merged([first, nat("-p tcp -j REDIRECT --to-ports 1081")]))
    assert (way.turned, way.blocked) == (None, None)


def test_an_unknown_target_may_be_the_end() -> None:
    way = out(nat("-p tcp -j SOMETHING --new", "-p tcp -j REDIRECT --to-ports 1081"))
    assert (way.turned, way.blocked, way.certain) == (None, None, False)


def test_a_mark_that_may_be_set_is_unknown() -> None:
    mangle = "*mangle\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m limit --limit 1/s -j MARK --set-mark 7\nCOMMIT\n"
    way = out(merged([read_iptables(mangle, 4), nat("-m mark --mark 7 -j REDIRECT --to-ports 1081")]))
    assert (way.packet.mark, way.turned) == (UNKNOWN, None)


def nft(*expressions: Any, family: str = "inet", chain: dict[str, Any] | None = None, more: Any = ()) -> Ruleset:
    """One hooked chain with these rules, each a list of statements."""
    table = {"family": family, "table": "t"}
    base = {"name": "c", "type": "nat", "hook": "output", "prio": -100, "policy": "accept"} if chain is None else chain
    rules = [{"rule": {**table, "chain": "c", "expr": expression}} for expression in expressions]
    return read_nft(json.dumps({"nftables": [{"metainfo": {}}, {"chain": {**table, **base}}, *more, *rules]}))


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


REDIRECT = {"redirect": {"port": 1081}}
FLAGS = {"payload": {"protocol": "tcp", "field": "flags"}}
PORT, DADDR = {"payload": {"protocol": "tcp", "field": "dport"}}, {"payload": {"protocol": "ip", "field": "daddr"}}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (match({"meta": {"key": "mark"}}, 0), True),
        (match({"&": [{"meta": {"key": "mark"}}, 255]}, 16), False),
        (match({"meta": {"key": "skuid"}}, {"range": [1, 1000]}), True),
        (match({"meta": {"key": "skuid"}}, "root"), False),
        (match({"meta": {"key": "skuid"}}, "no.such.user"), None),
        (match({"meta": {"key": "l4proto"}}, {"set": ["udp", 6]}), True),
        (match({"meta": {"key": "nfproto"}}, "ipv6"), False),
        (match({"meta": {"key": "oifname"}}, "eth*"), True),
        (match({"meta": {"key": "iifname"}}, "eth0", "!="), True),
        (match({"meta": {"key": "cgroup"}}, 1), None),
        (match({"socket": {"key": "cgroupv2", "level": 1}}, "user.slice"), None),
        (match({"socket": {"key": "transparent"}}, 1), False),
        (match(DADDR, {"prefix": {"addr": "203.0.113.0", "len": 24}}), True),
        (match(DADDR, {"set": [{"range": ["203.0.113.0", "203.0.113.9"]}]}, "!="), False),
        (match({"payload": {"protocol": "ip6", "field": "daddr"}}, "::1", "!="), False),
        (match(PORT, 443), True),
        (match(PORT, 1024, "<"), True),
        (match({"payload": {"protocol": "udp", "field": "dport"}}, 443), False),
        (match({"payload": {"protocol": "th", "field": "dport"}}, {"set": [80, {"range": [440, 450]}]}), True),
        (match({"fib": {"result": "type", "flags": ["daddr"]}}, "local", "!="), True),
        (match({"fib": {"result": "oif", "flags": ["daddr"]}}, "eth0"), None),
        (match({"ct": {"key": "state"}}, ["established", "related"], "in"), False),
        (match({"ct": {"key": "mark"}}, 1), None),
        (match({"&": [FLAGS, ["syn", "ack"]]}, "syn"), True),
        (match(FLAGS, {"set": ["fin", "rst"]}, "in"), False),
        (match(FLAGS, ["syn", "ack"], "in"), True),
        (match(FLAGS, {"set": ["syn", {"|": ["syn", "ack"]}]}), True),
        (match({"&": [FLAGS, {"|": [{"|": ["fin", "syn"]}, "ack"]}]}, "syn", "!="), False),
        (match({"&": [FLAGS, ["syn", "cwr"]]}, "syn"), True),
        (match({"&": [FLAGS, ["syn", "more"]]}, "syn"), None),
        (match({"payload": {"protocol": "icmp", "field": "type"}}, "echo-request"), False),
        (match(DADDR, "@some"), True),
        (match(DADDR, "@none"), None),
        ({"limit": {"rate": 1, "per": "second"}}, None),
        ({"counter": {"packets": 0, "bytes": 0}}, True),
    ],
)
def test_conditions_of_nft(condition: Any, holds: bool | None) -> None:
    elements = [{"elem": {"val": {"prefix": {"addr": "203.0.113.0", "len": 28}}, "timeout": 60, "expires": 5}}]
    some = {"set": {"family": "inet", "table": "t", "name": "some", "type": "ipv4_addr", "elem": elements}}
    step = out(nft([condition, REDIRECT], more=[some])).may(Kind.REDIRECT)
    assert (None if step is None else step.certain) == {True: True, False: None, None: False}[holds]


def test_a_rule_for_one_family_is_none_for_the_other() -> None:
    ruleset = nft([match(DADDR, "10.0.0.1", "!="), REDIRECT])
    assert out(ruleset).turned is not None
    assert out(ruleset, PACKET6).turned is None


def test_a_named_verdict_map() -> None:
    pairs = [[{"concat": ["203.0.113.1", 443]}, {"drop": None}], [{"concat": ["203.0.113.2", 443]}, {"accept": None}]]
    named = {"map": {"family": "inet", "table": "t", "name": "m", "elem": pairs}}
    ruleset = nft([{"vmap": {"key": {"concat": [DADDR, PORT]}, "data": "@m"}}], [REDIRECT], more=[named])
    assert out(ruleset).blocked is not None


def test_tables_of_iptables_are_left_to_it() -> None:
    text = json.dumps({"nftables": [{"table": {"family": "ip", "name": "nat"}}, {"table": {"family": "inet", "name": "nat"}}]})  # fmt: skip
    assert iptables_tables(text) == {("ip", "nat")}


def test_a_match_on_what_a_packet_does_not_have() -> None:
    """What is routed through has no owner: neither `skuid 0` nor `skuid != 0` holds for it."""
    nobody = Packet(version=4, destination=ip_address("203.0.113.1"), dport=80, uid=None)
    assert [Match("uid", (Range(0, 0),), negate).holds(nobody) for negate in (False, True)] == [False, False]


words = st.sampled_from(["-A OUTPUT", "-p tcp", "!", "-m", "mark", "--mark", "0x1/0xff", "-d", "10.0.0.0/8", "--dport",
    "1:2", "-j", "-g", "X", "RETURN", "REDIRECT", "--to-ports", "1081", "DNAT", "--to-destination", "a:b", "-i", "+",
    "--uid-owner", "--tcp-flags", "SYN", "TPROXY", "--on-port", "é"])  # fmt: skip


@given(st.lists(st.lists(words, max_size=12), max_size=6))
def test_nonsense_is_refused_as_such_or_read(lines: list[list[str]]) -> None:
    """Never anything but what the caller of the readers expects."""
    body = "\n".join(" ".join(["-A OUTPUT", *line]) for line in lines)
    try:
        ruleset = read_iptables(f"*nat\n:OUTPUT ACCEPT [0:0]\n:X - [0:0]\n{body}\nCOMMIT\n", 4)
    except (ValueError, LookupError):
        return
    out(ruleset)

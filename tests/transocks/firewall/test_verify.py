"""What verify says of differences, and of who takes connections before our rules do."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any

import pytest

from transocks.firewall.config import Mode, Tool
from transocks.firewall.foreign import Taken, taken
from transocks.firewall.saved import changes, parse_save, select
from transocks.firewall.verify import Force, compare, force_nft, from_nft, from_saved, guards
from transocks.firewall.wanted import Selection, Wanted
from transocks.netfilter.iptables import read_iptables
from transocks.netfilter.nft import read_nft
from transocks.netfilter.ruleset import Ruleset

OWN = ("TRANSOCKS", "TRANSOCKS-UDP")
SAVED = """\
*nat
:OUTPUT ACCEPT [0:0]
:TRANSOCKS - [1:60]
-A OUTPUT -p tcp -j TRANSOCKS
-A TRANSOCKS -d 10.0.0.0/8 -j RETURN
-A TRANSOCKS -d 127.0.0.0/8 -j RETURN
-A TRANSOCKS -p tcp -j REDIRECT --to-ports 1081
COMMIT
"""


def said(live: str) -> list[str]:
    wanted = from_saved(parse_save(SAVED)[0], OWN, "IPv4")
    assert wanted is not None
    return list(compare(wanted, from_saved(parse_save(live)[0], OWN, "IPv4")))


WHERE = "IPv4 table nat, chain"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[1:60]", "[7:420]", []),
        ("-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n", "", [f'missing: {WHERE} TRANSOCKS: "-d 10.0.0.0/8 -j RETURN"']),
        ("--to-ports 1081", "--to-ports 1080",
         [f'changed: {WHERE} TRANSOCKS: "-p tcp -j REDIRECT --to-ports 1080", should be "-p tcp -j REDIRECT --to-ports 1081"']),
        ("-A OUTPUT -p tcp -j TRANSOCKS\n", "", [f"missing: {WHERE} OUTPUT"]),
        ("-A OUTPUT -p tcp -j TRANSOCKS\n", "-A OUTPUT -p tcp -j TRANSOCKS\n" * 2,
         [f'not ours: {WHERE} OUTPUT: "-p tcp -j TRANSOCKS" is there once more']),
        ("-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n-A TRANSOCKS -d 127.0.0.0/8 -j RETURN\n",
         "-A TRANSOCKS -d 127.0.0.0/8 -j RETURN\n-A TRANSOCKS -d 10.0.0.0/8 -j RETURN\n",
         [f'reordered: {WHERE} TRANSOCKS: "-d 127.0.0.0/8 -j RETURN" stands where "-d 10.0.0.0/8 -j RETURN" should']),
        (":TRANSOCKS - [1:60]", ":OTHERS - [0:0]", ["missing: IPv4 table nat: nothing of it is loaded"]),
        # What others do is not compared here.
        ("-A OUTPUT", "-A OUTPUT -p tcp -j ACCEPT\n-A OUTPUT", []),
    ],
)  # fmt: skip
def test_differences(old: str, new: str, expected: list[str]) -> None:
    assert old in SAVED
    assert said(SAVED.replace(old, new)) == expected


def nft(*rules: list[Any], elements: list[Any] | None = None, active: list[Any] | None = None) -> list[dict[str, Any]]:
    place = {"family": "inet", "table": "transocks"}
    return [
        {"metainfo": {"version": "1"}},
        {"table": {"family": "inet", "name": "transocks", "handle": 1}},
        {"set": {**place, "name": "direct4", "elem": elements or []}},
        {"set": {**place, "name": "active", "elem": ["tcp", "udp"] if active is None else active}},
        {"chain": {**place, "name": "c", "type": "nat", "hook": "output", "prio": -90, "policy": "accept"}},
        *({"rule": {**place, "chain": "c", "handle": number, "expr": rule}} for number, rule in enumerate(rules)),
    ]


ACCEPT, DROP, COUNT = {"accept": None}, {"drop": None}, {"counter": {"packets": 5, "bytes": 6}}


def test_differences_in_nft() -> None:
    prefix = {"prefix": {"addr": "10.0.0.0", "len": 8}}
    wanted = from_nft(nft([ACCEPT], elements=[prefix, "192.0.2.1"]), "", "transocks")
    assert wanted is not None
    assert not list(compare(wanted, from_nft(nft([COUNT, ACCEPT], elements=["192.0.2.1", prefix]), "", "transocks")))
    listing = "table inet transocks { # handle 1\n\tchain c { # handle 2\n\t\tdrop # handle 0\n\t}\n}\n"
    live = nft([DROP], elements=[prefix], active=[])
    assert list(compare(wanted, from_nft(live, listing, "transocks"))) == [
        'changed: table inet transocks, chain c: "drop", should be "[{"accept": null}]"',
        "missing: table inet transocks, set direct4: 192.0.2.1",
    ]
    live[4]["chain"]["prio"] = 0
    (moved,) = [line for line in compare(wanted, from_nft(live, listing, "transocks")) if "priority" in line]
    assert "is type nat, hook output, priority 0, policy accept, should be type nat, hook output, priority -90" in moved


def test_whether_rules_are_in_force() -> None:
    timed = {"elem": {"val": "tcp", "timeout": 60, "expires": 41}}
    assert force_nft(nft(), "transocks") == Force()
    assert force_nft(nft(active=[timed]), "transocks") == Force(seconds=41)
    assert force_nft(nft(active=[]), "transocks") == Force(over=True)
    guard = "TRANSOCKS -m time --datestart 2026-01-01T00:00:00 --datestop 2038-01-19T03:14:07 -j RETURN"
    live = SAVED.replace("-A TRANSOCKS -d 10", f"-A {guard}\n-A TRANSOCKS -d 10")
    assert guards(parse_save(live)) == [("nat", guard, "2026-01-01T00:00:00")]
    assert said(live) == []


# Rules of others.

EXCLUDED = tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "fc00::/7")))


def taken_by(
    others: Ruleset, mode: Mode = Mode.HOST, *, nft: bool = False, ports: tuple[tuple[int, int], ...] = ()
) -> list[Taken]:
    wanted = Wanted(mode=mode, port=1, exclude=EXCLUDED, selection=Selection(ports=ports))
    return list(taken(wanted, Tool.NFT if nft else Tool.IPTABLES, others))


def table(*rules: str, name: str = "nat", jump: str = "-A OUTPUT -p tcp -j TRANSOCKS") -> Ruleset:
    own = [f":TRANSOCKS{kind} -" for kind in ("", "-TPROXY", "-EXEC-1")]
    chains = [":OUTPUT ACCEPT", ":PREROUTING ACCEPT", *own, ":OTHER -", ":DEEPER -"]
    return read_iptables("\n".join([f"*{name}", *chains, *rules, jump, "COMMIT"]), 4)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (["-A OUTPUT -p tcp -j ACCEPT"], "all"),
        (["-A OUTPUT -m owner --uid-owner 7 -j RETURN"], "all"),
        (["-A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 3128"], "all"),
        (["-A OUTPUT -j OTHER", "-A OTHER -p tcp -j DNAT --to-destination 10.0.0.1"], "all"),
        (["-A OUTPUT -j OTHER", "-A OTHER -j DEEPER", "-A DEEPER -p tcp -j ACCEPT"], "all"),
        (["-A OUTPUT -d 192.0.2.1/32 -p tcp -j DNAT --to-destination 10.0.0.1"], "some"),
        (["-A OUTPUT -m set --match-set blocked dst -j RETURN"], "some"),
        (['-A OUTPUT -m comment --comment "no -j LOG" -j ACCEPT'], "all"),
        (["-A OUTPUT -m connmark --mark 0x7473 -j ACCEPT"], "all"),
        (["-A OUTPUT -p tcp -j NETMAP --to 192.0.2.0/24"], "all"),
        (["-A OUTPUT -p tcp -g OTHER"], "all"),  # whatever becomes of it there, it does not come back
        # What these take is not ours.
        (["-A OUTPUT -d 10.1.0.0/16 -j ACCEPT"], None),
        (["-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j OTHER", "-A OTHER -p tcp -j DNAT --to :80"], None),
        (["-A OUTPUT -d 10.96.0.1/32 -j OTHER", "-A OTHER -j DEEPER", "-A DEEPER -p tcp -j DNAT --to :80"], None),
        (["-A OUTPUT -p udp -j ACCEPT"], None),
        (["-A OUTPUT ! -p tcp -j ACCEPT"], None),
        (["-A OUTPUT -p tcp -m tcp --dport 53 -j ACCEPT"], None),
        (["-A OUTPUT -m mark --mark 0x7473 -j ACCEPT"], None),
        # Nor do these take anything.
        (["-A OUTPUT -j OTHER", "-A OTHER -j RETURN"], None),
        (["-A OUTPUT -j LOG"], None),
        (["-A OUTPUT -j IDLETIMER --timeout 9 --label x"], None),
        (["-A OUTPUT -j TRANSOCKS-EXEC-1", "-A TRANSOCKS-EXEC-1 -p tcp -j REDIRECT --to-ports 9"], None),
        (["-A OUTPUT -m comment --comment x"], None),
        (["-A PREROUTING -p tcp -j ACCEPT"], None),
        (["-A OUTPUT -j OTHER", "-A OTHER -j DEEPER", "-A DEEPER -j OTHER"], None),  # the kernel takes no such loop
    ],
)  # fmt: skip
def test_who_takes_connections_before_ours(rules: list[str], found: str | None) -> None:
    assert [t.some for t in taken_by(table(*rules))] == ([] if found is None else [found == "some"])


def test_places_in_iptables() -> None:
    accept = "-A OUTPUT -p tcp -j ACCEPT"
    # Behind our jump; and beside nft's rules, for which only a mapping counts.
    assert not taken_by(table(jump=f"-A OUTPUT -p tcp -j TRANSOCKS\n{accept}"))
    assert not taken_by(table(accept, jump=""), nft=True)
    assert taken_by(table("-A OUTPUT -p tcp -j DNAT --to :1", jump=""), nft=True)
    (raw,) = taken_by(table("-A OUTPUT -p tcp -j CT --notrack", "-A OUTPUT -j CT --zone 1", name="raw"))
    assert "table raw, chain OUTPUT" in raw.text
    mangle = table("-A PREROUTING -p tcp -j TPROXY --on-port 1", name="mangle")
    assert taken_by(mangle, Mode.TPROXY, nft=True)
    assert not taken_by(mangle, Mode.GATEWAY, nft=True)
    # Of a connection by TPROXY every packet comes this way.
    others = table(
        "-A PREROUTING -m socket --transparent -j ACCEPT", name="mangle", jump="-A PREROUTING -j TRANSOCKS-TPROXY"
    )
    assert taken_by(others, Mode.TPROXY)
    assert taken_by(table("-A PREROUTING -p tcp -j DROP", name="raw", jump=""), Mode.TPROXY)
    assert not taken_by(table("-A OUTPUT -p tcp --dport 22 -j ACCEPT"), ports=((80, 80),))


def foreign(*rules: list[Any], prio: int = -100, kind: str = "nat", hook: str = "output", more: Any = ()) -> list[Any]:
    place = {"family": "ip", "table": "other"}
    return [
        {"chain": {**place, "name": "base", "type": kind, "hook": hook, "prio": prio}},
        {"chain": {**place, "name": "deeper"}},
        *({"rule": {**place, "chain": "base", "handle": at, "expr": rule}} for at, rule in enumerate(rules)),
        *({kind: {**place, **entry}} for kind, entry in more),
    ]


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


REDIRECT = {"redirect": {"port": 1}}
DADDR = {"payload": {"protocol": "ip", "field": "daddr"}}
LOCAL = match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
VMAP = {"vmap": {"key": {"concat": [DADDR, {"meta": {"key": "l4proto"}}]}, "data": "@services"}}
DEEPER = ("rule", {"chain": "deeper", "handle": 9, "expr": [REDIRECT]})


def service(address: str) -> list[Any]:
    verdict = [{"concat": [address, "tcp"]}, {"goto": {"target": "deeper"}}]
    return [("map", {"name": "services", "elem": [verdict]}), DEEPER]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (foreign([REDIRECT]), "all"),
        (foreign([ACCEPT]), None),  # ends only that chain
        (foreign([REDIRECT], prio=-80), None),
        (foreign([REDIRECT], hook="prerouting"), None),
        (foreign([LOCAL, REDIRECT]), None),
        (foreign([match(DADDR, {"prefix": {"addr": "10.0.0.0", "len": 8}}), REDIRECT]), None),
        (foreign([match(DADDR, {"prefix": {"addr": "10.0.0.0", "len": 8}}, "!="), REDIRECT]), "all"),
        (foreign([match(DADDR, {"set": ["10.0.0.1", "192.0.2.1"]}), REDIRECT]), "some"),
        (foreign([match(DADDR, "@nets"), REDIRECT], more=[("set", {"name": "nets", "elem": ["10.0.0.1"]})]), None),
        (foreign([match({"payload": {"protocol": "ip6", "field": "daddr"}}, "::a00:1"), REDIRECT]), "some"),
        (foreign([match({"meta": {"key": "l4proto"}}, "udp"), REDIRECT]), None),
        (foreign([match({"payload": {"protocol": "icmp", "field": "type"}}, "echo-request"), REDIRECT]), None),
        (foreign([match({"meta": {"key": "l4proto"}}, {"set": ["tcp", "udp"]}), REDIRECT]), "all"),
        (foreign([match({"payload": {"protocol": "tcp", "field": "dport"}}, 53), REDIRECT]), None),
        (foreign([match({"payload": {"protocol": "tcp", "field": "dport"}}, {"range": [50, 60]}), REDIRECT]), "all"),
        (foreign([match({"meta": {"key": "mark"}}, 0x7473), REDIRECT]), None),
        (foreign([{"jump": {"target": "deeper"}}], more=[DEEPER]), "all"),
        (foreign([VMAP], more=service("192.0.2.1")), "some"),
        (foreign([VMAP], more=service("10.0.0.1")), None),
        (foreign([{"notrack": None}], kind="filter", prio=-300), "all"),
        (foreign([DROP], kind="filter", prio=0), None),
    ],
)
def test_who_takes_connections_before_ours_in_nft(entries: list[Any], found: str | None) -> None:
    text = json.dumps({"nftables": entries})
    assert [t.some for t in taken_by(read_nft(text), nft=True)] == ([] if found is None else [found == "some"])
    ours = text.replace('"ip", "table": "other"', '"inet", "table": "transocks_gateway"')
    assert not taken_by(read_nft(ours), nft=True)


def test_changes_from_nothing_and_back() -> None:
    wanted = parse_save(SAVED.replace(":OUTPUT ACCEPT [0:0]\n", ""))
    there = changes(wanted, [])
    assert there.fill.splitlines()[1] == ":TRANSOCKS - [0:0]"
    assert "-A OUTPUT" not in there.fill
    assert there.hook == "*nat\n-A OUTPUT -p tcp -j TRANSOCKS\nCOMMIT\n"
    assert there.drop == ""
    live = select(parse_save(SAVED), OWN)
    assert changes(wanted, live).hook == ""
    assert changes([], live).drop.splitlines()[1:-1] == [
        "-D OUTPUT -p tcp -j TRANSOCKS",
        "-F TRANSOCKS",
        "-X TRANSOCKS",
    ]


def test_a_comment_is_no_jump() -> None:
    rule = '-A OUTPUT -p udp -m comment --comment "say \\"before -j TRANSOCKS \\"" -j ACCEPT\n'
    (table,) = select(parse_save(SAVED.replace("-A TRANSOCKS -d 10", f"{rule}-A TRANSOCKS -d 10")), OWN)
    assert table == select(parse_save(SAVED), OWN)[0]


def test_hooks_are_put_right() -> None:
    wanted = parse_save(SAVED)[:1]
    twice = SAVED.replace("-A OUTPUT -p tcp -j TRANSOCKS\n", "-A OUTPUT -p tcp -j TRANSOCKS\n" * 2)
    assert changes(wanted, select(parse_save(twice), OWN)).hook == "*nat\n-D OUTPUT -p tcp -j TRANSOCKS\nCOMMIT\n"
    other = SAVED.replace("-A OUTPUT -p tcp -j", "-A OUTPUT -o eth0 -p tcp -j")
    assert changes(wanted, select(parse_save(other), OWN)).hook.splitlines()[1:-1] == [
        "-D OUTPUT -o eth0 -p tcp -j TRANSOCKS",
        "-A OUTPUT -p tcp -j TRANSOCKS",
    ]
    # As iptables-save writes it.
    quic = "*filter\n:TRANSOCKS-UDP - [0:0]\n-I OUTPUT -p udp --dport 443 -j TRANSOCKS-UDP\nCOMMIT\n"
    live = quic.replace("-I OUTPUT -p udp", "-A OUTPUT -p udp -m udp")
    assert changes(parse_save(quic), parse_save(live)).hook == ""


def test_json_of_nft_is_read_as_it_comes() -> None:
    text = json.dumps({"nftables": nft([ACCEPT])})
    assert from_nft(json.loads(text)["nftables"], "", "transocks_gateway") is None

"""Warnings of usocksd: settings that are valid but do not work."""

from __future__ import annotations

import re
from contextlib import suppress
from copy import deepcopy
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import usocksd.lint
from usocksd.clients import Client
from usocksd.commands.serve import make_users
from usocksd.config import UsocksdConfig
from usocksd.errors import ConfigError, Fault
from usocksd.names.site_index import SiteIndex
from usocksd.settings.loader import parse, show, structure


def lint(config: UsocksdConfig, resolv_conf: Path = Path("/nonexistent")) -> list[Fault]:
    users = None
    with suppress(ConfigError):
        users = make_users(config)
    return usocksd.lint.lint(config, None if users is None else users.names, resolv_conf=resolv_conf)


def found(toml: str, resolv_conf: Path = Path("/nonexistent")) -> list[tuple[str, str]]:
    """Key and value of each warning."""
    return [(fault.path, fault.value) for fault in lint(parse(UsocksdConfig, toml, "usocksd.toml"), resolv_conf)]


def text(toml: str) -> str:
    return "\n".join(fault.at("usocksd.toml") for fault in lint(parse(UsocksdConfig, toml, "usocksd.toml")))


def test_nothing_is_wrong_with_the_defaults() -> None:
    assert lint(UsocksdConfig()) == []


def test_a_warning_is_one_line_with_place_key_value_and_what_to_do() -> None:
    said = text('[incoming]\naddresses = ["192.0.2.4"]\n[timeouts]\nidle = 200\n')
    assert said.splitlines() == [
        "usocksd.toml:2: incoming.addresses[0]: 192.0.2.4: not an address of this host, so it can't be listened on: add it to an"
        " interface, remove it here, or set net.ipv4.ip_nonlocal_bind=1",
        "usocksd.toml:3: timeouts.half_closed: 300: a silent connection lives longer once half of it has ended: expected at most"
        " timeouts.idle, which is 200",
    ]


# [incoming.proxy_protocol]


def test_trusting_everybody_to_be_a_proxy() -> None:
    table = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["192.0.2.0/24", "::/0", "192.0.2.1"]'
    key = "incoming.proxy_protocol.trusted"
    assert found(table) == [(f"{key}[1]", '"::/0"'), (f"{key}[2]", '"192.0.2.1/32"')]
    assert "lets everybody claim to be any client" in text(table)


def test_rules_for_clients_that_are_proxies() -> None:
    """Their own connections are admitted by `trusted`."""
    rule = '[[rule]]\naction = "deny"\nfrom = ["192.0.2.1"]\n[incoming]\nallow_from = ["10.0.0.0/8"]\n'
    assert [key for key, _ in found(rule)] == ["rule[0].from"]
    assert found(f'{rule}[incoming.proxy_protocol]\nport = 1090\ntrusted = ["192.0.2.1"]') == []


def test_egress() -> None:
    toml = """
        [outgoing]
        addresses = ["192.0.2.77", "127.0.0.1", "192.0.2.77"]
        iface = "nosuchif0"
        dnsbl_domain = "dnsbl.example.org"
        [egress.unused]
        addresses = ["192.0.2.78"]
        mark = 5
        [egress.none]
        [egress.nobody]
        iface = "nosuchif1"
        dnsbl_domains = ["dnsbl.example.net"]
        [[rule]]
        action = "allow"
        egress = "none"
        [[rule]]
        action = "allow"
        ports = [1]
        egress = "nobody"
        """
    assert [fault for fault in found(toml) if "mark" not in fault[0] and "rule" not in fault[0]] == [
        ("outgoing.addresses[0]", "192.0.2.77"),
        ("outgoing.addresses[2]", "192.0.2.77"),
        ("outgoing.addresses[2]", "192.0.2.77"),
        ("outgoing.iface", '"nosuchif0"'),
        ("egress.unused", ""),
        ("egress.unused.addresses[0]", "192.0.2.78"),
        ("egress.none", ""),
        ("egress.nobody.iface", '"nosuchif1"'),
        ("egress.nobody.dnsbl_domains", '["dnsbl.example.net"]'),
    ]
    assert found('[egress.default]\naddresses = ["192.0.2.77"]') == [("egress.default.addresses[0]", "192.0.2.77")]
    assert found('[outgoing]\niface = "lo"') == []


# Clients


@pytest.mark.parametrize(
    ("incoming", "open_proxy"),
    [
        ('allow_from = ["0.0.0.0/0"]', True),
        ('allow_from = ["::/0"]', True),
        ('allow_from = ["0.0.0.0/1", "192.0.2.1", "128.0.0.0/1"]', True),
        ('allow_from = ["0.0.0.0/1", "192.0.0.0/2"]', False),
        ('allow_from = ["0.0.0.0/0", "::/0"]\naddresses = ["127.0.0.1", "::1"]', False),
        ('allow_from = ["0.0.0.0/0"]\naddresses = ["::"]', False),
        ("", False),
    ],
)
def test_an_open_proxy(incoming: str, open_proxy: bool, tmp_path: Path) -> None:
    assert ("an open proxy" in text(f"[incoming]\n{incoming}")) == open_proxy
    users = tmp_path / "users"
    users.touch(0o600)
    assert "an open proxy" not in text(f'[incoming]\n{incoming}\n[auth]\nusers_file = "{users}"')
    optional = text(f'[incoming]\n{incoming}\n[auth]\nusers_file = "{users}"\nrequired = false')
    assert ("an open proxy" in optional) == open_proxy


def test_who_may_read_the_users(users: Path) -> None:
    toml = f'[auth]\nusers_file = "{users}"'
    assert found(toml) == []
    users.chmod(0o644)
    assert found(toml) == [("auth.users_file", f'"{users}"')]
    users.chmod(0o640)
    users.write_text("")
    assert found(toml) == [("auth.users_file", f'"{users}"')]  # it has none


# Lists


def sites(*entries: str, key: str = "deny_sites") -> list[str]:
    listed = ", ".join(f'"{entry}"' for entry in entries)
    faults = lint(parse(UsocksdConfig, f"[outgoing]\n{key} = [{listed}]", ""))
    return [fault.path.removeprefix(f"outgoing.{key}") + " " + fault.expected for fault in faults]


def beside(index: int, entry: str) -> str:
    return f'[{index}] has no effect beside "{entry}" of this list: remove it'


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([".b", "a.b"], [beside(1, ".b")]),
        (["A.b.", ".b", "a.b", ".x.b", "b"], [beside(0, ".b"), beside(2, "A.b."), beside(3, ".b")]),
        (["", "192.0.2.1", "192.0.2.0/24", ""], [beside(1, "192.0.2.0/24"), beside(3, "")]),
        (["::1", "10.1.0.0/16", "10.0.0.0/8", "10.1.0.0/16"], [beside(1, "10.0.0.0/8"), beside(3, "10.1.0.0/16")]),
        (["a", "x.a.b", ".a.b.c", "10.0.0.0/9", "10.128.0.0/9", "::/0"], []),
    ],
)
def test_entries_that_another_one_covers(entries: list[str], said: list[str]) -> None:
    assert sites(*entries) == sites(*entries, key="allow_sites") == said


# Rules

RULE_ENTRIES = [
    "", "a", ".a", "x.a", ".x.a", "10.0.0.0/8", "10.1.0.0/16", "10.1.0.1", "0.0.0.0/0", "127.0.0.1", "127.0.0.0/8", "::/0",
]  # fmt: skip
RULE = st.fixed_dictionaries(
    {"action": st.sampled_from(["allow", "deny"])},
    optional={
        "from": st.lists(
            st.sampled_from(["10.0.0.0/8", "10.9.0.0/16", "10.128.0.0/9", "10.0.0.0/9", "::/0"]), min_size=1
        ),
        "user": st.lists(st.sampled_from(["ci", "bob"]), min_size=1),
        "to": st.lists(st.sampled_from(RULE_ENTRIES), min_size=1, max_size=3),
        "ports": st.lists(st.sampled_from([25, "20-30", "0-24", "25-65535", 443]), min_size=1, max_size=3),
    },
)


LIST = st.lists(st.sampled_from(RULE_ENTRIES), max_size=4)


@settings(max_examples=60)
@given(st.lists(RULE, max_size=4), LIST, LIST)
def test_removing_what_check_says_changes_no_decision(
    rules: list[dict[str, Any]], allow: list[str], deny: list[str]
) -> None:
    toml = {"rule": rules, "outgoing": {"allow_sites": allow, "deny_sites": deny, "deny_ports": [25]}}
    before = decisions(toml)
    for fault in lint(structure(UsocksdConfig, toml, "")):
        path = re.fullmatch(r"(?:rule\[(\d+)\]|outgoing)(?:\.(\w+))?(?:\[(\d+)\])?", fault.path)
        if path is None or "remove it" not in fault.expected:
            continue
        shorter = deepcopy(toml)
        place: Any = shorter["rule"] if path[1] else shorter["outgoing"]
        for key in (int(path[1]) if path[1] else None, path[2], int(path[3]) if path[3] else None):
            if key is not None:
                inner, last = place, key
                place = place[key]
        del inner[last]
        assert decisions(shorter) == before, fault


def decisions(toml: dict[str, Any]) -> list[bool]:
    """On every request for one of some hosts, and on every address that an allowed name may resolve to."""
    rules = structure(UsocksdConfig, toml, "").access_rules(lambda _: False)
    addresses = ["10.1.0.1", "10.2.0.1", "192.0.2.1", "127.0.0.1", "2001:db8::1", "::1", "64:ff9b::a01:1"]
    clients, users = ["10.9.0.1", "10.200.0.1", "2001:db8::5"], [None, "ci"]
    found = []
    for text, user, port in product(clients, users, [24, 25]):
        client = Client.at(text, user=user)
        found += [rules.judge(client, None, ip_address(address), port).allowed for address in addresses]
        for name in ("a", "x.a", "y.x.a", "b"):
            found.append(rules.judge(client, name, None, port).allowed)
            if found[-1]:
                found += [rules.judge(client, name, ip_address(address), port).allowed for address in addresses]
    return found


def covered(*rules: str, more: str = "") -> list[str]:
    """The reported covering of rules, as "2 by 0" """
    toml = "".join(f"[[rule]]\n{rule}\n" for rule in rules) + more
    return [
        f"{fault.path.removeprefix('rule')} by {int(match[1]) - 1}"
        for fault in lint(parse(UsocksdConfig, toml, ""))
        if (match := re.match(r"never decides, since rule (\d+) .*matches everything that it matches", fault.expected))
    ]


ALLOW, DENY = 'action = "allow"\n', 'action = "deny"\n'


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([ALLOW, DENY], ["[1] by 0"]),
        ([DENY + "ports = [443]", DENY + 'to = ["127.0.0.1"]\nports = [443]'], ["[1] by 0"]),
        ([ALLOW, ALLOW + 'to = ["127.0.0.1"]'], []),  # lifts the protection
        ([ALLOW + 'to = ["127.0.0.0/8"]', ALLOW + 'to = ["127.0.0.1"]'], ["[1] by 0"]),
        ([ALLOW, DENY + 'to = ["0.0.0.0/0"]', ALLOW + 'to = ["127.0.0.1"]'], ["[1] by 0", "[2] by 1"]),
        ([ALLOW + 'to = [".a"]', DENY + 'to = ["x.a", ".y.a"]'], ["[1] by 0"]),
        ([ALLOW + 'to = [".a"]', DENY + 'to = ["x.a", "a"]'], []),
        ([DENY + 'to = ["10.0.0.0/9", "10.128.0.0/9"]', DENY + 'to = ["10.0.0.0/8"]'], ["[1] by 0"]),
        ([DENY + 'to = ["10.0.0.0/9"]', DENY + 'to = ["10.0.0.0/8"]'], []),
        ([DENY + 'from = ["10.0.0.0/8"]', DENY + 'from = ["10.1.0.0/16"]'], ["[1] by 0"]),
        ([DENY + 'from = ["10.0.0.0/8"]', DENY], []),
        ([DENY + 'user = ["ci"]', DENY + 'user = ["ci", "bob"]'], []),
        ([DENY + 'user = ["ci", "bob"]', DENY + 'user = ["ci"]'], ["[1] by 0"]),
        ([DENY + 'ports = ["1-20", "21-30"]', DENY + 'ports = ["15-25"]'], ["[1] by 0"]),
        ([DENY + 'ports = ["1-20"]', DENY + 'ports = ["15-25"]'], []),
        ([DENY + "ports = [1]", DENY + 'from = ["::/0"]', DENY + 'from = ["::1"]\nports = [2]'], ["[2] by 1"]),
    ],
)
def test_rules_that_one_above_covers(rules: list[str], said: list[str]) -> None:
    assert covered(*rules) == said


def test_networks_that_another_one_covers() -> None:
    toml = '[incoming]\nallow_from = ["10.1.0.0/16", "10.0.0.0/8", "::1", "10.0.0.0/8", "192.0.2.1", "::/64"]'
    assert [key for key, _ in found(toml)] == [f"incoming.allow_from[{at}]" for at in (0, 2, 3)]


def test_lists_that_a_rule_above_covers() -> None:
    lists = '[outgoing]\nallow_sites = ["a"]\ndeny_sites = ["b"]\ndeny_ports = [25]\n'
    assert covered(ALLOW + 'to = ["b"]', more=lists) == ["outgoing.deny_sites by 0"]
    assert covered(ALLOW + "ports = [25]", more=lists) == ["outgoing.deny_ports by 0"]


@pytest.mark.parametrize(
    ("above", "rule", "mend"),
    [
        (DENY + "ports = [1]", ALLOW + "ports = [1]", "remove it, or move it up"),
        (ALLOW, ALLOW, "remove it, or move it up"),
        (ALLOW + 'to = ["10.0.0.0/8"]', DENY + 'to = ["10.1.0.0/16"]', "move it up"),
    ],
)
def test_the_advice_for_a_rule_that_never_decides(above: str, rule: str, mend: str) -> None:
    faults = lint(parse(UsocksdConfig, f'[[rule]]\nname = "top"\n{above}\n[[rule]]\n{rule}\n', "f"))
    assert (
        faults[-1].expected
        == f'never decides, since rule 1 "top" (line 1) above matches everything that it matches: {mend}'
    )


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([DENY], "rule 1: denies every request: expected rules above that allow some"),
        ([DENY + 'to = ["a"]', DENY, ALLOW], "rule 2: denies every request: expected rules above that allow some"),
        (
            [ALLOW + 'to = ["a"]', 'name = "all the rest"\n' + DENY, *([ALLOW + "ports = [80]"] * 50)],
            'rule 2: "all the rest": denies everything, so 50 rules behind it never decide: move it down',
        ),
    ],
)
def test_a_rule_that_denies_everything_gets_one_warning(rules: list[str], said: str) -> None:
    toml = "".join(f"[[rule]]\n{rule}\n" for rule in rules)
    assert [str(fault) for fault in lint(parse(UsocksdConfig, toml, ""))] == [said]
    # Where it belongs nothing is said of it.
    assert found("".join(f"[[rule]]\n{rule}\n" for rule in (ALLOW + 'to = ["a"]', DENY))) == []


def test_lists_behind_a_rule_that_denies_everything() -> None:
    lists = '[outgoing]\nallow_sites = ["a"]\ndeny_ports = [25]\n'
    faults = [
        str(fault) for fault in lint(parse(UsocksdConfig, f'[[rule]]\n{ALLOW}to = ["b"]\n[[rule]]\n{DENY}{lists}', ""))
    ]
    never = "outgoing.allow_sites and outgoing.deny_ports behind it never decide"
    assert faults == [f"rule 2: denies everything, so {never}: move it down"]


def test_a_long_list_in_many_rules_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text("".join(f"host{n}.example\n" for n in range(1000)))
    looked_up = []
    covering = SiteIndex.covering
    monkeypatch.setattr(SiteIndex, "covering", lambda index, entry: looked_up.append(entry) or covering(index, entry))
    to = f'to = ["file:{tmp_path}/long.txt"]'
    assert covered(DENY + to, *(DENY + to + f"\nports = [{port}]" for port in range(1, 20))) == [
        f"[{at}] by 0" for at in range(1, 20)
    ]
    assert not looked_up
    # It ends when no rule is left.
    assert covered(DENY + 'to = ["host0.example"]', DENY + to) == []
    assert len(looked_up) <= 2


def test_a_network_to_leave_from_that_is_not_routed_here() -> None:
    toml = '[egress.default]\naddresses = ["192.0.2.16/28"]\n'
    assert "ip route add local 192.0.2.16/28 dev lo" in text(toml)


def test_name_servers_that_can_be_none(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver fe80::1\nnameserver ::1%nosuch0\nnameserver 0.0.0.0\nnameserver ::1%lo\nnameserver x\n")
    assert found("", conf) == [(str(conf), '"fe80::1"'), (str(conf), '"::1%nosuch0"')]
    assert "fe80::1%eth0" in lint(UsocksdConfig(), conf)[0].expected
    # With others in the configuration nobody asks these, and the system's own resolver is the system's.
    for toml in ('[dns]\nservers = ["127.0.0.1"]', '[dns]\nresolver = "system"'):
        assert found(toml, conf) == []
    assert "dns.servers" in text('[dns]\nservers = ["fe80::1%nosuch0"]')


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A file with bob."""
    path = tmp_path / "users"
    path.write_text("bob:$2y$05$" + "a" * 53 + "\n")
    path.chmod(0o600)
    return path


def test_denying_users_if_authentication_is_optional(users: Path) -> None:
    auth = f'[auth]\nusers_file = "{users}"\n'
    rule = '[[rule]]\naction = "{}"\nuser = ["bob"]\n'
    assert found(auth + rule.format("deny")) == []
    assert found(f"{auth}required = false\n{rule.format('allow')}") == []
    assert found(f"{auth}required = false\n{rule.format('deny')}") == [("rule[0].user", '["bob"]')]


def test_conditions_that_no_request_meets(tmp_path: Path, users: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n")
    rule = f"""
        [[rule]]
        action = "deny"
        from = ["203.0.113.0/24", "203.0.113.7"]
        user = ["bob", "alcie"]
        to = ["x.a", "file:{tmp_path}/empty.txt", ".a", "X.a"]
        """
    assert found(rule) == [
        ("rule[0].from[1]", '"203.0.113.7/32"'),
        ("rule[0].from", '["203.0.113.0/24", "203.0.113.7/32"]'),
        ("rule[0].user", '["bob", "alcie"]'),
        ("rule[0].to[0]", '"x.a"'),
        ("rule[0].to[3]", '"X.a"'),
        ("rule[0].to[1]", show(f"file:{tmp_path}/empty.txt")),
    ]
    with_users = found(f'{rule}[auth]\nusers_file = "{users}"\n[incoming]\nallow_from = ["203.0.113.0/28"]')
    assert [fault for fault in with_users if "to[" not in fault[0]] == [
        ("rule[0].from[1]", '"203.0.113.7/32"'),
        ("rule[0].user[1]", '"alcie"'),
    ]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("203.0.113.7/24", 'is all of 203.0.113.0/24: write "203.0.113.0/24", or "203.0.113.7" for the one address'),
        ("2001:db8::1/32", 'is all of 2001:db8::/32: write "2001:db8::/32", or "2001:db8::1" for the one address'),
        ("10.0.0", 'is the address 10.0.0.0: write "10.0.0.0", or "10.0.0.0/24" for a network'),
        ("10.1", 'is the address 10.0.0.1: write "10.0.0.1", or "10.1.0.0/16" for a network'),
        ("0x7f000001", 'is the address 127.0.0.1: write "127.0.0.1"'),
        ("::ffff:10.1.2.3/104", 'is all of 10.0.0.0/8: write "10.0.0.0/8", or "::ffff:10.1.2.3" for the one address'),
    ],
)
def test_entries_that_may_be_read_otherwise(entry: str, said: str) -> None:
    def warned(toml: str) -> list[str]:
        return [fault.expected for fault in lint(parse(UsocksdConfig, toml, "")) if fault.expected == said]

    assert warned(f'[outgoing]\ndeny_sites = ["x.example", "{entry}"]\n') == [said]
    assert warned(f'[outgoing]\nallow_sites = ["{entry}"]\n') == [said]
    assert warned(f'[[rule]]\naction = "deny"\nto = ["{entry}"]\n') == [said]
    if "/" in entry:
        assert warned(f'[[rule]]\naction = "deny"\nfrom = ["10.9.9.9", "{entry}"]\n') == [said]
        assert warned(f'[incoming]\nallow_from = ["{entry}"]\n') == [said]
        proxied = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["{entry}"]\n'
        assert warned(proxied.format(entry=entry)) == [said]


def test_entries_that_can_be_read_in_one_way_only() -> None:
    clear = ["10.0.0.0/8", "192.0.2.1", "2001:db8::1", "::ffff:172.16.0.0/108", "::ffff:192.0.2.9", "box", "x4", ".x4"]
    assert found(f"[outgoing]\ndeny_sites = {clear}\n") == []


def test_ports_that_are_listed_twice() -> None:
    ports = found("[outgoing]\ndeny_ports = [25, 22, 25, 25]")
    assert ports == [("outgoing.deny_ports[2]", "25"), ("outgoing.deny_ports[3]", "25")]


def test_long_lists_are_looked_at_in_no_time_and_not_recited() -> None:
    names = tuple(f"host{number}.d{number % 100}.example" for number in range(10_000))
    networks = tuple(f"10.{number >> 8 & 255}.{number & 255}.0/24" for number in range(4_000))
    config = UsocksdConfig()
    outgoing = attrs.evolve(config.outgoing, allow_sites=(*names, ".d7.example", *networks), deny_sites=names)
    said = lint(attrs.evolve(config, outgoing=outgoing))
    assert len(said) < 50
    assert "(89 others like it)" in said[10].expected

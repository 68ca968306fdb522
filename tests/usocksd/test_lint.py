"""What usocksd warns of: settings that are valid and won't do."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import usocksd.coverage
import usocksd.lint
from usocksd.acl import AccessRules, Decision
from usocksd.config import Config
from usocksd.errors import Fault
from usocksd.lint import lint, warnings
from usocksd.names.match import canonical_host
from usocksd.names.site_index import SiteIndex
from usocksd.names.sites import Entry, SiteList
from usocksd.net.address import socket_address
from usocksd.settings.loader import parse, show, structure
from usocksd.settings.warnings import Host, connections_of_descriptors, lint_common

CLIENT = "10.9.9.9"


@pytest.fixture(autouse=True, scope="module")
def no_search_domains() -> Iterator[None]:
    """Whatever the host that the tests run on has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usocksd.lint, "RESOLV_CONF", Path("/nonexistent"))
        patch.setattr(socket, "gethostname", lambda: "proxy1")
        yield


def found(toml: str) -> list[tuple[str, str]]:
    """Key and value of each warning."""
    return [(fault.path, fault.value) for fault in lint(parse(Config, toml, "usocksd.toml"))]


def text(toml: str) -> str:
    return "\n".join(warnings(parse(Config, toml, "usocksd.toml")))


def host(**changes: Any) -> Host:
    """A host that has all that a default configuration wants."""
    addresses = frozenset(map(ip_address, ("127.0.0.1", "::1", "192.0.2.1", "fe80::1")))
    roomy = Host(
        addresses=addresses,
        interfaces=("lo", "eth0"),
        ipv6=True,
        nonlocal_bind=(),
        descriptors=20_000,
        cpus=4,
        may_mark=True,
    )
    return attrs.evolve(roomy, **changes)


def on(this: Host, toml: str) -> list[Fault]:
    return list(lint_common(parse(Config, toml, "usocksd.toml").common(), this))


def test_nothing_is_wrong_with_the_defaults() -> None:
    assert warnings(Config()) == []
    assert on(host(ipv6=False, may_mark=False, cpus=1, descriptors=64), "") == []


def test_each_is_one_line_with_key_value_and_mend() -> None:
    said = text('[incoming]\naddresses = ["192.0.2.4"]\n[timeouts]\nidle = 200\n')
    assert said.splitlines() == [
        "usocksd.toml:2: incoming.addresses[0]: 192.0.2.4: not an address of this host, so it can't be listened on: add it to an"
        " interface, remove it here, or set net.ipv4.ip_nonlocal_bind=1",
        "usocksd.toml:3: timeouts.half_closed: 300: a silent connection lives longer once half of it has ended: expected at most"
        " timeouts.idle, which is 200",
    ]


# [incoming.proxy_protocol]


def test_proxies_that_are_everybody() -> None:
    table = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["192.0.2.0/24", "::/0", "192.0.2.1"]'
    key = "incoming.proxy_protocol.trusted"
    assert found(table) == [(f"{key}[1]", '"::/0"'), (f"{key}[2]", '"192.0.2.1/32"')]
    assert "lets everybody claim to be any client" in text(table)


def test_rules_for_proxies_that_are_no_clients() -> None:
    """Their own connections are admitted by `trusted`."""
    rule = '[[rule]]\naction = "deny"\nfrom = ["192.0.2.1"]\n[incoming]\nallow_from = ["10.0.0.0/8"]\n'
    assert [key for key, _ in found(rule)] == ["rule[0].from"]
    assert found(f'{rule}[incoming.proxy_protocol]\nport = 1090\ntrusted = ["192.0.2.1"]') == []


# Addresses


def test_this_host_is_looked_at() -> None:
    here = Host.here(frozenset())
    assert "lo" in here.interfaces
    assert here.cpus == len(os.sched_getaffinity(0))
    assert here.descriptors > 100
    assert found('[incoming]\naddresses = ["127.0.0.1", "127.9.9.9"]') == []


@pytest.mark.parametrize(
    ("address", "this", "said"),
    [
        ("192.0.2.1", host(), ""),
        ("127.3.4.5", host(), ""),
        ("0.0.0.0", host(), ""),
        ("::", host(), ""),
        ("192.0.2.2", host(), "not an address of this host"),
        ("192.0.2.2", host(nonlocal_bind=(4,)), ""),
        ("2001:db8::1", host(nonlocal_bind=(4,)), "set net.ipv6.ip_nonlocal_bind=1"),
        ("2001:db8::1", host(nonlocal_bind=(6,)), ""),
        ("fe80::1%eth0", host(), ""),
        ("fe80::1%eth1", host(), "no interface eth1"),
        ("fe80::2%eth0", host(), "not an address of this host"),
        ("::", host(ipv6=False), "has no IPv6"),
    ],
)
def test_listening_addresses(address: str, this: Host, said: str) -> None:
    faults = on(this, f'[incoming]\naddresses = ["{address}"]')
    assert [fault.path for fault in faults] == ["incoming.addresses[0]"] * bool(said)
    assert all(said in fault.expected for fault in faults)


def test_what_cannot_be_bound_is_what_the_kernel_refuses() -> None:
    """The warning against bind(2) itself, on this host."""
    for address in ("127.0.0.1", "127.8.8.8", "192.0.2.77", "fe80::77%lo", "2001:db8::77", "::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family) as sock:
                sock.bind(socket_address(address, 0))
            refused = False
        except OSError:
            refused = True
        assert bool(found(f'[incoming]\naddresses = ["{address}"]')) == refused, address


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


def test_clients_that_are_listed_twice() -> None:
    toml = '[incoming]\nallow_from = ["10.1.0.0/16", "10.0.0.0/8", "::1", "10.0.0.0/8", "192.0.2.1", "::1", "::/64"]'
    assert found(toml) == [
        ("incoming.allow_from[0]", '"10.1.0.0/16"'),
        ("incoming.allow_from[2]", '"::1/128"'),
        ("incoming.allow_from[3]", '"10.0.0.0/8"'),
        ("incoming.allow_from[5]", '"::1/128"'),
    ]


# Metrics, control socket, log file, users


@pytest.mark.parametrize(
    ("incoming", "key"),
    [
        ('metrics_address = "::1"\nmetrics_port = 0', "metrics_address"),
        ("metrics_port = 0", None),
        ('metrics_address = "0.0.0.0"', "metrics_address"),
        ('metrics_address = "192.0.2.77"', "metrics_address"),
        ('metrics_address = "127.0.0.2"', None),
        ("metrics_port = 1080", "metrics_port"),
        ('metrics_port = 1080\naddresses = ["127.0.0.1"]', "metrics_port"),
        ('metrics_port = 1080\naddresses = ["127.0.0.2"]', None),
        ('metrics_port = 1080\nmetrics_address = "::1"\naddresses = ["127.0.0.1"]', None),
    ],
)
def test_metrics(incoming: str, key: str | None) -> None:
    assert [path for path, _ in found(f"[incoming]\n{incoming}")] == ([] if key is None else [f"incoming.{key}"])


def test_a_private_address_for_the_metrics_is_what_it_is_for() -> None:
    here = host(addresses={ip_address("10.0.0.1"), ip_address("8.8.8.8")})
    assert on(here, '[incoming]\nmetrics_address = "10.0.0.1"') == []
    assert "the Internet" in on(here, '[incoming]\nmetrics_address = "8.8.8.8"')[0].expected


def test_control(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return text(f'control = "{path}"')

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
    assert text('control = ""') == ""


def test_the_log_file(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return text(f'[log]\nfilename = "{path}"')

    assert said(tmp_path / "new.log") == ""
    assert not (tmp_path / "new.log").exists()
    (tmp_path / "there.log").touch()
    assert said(tmp_path / "there.log") == ""
    assert "is a directory" in said(tmp_path)
    assert "create it" in said(tmp_path / "none" / "new.log")
    assert "log.filename" in said(tmp_path / ("x" * 300))


def test_who_may_read_the_users(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.touch()
    toml = f'[auth]\nusers_file = "{users}"'
    users.chmod(0o640)
    assert found(toml) == [("auth.users_file", f'"{users}"')]  # it has none
    users.write_text("bob:$2y$05$" + "a" * 53 + "\n")
    assert found(toml) == []
    users.chmod(0o644)
    assert found(toml) == [("auth.users_file", f'"{users}"')]


# Numbers


def test_marks() -> None:
    assert [fault.path for fault in on(host(may_mark=False), "[outgoing]\nmark = 9")] == ["outgoing.mark"]
    assert on(host(), "[outgoing]\nmark = 9") == []


def test_workers_and_limits() -> None:
    assert [fault.path for fault in on(host(), "workers = 5")] == ["workers"]
    assert on(host(), "workers = 4") == []
    most = connections_of_descriptors(Config(workers=2).common(), host())
    assert on(host(), f"workers = 2\n[limits]\nconnections = {most}") == []
    over = on(host(), f"workers = 2\n[limits]\nconnections = {most + 1}")
    assert [fault.path for fault in over] == ["limits.connections"]
    assert f"2 x 20000 file descriptors allow {most}" in over[0].expected
    assert on(host(), "[limits]\nconnections = 10\nper_client = 10") == []
    assert on(host(), "[limits]\nconnections = 0\nper_client = 10") == []
    assert [fault.path for fault in on(host(), "[limits]\nconnections = 10\nper_client = 11")] == ["limits.per_client"]


@pytest.mark.parametrize(
    ("timeouts", "keys"),
    [
        ("idle = 5\nhalf_closed = 5\nhandshake = 5", []),
        ("idle = 5", ["handshake", "half_closed"]),
        ("handshake = 8000", ["handshake"]),
        ("stop = 601", ["drain"]),
        ("stop = 0\ndrain = 0", []),
        ("drain = 0", ["drain"]),
    ],
)
def test_timeouts(timeouts: str, keys: list[str]) -> None:
    assert [path for path, _ in found(f"[timeouts]\n{timeouts}")] == [f"timeouts.{key}" for key in keys]


# Sites and ports


def sites(allow: list[str], deny: list[str]) -> list[str]:
    config = parse(Config, f"[outgoing]\nallow_sites = {listed(allow)}\ndeny_sites = {listed(deny)}", "")
    return [f"{fault.path.removeprefix('outgoing.')} {fault.expected}" for fault in lint(config)]


def listed(entries: list[str]) -> str:
    return "[" + ", ".join(f'"{entry}"' for entry in entries) + "]"


@pytest.mark.parametrize(
    ("allow", "deny", "said"),
    [
        ([".b", "a.b"], [], ['allow_sites[1] has no effect beside ".b" of this list: remove it']),
        ([], ["A.b.", ".b", "a.b", ".x.b", "b"], [
            'deny_sites[0] has no effect beside ".b" of this list: remove it',
            'deny_sites[2] the same as "A.b." of this list: remove it',
            'deny_sites[3] has no effect beside ".b" of this list: remove it',
        ]),
        ([], ["", "192.0.2.1", "192.0.2.0/24", ""], [
            'deny_sites[1] has no effect beside "192.0.2.0/24" of this list: remove it',
            "deny_sites[3] is in this list already: remove it",
        ]),
        (["a.b", ".c"], ["a.b"], ['allow_sites[0] never allowed, since deny_sites has "a.b": remove one of the two']),
        ([".a.b", ".c"], [".b"], ['allow_sites[0] never allowed, since deny_sites has ".b": remove one of the two']),
        ([".b"], ["x.a.b", ".a.b"], ['deny_sites[0] has no effect beside ".a.b" of this list: remove it']),
        (["a.b"], [".b", ".c", "a.c", "c"], [
            'allow_sites[0] never allowed, since deny_sites has ".b": remove it there',
            "deny_sites[1] denies nothing, since allow_sites has nothing of it: remove it",
            'deny_sites[2] has no effect beside ".c" of this list: remove it',
            "deny_sites[3] denies nothing, since allow_sites has nothing of it: remove it",
        ]),
        (["a.b"], ["10.0.0.0/8"], []),
        (["192.0.2.0/24"], ["10.0.0.0/8", "192.0.2.1", "a", ""], [
            "deny_sites[0] denies nothing, since allow_sites has nothing of it: remove it",
            "deny_sites[2] denies nothing, since allow_sites has nothing of it: remove it",
        ]),
        (["64:ff9b::/96"], ["10.0.0.0/8", "2001:db8::1"], [
            "deny_sites[1] denies nothing, since allow_sites has nothing of it: remove it"
        ]),
        (["a"], [""], ["deny_sites[0] denies nothing, since allow_sites has nothing of it: remove it"]),
        (["", "a"], [""], ['allow_sites[0] never allowed, since deny_sites has "": remove one of the two']),
    ],
)  # fmt: skip
def test_sites(allow: list[str], deny: list[str], said: list[str]) -> None:
    assert sorted(sites(allow, deny)) == sorted(said)


NAMES = [".".join(filter(None, labels)) for a in ("", "a", "b") for labels in (("x", a), ("y", a), ("x", "y", a))]
ADDRESSES = ["10.0.0.1", "10.1.0.1", "192.0.2.1", "64:ff9b::a00:1", "64:ff9b::c000:201", "2001:db8::1", "::a00:1"]
NUMERIC = [*ADDRESSES, "203.0.113.1", "2001:db8:1::1"]
ENTRIES = [
    "", *NAMES, *(f".{name}" for name in NAMES), ".a", ".b", "X.A.", *ADDRESSES,
    "10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "::/0", "::/96", "64:ff9b::/96", "2001:db8::/32",
]  # fmt: skip
LIST = st.lists(st.sampled_from(ENTRIES), max_size=5)


@given(LIST, LIST)
def test_an_entry_that_is_said_to_be_of_no_use_can_go_and_nothing_changes(allow: list[str], deny: list[str]) -> None:
    """Each warning against what the rules decide, for names, for addresses, and for what names resolve to."""
    before = decisions(allow, deny)
    for warning in sites(allow, deny):
        match = re.match(r"(allow|deny)_sites\[(\d+)\]", warning)
        assert match is not None
        shorter = {"allow": list(allow), "deny": list(deny)}
        del shorter[match[1]][int(match[2])]
        if "remove it there" not in warning:
            assert decisions(**shorter) == before, warning


@given(LIST, LIST)
def test_an_entry_without_which_nothing_would_change_is_told_if_it_is_a_name(allow: list[str], deny: list[str]) -> None:
    told = {warning.partition(" ")[0] for warning in sites(allow, deny)}
    for index, entry in enumerate(deny):
        others = deny[:index] + deny[index + 1 :]
        if entry not in NAMES or entry in [other.lower().removesuffix(".") for other in others]:
            continue  # of two that are the same, the second is told
        if decisions(allow, others) == decisions(allow, deny):
            assert f"deny_sites[{index}]" in told


def decisions(allow: list[str], deny: list[str]) -> list[bool]:
    rules = AccessRules.compile(allow_sites=allow, deny_sites=deny, is_local=lambda _: False)
    names = [*(f"w.{name}" for name in NAMES), *NAMES, "a", "b", "w.a"]
    return [each.allowed for each in all_decisions(rules, [CLIENT], [None], [*names, *NUMERIC], ADDRESSES, [80])]


def all_decisions(
    rules: AccessRules,
    clients: Sequence[str],
    users: Sequence[str | None],
    hosts: Sequence[str],
    addresses: Sequence[str],
    ports: Sequence[int],
) -> list[Decision]:
    """On every request for one of these hosts, and on every address that a name which is allowed may resolve to."""
    found = []
    for client, user, port, text in product(map(ip_address, clients), users, ports, hosts):
        host = canonical_host(text)
        of_host = rules.decide_name(client, user, host, port)
        found.append(of_host)
        if isinstance(host, str):
            found += [
                rules.decide_address(client, user, host, ip_address(address), port) if of_host.allowed else of_host
                for address in addresses
            ]
    return found


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


@settings(max_examples=200)
@given(st.lists(RULE, max_size=4), LIST, LIST)
def test_a_rule_that_is_said_to_decide_nothing_can_go_and_nothing_changes(
    rules: list[dict[str, Any]], allow: list[str], deny: list[str]
) -> None:
    toml = {"rule": rules, "outgoing": {"allow_sites": allow, "deny_sites": deny, "deny_ports": [25]}}
    before = of_all(toml)
    for fault in lint(structure(Config, toml, "")):
        match = re.fullmatch(r"rule\[(\d+)\]|outgoing\.(\w+)", fault.path)
        if match is None or " has all of it" not in fault.expected:
            continue
        if "never decides" in fault.expected:
            name = match[2] or f"rule {int(match[1]) + 1}"
            assert not any(rule == name or rule.startswith(f"{name} ") for rule in deciding(toml)), fault
        if "remove it" in fault.expected:
            shorter = {"rule": list(rules), "outgoing": dict(toml["outgoing"])}
            if match[1] is None:
                del shorter["outgoing"][match[2]]
            else:
                del shorter["rule"][int(match[1])]
            assert of_all(shorter) == before, fault


def of_all(toml: dict[str, Any]) -> list[bool]:
    return [decision.allowed for decision in all_of(toml)]


def deciding(toml: dict[str, Any]) -> set[str]:
    """The rules that decide anything."""
    return {decision.rule for decision in all_of(toml)}


def all_of(toml: dict[str, Any]) -> list[Decision]:
    rules = structure(Config, toml, "").access_rules(lambda _: False)
    hosts = ["a", "x.a", "y.x.a", "b"]
    addresses = ["10.1.0.1", "10.2.0.1", "192.0.2.1", "127.0.0.1", "2001:db8::1", "::1", "64:ff9b::a01:1"]
    clients, users = ["10.9.0.1", "10.200.0.1", "192.0.2.1", "2001:db8::5"], [None, "ci", "bob"]
    return all_decisions(rules, clients, users, [*hosts, *addresses], addresses, [24, 25, 443])


def covered(*rules: str, more: str = "") -> list[str]:
    """Which rule each rule is said to be covered by, as "2 by 0" """
    toml = "".join(f"[[rule]]\n{rule}\n" for rule in rules) + more
    return [
        f"{fault.path.removeprefix('rule')} by {int(match[1]) - 1}"
        for fault in lint(parse(Config, toml, ""))
        if (match := re.match(r"(?:never decides, since )?rule (\d+) .*has all of it", fault.expected))
    ]


ALLOW, DENY = 'action = "allow"\n', 'action = "deny"\n'


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([ALLOW, DENY], ["[1] by 0"]),
        ([DENY + "ports = [443]", DENY + 'to = ["127.0.0.1"]\nports = [443]'], ["[1] by 0"]),
        ([ALLOW, ALLOW + 'to = ["127.0.0.1"]'], []),  # lifts the protection
        ([ALLOW + 'to = ["127.0.0.0/8"]', ALLOW + 'to = ["127.0.0.1"]'], ["[1] by 0"]),
        # Without the second, the third would lift it.
        ([ALLOW, DENY + 'to = ["0.0.0.0/0"]', ALLOW + 'to = ["127.0.0.1"]'], ["[2] by 1"]),
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


def test_lists_that_a_rule_above_covers() -> None:
    lists = '[outgoing]\nallow_sites = ["a"]\ndeny_sites = ["b"]\ndeny_ports = [25]\n'
    assert covered(ALLOW + 'to = ["b"]', more=lists) == ["outgoing.deny_sites by 0"]
    # What it has not is denied by the list, and by nothing else.
    assert covered(ALLOW + 'to = ["a"]', more=lists) == []
    assert covered(ALLOW + "ports = [25]", more=lists) == ["outgoing.deny_ports by 0"]


@pytest.mark.parametrize(
    ("above", "rule", "said"),
    [
        (
            DENY + "ports = [1]",
            ALLOW + "ports = [1]",
            "never decides, since {} has all of it: remove it, or move it up",
        ),
        (ALLOW, ALLOW, "never decides, since {} has all of it: remove it, or move it up"),
        (
            ALLOW,
            DENY + 'to = ["127.0.0.1"]',
            "{} has all of it but protected addresses, which are denied anyway: remove it, or move it up",
        ),
        (
            ALLOW + 'to = ["10.0.0.0/8"]',
            DENY + 'to = ["10.1.0.0/16"]',
            "{} has all of it but IPv6 addresses that lead to its IPv4 ones: move it up",
        ),
        (
            ALLOW + 'to = ["2001:db8::/32"]',
            DENY + 'to = ["2001:db8::1"]',
            "never decides, since {} has all of it: remove it, or move it up",
        ),
        (
            ALLOW + 'to = ["a", "10.0.0.0/8"]',
            DENY + 'to = ["a", "10.1.0.0/16"]',
            "{} has all of it but protected addresses, which are denied anyway and IPv6 addresses that lead to its IPv4"
            " ones: move it up",
        ),
    ],
)
def test_what_a_rule_above_leaves(above: str, rule: str, said: str) -> None:
    (fault,) = lint(parse(Config, f'[[rule]]\nname = "top"\n{above}\n[[rule]]\n{rule}\n', ""))
    assert fault.expected == said.format('rule 1 "top" above')


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
def test_a_rule_that_denies_everything_is_told_once(rules: list[str], said: str) -> None:
    toml = "".join(f"[[rule]]\n{rule}\n" for rule in rules)
    assert [str(fault) for fault in lint(parse(Config, toml, ""))] == [said]
    # Where it belongs nothing is said of it.
    assert found("".join(f"[[rule]]\n{rule}\n" for rule in (ALLOW + 'to = ["a"]', DENY))) == []


def test_lists_behind_a_rule_that_denies_everything() -> None:
    lists = '[outgoing]\nallow_sites = ["a"]\ndeny_ports = [25]\n'
    faults = [str(fault) for fault in lint(parse(Config, f'[[rule]]\n{ALLOW}to = ["b"]\n[[rule]]\n{DENY}{lists}', ""))]
    never = "outgoing.allow_sites and outgoing.deny_ports behind it never decide"
    assert faults == [f"rule 2: denies everything, so {never}: move it down"]


def test_a_long_list_in_many_rules_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text("".join(f"host{n}.example\n" for n in range(1000)))
    counted: Counter[str] = Counter()

    class Counting(SiteIndex):
        def __init__(self, lists: Sequence[tuple[SiteList, int]]) -> None:
            counted["entries"] += sum(len(each) for each, _ in lists)
            super().__init__(lists)

        def covering(self, entry: Entry) -> int:
            counted["lookups"] += 1
            return super().covering(entry)

    monkeypatch.setattr(usocksd.coverage, "SiteIndex", Counting)
    to = f'to = ["file:{tmp_path}/long.txt"]'
    rules = [DENY + to, *(DENY + to + f"\nports = [{port}]" for port in range(1, 20))]
    assert covered(*rules) == [f"[{at}] by 0" for at in range(1, 20)]
    assert counted == {"entries": 1000}
    # The same in another file: entry by entry, but not for each rule.
    (tmp_path / "again.txt").write_text((tmp_path / "long.txt").read_text())
    assert covered(rules[0], *(rule.replace("/long.txt", "/again.txt") for rule in rules[1:]))[18:] == ["[19] by 0"]
    assert counted.pop("lookups") == 1000
    # It ends when no rule is left.
    assert covered(DENY + 'to = ["host0.example"]', DENY + to) == []
    assert counted["lookups"] <= 2


def test_search_domains_make_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """secret.corp.example is what allow_sites has, and what the client called "secret" is what deny_sites has."""
    monkeypatch.setattr(usocksd.lint, "RESOLV_CONF", tmp_path / "resolv.conf")
    allow, deny = [".corp.example"], ["secret", ""]
    idle = [f"deny_sites[{n}] denies nothing, since allow_sites has nothing of it: remove it" for n in range(2)]
    assert sites(allow, deny) == idle
    for text in ("nameserver ::1\n search corp.example\n", "domain corp.example\n"):
        (tmp_path / "resolv.conf").write_text(text)
        assert sites(allow, deny) == idle[1:]
    (tmp_path / "resolv.conf").write_text("nameserver ::1\n")
    assert sites(allow, deny) == idle
    monkeypatch.setattr(socket, "gethostname", lambda: "proxy1.corp.example")
    assert sites(allow, deny) == idle[1:]


def test_a_network_to_leave_from_that_is_not_routed_here() -> None:
    toml = '[egress.default]\naddresses = ["192.0.2.16/28"]\n'
    assert "ip route add local 192.0.2.16/28 dev lo" in text(toml)


def test_name_servers_that_can_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "resolv.conf"
    monkeypatch.setattr(usocksd.lint, "RESOLV_CONF", conf)
    conf.write_text("nameserver fe80::1\nnameserver ::1%nosuch0\nnameserver 0.0.0.0\nnameserver ::1%lo\nnameserver x\n")
    assert [(key, value) for key, value in found("") if key == str(conf)] == [
        (str(conf), '"fe80::1"'),
        (str(conf), '"::1%nosuch0"'),
    ]
    assert "fe80::1%eth0" in text("")
    # With others in the configuration nobody asks these, and the system's own resolver is the system's.
    for toml in ('[dns]\nservers = ["127.0.0.1"]', '[dns]\nresolver = "system"'):
        assert str(conf) not in text(toml)
    assert "dns.servers" in text('[dns]\nservers = ["fe80::1%nosuch0"]')


def test_users_that_need_not_say_who_they_are(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("bob:$2y$05$" + "a" * 53 + "\n")
    users.chmod(0o600)
    auth = f'[auth]\nusers_file = "{users}"\n'
    rule = '[[rule]]\naction = "{}"\nuser = ["bob"]\n'
    assert found(auth + rule.format("deny")) == []
    assert found(f"{auth}required = false\n{rule.format('allow')}") == []
    assert found(f"{auth}required = false\n{rule.format('deny')}") == [("rule[0].user", '["bob"]')]


def test_what_no_request_is(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n")
    users = tmp_path / "users"
    users.write_text("bob:$2y$05$" + "a" * 53 + "\n")
    users.chmod(0o600)
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
def test_what_reads_as_something_else(entry: str, said: str) -> None:
    def warned(toml: str) -> list[str]:
        return [fault.expected for fault in lint(parse(Config, toml, "")) if fault.expected == said]

    assert warned(f'[outgoing]\ndeny_sites = ["x.example", "{entry}"]\n') == [said]
    assert warned(f'[outgoing]\nallow_sites = ["{entry}"]\n') == [said]
    assert warned(f'[[rule]]\naction = "deny"\nto = ["{entry}"]\n') == [said]
    if "/" in entry:
        assert warned(f'[[rule]]\naction = "deny"\nfrom = ["10.9.9.9", "{entry}"]\n') == [said]
        assert warned(f'[incoming]\nallow_from = ["{entry}"]\n') == [said]
        proxied = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["{entry}"]\n'
        assert warned(proxied.format(entry=entry)) == [said]


def test_what_reads_as_what_it_is() -> None:
    clear = ["10.0.0.0/8", "192.0.2.1", "2001:db8::1", "::ffff:172.16.0.0/108", "::ffff:192.0.2.9", "box", "x4", ".x4"]
    assert found(f"[outgoing]\ndeny_sites = {clear}\n") == []


def test_ports() -> None:
    assert found("[outgoing]\ndeny_ports = [25, 22, 25, 25]") == [
        ("outgoing.deny_ports[2]", "25"),
        ("outgoing.deny_ports[3]", "25"),
    ]


def test_long_lists_are_looked_at_in_no_time_and_not_recited() -> None:
    names = tuple(f"host{number}.d{number % 100}.example" for number in range(50_000))
    networks = tuple(f"10.{number >> 8 & 255}.{number & 255}.0/24" for number in range(20_000))
    config = Config()
    outgoing = attrs.evolve(config.outgoing, allow_sites=(*names, ".d7.example", *networks), deny_sites=names)
    said = warnings(attrs.evolve(config, outgoing=outgoing))
    assert len(said) < 50
    assert "(489 others like it)" in said[10]

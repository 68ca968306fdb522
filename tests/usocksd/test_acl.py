"""The rules on destinations: examples of what they protect, and every combination against a walk over the rules."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import attrs
import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from usocksd.acl import COMMANDS, PROTOCOLS, AccessRules, Rule, RuleAnswer, Ruling, rules_of_lists
from usocksd.clients import Client, ClientRules
from usocksd.config import UsocksdConfig
from usocksd.names.match import PROTECTED, canonical_host, judged_addresses, parse_network
from usocksd.names.sites import SiteList, parse_entry
from usocksd.net.address import IPAddress, numeric_address
from usocksd.settings.loader import parse

CLIENT = Client.at("10.9.9.9")
OWN = frozenset({IPv4Address("198.51.100.1"), IPv6Address("2001:db8::1")})


def rules(
    *written: Rule, allow_sites: Sequence[str] = (), deny_sites: Sequence[str] = (), deny_ports: Sequence[int] = ()
) -> AccessRules:
    """These rules, then the lists of [outgoing]."""
    return AccessRules([*written, *rules_of_lists(allow_sites, deny_sites, deny_ports)], OWN.__contains__)


def asked(access: AccessRules, host: str, port: int = 443) -> Ruling:
    found = canonical_host(host)
    return (
        access.judge(CLIENT, found, None, port) if isinstance(found, str) else access.judge(CLIENT, None, found, port)
    )


def test_the_original_test_configuration() -> None:
    access = rules(
        allow_sites=["www.amazon.com", ".google.com"],
        deny_sites=[".2ch.net", "bad.google.com", ""],
        deny_ports=[22, 25],
    )
    assert asked(access, "www.amazon.com") == Ruling(True, 'allow_sites "www.amazon.com"')
    assert asked(access, "www.google.com") == Ruling(True, 'allow_sites ".google.com"')
    assert asked(access, "google.com") == Ruling(False, "allow_sites")
    assert asked(access, "bad.google.com") == Ruling(False, 'deny_sites "bad.google.com"')
    assert asked(access, "www.2ch.net") == Ruling(False, "allow_sites")
    assert asked(access, "www.google.com", 25) == Ruling(False, "deny_ports 25")
    assert asked(access, "203.0.113.1") == Ruling(False, "allow_sites")


def test_the_empty_entry_is_requests_without_a_name() -> None:
    access = rules(deny_sites=[""])
    for host in ("203.0.113.1", "2001:db8:1::1", "0xcb.0x71.113.1", "203.0.113.1."):
        assert asked(access, host) == Ruling(False, 'deny_sites ""')
    assert asked(access, "www.example.com").allowed
    # what a name resolved to was not sent as an address
    assert access.judge(CLIENT, "www.example.com", IPv4Address("203.0.113.1"), 443).allowed
    only_addresses = rules(allow_sites=[""])
    assert asked(only_addresses, "203.0.113.1").allowed
    assert not asked(only_addresses, "www.example.com").allowed
    assert not asked(only_addresses, "127.0.0.1").allowed


PROTECTED_ADDRESSES = {
    "loopback": ["127.0.0.1", "127.255.0.9", "::1", "2130706433", "64:ff9b::7f00:1", "2001:db8::5efe:7f00:1"],
    "unspecified": ["0.0.0.0", "0x0", "0.1.2.3", "::", "::ffff:0.0.0.0"],
    "link-local": ["169.254.169.254", "fe80::1%eth0", "2002:a9fe:a9fe::", "::169.254.169.254"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1"],
    "broadcast": ["255.255.255.255"],
    "site-local": ["fec0::1", "feff::1"],
    "cloud metadata": [
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
    ],
    "address of this host": ["198.51.100.1", "2001:db8::1", "0xc6336401", "::ffff:198.51.100.1"],
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in PROTECTED_ADDRESSES.items() for t in texts])
def test_protected_addresses_are_denied_however_they_are_reached(kind: str, text: str) -> None:
    host = canonical_host(text)
    assert not isinstance(host, str)
    assert rules().judge(CLIENT, None, host, 80) == Ruling(False, f"built-in: {kind}")
    assert rules().judge(CLIENT, "www.example.com", host, 80) == Ruling(False, f"built-in: {kind}")


def test_addresses_behind_a_nat64_of_this_network_are_judged_as_ipv4() -> None:
    text = '[outgoing]\nnat64_prefixes = ["2001:db8:64::/96"]\ndeny_sites = ["10.0.0.0/8"]\n'
    known = parse(UsocksdConfig, text, "usocksd.toml").access_rules(lambda _: False)
    assert asked(known, "2001:db8:64::10.0.0.1") == Ruling(False, 'deny_sites "10.0.0.0/8"')
    assert asked(known, "2001:db8:64::127.0.0.1") == Ruling(False, "built-in: loopback")
    assert asked(known, "2001:db8:64::192.0.2.1").allowed
    answers = known.trace(CLIENT, None, IPv6Address("2001:db8:64::a00:1"), 443)
    assert answers[-1].why == 'deny_sites lists "10.0.0.0/8"'


def test_a_rule_for_the_address_lifts_the_protection_and_one_for_a_name_does_not() -> None:
    loopback = IPv4Address("127.0.0.1")
    by_address = rules(allow_sites=["127.0.0.0/8", "198.51.100.1", ".example.com"])
    assert asked(by_address, "127.0.0.1") == Ruling(True, 'allow_sites "127.0.0.0/8"')
    assert asked(by_address, "198.51.100.1") == Ruling(True, 'allow_sites "198.51.100.1"')
    assert by_address.judge(CLIENT, "www.example.com", loopback, 80).allowed
    assert not by_address.judge(CLIENT, "www.example.com", IPv4Address("169.254.169.254"), 80).allowed
    # reached through a prefix that embeds it, it is another address and not the one allowed
    assert not asked(by_address, "64:ff9b::127.0.0.1").allowed
    by_name = rules(allow_sites=["localhost", ".example.com"])
    assert asked(by_name, "localhost").allowed
    assert not by_name.judge(CLIENT, "www.example.com", loopback, 80).allowed
    # and a denial still comes first
    both = rules(allow_sites=["127.0.0.1"], deny_sites=["127.0.0.0/8"])
    assert not asked(both, "127.0.0.1").allowed


# --- [[rule]] ---


def rule(action: str, *to: str, name: str = "a rule", **conditions: Any) -> Rule:
    sites = (SiteList(map(parse_entry, to)),) if to else None
    return Rule(name=name, allow=action == "allow", to=sites, **conditions)


def test_every_rule_gives_the_reason() -> None:
    blocked = SiteList(map(parse_entry, [".example.org", "203.0.113.0/24"]), "file:blocked.txt")
    access = rules(
        rule("deny", name="from", clients=(parse_network("10.1.0.0/16"),)),
        rule("deny", name="user", users=frozenset(["ci"])),
        rule("deny", name="ports", ports=((25, 25), (6000, 6100))),
        rule("deny", "www.example.com", name="to"),
        rule("allow", name="protected"),
        Rule(name="list", allow=False, to=(blocked,), clients=(parse_network("10.9.0.0/16"),), ports=((443, 443),)),
    )
    misses = [
        RuleAnswer("from", False, "from does not list 10.9.9.9"),
        RuleAnswer("user", False, "user is nobody"),
        RuleAnswer("ports", False, "port 443 not in 25, 6000-6100"),
    ]
    assert access.trace(CLIENT, "a.example.org", None, 443) == [
        *misses,
        RuleAnswer("to", False, "to does not list a.example.org"),
        RuleAnswer("protected", True, "it has no conditions"),
    ]
    assert access.trace(CLIENT, "a.example.org", IPv4Address("127.0.0.1"), 443) == [
        *misses,
        RuleAnswer("to", False, "to does not list a.example.org or 127.0.0.1"),
        RuleAnswer("protected", False, "127.0.0.1 is protected (loopback), which only an entry with the address lifts"),
        RuleAnswer("list", True, 'from lists 10.9.9.9, to lists ".example.org" (file:blocked.txt), port is 443'),
    ]
    assert access.trace(CLIENT, None, IPv4Address("127.0.0.1"), 443)[-1] == RuleAnswer(
        "built-in: loopback", True, "127.0.0.1 is protected (loopback)"
    )


def test_the_lists_give_the_reason() -> None:
    access = rules(allow_sites=[".example.com", ""], deny_sites=["BAD.example.com"], deny_ports=[*range(20, 28)])
    assert access.trace(CLIENT, "www.example.com", None, 443) == [
        RuleAnswer("allow_sites", False, 'allow_sites lists ".example.com"'),
        RuleAnswer("deny_sites", False, "deny_sites does not list www.example.com"),
        RuleAnswer("deny_ports", False, "port 443 not in 20, 21, 22, 23, 24, 25 and 2 more"),
        RuleAnswer('allow_sites ".example.com"', True, 'allow_sites lists ".example.com"'),
    ]
    assert access.trace(CLIENT, "bad.example.com", None, 443)[-1] == RuleAnswer(
        'deny_sites "BAD.example.com"', True, 'deny_sites lists "bad.example.com"'
    )
    assert access.trace(CLIENT, "x", None, 443) == [RuleAnswer("allow_sites", True, "allow_sites does not list x")]
    assert access.trace(CLIENT, None, IPv4Address("203.0.113.1"), 25)[-1] == RuleAnswer(
        "deny_ports 25", True, "port is 25"
    )
    assert rules().trace(CLIENT, None, IPv4Address("203.0.113.1"), 25) == [
        RuleAnswer("built-in", False, "203.0.113.1 is not protected"),
        RuleAnswer("default", True, "no rule has decided"),
    ]


# --- the evaluator against a walk over the rules, one condition after the other ---

NAMES = st.lists(st.sampled_from(["a", "b", "example", "com"]), min_size=1, max_size=4).map(".".join)
ADDRESSES = st.sampled_from(
    [
        "192.0.2.1",
        "192.0.2.77",
        "203.0.113.9",
        "127.0.0.1",
        "127.0.0.2",
        "198.51.100.1",
        "2001:db8::1",
        "2001:db8:1::1",
        "64:ff9b::c000:201",
        "64:ff9b::7f00:1",
        "2002:c000:201::",
        "::1",
    ]
)
NETWORKS = st.sampled_from(
    [
        "192.0.2.0/24",
        "192.0.2.64/26",
        "0.0.0.0/0",
        "::/0",
        "2001:db8::/32",
        "127.0.0.0/8",
        "64:ff9b::/96",
        "198.51.100.1/32",
    ]
)
ENTRY = NAMES | NAMES.map(".".__add__) | ADDRESSES | NETWORKS | st.just("")
ENTRIES = st.lists(ENTRY, max_size=5)
CLIENTS = ["10.1.0.1", "10.2.0.1", "2001:db8:c::1"]
USERS = [None, "ci", "bob"]
PORTS = [0, 25, 80, 443, 65535]


@frozen
class Written:
    """A rule as plain text, which the walk reads."""

    allow: bool
    clients: list[str] | None
    users: list[str] | None
    to: list[str] | None
    in_file: list[str]
    ports: list[tuple[int, int]] | None
    opposite: bool = False

    def compiled(self, name: str) -> Rule:
        lists = (self.to, self.in_file)
        return Rule(
            name=name,
            allow=self.allow,
            clients=None if self.clients is None else tuple(map(parse_network, self.clients)),
            users=None if self.users is None else frozenset(self.users),
            to=None if self.to is None else tuple(SiteList(map(parse_entry, entries or ())) for entries in lists),
            ports=None if self.ports is None else tuple(self.ports),
            pool=f"pool of {name}",
        )

    def matches(self, client: str, user: str | None, name: str | None, ip: IPAddress | None, port: int) -> bool:
        if self.clients is not None and not any(ip_address(client) in ip_network(network) for network in self.clients):
            return False
        if self.users is not None and user not in self.users:
            return False
        if self.ports is not None and not any(port in range(first, last + 1) for first, last in self.ports):
            return False
        reached = () if ip is None else judged_addresses(ip)
        allows_itself_only = self.allow or self.opposite
        by_address = by_name = False
        for entry in [*(self.to or ()), *self.in_file]:
            meant = entry.removeprefix(".")
            if entry == "":
                by_name |= name is None
            elif "/" in entry or not isinstance(canonical_host(meant), str):
                by_address |= any(at in ip_network(entry) for at in (reached[:1] if allows_itself_only else reached))
            elif entry.startswith("."):
                by_name |= name is not None and name.endswith(entry)
            else:
                by_name |= name == entry
        if self.opposite:
            return not by_address and not by_name
        if self.allow and not by_address and is_protected(reached):
            return False
        return self.to is None or by_address or by_name


def is_protected(addresses: Sequence[IPAddress]) -> bool:
    networks = [ip_network(text) for _, texts in PROTECTED for text in texts]
    return any(ip in OWN or any(ip in network for network in networks) for ip in addresses)


RULE = st.builds(
    Written,
    allow=st.booleans(),
    clients=st.none() | st.lists(st.sampled_from(["10.1.0.0/16", "10.0.0.0/8", "2001:db8::/32"]), min_size=1),
    users=st.none() | st.lists(st.sampled_from(["ci", "bob"]), min_size=1),
    to=st.none() | st.lists(ENTRY, min_size=1, max_size=4),
    in_file=st.just([]) | ENTRIES,
    ports=st.none() | st.lists(st.sampled_from([(25, 25), (0, 24), (80, 443), (26, 65535)]), min_size=1),
)


@given(
    st.lists(RULE, max_size=6),
    ENTRIES,
    ENTRIES,
    st.lists(st.sampled_from([25, 80])),
    st.sampled_from(CLIENTS),
    st.sampled_from(USERS),
    NAMES | ADDRESSES,
    st.none() | NAMES,
    st.none() | ADDRESSES,
    st.sampled_from(PORTS),
)
@settings(max_examples=500)
def test_agrees_with_a_walk_over_the_rules(
    written: list[Written],
    allow_sites: list[str],
    deny_sites: list[str],
    deny_ports: list[int],
    client: str,
    user: str | None,
    host: str,
    sent: str | None,
    address: str | None,
    port: int,
) -> None:
    written = [attrs.evolve(one, in_file=[] if one.to is None else one.in_file) for one in written]
    access = rules(
        *(one.compiled(f"r{at}") for at, one in enumerate(written)),
        allow_sites=allow_sites,
        deny_sites=deny_sites,
        deny_ports=deny_ports,
    )

    def of_list(entries: list[str], **changes: Any) -> Written:
        return attrs.evolve(Written(False, None, None, entries, [], None), **changes)

    walked = [
        *((f"r{at}", one) for at, one in enumerate(written)),
        *([("allow_sites", of_list(allow_sites, opposite=True))] if allow_sites else []),
        *([("deny_sites", of_list(deny_sites))] if deny_sites else []),
        *([("deny_ports", Written(False, None, None, None, [], [(p, p) for p in deny_ports]))] if deny_ports else []),
        *([("allow_sites", of_list(allow_sites, allow=True))] if allow_sites else []),
    ]
    asked_for = canonical_host(host)
    name = asked_for if isinstance(asked_for, str) else None
    judged = asked_for if not isinstance(asked_for, str) else None if address is None else ip_address(address)
    also = None if name is None or sent is None else str(canonical_host(sent))
    who = Client.at(client, user=user)
    ruling = access.judge(who, name, judged, port, also)
    answers = access.trace(who, name, judged, port, also)
    names = [name, *([] if also is None else [also])]

    for at, (rule_name, one) in enumerate(walked):
        matches = [one.matches(client, user, each, judged, port) for each in names]
        if all(matches) if one.opposite else any(matches):  # what has the host by either name has it
            assert ruling.allowed == one.allow
            assert ruling.rule.split(" ")[0] == rule_name
            assert ruling.pool == (f"pool of {rule_name}" if rule_name[0] == "r" else "default")
            assert len(answers) == at + 1
            break
    else:
        guarded = judged is not None and is_protected(judged_addresses(judged))
        assert ruling.allowed == (not guarded)
        assert ruling.rule.startswith("built-in: " if guarded else "default")
    assert (answers[-1].rule, answers[-1].matched) == (ruling.rule, True)
    assert not any(each.matched for each in answers[:-1])
    assert all(each.why for each in answers)


# --- clients ---


@pytest.mark.parametrize(
    ("allow_from", "admitted", "others"),
    [
        (
            [],  # private networks
            "127.0.0.1 ::1 10.1.2.3 172.31.255.255 192.168.0.1 100.64.0.1 169.254.1.1 fe80::1%eth0 fd00::1"
            " ::ffff:10.1.2.3",
            "172.32.0.0 100.128.0.1 203.0.113.1 2001:db8::1 64:ff9b::10.0.0.1 ::ffff:203.0.113.1",
        ),
        # Without a mask it is one host, not a /32.
        (
            ["10.0.0.0/8", "203.0.113.5", "2001:db8::5"],
            "::ffff:10.0.0.1 203.0.113.5 2001:db8::5",
            "203.0.113.6 2001:db8::6 127.0.0.1 192.168.0.1",
        ),
    ],
)
def test_which_clients_are_admitted(allow_from: list[str], admitted: str, others: str) -> None:
    clients = ClientRules(map(parse_network, allow_from)) if allow_from else ClientRules()
    peers = f"{admitted} {others}".split()
    assert [peer for peer in peers if clients.admits(numeric_address(peer))] == admitted.split()


@pytest.mark.parametrize(
    ("commands", "denied"),
    [
        (None, {"connect", "bind", "udp_associate"}),
        (PROTOCOLS["tcp"], {"connect", "bind"}),
        (PROTOCOLS["udp"], {"udp_associate"}),
        (frozenset({"bind"}), {"bind"}),
    ],
)
def test_a_rule_holds_for_its_commands(commands: frozenset[str] | None, denied: set[str]) -> None:
    access = rules(Rule(name="these", allow=False, commands=commands), deny_ports=[25])
    address = numeric_address("203.0.113.1")
    for command in COMMANDS:
        ruling = access.judge(CLIENT, None, address, 443, command=command)
        assert ruling.allowed == (command not in denied)
        *_, last = access.trace(CLIENT, None, address, 443, command=command)
        assert last.rule == ruling.rule
        # The lists of [outgoing] hold for all, so no denial is walked around.
        assert not access.judge(CLIENT, None, address, 25, command=command).allowed

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.acl import PROTECTED, AccessRules, ClientRules, Decision, site_fault
from usocksd.match import IPAddress, canonical_host, judged_addresses, parse_network

OWN = frozenset({IPv4Address("198.51.100.1"), IPv6Address("2001:db8::1")})


def rules(
    allow_sites: Sequence[str] = (), deny_sites: Sequence[str] = (), deny_ports: Sequence[int] = ()
) -> AccessRules:
    return AccessRules.from_lists(
        allow_sites=allow_sites, deny_sites=deny_sites, deny_ports=deny_ports, is_local=OWN.__contains__
    )


def asked(access: AccessRules, host: str, port: int = 443) -> Decision:
    return access.decide_name(canonical_host(host), port)


def test_the_original_test_configuration() -> None:
    access = rules(
        allow_sites=["www.amazon.com", ".google.com"],
        deny_sites=[".2ch.net", "bad.google.com", ""],
        deny_ports=[22, 25],
    )
    assert asked(access, "www.amazon.com") == Decision(True, 'allow_sites "www.amazon.com"')
    assert asked(access, "www.google.com") == Decision(True, 'allow_sites ".google.com"')
    assert asked(access, "google.com") == Decision(False, "allow_sites")
    assert asked(access, "bad.google.com") == Decision(False, 'deny_sites "bad.google.com"')
    assert asked(access, "www.2ch.net") == Decision(False, "allow_sites")
    assert asked(access, "www.google.com", 25) == Decision(False, "deny_ports 25")
    assert asked(access, "203.0.113.1") == Decision(False, "allow_sites")


def test_without_lists_everything_but_the_protected_is_allowed() -> None:
    access = rules()
    assert asked(access, "www.example.com") == Decision(True, "default")
    assert asked(access, "203.0.113.1") == Decision(True, "default")
    assert asked(access, "10.0.0.1") == Decision(True, "default")
    assert access.decide_address(IPv4Address("203.0.113.1"), 443) == Decision(True, "default")


def test_the_empty_entry_is_requests_without_a_name() -> None:
    access = rules(deny_sites=[""])
    for host in ("203.0.113.1", "2001:db8:1::1", "0xcb.0x71.113.1", "203.0.113.1."):
        assert asked(access, host) == Decision(False, 'deny_sites ""')
    assert asked(access, "www.example.com").allowed
    # what a name resolved to was not sent as an address
    assert access.decide_address(IPv4Address("203.0.113.1"), 443).allowed
    only_addresses = rules(allow_sites=[""])
    assert asked(only_addresses, "203.0.113.1").allowed
    assert not asked(only_addresses, "www.example.com").allowed
    assert not asked(only_addresses, "127.0.0.1").allowed


DENIED = rules(deny_sites=["www.example.com", ".example.org", "203.0.113.7", "192.0.2.0/24", "2001:db8:bad::/48"])


@pytest.mark.parametrize(
    "spelling",
    [
        "www.example.com",
        "WWW.EXAMPLE.COM",
        "www.example.com.",
        "ｗｗｗ.example。com",  # noqa: RUF001
        "www.exam\u00adple.com",
        "a.example.org",
        "a.B.example.ORG.",
        "203.0.113.7",
        "203.0.113.7.",
        "203.0.28935",
        "0xcb007107",
        "3405803783",
        "0313.0.0161.7",
        "２０３.0.113.7",  # noqa: RUF001
        "::ffff:203.0.113.7",
        "[::ffff:cb00:7107]",
        "::203.0.113.7",
        "64:ff9b::203.0.113.7",
        "64:ff9b:1::cb00:7107",
        "2002:cb00:7107::1",
        "192.0.2.200",
        "[2001:DB8:bad::1]",
        "2001:db8:bad::1%eth0",
    ],
)
def test_no_spelling_gets_around_a_rule(spelling: str) -> None:
    decision = asked(DENIED, spelling)
    assert not decision.allowed
    assert decision.rule.startswith("deny_sites")


@pytest.mark.parametrize("spelling", ["www..example.com", "www.example.com\x00.x", "www.example.com ", ".example.org"])
def test_what_is_no_host_does_not_reach_the_rules(spelling: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical_host(spelling)


def test_resolved_addresses_meet_the_address_entries() -> None:
    for text in ("203.0.113.7", "192.0.2.1", "64:ff9b::192.0.2.1", "2001:db8:bad::1", "::ffff:192.0.2.1"):
        assert not DENIED.decide_address(ip_address(text), 443).allowed
    assert DENIED.decide_address(IPv4Address("203.0.113.8"), 443).allowed
    assert DENIED.decide_address(IPv4Address("192.0.2.1"), 443).rule == 'deny_sites "192.0.2.0/24"'
    assert not rules(deny_ports=[25]).decide_address(IPv4Address("203.0.113.8"), 25).allowed


PROTECTED_SPELLINGS = {
    "loopback": [
        "127.0.0.1",
        "127.255.0.9",
        "::1",
        "127.1",
        "2130706433",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
    ],
    "unspecified": ["0.0.0.0", "0", "0x0", "0.1.2.3", "::", "::ffff:0.0.0.0"],
    "link-local": ["169.254.169.254", "0xa9fea9fe", "fe80::1%eth0", "2002:a9fe:a9fe::", "::169.254.169.254"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1"],
    "broadcast": ["255.255.255.255"],
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


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in PROTECTED_SPELLINGS.items() for t in texts])
def test_protected_addresses_are_denied_however_they_are_reached(kind: str, text: str) -> None:
    host = canonical_host(text)
    assert not isinstance(host, str)
    assert rules().decide_name(host, 80) == Decision(False, f"built-in: {kind}")
    assert rules().decide_address(host, 80) == Decision(False, f"built-in: {kind}")


def test_a_rule_for_the_address_lifts_the_protection_and_one_for_a_name_does_not() -> None:
    loopback = IPv4Address("127.0.0.1")
    by_address = rules(allow_sites=["127.0.0.0/8", "198.51.100.1", ".example.com"])
    assert asked(by_address, "127.0.0.1") == Decision(True, 'allow_sites "127.0.0.0/8"')
    assert asked(by_address, "198.51.100.1") == Decision(True, 'allow_sites "198.51.100.1"')
    assert by_address.decide_address(loopback, 80).allowed
    assert not by_address.decide_address(IPv4Address("169.254.169.254"), 80).allowed
    # reached through a prefix that embeds it, it is another address and not the one allowed
    assert not asked(by_address, "64:ff9b::127.0.0.1").allowed
    by_name = rules(allow_sites=["localhost", ".example.com"])
    assert asked(by_name, "localhost").allowed
    assert not by_name.decide_address(loopback, 80).allowed
    # and a denial still comes first
    both = rules(allow_sites=["127.0.0.1"], deny_sites=["127.0.0.0/8"])
    assert not asked(both, "127.0.0.1").allowed


@pytest.mark.parametrize("entry", ["*.example.com", ".10.0.0.1", "10.0.0.0/33", "a b", ".", "..", "a..b"])
def test_an_entry_that_could_never_match_is_a_fault(entry: str) -> None:
    assert site_fault(entry) is not None
    with pytest.raises(ValueError):  # noqa: PT011
        rules(deny_sites=[entry])


@pytest.mark.parametrize(
    "entry", ["www.example.com", ".com", "", "10.0.0.1", "0x7f.1", "[::1]", "10.0.0.0/8", "ü.example"]
)
def test_what_an_entry_can_be(entry: str) -> None:
    assert site_fault(entry) is None
    rules(deny_sites=[entry])


def test_the_fault_of_a_wildcard_says_what_to_write() -> None:
    assert '".example.com" for all names below it' in str(site_fault("*.example.com"))


# --- the fast evaluator against the plain meaning of the lists ---

NAMES = st.lists(st.sampled_from(["a", "b", "example", "com"]), min_size=1, max_size=4).map(".".join)
ADDRESSES = st.sampled_from(
    [
        "192.0.2.1",
        "192.0.2.77",
        "203.0.113.9",
        "127.0.0.1",
        "2001:db8:1::1",
        "64:ff9b::c000:201",
        "2002:c000:201::",
    ]
)
NETWORKS = st.sampled_from(["192.0.2.0/24", "192.0.2.64/26", "0.0.0.0/0", "::/0", "2001:db8::/32", "127.0.0.1"])
ENTRIES = st.lists(NAMES | NAMES.map(".".__add__) | ADDRESSES | NETWORKS | st.just(""), max_size=6)


def naive_match(entries: Sequence[str], name: str | None, addresses: Sequence[IPAddress], resolved: bool) -> bool:
    for entry in entries:
        if entry == "":
            hit = name is None and not resolved
        elif "/" in entry or not isinstance(canonical_host(entry.lstrip(".")), str):
            hit = any(address in ip_network(entry) for address in addresses)
        elif entry.startswith("."):
            hit = name is not None and name.endswith(entry)
        else:
            hit = name == entry
        if hit:
            return True
    return False


def naive(
    allow: Sequence[str],
    deny: Sequence[str],
    ports: Sequence[int],
    host: IPAddress | str,
    port: int,
    resolved: bool,
) -> bool:
    name = host if isinstance(host, str) else None
    address = () if isinstance(host, str) else (host,)
    judged = () if isinstance(host, str) else judged_addresses(host)
    if allow and not resolved and not naive_match(allow, name, address, resolved):
        return False
    if naive_match(deny, name, judged, resolved) or port in ports:
        return False
    if naive_match([entry for entry in allow if entry], name, address, resolved):
        return True
    protected = [ip_network(text) for _, texts in PROTECTED for text in texts]
    return not any(ip in OWN or any(ip in network for network in protected) for ip in judged)


@given(
    ENTRIES,
    ENTRIES,
    st.lists(st.sampled_from([25, 80])),
    NAMES | ADDRESSES,
    st.sampled_from([25, 443]),
    st.booleans(),
)
def test_agrees_with_a_naive_walk(
    allow: list[str], deny: list[str], ports: list[int], text: str, port: int, resolved: bool
) -> None:
    access = rules(allow, deny, ports)
    host = canonical_host(text)
    if resolved and not isinstance(host, str):
        assert access.decide_address(host, port).allowed == naive(allow, deny, ports, host, port, True)
    else:
        assert access.decide_name(host, port).allowed == naive(allow, deny, ports, host, port, False)


# --- clients ---


@pytest.mark.parametrize(
    ("peer", "admitted"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("10.1.2.3", True),
        ("172.31.255.255", True),
        ("172.32.0.0", False),
        ("192.168.1.1", True),
        ("100.64.0.1", True),
        ("100.128.0.1", False),
        ("169.254.1.1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:203.0.113.1", False),
        ("203.0.113.1", False),
        ("2001:db8::1", False),
        ("64:ff9b::10.0.0.1", False),
    ],
)
def test_by_default_only_private_clients_are_admitted(peer: str, admitted: bool) -> None:
    clients = ClientRules()
    assert clients.is_default
    assert clients.admits(peer) is admitted
    assert clients.admits(peer) is admitted  # remembered
    assert clients.admits(ip_address(peer)) is admitted


def test_allow_from_replaces_the_default() -> None:
    clients = ClientRules(map(parse_network, ["10.0.0.0/8", "203.0.113.5", "2001:db8::5"]))
    assert not clients.is_default
    assert clients.admits("::ffff:10.0.0.1")
    assert clients.admits("203.0.113.5")
    assert not clients.admits("203.0.113.6")
    assert clients.admits("2001:db8::5")
    assert not clients.admits("2001:db8::6")  # no mask is one host, not a /32
    assert not clients.admits("127.0.0.1")
    assert not clients.admits("192.168.0.1")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientRules, "_MOST_REMEMBERED", 10)
    clients = ClientRules()
    for n in range(100):
        assert clients.admits(f"10.0.0.{n}")
    assert len(clients._remembered) <= 10

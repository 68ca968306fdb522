"""Entries, compact lists of them, and the index over many lists, each against a plain walk."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from usocksd.names.match import canonical_host, parse_network
from usocksd.names.site_index import SiteIndex
from usocksd.names.sites import Entry, Prefix, SiteList, entry_fault, parse_entry, prefix_of
from usocksd.net.address import IPNetwork


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("", ""),
        ("www.example.com", "www.example.com"),
        ("WWW.Example.com.", "www.example.com"),
        (".Example.org.", ".example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        (".bücher.example", ".xn--bcher-kva.example"),
        ("0xa.example", "0xa.example"),
        ("10.0.0.1", Prefix(4, 0x0A000001, 32)),
        ("0x0a.1", Prefix(4, 0x0A000001, 32)),
        ("012.0.0.1", Prefix(4, 0x0A000001, 32)),
        ("10.1.2.3/8", Prefix(4, 0x0A000000, 8)),
        ("0.0.0.0/0", Prefix(4, 0, 0)),
        ("::/0", Prefix(6, 0, 0)),
        ("2001:db8::7/32", Prefix(6, 0x20010DB8 << 96, 32)),
        ("[2001:db8::]", Prefix(6, 0x20010DB8 << 96, 128)),
        ("::ffff:10.0.0.1", Prefix(4, 0x0A000001, 32)),
        ("::ffff:10.0.0.0/104", Prefix(4, 0x0A000000, 8)),
        ("::ffff:0:0/95", Prefix(6, 0xFFFE << 32, 95)),
    ],
)
def test_entries(text: str, entry: Entry) -> None:
    assert parse_entry(text) == entry
    assert entry_fault(text) is None


@pytest.mark.parametrize(
    "text",
    [".", "..", "a..b", "*.example.com", "a b", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/255.0.0.0", "10/8",
     ".10.0.0.1", "example.123", "a/8", "::/129", "::/1000", "/8", "a\0b", "10.0.0.1\0", "x" * 64,
     ".".join(["x" * 60] * 5), "file:x", "\ud800"],
)  # fmt: skip
def test_invalid_entries(text: str) -> None:
    assert entry_fault(text) is not None


ANY_TEXT = st.text(st.sampled_from("abx01279.:/-_%[]ü"), max_size=20)


@given(
    ANY_TEXT
    | st.ip_addresses().map(str)
    | st.tuples(st.ip_addresses(), st.integers(0, 140)).map(lambda pair: f"{pair[0]}/{pair[1]}")
)
@example("a.1")
@example("1.a")
@example("::ffff:1.2.3.4/96")
def test_the_fast_way_to_read_an_entry_is_the_slow_one(text: str) -> None:
    slow: Entry | None = None
    with contextlib.suppress(ValueError):
        if "/" in text:
            slow = prefix_of(parse_network(text))
        elif text:
            host = canonical_host(text.removeprefix("."))
            if isinstance(host, str):
                slow = "." * text.startswith(".") + host
            elif not text.startswith("."):
                slow = prefix_of(parse_network(str(host)))
        else:
            slow = ""
    if slow is None:
        assert entry_fault(text) is not None
    else:
        assert parse_entry(text) == slow


def test_a_prefix_is_shown_as_records_name_it() -> None:
    shown = ["10.0.0.1", "10.0.0.0/8", "2001:db8::1", "::/0"]
    assert [str(parse_entry(text)) for text in shown] == shown


# Few leading and few trailing bits, so that networks nest, touch and are the same.
V4 = st.tuples(st.integers(0, 7).map(lambda n: n << 29) | st.integers(0, 7), st.integers(0, 32))
V6 = st.tuples(st.integers(0, 7).map(lambda n: n << 125) | st.integers(0, 7) | st.just(2**64), st.integers(0, 128))
NETWORK = V4.map(lambda t: ip_network((IPv4Address(t[0]), t[1]), strict=False)) | V6.map(
    lambda t: ip_network((IPv6Address(t[0]), t[1]), strict=False)
)
NAME = st.lists(st.sampled_from(["a", "b", "aa", "x1"]), min_size=1, max_size=4).map(".".join)
LISTS = st.lists(st.tuples(st.lists(NETWORK | NAME | NAME.map(".".__add__), max_size=8), st.integers(0, 7)), max_size=5)


def compiled(lists: list[tuple[list[IPNetwork | str], int]]) -> SiteIndex:
    return SiteIndex([(SiteList(parse_entry(str(entry)) for entry in entries), mask) for entries, mask in lists])


@given(LISTS, NAME)
def test_the_lists_that_have_a_name(lists: list[tuple[list[IPNetwork | str], int]], name: str) -> None:
    mask = 0
    for entries, bits in lists:
        for entry in entries:
            if isinstance(entry, str) and (name.endswith(entry) if entry[0] == "." else name == entry):
                mask |= bits
    index = compiled(lists)
    assert index.of_name(name) == mask
    entry = index.entry_of(name, mask)
    assert (entry is None) == (mask == 0)
    assert entry is None or (name.endswith(entry) if entry[0] == "." else name == entry)


@given(LISTS, st.data())
def test_the_lists_that_have_an_address(lists: list[tuple[list[IPNetwork | str], int]], data: st.DataObject) -> None:
    networks = [entry for entries, _ in lists for entry in entries if not isinstance(entry, str)]
    edges = [ip for network in networks for ip in (network.network_address, network.broadcast_address)]
    ip = data.draw(
        st.sampled_from([*edges, *(edge + 1 for edge in edges if int(edge) < 2**32 - 1)])
        if edges
        else st.ip_addresses()
    )
    mask = 0
    for entries, bits in lists:
        for entry in entries:
            if not isinstance(entry, str) and entry.version == ip.version and ip in entry:
                mask |= bits
    assert compiled(lists).of_address(ip) == mask


@given(LISTS, NETWORK | NAME | NAME.map(".".__add__))
def test_the_lists_that_have_all_of_an_entry(
    lists: list[tuple[list[IPNetwork | str], int]], asked: IPNetwork | str
) -> None:
    """Compares networks with their parts of equal size: the given prefix length, or one bit more if it is short."""
    covering = compiled(lists).covering(parse_entry(str(asked)))
    mask = 0
    for bit in (1, 2, 4):
        entries = [entry for entries, bits in lists if bits & bit for entry in entries]
        if isinstance(asked, str):
            names = [entry for entry in entries if isinstance(entry, str)]
            if asked[0] == ".":
                has = any(name[0] == "." and ("x" + asked).endswith(name) for name in names)
            else:
                has = any(asked.endswith(name) if name[0] == "." else asked == name for name in names)
        else:
            inside = [net for net in entries if not isinstance(net, str) and net.version == asked.version]
            left = [asked]
            for network in inside:
                left = [part for whole in left for part in without(whole, network)]
            has = not left
        mask |= bit * has
    assert covering == mask


def without(whole: IPNetwork, network: IPNetwork) -> list[IPNetwork]:
    if whole.subnet_of(network):  # type: ignore[arg-type]
        return []
    return list(whole.address_exclude(network)) if network.subnet_of(whole) else [whole]  # type: ignore[arg-type]


@given(st.lists(NETWORK, max_size=10), st.data())
def test_the_narrowest_network_that_has_an_address(networks: list[IPNetwork], data: st.DataObject) -> None:
    edges = [ip for network in networks for ip in (network.network_address, network.broadcast_address)]
    ip = data.draw(st.sampled_from(edges) if edges else st.ip_addresses())
    having = [network for network in networks if network.version == ip.version and ip in network]
    found = SiteList(map(prefix_of, networks)).find(ip)
    assert found == (prefix_of(max(having, key=lambda network: network.prefixlen)) if having else None)


def test_a_list_knows_its_entries() -> None:
    entries = ["b.example", ".a.example", "10.0.0.0/8", "::1", "", "192.0.2.1"]
    sites = SiteList(map(parse_entry, entries), "file:x")
    assert sorted(str(entry) for entry in sites.entries()) == sorted(entries)
    assert len(sites) == len(entries)
    assert sites.has(".a.example")
    assert not sites.has("a.example")
    assert not sites.has("example")
    assert SiteIndex([(sites, 4)]).nameless == 4
    assert SiteIndex([(sites, 4)]).covering("") == 4
    assert SiteIndex([]).of_address(ip_address("10.0.0.1")) == 0


def test_names_are_found_among_many() -> None:
    """More than one bucket of the hash table, and names that begin or end alike."""
    names = [f"{n:x}.example" for n in range(5000)]
    lists = [(SiteList(names[at::3]), 1 << at) for at in range(3)]
    index = SiteIndex([*lists, (SiteList(["f.example", ".f.example"]), 8)])
    for at, name in enumerate(names):
        assert index.of_name(name) & 7 == 1 << at % 3
        assert index.of_name(f"x{name}") == 0
        assert index.of_name(f"{name}x") == 0
    assert index.of_name("f.example") & 8
    assert index.of_name("a.f.example") == 8

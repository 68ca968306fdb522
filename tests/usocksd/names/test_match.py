from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.names.match import (
    NetworkMap,
    canonical_host,
    entries_of,
    judged_addresses,
    parse_network,
    rendezvous,
)
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

LOOPBACK = IPv4Address("127.0.0.1")


@pytest.mark.parametrize(
    "spelling",
    [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "127.0.1",
        "0x7f.1",
        "0X7F.0x0.0x0.0x1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "017700000001",
        "0x7f.0.0.01",
        "::ffff:127.0.0.1",
        "::FFFF:7f00:1",
        "[::ffff:127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "::ffff:127.0.0.1%lo",
        "１２７.0.0.1",  # noqa: RUF001 full-width digits
        "127。0。0。1",  # ideographic full stops
        "127.0.0.1。",
        "0ｘ7f.1",  # noqa: RUF001
        "①②⑦.1",  # circled digits
        "127.0.0.\u00ad1",  # a soft hyphen is mapped to nothing
    ],
)
def test_every_spelling_of_an_ipv4_address_is_that_address(spelling: str) -> None:
    assert canonical_host(spelling) == LOOPBACK


@pytest.mark.parametrize(
    ("spelling", "host"),
    [
        *((text, IPv6Address("::1")) for text in ("::1", "[::1]", "0:0:0:0:0:0:0:1", "::0001", "::1%lo", "[::1%25lo]")),
        *((text, IPv6Address("::1")) for text in ("::0.0.0.1", "：：１")),  # noqa: RUF001
        ("WWW.Example.COM", "www.example.com"),
        ("www.example.com.", "www.example.com"),
        ("ｗｗｗ．example．com", "www.example.com"),  # noqa: RUF001
        ("www。example｡com", "www.example.com"),
        ("exam\u00adple.com", "example.com"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example.", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("\u212a.example", "k.example"),  # KELVIN SIGN
        ("_sip._tcp.example.com", "_sip._tcp.example.com"),
        ("_x.bücher.example", "_x.xn--bcher-kva.example"),
        ("r3---sn-4g5e.example", "r3---sn-4g5e.example"),
        ("localhost", "localhost"),
        ("1.2.3.4.com", "1.2.3.4.com"),
        ("0xdead.beef", "0xdead.beef"),
        ("1.2.3.0xg", "1.2.3.0xg"),
        ("-1", "-1"),
        ("a" * 63 + ".b", "a" * 63 + ".b"),
    ],
)
def test_hosts_have_one_form(spelling: str, host: str | IPv6Address) -> None:
    assert canonical_host(spelling) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        ".example.com",
        "www..example.com",
        "example.com..",
        "127.0.0.1..",
        "www example.com",
        "example.com ",
        " 127.0.0.1",
        "127.0.0.1 x",
        "example.com\n",
        "127.0.0.1\n",
        "127.0.0.1\x00.example.com",
        "example.com\x00",
        "example\t.com",
        "1.2.3.4.5",
        "256.1.1.1",
        "1.16777216",
        "4294967296",
        "08.1",
        "1.2.3.08",
        "0x.1",
        "0x",
        "+1",
        "1_0.1",
        "example.123",
        "[127.0.0.1]",
        "[::1",
        "::1]",
        "[::1].",
        "::1.",
        "[]",
        ":",
        "::ffff:0x7f.1",
        "::ffff:127.1",
        "fe80::1%",
        "example.com:80",
        "user@example.com",
        "example.com/",
        "*.example.com",
        "a%b",
        "a" * 64 + ".com",
        ".".join(["a" * 49] * 6),
        "a\u200db.example",  # a joiner out of place
        "\u2488example",  # DIGIT ONE FULL STOP, disallowed by UTS 46
        "\ufffd.example",
        "ü" * 60 + ".example",
        "ü" * 300,
    ],
)
def test_invalid_hosts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical_host(text)


@given(st.text(max_size=40) | st.text(alphabet="0123456789abcdefx.:[]%-_ÜA", max_size=40))
def test_canonical_is_a_fixed_point_and_never_another_exception(text: str) -> None:
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(str(host)) == host
    assert not isinstance(host, str) or (host == host.lower() and host.isascii() and not host.endswith("."))


@given(st.text(alphabet="0123456789abfx.", max_size=20) | st.ip_addresses(v=4).map(str))
def test_agrees_with_inet_aton_of_the_c_library(text: str) -> None:
    try:
        expected = IPv4Address(socket.inet_aton(text))
    except OSError:
        with contextlib.suppress(ValueError):
            # inet_aton takes no trailing dot; we strip it first
            assert text.endswith(".") or not isinstance(canonical_host(text), IPv4Address)
    else:
        assert canonical_host(text) == expected


def test_numeric_address_is_strict() -> None:
    assert numeric_address("fe80::1%eth0") == IPv6Address("fe80::1")
    assert numeric_address("::ffff:10.0.0.1") == IPv4Address("10.0.0.1")
    for text in ("127.1", "0x7f.1", "010.0.0.1", "[::1]", "localhost", ""):
        with pytest.raises(ValueError):  # noqa: PT011
            numeric_address(text)


def test_networks() -> None:
    assert parse_network("10.1.2.3/8") == ip_network("10.0.0.0/8")
    assert parse_network("2001:db8::1") == ip_network("2001:db8::1/128")
    assert parse_network("192.0.2.1") == ip_network("192.0.2.1/32")
    assert parse_network("::ffff:10.0.0.0/104") == ip_network("10.0.0.0/8")
    assert parse_network("::/0") == ip_network("::/0")
    for text in ("10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0.0.0/0.255.255.255", "10.0.0.0/", "10/8", "", "x"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_network(text)


@pytest.mark.parametrize(
    ("ip", "inside"),
    [
        ("64:ff9b::7f00:1", ["127.0.0.1"]),
        ("64:ff9b::169.254.169.254", ["169.254.169.254"]),
        ("64:ff9b:1::a9fe:a9fe", ["169.254.169.254"]),
        ("2002:7f00:1::1", ["127.0.0.1"]),
        ("2002:a9fe:a9fe:ffff:1:2:3:4", ["169.254.169.254"]),
        ("::127.0.0.1", ["127.0.0.1"]),
        ("::ffff:127.0.0.1", ["127.0.0.1"]),
        ("::ffff:0:127.0.0.1", ["127.0.0.1"]),
        ("2001:db8:1:2:0:5efe:10.0.0.1", ["10.0.0.1"]),
        ("2001:db8:1:2:200:5efe:10.0.0.1", ["10.0.0.1"]),
        ("2002:7f00:1:0:0:5efe:10.0.0.1", ["127.0.0.1", "10.0.0.1"]),
        # Teredo, the example of RFC 4380 section 4: the server, and the client with obfuscated port and address.
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", ["65.54.227.120", "192.0.2.45"]),
        *((ip, []) for ip in ("127.0.0.1", "::1", "::", "2001:db8::7f00:1", "64:ff9c::7f00:1", "2003:7f00:1::")),
        *((ip, []) for ip in ("2001:1::1", "::1:5efe:7f00:1")),
    ],
)
def test_embedded_ipv4_addresses_are_judged_too(ip: str, inside: list[str]) -> None:
    assert judged_addresses(ip_address(ip)) == (ip_address(ip), *map(IPv4Address, inside))


# RFC 6052 section 2.4 has these for 2001:db8::/32.
@pytest.mark.parametrize(
    ("prefix", "ip"),
    [
        ("2001:db8::/32", "2001:db8:c000:221::"),
        ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
        ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
        ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
        ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
        ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
    ],
)
def test_behind_a_prefix_of_a_nat64_that_is_known_the_ipv4_address_is_judged(prefix: str, ip: str) -> None:
    address = IPv6Address(ip)
    assert judged_addresses(address) == (address,)
    assert judged_addresses(address, [IPv6Network("2001:db8:ffff::/96"), IPv6Network(prefix)])[1:] == (
        IPv4Address("192.0.2.33"),
    )


@pytest.mark.parametrize(
    "ip",
    [
        "64:ff9b:1::10.0.0.1",
        "64:ff9b:1:a00:0:100::",
        "64:ff9b:1:a00:0:100:1:2",  # the rest should be zero, and is ignored (RFC 6052 section 2.2)
        "64:ff9b:1:ff0a:0:1::",
        "64:ff9b:1:ffff:a:0:100::",
    ],
)
def test_the_local_prefix_of_nat64_may_have_any_length(ip: str) -> None:
    assert IPv4Address("10.0.0.1") in judged_addresses(IPv6Address(ip))
    if ip.endswith("10.0.0.1"):
        assert judged_addresses(IPv6Address(ip))[1:] == (IPv4Address("10.0.0.1"),)


def test_a_known_length_of_the_local_prefix_of_nat64_is_the_only_one() -> None:
    known = [IPv6Network("64:ff9b:1:a00::/96")]
    assert judged_addresses(IPv6Address("64:ff9b:1:a00::192.0.2.1"), known)[1:] == (IPv4Address("192.0.2.1"),)


def test_the_entries_that_have_a_name() -> None:
    """The domain itself is not below it."""
    assert list(entries_of("a.b.example")) == ["a.b.example", ".b.example", ".example"]


@st.composite
def networks_and_address(draw: st.DrawFn) -> tuple[list[IPNetwork], IPAddress]:
    # Few leading bits, so that networks nest and touch and addresses fall on their borders.
    number = st.integers(0, 15).map(lambda n: n << 28) | st.integers(0, 2**32 - 1)
    v4 = st.tuples(number, st.integers(0, 32)).map(lambda t: ip_network(t, strict=False))
    v6 = st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda t: ip_network(t, strict=False))
    networks = draw(st.lists(v4 | v6, max_size=12))
    edges = [edge for network in networks for edge in (network.network_address, network.broadcast_address)]
    address = st.ip_addresses() | number.map(IPv4Address)
    return networks, draw(st.sampled_from(edges) | address if edges else address)


@given(networks_and_address())
def test_networks_agree_with_a_walk_over_the_entries(case: tuple[list[IPNetwork], IPAddress]) -> None:
    networks, address = case
    matching = [network for network in networks if network.version == address.version and address in network]
    found = NetworkMap({network: network for network in networks}).match(address)
    assert (found in matching) if matching else found is None


CANDIDATES = [f"192.0.2.{n}" for n in range(10)]


def test_rendezvous_moves_only_the_keys_of_the_one_removed() -> None:
    moved = 0
    for n in range(1000):
        key = b"x" * 70 + b"%d" % n  # the whole key counts, however long
        before = rendezvous(key, CANDIDATES, str.encode)
        after = rendezvous(key, [c for c in CANDIDATES if c != "192.0.2.3"], str.encode)
        assert after == [c for c in before if c != "192.0.2.3"]
        moved += before[0] != after[0]
    assert 60 <= moved <= 140


def test_rendezvous_is_the_same_in_another_process() -> None:
    program = (
        "from usocksd.names.match import rendezvous\n"
        "print(*rendezvous(b'key', [f'192.0.2.{n}' for n in reversed(range(10))], str.encode))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == rendezvous(b"key", CANDIDATES, str.encode)

"""No spelling of a destination gets around a rule: through the daemon, with SOCKS5, SOCKS4 and SOCKS4a."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from socket import socket as Socket

import daemons
import pytest
from daemons import GRANTED, GREETING, Daemon, NameServer, Served, receive_exactly, receive_reply

from usocksd.net.address import IPAddress

COMMON = """
[incoming]
port = 0
addresses = ["127.0.0.1"]
[dns]
servers = ["{dns}"]
"""
FORBIDDEN = '"forbidden.test", ".below.test", "bücher.test", "127.0.0.66", "127.0.66.0/24", "2001:db8:66::/48"'
# Everything else is allowed, so a request that evades a rule arrives.
CONFIGS = {
    "deny_sites": f"""
[outgoing]
allow_sites = [".test", "127.0.0.0/8", "0.0.0.0/0", "::/0", ""]
deny_sites = [{FORBIDDEN}]
""",
    "rules": f"""
[[rule]]
name = "forbidden"
action = "deny"
to = [{FORBIDDEN}]
[[rule]]
action = "allow"
to = ["0.0.0.0/0", "::/0"]
""",
    "rules that allow": """
[[rule]]
action = "allow"
to = ["other.test", "127.0.0.1", ".other.test"]
[[rule]]
name = "forbidden"
action = "deny"
""",
    "allow_sites": """
[outgoing]
allow_sites = ["other.test", "127.0.0.1", ".other.test"]
""",
}
NOT_ALLOWED, HOST_UNREACHABLE = 2, 4


def wide(text: str) -> str:
    """In full-width characters."""
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


NAMES = [
    "forbidden.test", "FORBIDDEN.TEST", "Forbidden.Test", "forbidden.test.", "FORBIDDEN.test.",
    "forbidden\u3002test", "forbidden\uff0etest", "forbidden\uff61test", "forbidden.test\u3002",
    wide("forbidden") + ".test", wide("FORBIDDEN.TEST"), "\u24d5orbidden.test", "forbidden.te\u017ft", "forb\u2170dden.test",
    "for\u00adbidden.test", "for\u200bbidden.test", "for\u2060bidden.test", "\ufeffforbidden.test", "forbidden.tes\ufe0ft",
    "a.below.test", "A.B.Below.Test.", "xn--a.below.test", "_dmarc.below.test", "a.below\uff0etest", "-.below.test",
    "bücher.test", "BÜCHER.test", "bu\u0308cher.test", "xn--bcher-kva.test", "XN--BCHER-KVA.TEST.", wide("b") + "ücher.test",
]  # fmt: skip
ADDRESSES = [
    "127.0.0.66", "127.0.66", "127.66", "127.0x42", "0x7f.66", "0177.0.0.0102", "0X7F.0.0.0x42", "2130706498", "0x7f000042",
    "017700000102", "127.0.0.66.", "127.0.0.0x00000042", "127.0.66.255", "127.0.17151",
    "::ffff:127.0.0.66", "::ffff:7f00:42", "::FFFF:7F00:0042", "0:0:0:0:0:ffff:7f00:42", "[::ffff:127.0.0.66]",
    "::ffff:127.0.0.66%lo", "::127.0.0.66", "::7f00:42", "64:ff9b::127.0.0.66", "64:ff9b::7f00:42",
    "2002:7f00:42::", "2002:7f00:42::1", "[2002:7f00:42::]", "2002:7f00:42:1:2:3:4:5",
    "2001:db8:66::1", "2001:0DB8:0066:0000::1", "[2001:db8:66::1]", "2001:db8:66::1%1", "2001:db8:66:0:0:0:1.2.3.4",
    "\uff11\uff12\uff17.0.0.66", "127\u30020\u30020\u300266", "127\uff0e66", "①②⑦.0.0.66", "127.0.0.\U0001d7e8\U0001d7e8", "127.0.0.66\u3002",
]  # fmt: skip
# Neither names nor addresses: nothing is asked for and nothing is dialled. (What a resolver, or a C program before it,
# might cut or unescape.)
NONSENSE = [
    "forbidden.test..", ".forbidden.test", "forbidden..test", "a..below.test", "..", ".", "\u3002", "",
    " forbidden.test", "forbidden.test ", "\tforbidden.test", "forbidden.test\n", "forbidden.test\r\n", "forbidden.test\0",
    "forbidden.test\0.other.test", "other.test\0.forbidden.test", "forbidden%2etest", "forbidden\\.test", "forb\\105dden.test",
    "forbidden.test:80", "forbidden.test/", "user@forbidden.test", "[forbidden.test]", "http://forbidden.test", "*.test",
    "forbidden\u2024test", "a\u0338.forbidden.test\u2044", "xn--\u00e9.below.test",
    "127.0.0.66 ", " 127.0.0.66", "127.0.0.66\0", "127.0.0.66/32", "127.0.0.66:80", "127..0.66", "127.0.0.0.66", "127.0.0.322",
    "4294967362", "0x17f000042", "127.0.0.0x", "127.0.0.08", "127.0.0.6six6.0x42", "1.test.66", "127.0.0.66%lo",
    "[127.0.0.66]", "[::ffff:127.0.0.66", "::ffff:127.0.0.66]", "::ffff:127.66", "::ffff:0x7f.0.0.66", "::ffff:127.0.0.066",
    "2001:db8:66::1%", "2001:db8:66:::1", "a" * 64 + ".below.test", "a." * 122 + "below.test",
]  # fmt: skip


class _Everything(dict):  # type: ignore[type-arg]
    """Every name is at 127.0.0.1, except those that point at a forbidden address."""

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: object, default: object = None) -> Sequence[str]:  # type: ignore[override]
        return POINTING.get(str(name).removesuffix("."), ("127.0.0.1",))


POINTING = {
    "a.other.test": ("127.0.0.66",),
    "mapped.other.test": ("::ffff:127.0.0.66",),
    "nat64.other.test": ("64:ff9b::7f00:42",),
    "6to4.other.test": ("2002:7f00:42::",),
    "v6.other.test": ("2001:db8:66::1",),
}


@pytest.fixture(scope="module")
def dns() -> Iterator[NameServer]:
    with NameServer({}) as server:
        server.names = _Everything()
        yield server


@pytest.fixture(scope="module")
def destination() -> Iterator[Served]:
    """On every address of 127.0.0.0/8."""
    listener = Socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen()
    with Served(listener, daemons.echo) as server:
        yield server


@pytest.fixture(scope="module", params=CONFIGS)
def server(
    request: pytest.FixtureRequest, dns: NameServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    folder: Path = tmp_path_factory.mktemp("usocksd")
    with Daemon("usocksd", COMMON.format(dns=dns.address) + CONFIGS[request.param], folder) as daemon:
        yield daemon


def ask(server: Daemon, destination: Served, host: bytes | IPAddress, version: int) -> int:
    """The reply to a request for this name or address: SOCKS5's, and of SOCKS4 0 if it is granted, else 91."""
    with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE) as client:
        port = destination.port.to_bytes(2)
        if version == 4:
            address, name = (b"\x00\x00\x00\x01", host + b"\x00") if isinstance(host, bytes) else (host.packed, b"")
            client.sendall(b"\x04\x01" + port + address + b"me\x00" + name)
            answer = receive_exactly(client, 8)
            assert answer[:1] == b"\x00"
            return answer[1] - 90 and answer[1]
        if isinstance(host, bytes):
            asked = b"\x03" + bytes((len(host),)) + host
        else:
            asked = (b"\x01" if host.version == 4 else b"\x04") + host.packed
        client.sendall(GREETING + b"\x05\x01\x00" + asked + port)
        assert receive_exactly(client, 2) == b"\x05\x00"
        return receive_reply(client)[0]


@pytest.fixture(autouse=True)
def nobody_arrives(request: pytest.FixtureRequest, destination: Served) -> Iterator[None]:
    """No connection arrives, whatever the replies say."""
    before = len(destination.peers)
    yield
    if "_arrive" not in request.node.name:
        assert len(destination.peers) == before


@pytest.mark.parametrize("version", [4, 5])
def test_connections_that_no_rule_forbids_arrive(server: Daemon, destination: Served, version: int) -> None:
    """Otherwise the tests below would prove nothing."""
    before = len(destination.peers)
    for host in ("other.test", "Other.TEST.", "127.1", "b.other.test"):
        assert ask(server, destination, host.encode(), version) == GRANTED, host
    assert ask(server, destination, ip_address("127.0.0.1"), version) == GRANTED
    daemons.wait_until(lambda: len(destination.peers) == before + 5, "all five arrive")


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("hosts", [NAMES, ADDRESSES], ids=["names", "addresses"])
def test_every_spelling_is_denied_and_none_resolved(
    server: Daemon, dns: NameServer, destination: Served, hosts: Sequence[str], version: int
) -> None:
    before = len(dns.asked)
    refusal = NOT_ALLOWED if version == 5 else 91
    assert {host: ask(server, destination, host.encode(), version) for host in hosts} == dict.fromkeys(hosts, refusal)
    assert dns.asked[before:] == []


@pytest.mark.parametrize("version", [4, 5])
def test_invalid_hosts(server: Daemon, dns: NameServer, destination: Served, version: int) -> None:
    before = len(dns.asked)
    # A SOCKS4a name ends at its first NUL.
    hosts = [host for host in NONSENSE if version == 5 or "\0" not in host]
    allowed = {HOST_UNREACHABLE, 1} if version == 5 else {91}
    assert {
        host: reply for host in hosts if (reply := ask(server, destination, host.encode(), version)) not in allowed
    } == {}
    assert dns.asked[before:] == []


@pytest.mark.parametrize("version", [4, 5])
def test_bytes_that_are_no_text(server: Daemon, dns: NameServer, destination: Served, version: int) -> None:
    before = len(dns.asked)
    for host in (b"b\xfccher.test", b"forbidden\xff.test", b"\xc0\xaeforbidden.test", b"forbidden\xc0\xaetest"):
        assert ask(server, destination, host, version) != GRANTED, host
    assert dns.asked[before:] == []


def test_a_name_that_ends_at_its_nul_with_socks4a(server: Daemon, destination: Served) -> None:
    assert ask(server, destination, b"forbidden.test\0.other.test", 4) == 91


def test_addresses_as_addresses(server: Daemon, destination: Served) -> None:
    for text in (
        "127.0.0.66", "127.0.66.1", "::ffff:127.0.0.66", "::127.0.0.66", "64:ff9b::7f00:42", "2002:7f00:42::", "2001:db8:66::1"
    ):  # fmt: skip
        address = ip_address(text)
        assert ask(server, destination, address, 5) == NOT_ALLOWED, text
        if address.version == 4:
            assert ask(server, destination, address, 4) == 91, text


@pytest.mark.parametrize("version", [4, 5])
def test_names_that_point_at_denied_addresses(server: Daemon, destination: Served, version: int) -> None:
    refusal = NOT_ALLOWED if version == 5 else 91
    # Where only names are allowed, the protection of loopback denies the others all the same.
    by_address = "127.0.0.66" in (server.log.parent / "usocksd.toml").read_text()
    for host in POINTING if by_address else POINTING.keys() - {"v6.other.test"}:
        assert ask(server, destination, host.encode(), version) == refusal, host

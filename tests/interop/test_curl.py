"""curl, in every way it has of being told about a SOCKS proxy."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from random import Random
from urllib.parse import quote

import pytest
from world import (
    DENIED,
    OTHER_PASSWORD,
    OTHER_USER,
    PASSWORD,
    UNKNOWN,
    USER,
    Clients,
    Daemon,
    FarEnd,
    has_ipv6,
    need,
    split_page,
)

COULD_NOT_SEND_OR_RECEIVE, BAD_TLS, BAD_PROXY = 56, 35, 97  # exit statuses of curl(1)

PROXY_USER = f"{USER}:{quote(PASSWORD)}"  # curl decodes the option as it does a URL

# option, URL scheme, protocol of the access record, whether the daemon resolves names
WAYS = [
    pytest.param("--socks4", "socks4", "SOCKS4/4a", False, id="socks4"),
    pytest.param("--socks4a", "socks4a", "SOCKS4/4a", True, id="socks4a"),
    pytest.param("--socks5", "socks5", "SOCKS5", False, id="socks5"),
    pytest.param("--socks5-hostname", "socks5h", "SOCKS5", True, id="socks5-hostname"),
]
BY_NAME = [way for way in WAYS if way.values[3]]
SOCKS5 = [way for way in WAYS if way.values[2] == "SOCKS5"]
ways = pytest.mark.parametrize(("option", "scheme", "protocol", "resolves"), WAYS)
by_name = pytest.mark.parametrize(("option", "scheme", "protocol", "resolves"), BY_NAME)
socks5 = pytest.mark.parametrize(("option", "scheme", "protocol", "resolves"), SOCKS5)
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")

Answer = subprocess.CompletedProcess[bytes]


class Curl:
    """Fetches a page, by default from the far end's web port."""

    def __init__(self, clients: Clients, far: FarEnd) -> None:
        self._path = need("curl", "curl")
        self._clients = clients
        self._far = far

    def __call__(
        self, host: str, *options: str, port: int | None = None, environment: dict[str, str] | None = None
    ) -> Answer:
        url = f"http://{host}:{port or self._far.web}/a/page"
        command = [self._path, "-q", "-g", "-sSvi", *options, url]
        return self._clients.run(*command, environment=environment)

    def peer(self, answer: Answer) -> str:
        """The client that the page names, if the answer is the page."""
        assert answer.returncode == 0, answer.stderr.decode()
        peer, body = split_page(answer.stdout)
        assert body == self._far.page("/a/page")
        return peer


@pytest.fixture
def curl(clients: Clients, far: FarEnd) -> Curl:
    return Curl(clients, far)


def why(answer: Answer) -> str:
    """curl's error if it gets no answer because of the proxy."""
    assert answer.returncode == BAD_PROXY, answer.stderr.decode()
    return answer.stderr.decode()


@ways
def test_an_ipv4_address(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    peer = curl.peer(curl("127.0.0.1", option, daemon.address))
    daemon.relayed(
        far,
        peer,
        protocol=protocol,
        dest_host="127.0.0.1",
        dest_port=far.web,
        dest_addr=f"127.0.0.1:{far.web}",
        user=None,
        rule='allow_sites "127.0.0.1"',
    )


@ipv6
@pytest.mark.parametrize(("option", "scheme", "protocol", "resolves"), WAYS[1:])
def test_an_ipv6_address(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    """SOCKS4 has no room for one, but 4a has: as a name."""
    peer = curl.peer(curl("[::1]", option, daemon.address))
    assert peer.startswith("[::1]:")
    daemon.relayed(far, peer, protocol=protocol, dest_host="::1", dest_addr=f"[::1]:{far.web}")


@ways
def test_localhost(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    """A name that client and daemon both know; the options differ in who resolves it."""
    peer = curl.peer(curl("localhost", option, daemon.address))
    record = daemon.relayed(far, peer, protocol=protocol)
    assert record["dest_host"] in ({"localhost"} if resolves else {"127.0.0.1", "::1"})


@by_name
def test_a_name_that_only_the_daemon_can_resolve(
    curl: Curl, far: FarEnd, daemon: Daemon, names: str, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    peer = curl.peer(curl("inside.test", option, daemon.address))
    daemon.relayed(
        far,
        peer,
        protocol=protocol,
        dest_host="inside.test",
        dest_addr=f"127.0.0.1:{far.web}",
        rule='allow_sites "127.0.0.1"',  # of the address: the name has the other
    )


@ipv6
@by_name
def test_a_name_with_an_ipv6_address_only(
    curl: Curl, far: FarEnd, daemon: Daemon, names: str, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    peer = curl.peer(curl("six.test", option, daemon.address))
    daemon.relayed(far, peer, protocol=protocol, dest_host="six.test", dest_addr=f"[::1]:{far.web}")


@by_name
def test_an_international_name(
    curl: Curl, far: FarEnd, daemon: Daemon, names: str, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    """Which bytes curl sends depends on its build; the daemon accepts all of them."""
    peer = curl.peer(curl("Bücher.TEST", option, daemon.address))
    record = daemon.relayed(far, peer, protocol=protocol)
    assert record["dest_host"].lower() in {"bücher.test", "xn--bcher-kva.test"}


@ways
def test_by_url(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    peer = curl.peer(curl("127.0.0.1", "--proxy", f"{scheme}://{daemon.address}"))
    daemon.relayed(far, peer, protocol=protocol)


def test_by_environment(curl: Curl, far: FarEnd, daemon: Daemon, names: str) -> None:
    peer = curl.peer(curl("inside.test", environment={"ALL_PROXY": f"socks5h://{daemon.address}"}))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="inside.test")


@socks5
@pytest.mark.parametrize("daemon_of_users", ["guarded", "lenient"])
def test_a_user(
    request: pytest.FixtureRequest,
    curl: Curl,
    far: FarEnd,
    daemon_of_users: str,
    option: str,
    scheme: str,
    protocol: str,
    resolves: bool,
) -> None:
    daemon: Daemon = request.getfixturevalue(daemon_of_users)
    peer = curl.peer(curl("127.0.0.1", option, daemon.address, "--proxy-user", PROXY_USER))
    daemon.relayed(far, peer, protocol=protocol, user=USER)


@socks5
@pytest.mark.parametrize(("user", "password"), [(USER, PASSWORD), (OTHER_USER, OTHER_PASSWORD)])
def test_a_user_in_the_url(
    curl: Curl,
    far: FarEnd,
    guarded: Daemon,
    user: str,
    password: str,
    option: str,
    scheme: str,
    protocol: str,
    resolves: bool,
) -> None:
    url = f"{scheme}://{quote(user)}:{quote(password, safe='')}@{guarded.address}"
    peer = curl.peer(curl("127.0.0.1", "--proxy", url))
    guarded.relayed(far, peer, protocol=protocol, user=user)


@ways
def test_a_user_offered_without_need(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    """A server without users lets everybody in, and claims no user that it did not check."""
    peer = curl.peer(curl("127.0.0.1", "--proxy", f"{scheme}://{USER}:secret@{daemon.address}"))
    daemon.relayed(far, peer, protocol=protocol, user=None)


@ways
def test_no_user_if_authentication_is_optional(
    curl: Curl, far: FarEnd, lenient: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    peer = curl.peer(curl("127.0.0.1", option, lenient.address))
    lenient.relayed(far, peer, protocol=protocol, user=None)


def test_a_user_without_a_password_if_authentication_is_optional(curl: Curl, far: FarEnd, lenient: Daemon) -> None:
    """Such a client is anonymous; a wrong password of the same user is refused."""
    peer = curl.peer(curl("127.0.0.1", "--socks5", lenient.address, "--proxy-user", f"{USER}:"))
    lenient.relayed(far, peer, protocol="SOCKS5", user=None)


@socks5
def test_no_user_if_authentication_is_required(
    curl: Curl, guarded: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    assert "No authentication method was acceptable" in why(curl("127.0.0.1", option, guarded.address))
    guarded.expect("handshake failed", error="no acceptable authentication method among [00 01]")


@pytest.mark.parametrize("daemon_of_users", ["guarded", "lenient"])
def test_a_wrong_password(request: pytest.FixtureRequest, curl: Curl, daemon_of_users: str) -> None:
    daemon: Daemon = request.getfixturevalue(daemon_of_users)
    answer = curl("127.0.0.1", "--socks5", daemon.address, "--proxy-user", f"{USER}:wrong")
    assert "User was rejected by the SOCKS5 server" in why(answer)
    record = daemon.expect("handshake failed", error="wrong user or password")
    assert "wrong:" not in str(record)


@pytest.mark.parametrize("option", ["--socks4", "--socks4a"])
def test_socks4_has_no_password(curl: Curl, guarded: Daemon, option: str) -> None:
    answer = curl("127.0.0.1", option, guarded.address, "--proxy-user", PROXY_USER)
    assert "(91), request rejected or failed" in why(answer)
    guarded.expect("handshake failed", error="SOCKS4, which can't authenticate")


def test_gssapi_alone(curl: Curl, guarded: Daemon) -> None:
    """Declined by not choosing it."""
    answer = curl("127.0.0.1", "--socks5", guarded.address, "--socks5-gssapi", "--proxy-user", PROXY_USER)
    if b"built-in" in answer.stderr:
        pytest.skip("this curl was built without GSSAPI")
    assert "No authentication method was acceptable" in why(answer)
    guarded.expect("handshake failed", error="no acceptable authentication method among [00 01]")


def reply_of(answer: Answer) -> int:
    """The reply that the daemon gave, out of curl's words about it."""
    words = why(answer)
    line = next(line for line in words.splitlines() if re.search("(Can't|cannot) complete SOCKS", line))
    return int(line.rpartition("(")[2].partition(")")[0])


@ways
def test_a_denied_address(
    curl: Curl, daemon: Daemon, far: FarEnd, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    assert reply_of(curl(DENIED, option, daemon.address)) == (2 if protocol == "SOCKS5" else 91)
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host=DENIED, dest_port=far.web, rule="allow_sites")


@pytest.mark.parametrize(
    ("host", "rule"),
    [
        ("forbidden.test", 'deny_sites "forbidden.test"'),
        ("FORBIDDEN.test.", 'deny_sites "forbidden.test"'),
        ("elsewhere.example", "allow_sites"),
    ],
)
@by_name
def test_a_denied_name(
    curl: Curl,
    daemon: Daemon,
    host: str,
    rule: str,
    option: str,
    scheme: str,
    protocol: str,
    resolves: bool,
) -> None:
    assert reply_of(curl(host, option, daemon.address)) == (2 if protocol == "SOCKS5" else 91)
    daemon.expect("ruleset mismatch", protocol=protocol, rule=rule)


@by_name
def test_an_allowed_name_with_a_denied_address(
    curl: Curl, daemon: Daemon, names: str, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    """Allowing a name lifts no protection: whoever owns it could point it anywhere."""
    assert reply_of(curl("trap.test", option, daemon.address)) == (2 if protocol == "SOCKS5" else 91)
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host="trap.test", rule="built-in: loopback")


@ways
def test_a_refused_port(
    curl: Curl, far: FarEnd, daemon: Daemon, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    answer = curl("127.0.0.1", option, daemon.address, port=far.refused)
    assert reply_of(answer) == (5 if protocol == "SOCKS5" else 91)
    record = daemon.expect("dial to destination failed", protocol=protocol, dest_port=far.refused)
    assert "ECONNREFUSED" in record["error"]


@by_name
def test_an_unknown_name(
    curl: Curl, daemon: Daemon, names: str, option: str, scheme: str, protocol: str, resolves: bool
) -> None:
    assert reply_of(curl(UNKNOWN, option, daemon.address)) == (4 if protocol == "SOCKS5" else 91)
    daemon.expect("dial to destination failed", protocol=protocol, dest_host=UNKNOWN, error=f"{UNKNOWN}: no such name")


@ways
def test_megabytes_there_and_back(
    tmp_path: Path,
    clients: Clients,
    far: FarEnd,
    daemon: Daemon,
    option: str,
    scheme: str,
    protocol: str,
    resolves: bool,
) -> None:
    sent, received, head = tmp_path / "sent", tmp_path / "received", tmp_path / "head"
    sent.write_bytes(Random(2).randbytes(5_000_000))
    answer = clients.run(
        *(need("curl", "curl"), "-q", "-sS", option, daemon.address, "--data-binary", f"@{sent}"),
        *("-H", "Expect:", "-o", received, "-D", head, f"http://127.0.0.1:{far.web}/"),
    )
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert received.read_bytes() == sent.read_bytes()
    peer, _ = split_page(head.read_bytes())
    daemon.relayed(far, peer, protocol=protocol)


def test_http_at_the_socks_port(curl: Curl, daemon: Daemon) -> None:
    answer = curl("127.0.0.1", "--proxy", f"http://{daemon.address}")
    assert answer.returncode == 0
    assert answer.stdout.startswith(b"HTTP/1.1 501 SOCKS proxy, not HTTP\r\n")
    assert answer.stdout.endswith(
        b"\r\n\r\nThis port is a SOCKS proxy (SOCKS4, SOCKS4a, SOCKS5). It does not speak HTTP.\n"
    )
    daemon.expect("handshake failed", error="spoke HTTP to a SOCKS port")


def test_connect_at_the_socks_port(curl: Curl, daemon: Daemon) -> None:
    answer = curl("127.0.0.1", "--proxytunnel", "--proxy", f"http://{daemon.address}")
    assert answer.returncode == COULD_NOT_SEND_OR_RECEIVE
    assert b"501" in answer.stderr
    daemon.expect("handshake failed", error="spoke HTTP to a SOCKS port")


def test_tls_at_the_socks_port(curl: Curl, daemon: Daemon) -> None:
    """Closed at once; logged once per client, so the second try leaves no record."""
    for _ in range(2):
        answer = curl("127.0.0.1", "--proxy", f"https://{daemon.address}")
        assert answer.returncode == BAD_TLS
    curl("127.0.0.1", "--proxy", f"http://{daemon.address}")
    daemon.expect("handshake failed", error="spoke TLS to a SOCKS port")
    daemon.expect("handshake failed", error="spoke HTTP to a SOCKS port")

"""PySocks, the library behind `requests[socks]` and many scripts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from world import (
    DENIED,
    OTHER_PASSWORD,
    OTHER_USER,
    PASSWORD,
    PATIENCE,
    UNKNOWN,
    USER,
    Daemon,
    FarEnd,
    has_ipv6,
    talk,
)

socks: Any = pytest.importorskip("socks", reason="PySocks is not installed (PyPI PySocks)")

VERSIONS = [pytest.param(socks.SOCKS4, "SOCKS4/4a", id="socks4"), pytest.param(socks.SOCKS5, "SOCKS5", id="socks5")]
versions = pytest.mark.parametrize(("version", "protocol"), VERSIONS)
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")
SOME = Random(4).randbytes(300_000)


@contextlib.contextmanager
def connected(
    daemon: Daemon, version: int, to: tuple[str, int], *, rdns: bool = True, user: str | None = None, password: str = ""
) -> Iterator[Any]:
    """A PySocks socket that has gone through the daemon."""
    with socks.socksocket() as sock:
        sock.settimeout(PATIENCE)
        sock.set_proxy(version, daemon.host, daemon.port, rdns=rdns, username=user, password=password if user else None)
        sock.connect(to)
        yield sock


def endpoint(place: tuple[str, int]) -> str:
    return f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"


@versions
@pytest.mark.parametrize("rdns", [True, False])
def test_an_ipv4_address(far: FarEnd, daemon: Daemon, version: int, protocol: str, rdns: bool) -> None:
    with connected(daemon, version, ("127.0.0.1", far.echo), rdns=rdns) as sock:
        bound = endpoint(sock.get_proxy_sockname())
        peer = talk(sock, SOME)
    assert bound == peer  # the bound address in the reply is what the far end sees
    daemon.relayed(far, peer, protocol=protocol, dest_host="127.0.0.1", dest_port=far.echo, user=None)


@ipv6
@pytest.mark.parametrize("rdns", [True, False])
def test_an_ipv6_address(far: FarEnd, daemon: Daemon, rdns: bool) -> None:
    with connected(daemon, socks.SOCKS5, ("::1", far.echo), rdns=rdns) as sock:
        bound = endpoint(sock.get_proxy_sockname())
        peer = talk(sock, SOME)
    assert bound == peer
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.echo}")


@versions
def test_a_name_for_the_daemon_to_resolve(far: FarEnd, daemon: Daemon, names: str, version: int, protocol: str) -> None:
    with connected(daemon, version, ("inside.test", far.echo)) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol=protocol, dest_host="inside.test", dest_addr=f"127.0.0.1:{far.echo}")


@ipv6
@versions
def test_a_name_with_an_ipv6_address_only(far: FarEnd, daemon: Daemon, names: str, version: int, protocol: str) -> None:
    """The daemon can't tell a SOCKS4 client its IPv6 address, and sends 0.0.0.0:0."""
    with connected(daemon, version, ("six.test", far.echo)) as sock:
        bound = endpoint(sock.get_proxy_sockname())
        peer = talk(sock, SOME)
    assert bound == (peer if version == socks.SOCKS5 else "0.0.0.0:0")
    daemon.relayed(far, peer, protocol=protocol, dest_host="six.test", dest_addr=f"[::1]:{far.echo}")


@versions
def test_a_name_that_the_client_resolves(far: FarEnd, daemon: Daemon, version: int, protocol: str) -> None:
    with connected(daemon, version, ("localhost", far.echo), rdns=False) as sock:
        peer = talk(sock, SOME)
    record = daemon.relayed(far, peer, protocol=protocol)
    assert record["dest_host"] in {"127.0.0.1", "::1"}


@pytest.mark.parametrize(("user", "password"), [(USER, PASSWORD), (OTHER_USER, OTHER_PASSWORD)])
@pytest.mark.parametrize("daemon_of_users", ["guarded", "lenient"])
def test_a_user(request: pytest.FixtureRequest, far: FarEnd, daemon_of_users: str, user: str, password: str) -> None:
    daemon: Daemon = request.getfixturevalue(daemon_of_users)
    to = ("127.0.0.1", far.echo)
    with connected(daemon, socks.SOCKS5, to, user=user, password=password) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol="SOCKS5", user=user)


@versions
def test_a_user_offered_without_need(far: FarEnd, daemon: Daemon, version: int, protocol: str) -> None:
    with connected(daemon, version, ("127.0.0.1", far.echo), user=USER, password="secret") as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol=protocol, user=None)


def refusal(daemon: Daemon, version: int, to: tuple[str, int], **how: Any) -> Any:
    """The error of a failed attempt to connect. PySocks wraps even its own exceptions, since they are OSErrors."""
    with pytest.raises(socks.GeneralProxyError) as caught, connected(daemon, version, to, **how):
        pass
    return caught.value.socket_err


def is_reply(error: Any, reply: int) -> bool:
    """Whether this is how PySocks reports that SOCKS5 reply, or SOCKS4's only refusal."""
    kind, code = (socks.SOCKS4Error, 0x5B) if isinstance(error, socks.SOCKS4Error) else (socks.SOCKS5Error, reply)
    return type(error) is kind and error.msg.startswith(f"{code:#04x}: ")


@versions
def test_a_denied_address(far: FarEnd, daemon: Daemon, version: int, protocol: str) -> None:
    assert is_reply(refusal(daemon, version, (DENIED, far.echo)), 2)
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host=DENIED, rule="allow_sites")


@versions
def test_an_allowed_name_with_a_denied_address(
    far: FarEnd, daemon: Daemon, names: str, version: int, protocol: str
) -> None:
    assert is_reply(refusal(daemon, version, ("trap.test", far.echo)), 2)
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host="trap.test", rule="built-in: loopback")


@versions
def test_a_refused_port(far: FarEnd, daemon: Daemon, version: int, protocol: str) -> None:
    assert is_reply(refusal(daemon, version, ("127.0.0.1", far.refused)), 5)
    record = daemon.expect("dial to destination failed", protocol=protocol, dest_port=far.refused)
    assert "ECONNREFUSED" in record["error"]


@versions
def test_an_unknown_name(far: FarEnd, daemon: Daemon, names: str, version: int, protocol: str) -> None:
    assert is_reply(refusal(daemon, version, (UNKNOWN, far.echo)), 4)
    daemon.expect("dial to destination failed", protocol=protocol, error=f"{UNKNOWN}: no such name")


def test_no_user_if_authentication_is_required(far: FarEnd, guarded: Daemon) -> None:
    error = refusal(guarded, socks.SOCKS5, ("127.0.0.1", far.echo))
    assert type(error) is socks.SOCKS5AuthError
    assert "All offered SOCKS5 authentication methods were rejected" in error.msg
    guarded.expect("handshake failed", error="no acceptable authentication method among [00]")


def test_a_wrong_password(far: FarEnd, guarded: Daemon) -> None:
    error = refusal(guarded, socks.SOCKS5, ("127.0.0.1", far.echo), user=USER, password="wrong")
    assert type(error) is socks.SOCKS5AuthError
    assert "SOCKS5 authentication failed" in error.msg
    guarded.expect("handshake failed", error="wrong user or password")


def test_socks4_where_a_user_is_needed(far: FarEnd, guarded: Daemon) -> None:
    assert is_reply(refusal(guarded, socks.SOCKS4, ("127.0.0.1", far.echo), user=USER), 0x5B)
    guarded.expect("handshake failed", error="SOCKS4, which can't authenticate")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=ipv6)])
def test_datagrams(daemon: Daemon, host: str) -> None:
    """PySocks asks for an association with the name "0" and its real port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as far:
        far.settimeout(PATIENCE)
        far.bind((host, 0))
        with socks.socksocket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.set_proxy(socks.SOCKS5, daemon.host, daemon.port)
            for number in range(3):
                sock.sendto(b"%d" % number, far.getsockname()[:2])
                data, sender = far.recvfrom(100)
                far.sendto(data + b" back", sender)
                assert sock.recvfrom(100) == (b"%d back" % number, far.getsockname()[:2])

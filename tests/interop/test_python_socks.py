"""python-socks, the library behind the SOCKS proxies of aiohttp and httpx: sync, on trio and on asyncio."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
import trio
from world import (
    DENIED,
    PASSWORD,
    PATIENCE,
    UNKNOWN,
    USER,
    Daemon,
    FarEnd,
    has_ipv6,
    talk,
)

python_socks: Any = pytest.importorskip("python_socks", reason="python-socks is not installed (PyPI python-socks)")
from python_socks.async_ import asyncio as on_asyncio  # noqa: E402
from python_socks.async_ import trio as on_trio  # noqa: E402
from python_socks.sync import Proxy  # noqa: E402

SOME = Random(5).randbytes(300_000)
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")


def connect_sync(url: str, host: str, port: int, **how: Any) -> socket.socket:
    sock: socket.socket = Proxy.from_url(url, **how).connect(host, port, timeout=PATIENCE)
    return sock


def connect_trio(url: str, host: str, port: int, **how: Any) -> socket.socket:
    async def connect() -> socket.socket:
        sock = await on_trio.Proxy.from_url(url, **how).connect(host, port, timeout=PATIENCE)
        return blocking(sock.detach())

    return trio.run(connect)


def connect_asyncio(url: str, host: str, port: int, **how: Any) -> socket.socket:
    async def connect() -> socket.socket:
        sock = await on_asyncio.Proxy.from_url(url, **how).connect(host, port, timeout=PATIENCE)
        return blocking(sock.detach())

    return asyncio.run(connect())


def blocking(fd: int) -> socket.socket:
    """An ordinary socket of a descriptor that an event loop had."""
    sock = socket.socket(fileno=fd)
    sock.settimeout(PATIENCE)
    return sock


Connect = Callable[..., socket.socket]
FLAVOURS = {"sync": connect_sync, "trio": connect_trio, "asyncio": connect_asyncio}


@pytest.fixture(params=list(FLAVOURS))
def connect(request: pytest.FixtureRequest) -> Connect:
    """Connects through the proxy of a URL to a host and port: each test runs with every flavour of the library."""
    return FLAVOURS[request.param]


versions = pytest.mark.parametrize(("version", "protocol"), [("socks4", "SOCKS4/4a"), ("socks5", "SOCKS5")])


@versions
def test_an_ipv4_address(connect: Connect, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    with connect(f"{version}://{daemon.address}", "127.0.0.1", far.echo) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol=protocol, dest_host="127.0.0.1", dest_port=far.echo, user=None)


@ipv6
def test_an_ipv6_address(connect: Connect, far: FarEnd, daemon: Daemon) -> None:
    with connect(f"socks5://{daemon.address}", "::1", far.echo) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.echo}")


@versions
def test_a_name_for_the_daemon_to_resolve(
    connect: Connect, far: FarEnd, daemon: Daemon, names: str, version: str, protocol: str
) -> None:
    with connect(f"{version}://{daemon.address}", "inside.test", far.echo, rdns=True) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol=protocol, dest_host="inside.test", dest_addr=f"127.0.0.1:{far.echo}")


@versions
def test_a_name_that_the_client_resolves(
    connect: Connect, far: FarEnd, daemon: Daemon, version: str, protocol: str
) -> None:
    with connect(f"{version}://{daemon.address}", "localhost", far.echo, rdns=False) as sock:
        peer = talk(sock, SOME)
    record = daemon.relayed(far, peer, protocol=protocol)
    assert record["dest_host"] in {"127.0.0.1", "::1"}


def test_a_user(connect: Connect, far: FarEnd, guarded: Daemon) -> None:
    """In ASCII, the library has no others."""
    url = f"socks5://{USER}:{quote(PASSWORD, safe='')}@{guarded.address}"
    with connect(url, "127.0.0.1", far.echo) as sock:
        peer = talk(sock, SOME)
    guarded.relayed(far, peer, protocol="SOCKS5", user=USER)


@versions
def test_a_user_offered_without_need(
    connect: Connect, far: FarEnd, daemon: Daemon, version: str, protocol: str
) -> None:
    with connect(f"{version}://{USER}:secret@{daemon.address}", "127.0.0.1", far.echo) as sock:
        peer = talk(sock, SOME)
    daemon.relayed(far, peer, protocol=protocol, user=None)


def refusal(connect: Connect, url: str, host: str, port: int) -> Any:
    """The exception that ends an attempt to connect."""
    with pytest.raises(python_socks.ProxyError) as caught:
        connect(url, host, port, rdns=True).close()
    return caught.value


@versions
def test_a_denied_address(connect: Connect, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    error = refusal(connect, f"{version}://{daemon.address}", DENIED, far.echo)
    assert error.error_code == (2 if version == "socks5" else 91)
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host=DENIED, rule="allow_sites")


@versions
def test_a_refused_port(connect: Connect, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    error = refusal(connect, f"{version}://{daemon.address}", "127.0.0.1", far.refused)
    assert error.error_code == (5 if version == "socks5" else 91)
    record = daemon.expect("dial to destination failed", protocol=protocol, dest_port=far.refused)
    assert "ECONNREFUSED" in record["error"]


@versions
def test_an_unknown_name(
    connect: Connect, far: FarEnd, daemon: Daemon, names: str, version: str, protocol: str
) -> None:
    error = refusal(connect, f"{version}://{daemon.address}", UNKNOWN, far.echo)
    assert error.error_code == (4 if version == "socks5" else 91)
    daemon.expect("dial to destination failed", protocol=protocol, error=f"{UNKNOWN}: no such name")


def test_no_user_if_authentication_is_required(connect: Connect, far: FarEnd, guarded: Daemon) -> None:
    error = refusal(connect, f"socks5://{guarded.address}", "127.0.0.1", far.echo)
    assert "No acceptable authentication methods were offered" in str(error)
    guarded.expect("handshake failed", error="no acceptable authentication method among [00]")


def test_a_wrong_password(far: FarEnd, guarded: Daemon) -> None:
    """With one flavour only: a wrong password takes its second."""
    error = refusal(connect_sync, f"socks5://{USER}:wrong@{guarded.address}", "127.0.0.1", far.echo)
    assert "Username and password authentication failure" in str(error)
    guarded.expect("handshake failed", error="wrong user or password")

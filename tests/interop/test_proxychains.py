"""proxychains: a preloaded library that takes a program's connections, here curl's, through a chain of proxies."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from world import DENIED, PASSWORD, UNKNOWN, USER, Clients, Daemon, FarEnd, has_ipv6, need, split_page

ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")
versions = pytest.mark.parametrize(("version", "protocol"), [("socks4", "SOCKS4/4a"), ("socks5", "SOCKS5")])
COULD_NOT_CONNECT = 7  # exit status of curl(1)


class Proxychains:
    """Fetches a page with curl through a strict chain."""

    def __init__(self, folder: Path, clients: Clients, far: FarEnd) -> None:
        self._command = [need("proxychains4", "proxychains4"), "-f", str(folder / "chain"), need("curl", "curl")]
        self._config = folder / "chain"
        self._clients = clients
        self._far = far

    def __call__(self, *proxies: str, to: str, port: int | None = None) -> subprocess.CompletedProcess[bytes]:
        # proxy_dns: the program is given a made-up address for a name, and the last proxy gets the name.
        lines = ["strict_chain", "proxy_dns", "[ProxyList]", *proxies]
        self._config.write_text("".join(f"{line}\n" for line in lines))
        return self._clients.run(*self._command, "-q", "-g", "-sSi", f"http://{to}:{port or self._far.web}/page")

    def peer(self, done: subprocess.CompletedProcess[bytes]) -> str:
        """The client that the page names, if the answer is the page."""
        assert done.returncode == 0, done.stderr.decode()
        peer, body = split_page(done.stdout)
        assert body == self._far.page("/page")
        return peer


@pytest.fixture
def chain(tmp_path: Path, clients: Clients, far: FarEnd) -> Proxychains:
    return Proxychains(tmp_path, clients, far)


def proxy(version: str, daemon: Daemon, *user: str) -> str:
    """A line of the proxy list."""
    return " ".join([version, daemon.host, str(daemon.port), *user])


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """proxychains's message about a failed attempt."""
    assert done.returncode == COULD_NOT_CONNECT, done.stderr.decode()
    return next(line for line in done.stderr.decode().splitlines() if "Strict chain" in line)


@versions
def test_an_address(chain: Proxychains, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    peer = chain.peer(chain(proxy(version, daemon), to="127.0.0.1"))
    daemon.relayed(far, peer, protocol=protocol, dest_host="127.0.0.1", dest_port=far.web, user=None)


@ipv6
def test_an_ipv6_address(chain: Proxychains, far: FarEnd, daemon: Daemon) -> None:
    peer = chain.peer(chain(proxy("socks5", daemon), to="[::1]"))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.web}")


@versions
def test_a_name(chain: Proxychains, far: FarEnd, daemon: Daemon, names: str, version: str, protocol: str) -> None:
    peer = chain.peer(chain(proxy(version, daemon), to="inside.test"))
    daemon.relayed(far, peer, protocol=protocol, dest_host="inside.test")


def test_a_user(chain: Proxychains, far: FarEnd, guarded: Daemon) -> None:
    peer = chain.peer(chain(proxy("socks5", guarded, USER, PASSWORD), to="127.0.0.1"))
    guarded.relayed(far, peer, protocol="SOCKS5", user=USER)


def test_a_chain(chain: Proxychains, far: FarEnd, daemon: Daemon, guarded: Daemon, names: str) -> None:
    """Through one daemon to the other: the name and the user are for the last."""
    links = [proxy("socks4", daemon), proxy("socks5", guarded, USER, PASSWORD)]
    peer = chain.peer(chain(*links, to="inside.test"))
    last = guarded.relayed(far, peer, protocol="SOCKS5", user=USER, dest_host="inside.test")
    first = daemon.expect("proxy ends", src_addr=last["client_addr"])
    assert first["dest_addr"] == guarded.address
    assert first["tx_bytes"] > last["tx_bytes"]  # the handshake with the last one


@versions
def test_a_denied_address(chain: Proxychains, daemon: Daemon, version: str, protocol: str) -> None:
    assert "OK" not in complaint(chain(proxy(version, daemon), to=DENIED))
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host=DENIED)


@versions
def test_a_refused_port(chain: Proxychains, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    assert "OK" not in complaint(chain(proxy(version, daemon), to="127.0.0.1", port=far.refused))
    daemon.expect("dial to destination failed", protocol=protocol, dest_port=far.refused)


@versions
def test_an_unknown_name(chain: Proxychains, daemon: Daemon, names: str, version: str, protocol: str) -> None:
    assert "OK" not in complaint(chain(proxy(version, daemon), to=UNKNOWN))
    daemon.expect("dial to destination failed", protocol=protocol, dest_host=UNKNOWN)


def test_no_user_if_authentication_is_required(chain: Proxychains, guarded: Daemon) -> None:
    assert complaint(chain(proxy("socks5", guarded), to="127.0.0.1")).endswith("<--denied")
    guarded.expect("handshake failed", error="no acceptable authentication method among [00]")


def test_a_wrong_password(chain: Proxychains, guarded: Daemon) -> None:
    assert complaint(chain(proxy("socks5", guarded, USER, "wrong"), to="127.0.0.1")).endswith("<--denied")
    guarded.expect("handshake failed", error="wrong user or password")


def test_socks4_where_a_user_is_needed(chain: Proxychains, guarded: Daemon) -> None:
    assert complaint(chain(proxy("socks4", guarded, USER), to="127.0.0.1")).endswith("<--denied")
    guarded.expect("handshake failed", error="SOCKS4, which can't authenticate")

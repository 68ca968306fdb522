"""Node.js. It has no SOCKS client of its own; npm brings one, the package `socks`, which most others build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from world import DENIED, PASSWORD, UNKNOWN, USER, Clients, Daemon, FarEnd, has_ipv6, need

ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")
versions = pytest.mark.parametrize(("version", "protocol"), [(4, "SOCKS4/4a"), (5, "SOCKS5")])


@pytest.fixture(scope="module")
def package() -> Path:
    """Where the package `socks` is: among npm's own, or beside npm, as Debian has it."""
    npm = Path(need("npm", "npm")).resolve().parents[1]  # of .../npm/bin/npm-cli.js
    for place in npm / "node_modules/socks", npm.parent / "socks":
        if place.is_dir():
            return place
    pytest.skip("the npm package socks is not installed, and Node itself has no SOCKS client (Debian package npm)")


class Node:
    def __init__(self, package: Path, clients: Clients) -> None:
        self._command = [need("node", "nodejs"), Path(__file__).with_name("client.js"), package]
        self._clients = clients

    def __call__(
        self, daemon: Daemon, version: int, host: str, port: int, user: str = "", password: str = ""
    ) -> dict[str, Any]:
        """Says hello to the echo there; returns what client.js prints."""
        proxy: dict[str, Any] = {"host": daemon.host, "port": daemon.port, "type": version}
        if user:
            proxy |= {"userId": user, "password": password}
        job = {"proxy": proxy, "host": host, "port": port, "text": "hello"}
        done = self._clients.run(*self._command, json.dumps(job))
        assert (done.returncode, done.stderr) == (0, b"")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def peer(self, answer: dict[str, Any]) -> str:
        """The address of the client, if it got an answer."""
        assert "error" not in answer, answer
        heard: str = answer["heard"]
        peer, _, echoed = heard.partition("\n")
        assert echoed == "hello"
        return peer


@pytest.fixture
def node(package: Path, clients: Clients) -> Node:
    return Node(package, clients)


@versions
def test_an_ipv4_address(node: Node, far: FarEnd, daemon: Daemon, version: int, protocol: str) -> None:
    answer = node(daemon, version, "127.0.0.1", far.echo)
    peer = node.peer(answer)
    if version == 5:  # it does not report the address in SOCKS4's reply
        bound = answer["bound"]
        assert f"{bound['host']}:{bound['port']}" == peer
    daemon.relayed(far, peer, protocol=protocol, dest_host="127.0.0.1", user=None)


@ipv6
def test_an_ipv6_address(node: Node, far: FarEnd, daemon: Daemon) -> None:
    peer = node.peer(node(daemon, 5, "::1", far.echo))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.echo}")


@versions
def test_a_name(node: Node, far: FarEnd, daemon: Daemon, names: str, version: int, protocol: str) -> None:
    peer = node.peer(node(daemon, version, "inside.test", far.echo))
    daemon.relayed(far, peer, protocol=protocol, dest_host="inside.test")


def test_a_user(node: Node, far: FarEnd, guarded: Daemon) -> None:
    peer = node.peer(node(guarded, 5, "127.0.0.1", far.echo, USER, PASSWORD))
    guarded.relayed(far, peer, protocol="SOCKS5", user=USER)


def test_no_user_if_authentication_is_required(node: Node, far: FarEnd, guarded: Daemon) -> None:
    assert "no accepted authentication type" in node(guarded, 5, "127.0.0.1", far.echo)["error"]
    guarded.expect("handshake failed", error="no acceptable authentication method among [00]")


def test_a_wrong_password(node: Node, far: FarEnd, guarded: Daemon) -> None:
    answer = node(guarded, 5, "127.0.0.1", far.echo, USER, "wrong")
    assert answer == {"error": "Socks5 Authentication failed"}
    guarded.expect("handshake failed", error="wrong user or password")


@pytest.mark.parametrize(("version", "reply"), [(4, "Failed"), (5, "NotAllowed")])
def test_a_denied_address(node: Node, far: FarEnd, daemon: Daemon, version: int, reply: str) -> None:
    assert reply in node(daemon, version, DENIED, far.echo)["error"]
    daemon.expect("ruleset mismatch", dest_host=DENIED)


def test_a_refused_port(node: Node, far: FarEnd, daemon: Daemon) -> None:
    assert "ConnectionRefused" in node(daemon, 5, "127.0.0.1", far.refused)["error"]
    daemon.expect("dial to destination failed", dest_port=far.refused)


def test_an_unknown_name(node: Node, far: FarEnd, daemon: Daemon, names: str) -> None:
    assert "HostUnreachable" in node(daemon, 5, UNKNOWN, far.echo)["error"]
    daemon.expect("dial to destination failed", dest_host=UNKNOWN)

"""`transocks doctor` and `rules verify` with udp_ports: what becomes of datagrams."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket

import lab
import pytest
from test_doctor import IP_TRANSPARENT, IPV6_TRANSPARENT, Setup

PORT = 1084
START = 'start transocks, with listen_udp = "localhost:1084"'
RULES = """listen_udp = "localhost:1084"
[rules]
mode = "{mode}"
tool = "{tool}"
udp_ports = [53, 3478]
"""


class WithUDP(Setup):
    """A host or gateway with sockets for UDP, as transocks has them, and its own rules."""

    def __init__(self, net: lab.Net, folder: Path, mode: str, tool: str) -> None:
        super().__init__(net, folder, mode)
        self.configure(more=RULES.format(mode=mode, tool=tool))
        self.datagrams = [self.take(address) for address in ("127.0.0.1", "::1")]
        self.rules("apply", "--force")

    def take(self, address: str, *, transparent: bool = True) -> Socket:
        six = ":" in address
        sock = self.enter_context(self.proxy.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM))
        level, option = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if six else (socket.IPPROTO_IP, IP_TRANSPARENT)
        sock.setsockopt(level, option, transparent)
        sock.bind((address, PORT))
        sock.setblocking(False)
        return sock

    def without(self) -> None:
        for sock in self.datagrams:
            sock.close()


@pytest.fixture(params=["host", "gateway"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WithUDP]:
    """With nft."""
    with WithUDP(request.getfixturevalue(f"{request.param}_net"), tmp_path, request.param, "nft") as made:
        yield made


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize("mode", ["host", "gateway"])
def test_healthy(mode: str, tool: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with WithUDP(request.getfixturevalue(f"{mode}_net"), tmp_path, mode, tool) as made:
        found = made.doctor()
        assert found.bad == {}
        title = "host" if mode == "host" else "tproxy"
        names = [f"{mode}, IPv4", f"{mode}, IPv6", f"{title} (UDP), IPv4", f"{title} (UDP), IPv6"]
        assert [text.split(":")[0] for text in found.of("ok", "listeners")] == names
        assert list(dict.fromkeys(text.split(":")[0] for text in found.of("ok", "rules"))) == names
        assert made.rules("verify").startswith("as they should be")
        for sock in made.datagrams:
            with pytest.raises(BlockingIOError):
                sock.recv(100)  # no socket gets a sample


def test_nobody_takes_the_datagrams(there: WithUDP) -> None:
    there.without()
    found = there.doctor()
    assert set(found.faults) == {"listeners"}
    assert any("where nobody takes them" in seen for seen in found.of("fault", "listeners"))
    assert {f["do"] for f in found.findings if f["state"] == "fault"} == {START}


def test_a_socket_that_is_not_transparent(there: WithUDP) -> None:
    there.without()
    there.take("127.0.0.1", transparent=False)
    there.take("::1")
    found = there.doctor()
    assert set(found.faults) == {"listeners"}
    assert "lacks IP_TRANSPARENT" in found.faults["listeners"]
    assert {f["do"] for f in found.findings if f["state"] == "fault"} == {"name the port in listen_udp"}


def test_no_routing(there: WithUDP) -> None:
    there.run("ip rule del fwmark 0x7474")
    found = there.doctor()
    assert {"routes", "applied rules"} >= set(found.faults) >= {"routes"}
    assert "(mark 0x7474) is not routed to this host" in found.faults["routes"]
    there.follow(found, "routes")
    assert there.is_well()


def test_a_rule_of_others_drops_datagrams(there: WithUDP) -> None:
    hook = "output" if there.mode == "host" else "prerouting"
    rule = f"chain c {{ type filter hook {hook} priority -200; udp dport 3478 drop; }};"
    there.run(f"nft 'table inet other {{ {rule} }}'")
    found = there.doctor()
    assert set(found.faults) == {"rules"}
    assert "dropped on the way" in found.faults["rules"]
    assert "udp dport 3478 drop" in found.faults["rules"]
    _, out, err = there._commands.run("rules", "verify", "-f", str(there.config))
    assert "shadowed: " in out + err
    assert "datagrams to port 3478 before our rules do" in out + err


def test_the_daemon_s_own_queries_come_back(host_net: lab.Net, tmp_path: Path) -> None:
    with WithUDP(host_net, tmp_path, "host", "nft") as made:
        host_net.lab.etc("resolv.conf", f"nameserver {lab.WEB_V4}\n")
        assert made.is_well()
        made.run("nft flush chain inet transocks_dgram exempt")
        found = made.doctor()
        assert "resolver" in found.faults
        assert f"transocks's own queries to {lab.WEB_V4} are redirected to it" in found.faults["resolver"]

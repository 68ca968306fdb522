"""`transocks rules` with udp_ports: both daemons, the real tools, and what is beyond."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest
from daemons import Daemon, wait_until
from forks import Commands
from test_tproxy_udp import ECHO, EGRESS, FAMILY, WEB, Client, Echo, kill, transocks, usocksd

CONFIG = """
listen = ":1081"
listen_tproxy = ":1084"
listen_udp = "localhost:1084"
proxy_url = "socks5://127.0.0.1:1080"
mark = 0x7473
control = "{control}"
metrics_port = 0
[health]
interval = 0.2
[rules]
mode = "{mode}"
tool = "{tool}"
udp_ports = {ports}
reject_quic = {quic}
when_down = "{down}"
"""
MODES = [("gateway_net", "gateway"), ("gateway_net", "tproxy"), ("host_net", "host")]
LISTED, OTHER_PORT = ECHO, ECHO + 1


class Scene:
    """Both daemons in a network, and `transocks rules` beside them."""

    def __init__(self, net: lab.Net, folder: Path, daemon: Daemon) -> None:
        self.net = net
        self.folder = folder
        self.daemon = daemon
        self._commands = Commands(net.proxy)

    def rules(self, *words: str, status: int = 0) -> str:
        was, out, err = self._commands.run("rules", *words, "-f", str(self.folder / "transocks.toml"))
        assert was == status, out + err
        return out + err

    def close(self) -> None:
        self.rules("remove")
        self._commands.close()

    def flows(self) -> int:
        """How many of the clients' ports transocks has carried datagrams of."""
        return len(self.daemon.records("association starts"))

    def wait_for_flows(self, number: int) -> None:
        wait_until(lambda: self.flows() == number, self.daemon.lines)

    def loaded(self) -> str:
        """All that is loaded."""
        texts = [self.net.proxy.run("nft", "list", "ruleset").stdout]
        for version in ("-4", "-6"):
            texts.append(self.net.proxy.run("ip", version, "rule").stdout)
            texts.append(self.net.proxy.run("ip", version, "route", "show", "table", "all", "proto", "116").stdout)
        return "\n".join(line for text in texts for line in str(text).splitlines() if "7474" in line or "dgram" in line)


@contextlib.contextmanager
def scene(
    net: lab.Net, folder: Path, mode: str, tool: str = "nft", *, ports: str = f"[{ECHO}]", quic: str = "true",
    down: str = "open",
) -> Iterator[Scene]:  # fmt: skip
    control = folder / "control.sock"
    config = CONFIG.format(mode=mode, tool=tool, ports=ports, quic=quic, down=down, control=control)
    with usocksd(net, folder), transocks(net, folder, config) as daemon:
        with contextlib.closing(Scene(net, folder, daemon)) as found:
            yield found


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize(("where", "mode"), MODES)
def test_listed_ports_go_through_and_others_do_not(
    where: str, mode: str, tool: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    net: lab.Net = request.getfixturevalue(where)
    places = [(WEB[version], port) for version in (4, 6) for port in (LISTED, OTHER_PORT)]
    with Echo(net, *places), scene(net, tmp_path, mode, tool) as there:
        said = there.rules("apply")
        assert f"UDP: to port {ECHO} goes through transocks" in said
        for version in (4, 6):
            before = there.flows()
            with Client(net, version) as client:
                assert client.ask(port=LISTED)[0] == EGRESS[version]
                there.wait_for_flows(before + 1)
            with Client(net, version) as client:
                client.ask(port=OTHER_PORT)
                assert there.flows() == before + 1
        assert "as they should be" in there.rules("verify")
        there.rules("remove")
        assert not there.loaded()
        for version in (4, 6):
            with Client(net, version) as client:
                client.ask(port=LISTED)
        assert there.flows() == 2


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize(("where", "mode"), MODES)
def test_a_client_that_has_gone_tells_nobody_beyond(
    where: str, mode: str, tool: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """ICMP's "port unreachable" has the late answer in it, and would be sent by the client to the destination."""
    net: lab.Net = request.getfixturevalue(where)
    with scene(net, tmp_path, mode, tool) as there:
        there.rules("apply")
        for version in (4, 6):
            protocol = socket.IPPROTO_ICMPV6 if version == 6 else socket.IPPROTO_ICMP
            unreachable = b"\x01\x04" if version == 6 else b"\x03\x03"
            with (
                net.outside.socket(FAMILY[version], socket.SOCK_DGRAM) as server,
                net.outside.socket(FAMILY[version], socket.SOCK_RAW, protocol) as heard,
                Client(net, version) as client,
            ):
                server.bind((WEB[version], ECHO))
                server.settimeout(10)
                client.sock.sendto(b"hello", (WEB[version], ECHO))
                _, sender = server.recvfrom(100)
                client.sock.close()
                server.sendto(b"late", sender)
                heard.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    while True:
                        packet = heard.recv(2000)
                        assert packet[0 if version == 6 else 20 :][:2] != unreachable


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_servers_of_this_host_go_on_answering(host_net: lab.Net, tmp_path: Path, tool: str) -> None:
    with scene(host_net, tmp_path, "host", tool, ports='"all"') as there:
        there.rules("apply")
        for version in (4, 6):
            with (
                host_net.proxy.socket(FAMILY[version], socket.SOCK_DGRAM) as server,
                host_net.outside.socket(FAMILY[version], socket.SOCK_DGRAM) as asker,
            ):
                server.bind((EGRESS[version], 5300))
                asker.settimeout(5)
                asker.bind((WEB[version], 0))
                for number in range(3):
                    asker.sendto(b"%d" % number, (EGRESS[version], 5300))
                    data, sender = server.recvfrom(100)
                    server.sendto(data, sender)
                    assert asker.recvfrom(100)[0] == b"%d" % number
        assert there.flows() == 0


@pytest.mark.parametrize(("where", "mode"), MODES)
@pytest.mark.parametrize("down", ["open", "closed"])
def test_without_transocks(where: str, mode: str, down: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    net: lab.Net = request.getfixturevalue(where)
    with Echo(net, (WEB[4], ECHO)) as echo, scene(net, tmp_path, mode, down=down) as there:
        there.rules("apply")
        with Client(net) as client:
            assert client.ask()[0] == EGRESS[4]
        kill(there.daemon)
        with Client(net, patience=0.2) as client:
            client.sock.connect((WEB[4], ECHO))

            def ask() -> str:
                with contextlib.suppress(TimeoutError):  # as long as its sockets are not closed
                    client.sock.send(b"hello")
                    return "answered" if client.sock.recv(100) else ""
                return ""

            if mode == "host":  # nobody refuses what comes back in by lo
                heard = len(echo.heard)
                assert [ask() for _ in range(5)] == [""] * 5
                assert len(echo.heard) == heard
            elif down == "open":
                assert wait_until(ask, "it is answered")
            else:
                with pytest.raises(ConnectionRefusedError):
                    wait_until(ask, "it is refused")


@pytest.mark.parametrize("down", ["open", "closed"])
def test_held_rules_let_out_what_is_of_this_host_or_do_not(host_net: lab.Net, tmp_path: Path, down: str) -> None:
    with Echo(host_net, (WEB[4], ECHO)) as echo, scene(host_net, tmp_path, "host", down=down) as there:
        command = [sys.executable, "-m", "transocks", "rules", "hold", "-f", tmp_path / "transocks.toml"]
        with contextlib.ExitStack() as stack:
            hold = stack.enter_context(host_net.proxy.popen(*command))
            stack.callback(hold.terminate)
            with Client(host_net, patience=0.2) as client:
                client.sock.connect((WEB[4], ECHO))

                def is_carried() -> bool:
                    with contextlib.suppress(OSError):
                        client.sock.send(b"hello")
                        client.sock.recv(100)
                    return there.flows() > 0

                wait_until(is_carried, "the rules are held")
                kill(there.daemon)

                def is_answered() -> bool:
                    with contextlib.suppress(OSError):
                        client.sock.send(b"hello")
                        return bool(client.sock.recv(100))
                    return False

                if down == "open":
                    wait_until(is_answered, "it goes out directly")
                else:
                    heard = len(echo.heard)
                    assert not any(is_answered() for _ in range(10))
                    assert len(echo.heard) == heard


@pytest.mark.parametrize(
    ("ports", "quic", "refused"), [(f"[{ECHO}]", "true", True), ('"all"', "true", True), ("[443]", "true", False)]
)
def test_quic_is_refused_unless_it_is_listed(
    gateway_net: lab.Net, tmp_path: Path, ports: str, quic: str, refused: bool
) -> None:
    with Echo(gateway_net, (WEB[4], 443)), scene(gateway_net, tmp_path, "gateway", ports=ports, quic=quic) as there:
        there.rules("apply")
        with Client(gateway_net) as client:
            client.sock.connect((WEB[4], 443))
            client.sock.send(b"hello")
            if refused:
                with pytest.raises(ConnectionRefusedError):
                    client.sock.recv(100)
            else:
                assert client.sock.recv(100).endswith(b"hello")
        there.wait_for_flows(int(not refused))


def test_udp_ports_without_a_listener_is_a_fault(gateway_net: lab.Net, tmp_path: Path) -> None:
    with scene(gateway_net, tmp_path, "tproxy") as there:
        there.rules("apply")
        file = there.folder / "transocks.toml"
        text = file.read_text()
        file.write_text(text.replace('listen_udp = "localhost:1084"', 'listen_udp = "localhost:1999"'))
        assert "nobody listens on 127.0.0.1:1999" in there.rules("verify", status=1)
        file.write_text(text.replace('listen_udp = "localhost:1084"', ""))
        assert 'rules.udp_ports: expected listen_udp = "localhost:1084" beside it' in there.rules("apply", status=1)
        file.write_text(text)

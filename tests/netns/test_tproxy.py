"""TPROXY on a gateway between a client and the Internet: no address is changed, and one listener has them all.

The rules are the kernel's own, written here by hand. What comes in by lan0 and is not for this host is given to the
listener, and marked, and the mark's routing table says that every address is this host's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from socket import socket as Socket
from typing import Any

import daemons
import lab
import pytest
from daemons import Daemon, Served, receive_exactly
from observe import wait_until_stopped
from test_redirect import FAMILY, WEB, connect
from test_service import configure, hammered, reload, wait_for_workers

from usocksd.proxy_protocol import LOCAL_HEADER, header

PORT = 1084
OTHER = {4: lab.OTHER_V4, 6: lab.OTHER_V6}
GATEWAY = {4: lab.LAN_GATEWAY_V4, 6: lab.LAN_GATEWAY_V6}
CLIENT = {4: lab.LAN_CLIENT_V4, 6: lab.LAN_CLIENT_V6}
UPSTREAM = {4: "127.0.0.1", 6: "::1"}
IP_TRANSPARENT = 19  # linux/in.h

NFT = """
table inet by_hand {
    chain prerouting {
        type filter hook prerouting priority mangle
        iifname "lan0" fib daddr type != local meta nfproto ipv4 meta l4proto tcp tproxy ip to :1084 meta mark set 0x7474
        iifname "lan0" fib daddr type != local meta nfproto ipv6 meta l4proto tcp tproxy ip6 to :1084 meta mark set 0x7474
    }
}
"""
NAT = """
table inet nat_by_hand {
    chain prerouting {
        type nat hook prerouting priority dstnat
        iifname "lan0" tcp dport 81 redirect to :1081
    }
}
"""
IPTABLES = """*mangle
-A PREROUTING -i lan0 -p tcp -m addrtype ! --dst-type LOCAL -j TPROXY --on-port 1084 --tproxy-mark 0x7474
COMMIT
"""
USOCKSD = """
[incoming]
port = 1080
addresses = ["127.0.0.1"]
"""
TRANSOCKS = """
listen_tproxy = ":1084"
proxy_url = "socks5://127.0.0.1:1080"
[timeouts]
connect = 5
"""


@pytest.fixture
def net(gateway_net: lab.Net) -> lab.Net:
    for family in ("-4", "-6"):
        gateway_net.proxy.run("ip", family, "rule", "add", "fwmark", "0x7474", "lookup", "7474")
        gateway_net.proxy.run("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "7474")
    return gateway_net


def load(net: lab.Net, tool: str = "nft") -> None:
    if tool == "nft":
        net.proxy.run("nft", "-f", "-", input=NFT)
    else:
        net.proxy.run("iptables-restore", "--noflush", input=IPTABLES)
        net.proxy.run("ip6tables-restore", "--noflush", input=IPTABLES)


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, config: str = TRANSOCKS, server: str = USOCKSD) -> Iterator[tuple[Daemon, Daemon]]:
    with Daemon("usocksd", server, folder, popen=net.proxy.popen) as usocksd:
        if server is PROXIED:  # else it may be found down at first
            usocksd.ready()
        with Daemon("transocks", config, folder, popen=net.proxy.popen) as transocks:
            usocksd.ready()
            transocks.ready()
            yield transocks, usocksd


def name_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def says_back(sock: Socket, data: bytes = b"hello") -> bool:
    sock.sendall(data)
    return receive_exactly(sock, len(data)) == data


def connected(sock: Socket, place: tuple[str, int]) -> Socket:
    sock.connect(place)
    return sock


def fails(connecting: Callable[[], AbstractContextManager[Socket]]) -> bool:
    """Whether it is reset; that may come before connect(2) has returned."""
    try:
        with connecting() as sock:
            return sock.recv(1) == b"nothing"
    except (ConnectionResetError, ConnectionRefusedError):
        return True


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_original_destinations(net: lab.Net, tmp_path: Path, tool: str) -> None:
    """Several addresses and ports by one listener, and the client sees the addresses that it has asked for."""
    with both(net, tmp_path) as (client, server):
        load(net, tool)
        for version in (4, 6):
            for host in (WEB[version], OTHER[version]):
                for port in (80, 8443, PORT):
                    with Served(net.outside.listen(host, port), daemons.echo) as web:
                        with connect(net, version, port, host) as sock:
                            assert says_back(sock)
                            assert sock.getpeername()[:2] == (host, port)
                            own = name_of(*sock.getsockname()[:2])
                            assert own.startswith(name_of(CLIENT[version], 0)[:-1])
                        mine = client.record("proxy ends", client_addr=own)
                        assert mine["dest_addr"] == name_of(host, port)
                        theirs = server.record("proxy ends", client_addr=mine["src_addr"])
                        # It left through the SOCKS server.
                        assert theirs["src_addr"] == name_of(*web.peers[0])


def test_what_no_rule_brought(net: lab.Net, tmp_path: Path) -> None:
    """Made to the listener itself, by whichever address of the gateway: refused, and named."""
    with both(net, tmp_path) as (client, _):
        load(net)
        for version in (4, 6):
            hosts = (GATEWAY[version], {4: lab.PROXY_V4, 6: lab.PROXY_V6}[version][1])
            for host in hosts:
                before = len(client.records("not redirected"))
                assert fails(lambda: connect(net, version, PORT, host))
                daemons.wait_until(lambda: len(client.records("not redirected")) > before, client.lines)
        error = client.records("not redirected")[-1]["error"]
        assert error == "it was made to this port itself, no TPROXY rule brought it"


def test_loops(net: lab.Net, tmp_path: Path) -> None:
    """With a rule that leaves out nothing, not even what is for this host: the upstream and the other listener."""
    url = f"socks5://{lab.LAN_GATEWAY_V4}:1080"
    config = f'listen = ":1081"\n{TRANSOCKS.replace("socks5://127.0.0.1:1080", url)}'
    server = USOCKSD.replace("127.0.0.1", lab.LAN_GATEWAY_V4)
    with both(net, tmp_path, config, server) as (client, _):
        net.proxy.run("nft", "-f", "-", input=NFT.replace("fib daddr type != local ", ""))
        assert fails(lambda: connect(net, 4, 1080, lab.LAN_GATEWAY_V4))
        assert "its destination is the upstream" in client.record("loop refused")["error"]
        for version in (4, 6):
            before = len(client.records("not redirected"))
            assert fails(lambda: connect(net, version, 1081, GATEWAY[version]))
            daemons.wait_until(lambda: len(client.records("not redirected")) > before, client.lines)
        # Another service of the gateway is a destination like others.
        with Served(net.proxy.listen(lab.LAN_GATEWAY_V6, 2222), daemons.echo):
            with connect(net, 6, 2222, lab.LAN_GATEWAY_V6) as sock:
                own = name_of(*sock.getsockname()[:2])
                assert fails(lambda: sock)  # usocksd protects its own host
            refused = client.record("failed to connect to proxy server", client_addr=own)
            assert refused["dest_addr"] == name_of(lab.LAN_GATEWAY_V6, 2222)


def test_redirect_and_tproxy_side_by_side(net: lab.Net, tmp_path: Path) -> None:
    """Each connection is one or the other, whatever else the daemon listens for."""
    with both(net, tmp_path, f'listen = ":1081"\n{TRANSOCKS}') as (client, _):
        rules = NAT + NFT.replace("meta l4proto tcp", "tcp dport 80")
        net.proxy.run("nft", "-f", "-", input=rules)
        for version in (4, 6):
            for port in (80, 81):
                with Served(net.outside.listen(WEB[version], port), daemons.echo):
                    with connect(net, version, port) as sock:
                        assert says_back(sock)
                        own = name_of(*sock.getsockname()[:2])
                    assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[version], port)
        for port in (1081, PORT):
            before = len(client.records("not redirected"))
            assert fails(lambda: connect(net, 4, port, GATEWAY[4]))
            daemons.wait_until(lambda: len(client.records("not redirected")) > before, client.lines)


def test_reloads_lose_nothing(net: lab.Net, tmp_path: Path) -> None:
    """Under load: more workers, then fewer. Each of them has a socket of its own."""
    workers = "workers = {}\n" + TRANSOCKS
    with both(net, tmp_path, workers.format(2)) as (client, _):
        load(net)
        with hammered(net, tmp_path, clients=60) as under_way:
            for count in (3, 1):
                reload(client, tmp_path, workers.format(count))
                under_way.go_on(60)
            under_way.stop()
            assert under_way.failures() == []
            assert not any(transfer.refused for transfer in under_way.transfers())


def test_the_listener_comes_and_goes(net: lab.Net, tmp_path: Path) -> None:
    """By reload. What waits in it when it goes is still carried where it was going."""
    without = TRANSOCKS.replace('listen_tproxy = ":1084"', "")
    with contextlib.ExitStack() as stack:
        client, _ = stack.enter_context(both(net, tmp_path, without))
        for version in (4, 6):
            stack.enter_context(Served(net.outside.listen(WEB[version], 80), daemons.echo))
        reload(client, tmp_path, TRANSOCKS)
        client.record("listening", address=f"[::]:{PORT}")
        wait_for_workers(client, 1)
        load(net)
        old = client.worker
        live = stack.enter_context(connect(net, 4, 80))
        assert says_back(live)
        os.kill(old, signal.SIGSTOP)
        wait_until_stopped(old)
        waiting = stack.enter_context(connect(net, 6, 80))
        reload(client, tmp_path, without)
        assert says_back(waiting)  # by the new worker
        os.kill(old, signal.SIGCONT)
        assert says_back(live)  # by the old one, which drains
        own = name_of(*waiting.getsockname()[:2])
        waiting.close()
        assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[6], 80)


def test_a_listener_does_not_change_its_kind(net: lab.Net, tmp_path: Path) -> None:
    """What is with the old workers and the new ones can't be both: told so, and nothing changes."""
    plain = f'listen = ":{PORT}"\n' + TRANSOCKS.replace('listen_tproxy = ":1084"', "")
    with both(net, tmp_path) as (client, _):
        configure(client, tmp_path, plain)
        error = client.record("reload failed")["error"]
        assert error == f"0.0.0.0:{PORT} is listened on already, with IP_TRANSPARENT (listen_tproxy): " + (
            "expected another port, or a restart"
        )
        load(net)
        with Served(net.outside.listen(WEB[4], 80), daemons.echo), connect(net, 4, 80) as sock:
            assert says_back(sock)


def test_without_the_capability(net: lab.Net, tmp_path: Path) -> None:
    """The start, and check, say which setting it is and what it needs."""
    words = ["setpriv", "--bounding-set=-net_admin,-net_raw"]
    client = Daemon("transocks", TRANSOCKS, tmp_path, popen=net.proxy.popen, prefix=words)
    assert client.process.wait(daemons.PATIENCE) == 1
    error = client.record("can't start")["error"]
    assert error.startswith(
        f"can't listen on 0.0.0.0:{PORT}: a listen_tproxy socket (IP_TRANSPARENT) needs CAP_NET_ADMIN"
    )
    check = net.proxy.run(*words, sys.executable, "-m", "transocks", "check", tmp_path / "transocks.toml", check=False)
    assert "listen_tproxy: 0.0.0.0:1084: this user may not open sockets with IP_TRANSPARENT" in check.stderr


def activated(sockets: Sequence[Socket], *words: str) -> dict[str, Any]:
    """Options of Daemon, for one that these sockets are handed to as sd_listen_fds(3) has it; `words` before it."""
    fds = [sock.fileno() for sock in sockets]
    moves = "; ".join(f"exec {at}<&{fd} {fd}<&-" for at, fd in enumerate(fds, 3))
    shell = f'{moves}; LISTEN_FDS={len(fds)} LISTEN_PID=$$ exec "$@"'
    return {"prefix": ["bash", "-c", shell, "-", *words], "pass_fds": fds}


def test_sockets_of_systemd(net: lab.Net, tmp_path: Path) -> None:
    """Transparent=yes in a .socket unit: nothing is configured, and no capability needed."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for version in (4, 6):
            sock = stack.enter_context(net.proxy.socket(FAMILY[version]))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if version == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            sock.bind(("" if version == 4 else "::", PORT))
            sock.listen()
            sockets.append(sock)
        config = TRANSOCKS.replace('listen_tproxy = ":1084"', "workers = 2")
        stack.enter_context(Daemon("usocksd", USOCKSD, tmp_path, popen=net.proxy.popen)).ready()
        client = stack.enter_context(
            Daemon(
                "transocks",
                config,
                tmp_path,
                popen=net.proxy.popen,
                **activated(sockets, "setpriv", "--bounding-set=-net_admin,-net_raw"),
            )
        )
        client.ready()
        load(net)
        for version in (4, 6):
            with Served(net.outside.listen(WEB[version], 80), daemons.echo), connect(net, version, 80) as sock:
                assert says_back(sock)
                own = name_of(*sock.getsockname()[:2])
            assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[version], 80)
            before = len(client.records("not redirected"))
            assert fails(lambda: connect(net, version, PORT, GATEWAY[version]))
            daemons.wait_until(lambda: len(client.records("not redirected")) > before, client.lines)


def test_sockets_of_systemd_that_are_not_transparent(net: lab.Net, tmp_path: Path) -> None:
    """With listen_tproxy configured, the start says what is missing."""
    with net.proxy.listen("127.0.0.1", PORT) as sock:
        client = Daemon("transocks", TRANSOCKS, tmp_path, popen=net.proxy.popen, **activated([sock]))
        assert client.process.wait(daemons.PATIENCE) == 1
    error = client.record("can't start")["error"]
    assert error.startswith("listen_tproxy: none of the sockets has IP_TRANSPARENT")


# ---- whose connection it is, as usocksd sees it


PROXIED = """
[incoming]
port = 1080
addresses = ["127.0.0.1"]
allow_from = ["192.168.77.0/24", "fd77::/64"]
[incoming.proxy_protocol]
port = 1090
trusted = ["127.0.0.1", "192.168.77.1"]
addresses = ["127.0.0.1", "192.168.77.1"]
[[rule]]
name = "not this client"
action = "deny"
from = ["192.168.77.66", "fd77::66"]
"""
WITH_HEADER = (
    TRANSOCKS.replace("1080", "1090")
    + """
[health]
interval = 0.2
"""
)
WITH_HEADER = WITH_HEADER.replace("proxy_url", "proxy_protocol = true\nproxy_url")


def from_address(net: lab.Net, host: str) -> Socket:
    """A socket of the client that will connect from this one of its addresses."""
    sock = net.client.socket(FAMILY[6 if ":" in host else 4])
    sock.settimeout(daemons.PATIENCE)
    sock.bind((host, 0))
    return sock


@pytest.mark.parametrize("scheme", ["socks5", "socks4a"])
def test_the_client_is_known_to_usocksd(net: lab.Net, tmp_path: Path, scheme: str) -> None:
    """By its own address, in records and rules: one client of the gateway may, another may not."""
    net.lab.ip(net.client, "addr add 192.168.77.66/24 dev eth0", "addr add fd77::66/64 dev eth0 nodad")
    config = WITH_HEADER.replace("socks5:", f"{scheme}:")
    with both(net, tmp_path, config, PROXIED) as (client, server):
        load(net)
        for version in (4,) if scheme == "socks4a" else (4, 6):
            with Served(net.outside.listen(WEB[version], 8443), daemons.echo) as web:
                with from_address(net, CLIENT[version]) as sock:
                    sock.connect((WEB[version], 8443))
                    assert says_back(sock)
                    own = name_of(*sock.getsockname()[:2])
                theirs = server.record("proxy ends", client_addr=own)
                assert theirs["dest_addr"] == name_of(WEB[version], 8443)
                assert theirs["peer_addr"] == client.record("proxy ends", client_addr=own)["src_addr"]
                assert theirs["local_addr"] == "127.0.0.1:1090"
                with from_address(net, {4: "192.168.77.66", 6: "fd77::66"}[version]) as sock:
                    name = name_of(*sock.getsockname()[:2])
                    assert fails(partial(connected, sock, (WEB[version], 8443)))
                assert server.record("ruleset mismatch", client_addr=name)["rule"] == "not this client"
                assert len(web.peers) == 1
        # Probes are transocks's own connections: answered, though allow_from does not have it, and nobody's records.
        assert [record["error"] for record in client.records("upstream is down")] == []
        assert server.records("denied access") == []


def test_the_header_is_in_the_segment_of_the_handshake(net: lab.Net, tmp_path: Path) -> None:
    """What an upstream gets from us at first, in one piece: client and original destination, then SOCKS."""
    said: list[bytes] = []

    def upstream(sock: Socket) -> None:
        data = sock.recv(4096)
        if not data.startswith(LOCAL_HEADER):  # as probes do
            said.append(data)

    config = WITH_HEADER.replace("interval = 0.2", "")
    with (
        Served(net.proxy.listen("127.0.0.1", 1090), upstream),
        Daemon("transocks", config, tmp_path, popen=net.proxy.popen) as client,
    ):
        client.ready()
        load(net)
        with from_address(net, CLIENT[6]) as sock:
            own = sock.getsockname()[:2]
            assert fails(partial(connected, sock, (WEB[6], 8443)))
        daemons.wait_until(lambda: said, "the upstream is asked")
        greeting = header(own, (WEB[6], 8443)) + b"\x05"
        assert said[0].startswith(greeting)


def test_forged_headers(net: lab.Net, tmp_path: Path) -> None:
    """From a client of the gateway, who can reach the port and is not trusted: reset, whatever it says or not."""
    with Daemon("usocksd", PROXIED, tmp_path, popen=net.proxy.popen) as server:
        server.ready()
        for said in (b"", header(("192.168.77.1", 1), ("192.0.2.1", 1)) + daemons.GREETING):
            with from_address(net, CLIENT[4]) as sock:
                own = name_of(*sock.getsockname())
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    sock.connect((lab.LAN_GATEWAY_V4, 1090))
                    sock.sendall(said)
                    assert sock.recv(1) == b"reset"
            assert server.record("peer is not trusted", client_addr=own)
        # One that is trusted is believed.
        with net.proxy.socket() as sock:
            sock.settimeout(daemons.PATIENCE)
            sock.connect((lab.LAN_GATEWAY_V4, 1090))
            sock.sendall(
                header(("192.168.77.66", 1), ("192.0.2.1", 1)) + daemons.GREETING + daemons.request("192.0.2.1", 1)
            )
            assert receive_exactly(sock, 2) == b"\x05\x00"
            assert daemons.receive_reply(sock)[0] == 2
        assert server.record("ruleset mismatch", client_addr="192.168.77.66:1")

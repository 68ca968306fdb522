"""TPROXY on a gateway between a client and the Internet: no address is changed, and one listener gets all connections.

The rules are the kernel's own, written here by hand; the last test has those of `transocks rules`. What comes in by
lan0 and is not for this host is given to the listener, and marked, and the mark's routing table says that every address
is this host's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from socket import socket as Socket
from typing import Any

import daemons
import lab
import pytest
from daemons import Daemon, Served, name_of, receive_exactly
from load import Load
from observe import wait_until_stopped
from test_redirect import FAMILY, WEB, connect
from test_service import configure, reload, wait_for_workers

from usocksd.net.proxy_protocol import LOCAL_HEADER, header

PORT = 1084
OTHER = {4: lab.OTHER_V4, 6: lab.OTHER_V6}
GATEWAY = {4: lab.LAN_GATEWAY_V4, 6: lab.LAN_GATEWAY_V6}
CLIENT = {4: lab.LAN_CLIENT_V4, 6: lab.LAN_CLIENT_V6}
DENIED = {4: "192.168.77.66", 6: "fd77::66"}
IP_TRANSPARENT = 19  # linux/in.h
NOT_ADMIN = ("setpriv", "--bounding-set=-net_admin,-net_raw")
ONLY_ADMIN = ("setpriv", "--bounding-set=-all,+net_admin")

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
[log]
level = "debug"
[timeouts]
connect = 5
"""
PLAIN = TRANSOCKS.replace('listen_tproxy = ":1084"', "")

# Shared by most tests. The port of the destination selects the route.
GATEWAY_USOCKSD = """
[incoming]
port = 1080
addresses = ["127.0.0.1", "192.168.77.1"]
allow_from = ["192.168.77.0/24", "fd77::/64"]
[incoming.proxy_protocol]
port = 1090
trusted = ["127.0.0.1", "192.168.77.1"]
[[rule]]
name = "not this client"
action = "deny"
from = ["192.168.77.66", "fd77::66"]
"""
GATEWAY_TRANSOCKS = """
listen = ":1081"
listen_tproxy = ":1084"
control = "{control}"
proxy_url = "socks5://192.168.77.1:1080"
[upstream.named]
proxy_url = "socks5://127.0.0.1:1090"
proxy_protocol = true
[upstream.named-socks4]
proxy_url = "socks4a://127.0.0.1:1090"
proxy_protocol = true
[upstream.told]
proxy_url = "socks5://127.0.0.1:1091"
proxy_protocol = true
[[route]]
ports = [8000]
via = "named"
[[route]]
ports = [8004]
via = "named-socks4"
[[route]]
ports = [8091]
via = "told"
[health]
interval = 0.2
[log]
level = "debug"
[timeouts]
connect = 5
[rules]
mode = "tproxy"
"""


@pytest.fixture(scope="module")
def shared(
    shared_gateway_net: lab.Net, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[lab.Net, Daemon, Daemon]]:
    """A gateway with transocks, which may administer the network and nothing else, and usocksd."""
    net, folder = shared_gateway_net, tmp_path_factory.mktemp("gateway")
    net.lab.ip(net.client, "addr add 192.168.77.66/24 dev eth0", "addr add fd77::66/64 dev eth0 nodad preferred_lft 0")
    config = GATEWAY_TRANSOCKS.format(control=folder / "control.sock")
    with (
        Daemon("usocksd", GATEWAY_USOCKSD, folder, popen=net.proxy.popen) as server,
        Daemon("transocks", config, folder, popen=net.proxy.popen, prefix=ONLY_ADMIN) as client,
    ):
        yield net, client, server


@contextlib.contextmanager
def rules(net: lab.Net, text: str = NFT, tool: str = "nft") -> Iterator[None]:
    """These rules and TPROXY's routing, loaded by hand."""
    with contextlib.ExitStack() as stack:
        for words in ("rule add fwmark 0x7474 lookup 7474", "route add local default dev lo table 7474"):
            for family in ("-4", "-6"):
                net.proxy.run("ip", family, *words.split())
                stack.callback(net.proxy.run, "ip", family, *words.replace("add", "del").split())
        if tool == "nft":
            net.proxy.run("nft", "-f", "-", input=text)
            stack.callback(net.proxy.run, "nft", "flush", "ruleset")
        else:
            for name in ("iptables", "ip6tables"):
                net.proxy.run(f"{name}-restore", "--noflush", input=IPTABLES)
                stack.callback(net.proxy.run, name, "-t", "mangle", "-F")
        yield


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, config: str = TRANSOCKS) -> Iterator[Daemon]:
    with (
        Daemon("usocksd", USOCKSD, folder, popen=net.proxy.popen),
        Daemon("transocks", config, folder, popen=net.proxy.popen) as client,
    ):
        yield client


def says_back(sock: Socket, data: bytes = b"hello") -> bool:
    sock.sendall(data)
    return receive_exactly(sock, len(data)) == data


def from_address(net: lab.Net, host: str) -> Socket:
    """A socket of the client that will connect from this one of its addresses."""
    sock = net.client.socket(FAMILY[6 if ":" in host else 4])
    sock.settimeout(daemons.PATIENCE)
    sock.bind((host, 0))
    return sock


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


def is_not_redirected(net: lab.Net, client: Daemon, host: str, port: int) -> str:
    """A connection to that address is refused; returns the error in the record."""
    before = len(client.records("not redirected"))
    assert fails(lambda: connect(net, 6 if ":" in host else 4, port, host))
    daemons.wait_until(lambda: len(client.records("not redirected")) > before, client.lines)
    return str(client.records("not redirected")[-1]["error"])


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_original_destinations(shared: tuple[lab.Net, Daemon, Daemon], tool: str) -> None:
    """Several addresses and ports by one listener, and the client sees the addresses that it has asked for."""
    net, client, server = shared
    with rules(net, tool=tool):
        for version in (4, 6):
            for host, port in ((WEB[version], 80), (OTHER[version], 8443), (OTHER[version], PORT)):
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


def test_connections_that_no_rule_redirected(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """Made to the listener itself, by whichever address of the gateway: refused, and named."""
    net, client, _ = shared
    with rules(net):
        for host in (*GATEWAY.values(), lab.PROXY_V4[1], lab.PROXY_V6[1]):
            error = is_not_redirected(net, client, host, PORT)
            assert error == "it was made to this port itself, no TPROXY rule brought it"


def test_loops(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """With a rule that leaves out nothing, not even what is for this host: the upstream and the other listener."""
    net, client, _ = shared
    with rules(net, NFT.replace("fib daddr type != local ", "")):
        assert fails(lambda: connect(net, 4, 1080, lab.LAN_GATEWAY_V4))
        assert "its destination is the upstream" in client.record("loop refused")["error"]
        for host in GATEWAY.values():
            is_not_redirected(net, client, host, 1081)
        # Another service of the gateway is a destination like others.
        with Served(net.proxy.listen(lab.LAN_GATEWAY_V6, 2222), daemons.echo):
            with connect(net, 6, 2222, lab.LAN_GATEWAY_V6) as sock:
                own = name_of(*sock.getsockname()[:2])
                assert fails(lambda: sock)  # usocksd protects its own host
            refused = client.record("failed to connect to proxy server", client_addr=own)
            assert refused["dest_addr"] == name_of(lab.LAN_GATEWAY_V6, 2222)


def test_redirect_and_tproxy_side_by_side(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """Each connection is one or the other, whatever else the daemon listens for."""
    net, client, _ = shared
    with rules(net, NAT + NFT.replace("meta l4proto tcp", "tcp dport 80")):
        for version in (4, 6):
            for port in (80, 81):
                with Served(net.outside.listen(WEB[version], port), daemons.echo):
                    with connect(net, version, port) as sock:
                        assert says_back(sock)
                        own = name_of(*sock.getsockname()[:2])
                    assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[version], port)
        for port in (1081, PORT):
            is_not_redirected(net, client, GATEWAY[4], port)


# ---- whose connection it is, as usocksd sees it


@pytest.mark.parametrize(("port", "versions"), [(8000, (4, 6)), (8004, (4,))], ids=["socks5", "socks4a"])
def test_the_client_is_known_to_usocksd(
    shared: tuple[lab.Net, Daemon, Daemon], port: int, versions: Sequence[int]
) -> None:
    """Records and rules have the client's own address: one client of the gateway is allowed, another denied."""
    net, client, server = shared
    with rules(net):
        for version in versions:
            place = (WEB[version], port)
            with Served(net.outside.listen(*place), daemons.echo) as web:
                with from_address(net, CLIENT[version]) as sock:
                    sock.connect(place)
                    assert says_back(sock)
                    own = name_of(*sock.getsockname()[:2])
                theirs = server.record("proxy ends", client_addr=own)
                assert theirs["dest_addr"] == name_of(*place)
                assert theirs["peer_addr"] == client.record("proxy ends", client_addr=own)["src_addr"]
                assert theirs["local_addr"] == "127.0.0.1:1090"
                with from_address(net, DENIED[version]) as sock:
                    name = name_of(*sock.getsockname()[:2])
                    assert fails(partial(connected, sock, place))
                assert server.record("ruleset mismatch", client_addr=name)["rule"] == "not this client"
                assert len(web.peers) == 1
    # Probes are transocks's own connections: answered, although allow_from does not admit it, and not recorded.
    # (At first an upstream may be down: the daemons start side by side.)
    down = Counter(record["upstream"] for record in client.records("upstream is down"))
    down.subtract(record["upstream"] for record in client.records("upstream is up again"))
    assert set(+down) <= {"socks5://127.0.0.1:1091"}
    assert server.records("denied access") == []


def test_the_header_is_in_the_segment_of_the_handshake(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """The first segment to an upstream: PROXY header with client and original destination, then SOCKS."""
    net, _, _ = shared
    said: list[bytes] = []

    def upstream(sock: Socket) -> None:
        data = sock.recv(4096)
        if not data.startswith(LOCAL_HEADER):  # as probes do
            said.append(data)

    with Served(net.proxy.listen("127.0.0.1", 1091), upstream), rules(net), from_address(net, CLIENT[6]) as sock:
        own = sock.getsockname()[:2]
        assert fails(partial(connected, sock, (WEB[6], 8091)))
    assert said[0].startswith(header(own, (WEB[6], 8091)) + b"\x05")


def test_forged_headers(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """A client of the gateway can reach the port and is not trusted: it is reset, whatever it sends."""
    net, _, server = shared
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


def answer(sock: Socket) -> None:
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


def test_a_gateway_by_the_rules_of_transocks(shared: tuple[lab.Net, Daemon, Daemon]) -> None:
    """The setup of an operator, tested with curl: `transocks rules apply`, mode tproxy, and proxy_protocol.

    The original destination is exact, usocksd sees the client's own address, and its rule decides by that.
    """
    net, client, server = shared
    command = ("-m", "transocks", "rules", "{}", "-f", client.log.with_suffix(".toml"))

    def transocks_rules(verb: str, *more: str) -> None:
        net.proxy.run(sys.executable, *(verb if word == "{}" else word for word in command), *more)

    def curl(url: str, source: str) -> tuple[int, list[str]]:
        form = "%{local_ip} %{local_port} %{remote_ip} %{http_code}"
        words = ("-sS", "-o", "/dev/null", "--max-time", "10", "-w", form, "--interface", source)
        done = net.client.run("curl", *words, url, check=False)
        return done.returncode, done.stdout.split()

    transocks_rules("apply", "--force")  # one of its groups has no upstream that is there
    try:
        for version in (4, 6):
            place = (WEB[version], 8000)
            with Served(net.outside.listen(*place), answer) as web:
                status, (host, port, remote, code) = curl(f"http://{name_of(*place)}/", CLIENT[version])
                assert (status, host, remote, code) == (0, CLIENT[version], WEB[version], "200")
                own = name_of(host, int(port))
                mine, theirs = (daemon.record("proxy ends", client_addr=own) for daemon in (client, server))
                assert mine["dest_addr"] == theirs["dest_addr"] == name_of(*place)
                assert (theirs["peer_addr"], theirs["rule"]) == (mine["src_addr"], "default")
                assert theirs["src_addr"] == name_of(*web.peers[0])
                status, (host, port, _, code) = curl(f"http://{name_of(*place)}/", DENIED[version])
                assert (host, code) == (DENIED[version], "000")
                assert status != 0
                denied = server.record("ruleset mismatch", client_addr=name_of(host, int(port)))
                assert (denied["rule"], denied["dest_host"]) == ("not this client", WEB[version])
                assert len(web.peers) == 1
        transocks_rules("verify")
    finally:
        transocks_rules("remove")


# ---- the listener


def test_reloads_lose_nothing(gateway_net: lab.Net, tmp_path: Path) -> None:
    """Under load: more workers, then fewer. Each of them has a socket of its own."""
    net, workers = gateway_net, "workers = {}\n" + TRANSOCKS
    with (
        both(net, tmp_path, workers.format(2)) as client,
        rules(net),
        net.outside.listen(backlog=1024) as listener,
    ):
        places = [name_of(host, listener.getsockname()[1]) for host in WEB.values()]
        with Load(
            tmp_path, listener, places, clients=30, largest=1 << 17, pause=0.1, popen=net.client.popen
        ) as under_way:
            under_way.go_on(30)
            for count in (3, 1):
                reload(client, tmp_path, workers.format(count))
                under_way.go_on(30)
            under_way.stop()
            assert under_way.failures() == []
            assert not any(transfer.refused for transfer in under_way.transfers())


def test_the_listener_comes_and_goes(gateway_net: lab.Net, tmp_path: Path) -> None:
    """By reload. Connections that wait in a removed listener still reach their destination. A listener can't change its
    kind, since old and new workers share it.
    """
    net = gateway_net
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(both(net, tmp_path, PLAIN))
        for version in (4, 6):
            stack.enter_context(Served(net.outside.listen(WEB[version], 80), daemons.echo))
        reload(client, tmp_path, TRANSOCKS)
        client.record("listening", address=f"[::]:{PORT}")
        wait_for_workers(client, 1)
        stack.enter_context(rules(net))
        old = client.worker
        configure(client, tmp_path, f'listen = ":{PORT}"\n{PLAIN}')
        error = client.record("reload failed")["error"]
        assert error == f"0.0.0.0:{PORT} is listened on already, with IP_TRANSPARENT (listen_tproxy): " + (
            "expected another port, or a restart"
        )
        live = stack.enter_context(connect(net, 4, 80))
        assert says_back(live)
        wait_for_workers(client, 1)
        os.kill(old, signal.SIGSTOP)
        wait_until_stopped(old)
        waiting = stack.enter_context(connect(net, 6, 80))
        reload(client, tmp_path, PLAIN)
        assert says_back(waiting)  # by the new worker
        os.kill(old, signal.SIGCONT)
        assert says_back(live)  # by the old one, which drains
        own = name_of(*waiting.getsockname()[:2])
        waiting.close()
        assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[6], 80)


def activated(sockets: Sequence[Socket], *words: str) -> dict[str, Any]:
    """Options of Daemon, for one that these sockets are handed to as sd_listen_fds(3) has it; `words` before it."""
    fds = [sock.fileno() for sock in sockets]
    moves = "; ".join(f"exec {at}<&{fd} {fd}<&-" for at, fd in enumerate(fds, 3))
    shell = f'{moves}; LISTEN_FDS={len(fds)} LISTEN_PID=$$ exec "$@"'
    return {"prefix": ["bash", "-c", shell, "-", *words], "pass_fds": fds}


def test_sockets_of_systemd(gateway_net: lab.Net, tmp_path: Path) -> None:
    """Transparent=yes in a .socket unit: nothing is configured, and no capability needed. One socket has both families,
    as `ListenStream=1084` makes it, and IPv4 clients have IPv4 addresses.
    """
    net = gateway_net
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(net.proxy.socket(socket.AF_INET6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.bind(("::", PORT))
        sock.listen()
        config = "workers = 2\n" + PLAIN
        stack.enter_context(Daemon("usocksd", USOCKSD, tmp_path, popen=net.proxy.popen))
        words = activated([sock], *NOT_ADMIN)
        client = stack.enter_context(Daemon("transocks", config, tmp_path, popen=net.proxy.popen, **words))
        stack.enter_context(rules(net))
        for version in (4, 6):
            with Served(net.outside.listen(WEB[version], 80), daemons.echo), connect(net, version, 80) as sock:
                assert says_back(sock)
                own = name_of(*sock.getsockname()[:2])
            assert client.record("proxy ends", client_addr=own)["dest_addr"] == name_of(WEB[version], 80)
            is_not_redirected(net, client, GATEWAY[version], PORT)


def test_what_keeps_it_from_listening(gateway_net: lab.Net, tmp_path: Path) -> None:
    """The start, and check, say which setting it is and what it needs."""
    net = gateway_net

    def error(**options: Any) -> str:
        client = Daemon("transocks", TRANSOCKS, tmp_path, popen=net.proxy.popen, **options)
        assert client.process.wait(daemons.PATIENCE) == 1
        return str(client.record("can't start")["error"])

    assert error(prefix=NOT_ADMIN).startswith(
        f"can't listen on 0.0.0.0:{PORT}: a socket with IP_TRANSPARENT needs CAP_NET_ADMIN"
    )
    words = (*NOT_ADMIN, sys.executable, "-m", "transocks", "check", tmp_path / "transocks.toml")
    check = net.proxy.run(*words, check=False)
    assert "listen_tproxy: 0.0.0.0:1084: this user may not open sockets with IP_TRANSPARENT" in check.stderr
    with net.proxy.listen("127.0.0.1", PORT) as sock:
        assert error(**activated([sock])).startswith("listen_tproxy: none of the sockets has IP_TRANSPARENT")

"""Transparent UDP: real rules, usocksd as the proxy, dnsmasq and an echo server beyond. The rules are written by hand.

On a gateway, what comes in by lan0 is given to the listener. A host's own datagrams are marked in OUTPUT, so that they
come back in by lo, and are given to it there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket as Socket
from typing import Any

import daemons
import dns.message
import dns.query
import lab
import pytest
from daemons import Daemon, wait_until
from test_service import reload, wait_for_workers

from usocksd.net.address import join_port

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
WEB = {4: lab.WEB_V4, 6: lab.WEB_V6}
OTHER = {4: lab.OTHER_V4, 6: lab.OTHER_V6}
EGRESS = {4: lab.PROXY_V4[0], 6: lab.PROXY_V6[0]}
ECHO = 7000
NAME, ADDRESS = "www.example.test", "192.0.2.80"
METRICS = 1083

NFT = """
table inet by_hand {{
    chain prerouting {{
        type filter hook prerouting priority mangle
        {what} fib daddr type != local meta nfproto ipv4 meta l4proto udp tproxy ip to :1084 meta mark set 0x7474
        {what} fib daddr type != local meta nfproto ipv6 meta l4proto udp tproxy ip6 to :1084 meta mark set 0x7474
        {more}
    }}
    chain output {{
        type route hook output priority mangle
        {own}
    }}
}}
"""
NFT_OWN = """meta mark 0x7473 accept
        fib daddr type != local meta l4proto udp meta mark set 0x7474"""
IPTABLES = """*mangle
-A PREROUTING {what} -p udp -m addrtype ! --dst-type LOCAL -j TPROXY --on-port 1084 --tproxy-mark 0x7474
{own}
COMMIT
"""
IPTABLES_OWN = """-A OUTPUT -p udp -m mark --mark 0x7473 -j RETURN
-A OUTPUT -p udp -m addrtype ! --dst-type LOCAL -j MARK --set-mark 0x7474"""

USOCKSD = """
[incoming]
port = {port}
addresses = ["127.0.0.1"]
[outgoing]
mark = 0x7473
"""
TRANSOCKS = """
listen_udp = ":1084"
proxy_url = "socks5://127.0.0.1:1080"
mark = 0x7473
metrics_port = 1083
[health]
interval = 0.2
"""


@contextlib.contextmanager
def rules(net: lab.Net, tool: str = "nft", own: str = NFT_OWN, more: str = "") -> Iterator[None]:
    """These rules and their routing, loaded by hand. `more` rules are of the chain that gets a client's datagrams."""
    host = net.client is net.proxy
    with contextlib.ExitStack() as stack:
        for words in ("rule add fwmark 0x7474 lookup 7474", "route add local default dev lo table 7474"):
            for family in ("-4", "-6"):
                net.proxy.run("ip", family, *words.split())
                stack.callback(net.proxy.run, "ip", family, *words.replace("add", "del").split())
        if tool == "nft":
            what = 'iifname "lo" meta mark 0x7474' if host else 'iifname "lan0"'
            if host:
                text = NFT.format(what=what, more="", own=own + more.format(where=""))
            else:
                text = NFT.format(what=what, more=more.format(where=what), own="")
            net.proxy.run("nft", "-f", "-", input=text)
            stack.callback(net.proxy.run, "nft", "flush", "ruleset")
        else:
            what = "-i lo -m mark --mark 0x7474" if host else "-i lan0"
            for name in ("iptables", "ip6tables"):
                text = IPTABLES.format(what=what, own=IPTABLES_OWN if host else "")
                net.proxy.run(f"{name}-restore", "--noflush", input=text)
                stack.callback(net.proxy.run, name, "-t", "mangle", "-F")
        yield


def usocksd(net: lab.Net, folder: Path, port: int = 1080, config: str = USOCKSD) -> Daemon:
    place = folder / str(port)
    place.mkdir(exist_ok=True)
    return Daemon("usocksd", config.format(port=port), place, popen=net.proxy.popen)


def transocks(net: lab.Net, folder: Path, config: str = TRANSOCKS) -> Daemon:
    return Daemon("transocks", config, folder, popen=net.proxy.popen)


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, config: str = TRANSOCKS) -> Iterator[tuple[Daemon, Daemon]]:
    with usocksd(net, folder) as server, transocks(net, folder, config) as client, rules(net):
        yield client, server


class Echo:
    """Sends each datagram back, behind the address that it came from."""

    def __init__(self, net: lab.Net, *places: tuple[str, int]) -> None:
        self.heard: list[bytes] = []
        self._sockets = []
        for host, port in places or [(host, ECHO) for found in (WEB, OTHER) for host in found.values()]:
            sock = net.outside.socket(FAMILY[6 if ":" in host else 4], socket.SOCK_DGRAM)
            sock.bind((host, port))
            self._sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _serve(self, sock: Socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = sock.recvfrom(65535)
                if not sender:  # shutdown(2)
                    return
                self.heard.append(data)
                sock.sendto(f"{sender[0]} {sender[1]} ".encode() + data, sender)


class Client:
    """A UDP socket of the client."""

    def __init__(self, net: lab.Net, version: int = 4, patience: float = daemons.PATIENCE) -> None:
        self.sock = net.client.socket(FAMILY[version], socket.SOCK_DGRAM)
        self.sock.settimeout(patience)
        self.version = version

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def ask(self, data: bytes = b"hello", host: str = "", port: int = ECHO) -> tuple[str, int]:
        """Where the echo server says that this came from."""
        place = (host or WEB[self.version], port)
        self.sock.sendto(data, place)
        answer, sender = self.sock.recvfrom(65535)
        assert sender[:2] == place
        seen, number, echoed = answer.split(b" ", 2)
        assert echoed == data
        return seen.decode(), int(number)

    def is_silent(self, data: bytes = b"hello", host: str = "", port: int = ECHO) -> bool:
        """Whether nothing comes back. (Nothing can tell sooner that it never will.)"""
        self.sock.settimeout(0.5)
        try:
            self.ask(data, host, port)
        except TimeoutError:
            return True
        return False

    def keep_asking(self, what: Callable[[tuple[str, int]], Any] = bool) -> tuple[str, int]:
        """Ask ten times a second until the answer is as wanted."""
        self.sock.settimeout(0.1)

        def asked() -> tuple[str, int] | None:
            with contextlib.suppress(TimeoutError, AssertionError):
                found = self.ask()
                return found if what(found) else None
            return None

        found = wait_until(asked, "it is answered")
        assert found is not None
        return found


@contextlib.contextmanager
def dnsmasq(net: lab.Net) -> Iterator[None]:
    """A name server beyond, on both families."""
    process = net.outside.popen(
        "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--user=", "--no-resolv", "--no-hosts",
        "--bind-interfaces", f"--listen-address={lab.WEB_V4}", f"--listen-address={lab.WEB_V6}",
        f"--address=/{NAME}/{ADDRESS}", stderr=-1, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any("started" in line for line in process.stderr)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def look_up(net: lab.Net, version: int = 4, *, tries: int = 1, patience: float = daemons.PATIENCE) -> str:
    """The address of NAME, by a query over UDP to the name server beyond; raises dns.exception.Timeout."""
    query = dns.message.make_query(NAME, "A")
    for left in reversed(range(tries)):
        with net.client.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                answer = dns.query.udp(query, WEB[version], timeout=patience, sock=sock)
            except dns.exception.Timeout:
                if not left:
                    raise
            else:
                return str(answer.answer[0][0])
    raise AssertionError


def metric(net: lab.Net, series: str) -> float:
    """The value of a series, or of all whose labels it is the beginning of."""
    with net.proxy.socket() as sock:
        sock.settimeout(daemons.PATIENCE)
        sock.connect(("127.0.0.1", METRICS))
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        lines = daemons.receive_all(sock).decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"transocks_{series}"))


def wait_for_metric(net: lab.Net, series: str, value: float) -> None:
    """(Workers report twice a second.)"""
    wait_until(lambda: metric(net, series) == value, lambda: f"{series} is {value}, not {metric(net, series)}")


def dropped(net: lab.Net, cause: str, number: float) -> None:
    wait_for_metric(net, f'udp_dropped_total{{cause="{cause}"}}', number)


def verb(net: lab.Net, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb of transocks."""
    return net.proxy.run(sys.executable, "-m", "transocks", words[0], "-f", folder / "transocks.toml", *words[1:])


def kill(server: Daemon) -> None:
    """Master and workers, without a goodbye."""
    server.STATUS = None
    found = server.workers()
    server.process.kill()
    for pid in found:
        os.kill(pid, signal.SIGKILL)


# ---- the way


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize("where", ["gateway_net", "host_net"])
def test_names_are_resolved_beyond(where: str, tool: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    net = request.getfixturevalue(where)
    with (
        dnsmasq(net),
        usocksd(net, tmp_path) as server,
        transocks(net, tmp_path) as client,
        rules(net, tool),
    ):
        look_up(net)
        before = client.fds()
        for version in (4, 6):
            assert look_up(net, version) == ADDRESS
            place = join_port(WEB[version], 53)
            flow = client.record("udp flow", dest_addr=place)
            assert (flow["tx_packets"], flow["rx_packets"], flow["route"]) == (1, 1, "default")
            assert server.record("udp flow", dest_addr=place)["tx_packets"] == 1
        # All is over with the answer.
        wait_until(lambda: len(client.records("association ends", reason="closed")) == 3, client.lines)
        client.wait_for_fds(before)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("where", ["gateway_net", "host_net"])
def test_a_port_has_one_mapping_for_all_destinations(
    where: str, version: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    net = request.getfixturevalue(where)
    with Echo(net), both(net, tmp_path) as (client, server), Client(net, version) as one, Client(net, version) as two:
        seen = {one.ask(bytes((65 + n,)) * size) for n, size in enumerate((1, 100, 1200, 1400, 8000, 65000, 0))}
        seen |= {one.ask(host=OTHER[version])}
        assert len(seen) == 1
        assert seen.pop()[0] == EGRESS[version]
        assert two.ask()[0] == EGRESS[version]
        for daemon in (client, server):
            wait_until(lambda: len(daemon.records("association starts")) == 2, daemon.lines)


def test_no_client_gets_what_is_another_s(gateway_net: lab.Net, tmp_path: Path) -> None:
    """Between bind(2) and connect(2), the kernel may give a flow's socket datagrams of other clients."""
    net = gateway_net
    with Echo(net), both(net, tmp_path), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(net)) for _ in range(800)]
        for each in clients:
            each.sock.connect((lab.WEB_V4, ECHO))
        for number, each in enumerate(clients):
            each.sock.send(str(number).encode())
            if number % 40 == 39:
                time.sleep(0.03)
        answers = [each.sock.recv(100).split(b" ")[2] for each in clients]
        assert answers == [str(number).encode() for number in range(800)]
        for each in clients:
            each.sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.sock.recv(100)


def test_datagrams_wait_while_the_proxy_is_asked(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = TRANSOCKS + "[udp]\nqueue = 5\n"
    with Echo(net) as echo, both(net, tmp_path, config) as (_, server), Client(net) as client:
        os.kill(server.worker, signal.SIGSTOP)
        for number in range(7):
            client.sock.sendto(bytes((number,)), (lab.WEB_V4, ECHO))
        dropped(net, "queue_full", 2)
        os.kill(server.worker, signal.SIGCONT)
        wait_until(lambda: len(echo.heard) == 5, "those that waited arrive")
        assert echo.heard == [bytes((number,)) for number in range(5)]


def test_the_next_proxy_takes_over(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = TRANSOCKS.replace('"socks5://127.0.0.1:1080"', '["socks5://127.0.0.1:1080", "socks5://127.0.0.1:1090"]')
    with (
        Echo(net),
        usocksd(net, tmp_path) as first,
        usocksd(net, tmp_path, 1090) as second,
        transocks(net, tmp_path, config) as client,
        rules(net),
        Client(net) as here,
    ):
        before = here.ask()
        kill(first)
        after = here.keep_asking(lambda found: found != before)
        assert after[0] == before[0]
        assert here.ask() == after
        client.record("association is lost")
        assert client.record("association goes on")["upstream"] == "socks5://127.0.0.1:1090"
        second.record("association starts")


@pytest.mark.parametrize("version", [4, 6])
def test_the_proxy_is_told_of_the_client(gateway_net: lab.Net, tmp_path: Path, version: int) -> None:
    net = gateway_net
    admitted = 'addresses = ["127.0.0.1"]\nallow_from = ["192.168.77.0/24", "fd77::/64"]'
    trusted = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["127.0.0.1"]\n'
    server_config = USOCKSD.replace('addresses = ["127.0.0.1"]', admitted) + trusted
    config = "proxy_protocol = true\n" + TRANSOCKS.replace("1080", "1090")
    with (
        Echo(net),
        usocksd(net, tmp_path, config=server_config) as server,
        transocks(net, tmp_path, config),
        rules(net),
        Client(net, version) as here,
    ):
        assert here.ask() == here.ask()
        address = lab.LAN_CLIENT_V6 if version == 6 else lab.LAN_CLIENT_V4
        assert server.record("association starts")["client_addr"] == join_port(address, here.port)


def test_a_flow_that_is_silent_ends(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    with (
        Echo(net) as echo,
        both(net, tmp_path, TRANSOCKS + "[udp]\nidle = 1\n[timeouts]\nconnect = 0.5\nhandshake = 0.5\n") as (
            client,
            server,
        ),
        Client(net) as here,
        Client(net) as there,
    ):
        there.ask()
        wait_until(lambda: client.records("association ends"), client.lines)
        before, since = client.fds(), time.monotonic()
        here.ask()
        while time.monotonic() < since + 2.5:  # datagrams in either direction keep it, and no other time counts
            time.sleep(0.2)
            here.sock.sendto(b"", (lab.WEB_V4, ECHO))
        assert len(client.records("association ends")) == 1
        ended = wait_until(lambda: client.records("association ends")[1:], client.lines)[0]
        assert not client.records("association is lost")
        assert (ended["reason"], ended["ended_by"], ended["destinations"]) == ("idle timeout", "proxy", 1)
        assert ended["elapsed"] >= 2.5
        client.wait_for_fds(before)
        wait_until(lambda: len(server.records("association ends")) == 2, server.lines)
        here.sock.settimeout(daemons.PATIENCE)
        echo.heard.clear()
        here.sock.sendto(b"again", (lab.WEB_V4, ECHO))
        wait_until(lambda: echo.heard == [b"again"], "it begins again")


def test_old_flows_give_way(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    places = [(lab.WEB_V4, ECHO + number) for number in range(40)]
    with (
        Echo(net, *places),
        both(net, tmp_path, TRANSOCKS + "[udp]\nflows = 16\n") as (client, _),
        Client(net) as here,
    ):
        seen = {here.ask(host=host, port=port) for host, port in (*places, places[0])}
        assert len(seen) == 1
        (worker,) = client.workers()
        sockets = [name for name in client.descriptors(worker) if name.startswith("socket:")]
        assert len(sockets) < 40
        flows = wait_until(lambda: client.records("udp flow")[23:] and client.records("udp flow"), client.lines)
        assert flows[0]["dest_addr"] == f"{lab.WEB_V4}:{ECHO}"


def test_a_scan_harms_no_other_client(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    net.lab.ip(net.client, "addr add 192.168.77.3/24 dev eth0")
    with (
        Echo(net),
        both(net, tmp_path, TRANSOCKS + "[udp]\nflows = 64\n") as (client, _),
        Client(net) as here,
        Client(net) as scanner,
    ):
        here.sock.bind(("192.168.77.3", 0))
        before = here.ask()
        fds = client.fds()
        for port in range(20000, 22000):
            scanner.sock.sendto(b"scan", (lab.WEB_V4, port))
            if not port % 50:
                scanner.ask()
        assert client.fds() < fds + 2 * 64
        assert here.ask() == before
        scanner.sock.close()
        assert len(client.records("udp flow")) <= 1024
        assert client.records("udp flow", client_addr=f"192.168.77.3:{here.port}") == []


def test_few_descriptors(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    with (
        Echo(net),
        usocksd(net, tmp_path),
        Daemon("transocks", TRANSOCKS, tmp_path, popen=net.proxy.popen, prefix=("prlimit", "--nofile=250")) as client,
        rules(net),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(100):
            stack.enter_context(Client(net)).keep_asking()
        assert client.fds() < 200
        said = client.record("too few file descriptors left")
        assert (said["severity"], said["protocol"]) == ("warning", "udp")
        assert client.records("association ends", reason="shed")


# ---- what does not go on


@pytest.mark.parametrize("when", ["refuse", "direct"])
def test_without_a_proxy_that_has_udp(gateway_net: lab.Net, tmp_path: Path, when: str) -> None:
    net = gateway_net
    config = TRANSOCKS.replace("socks5://127.0.0.1:1080", "http://127.0.0.1:3128")
    config = f'control = "{tmp_path}/control"\nwhen_no_udp = "{when}"\n{config}'
    with Echo(net), transocks(net, tmp_path, config) as client, rules(net), Client(net) as here:
        if when == "direct":
            assert here.ask()[0] == EGRESS[4]
            assert here.ask() == here.ask(host=lab.OTHER_V4)
            assert client.record("association starts")["upstream"] == "direct"
            with Client(net) as six:
                six.ask()
        else:
            for _ in range(3):
                assert here.is_silent()
            (said,) = client.records("no upstream carries UDP")
            assert (said["severity"], said["group"]) == ("warning", "default")
            dropped(net, "no_udp", 3)
            assert client.records("association starts") == []
        status = json.loads(verb(net, tmp_path, "status", "--json").stdout)
        group = status["daemon"]["upstreams"]["default"]
        assert (group["when_no_udp"], group["upstreams"][0]["udp"]) == (when, False)


def test_past_the_proxies_only_those_that_were_asked_may_answer(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = TRANSOCKS + '[[route]]\nprotocol = "udp"\nvia = "direct"\n'
    with (
        Echo(net, (lab.WEB_V4, ECHO)),
        transocks(net, tmp_path, config),
        rules(net),
        Client(net) as here,
        net.outside.socket(kind=socket.SOCK_DGRAM) as same,
        net.outside.socket(kind=socket.SOCK_DGRAM) as stranger,
    ):
        same.bind((lab.WEB_V4, 0))
        stranger.bind((lab.OTHER_V4, 0))
        place = here.ask()
        stranger.sendto(b"stranger", place)
        same.sendto(b"another port", place)
        data, sender = here.sock.recvfrom(100)
        assert (data, sender) == (b"another port", same.getsockname())
        dropped(net, "stranger", 1)


def test_routes(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = (
        TRANSOCKS
        + f"""
        [[route]]
        name = "only for connections"
        protocol = "tcp"
        to = ["{lab.OTHER_V4}"]
        via = "reject"
        [[route]]
        name = "not there"
        protocol = "udp"
        to = ["{lab.WEB_V4}"]
        via = "reject"
        """
    )
    with Echo(net), both(net, tmp_path, config) as (client, _), Client(net) as here:
        assert here.is_silent()
        assert here.is_silent()
        here.ask(host=lab.OTHER_V4)
        (said,) = client.records("rejected by route")
        assert (said["route"], said["dest_addr"]) == ("not there", f"{lab.WEB_V4}:{ECHO}")
        dropped(net, "rejected", 2)


def test_a_port_that_this_host_has_itself(gateway_net: lab.Net, tmp_path: Path) -> None:
    """A socket on all addresses that does not share its port takes it from all transparent sockets."""
    net = gateway_net
    with Echo(net), both(net, tmp_path) as (client, _), Client(net) as here:
        with net.proxy.socket(kind=socket.SOCK_DGRAM) as daemon:
            daemon.bind(("0.0.0.0", ECHO))
            for _ in range(2):
                assert here.is_silent()
            (said,) = client.records("can't answer for a destination")
            assert "Address already in use" in said["error"]
            dropped(net, "address_in_use", 2)
        here.keep_asking()


def test_our_own_datagrams_do_not_come_back(host_net: lab.Net, tmp_path: Path) -> None:
    """With rules that do not exempt them, and both daemons of root, nothing but the port tells them."""
    net = host_net
    config = TRANSOCKS.replace("mark = 0x7473\n", "") + '[[route]]\nvia = "direct"\n'
    with (
        Echo(net) as echo,
        transocks(net, tmp_path, config) as client,
        rules(net, own="fib daddr type != local meta l4proto udp meta mark set 0x7474"),
        Client(net) as here,
    ):
        assert here.is_silent()
        said = client.record("loop refused")
        assert "one of our own" in said["error"]
        assert len(client.records("association starts")) == 1
        assert echo.heard == []


# ---- workers


def test_each_client_stays_with_one_worker(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    with (
        Echo(net),
        both(net, tmp_path, f"workers = 2\n{TRANSOCKS}") as (client, _),
        contextlib.ExitStack() as stack,
    ):
        wait_for_workers(client, 2)
        clients = [stack.enter_context(Client(net, version)) for version in (4, 6) for _ in range(20)]
        for each in clients:
            assert each.ask() == each.ask(host=OTHER[each.version])
        wait_until(lambda: len(client.records("association starts")) == 40, client.lines)
        sockets = [
            sum(name.startswith("socket:") for name in client.descriptors(worker)) for worker in client.workers()
        ]
        assert min(sockets) > 30, sockets


def test_a_reload_keeps_flows(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = f"{TRANSOCKS}[timeouts]\ndrain = 5\n"
    with Echo(net), both(net, tmp_path, config) as (client, _), Client(net) as here, Client(net) as another:
        before = here.ask()
        old = client.worker
        reload(client, tmp_path, config)
        assert here.ask() == before
        another.ask()
        assert old in client.workers()
        wait_until(lambda: client.workers() != [old] and len(client.workers()) == 1, "the old one ends")
        # The flow goes on in the new worker, and has another mapping there.
        here.keep_asking()


@pytest.mark.parametrize("trouble", ["reload", "kill"])
def test_names_are_resolved_all_the_time(gateway_net: lab.Net, tmp_path: Path, trouble: str) -> None:
    net = gateway_net
    config = f"workers = 2\n{TRANSOCKS}"
    failures: list[Exception] = []
    done, over = [0], threading.Event()

    def keep_looking() -> None:
        while not over.is_set():
            try:
                assert look_up(net, tries=3, patience=2) == ADDRESS
                done[0] += 1
            except Exception as error:
                failures.append(error)

    with dnsmasq(net), both(net, tmp_path, config) as (client, _):
        wait_for_workers(client, 2)
        threads = [threading.Thread(target=keep_looking) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            before = done[0]
            if trouble == "reload":
                reload(client, tmp_path, config)
            else:
                os.kill(client.workers()[-1], signal.SIGKILL)
                wait_for_workers(client, 2)
            wait_until(lambda: done[0] > before + 10, lambda: failures)
        over.set()
        for thread in threads:
            thread.join()
        assert failures == []
        client.expected |= {"a worker has died"}


def test_connections_lists_associations(gateway_net: lab.Net, tmp_path: Path) -> None:
    net = gateway_net
    config = f'control = "{tmp_path}/control"\n{TRANSOCKS}'
    with Echo(net), both(net, tmp_path, config), Client(net) as here:
        here.ask(b"12345")
        (row,) = json.loads(verb(net, tmp_path, "connections", "--json").stdout)["connections"]
        assert row["client"] == f"{lab.LAN_CLIENT_V4}:{here.port}"
        assert (row["state"], row["tx_bytes"], row["route"]) == ("association", 5, "default")
        assert row["upstream"] == "socks5://127.0.0.1:1080"
        wait_for_metric(net, "udp_associations", 1)
        wait_for_metric(net, 'udp_datagrams_total{direction="tx"}', 1)
        wait_for_metric(net, 'udp_bytes_total{direction="tx"}', 5)

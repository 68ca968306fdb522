"""Where connections leave from, with addresses that come and go, ports that run out, and a block list in DNS."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from socket import socket as Socket
from typing import Any, NamedTuple

import daemons
import lab
import pytest
from daemons import GRANTED, Daemon, Served, socks5, wait_until

from usocksd.serve.verbs.client import ControlClient
from usocksd.socks.datagram import header

WEB = {4: lab.WEB_V4, 6: lab.WEB_V6}
POOL = {4: lab.PROXY_V4, 6: lab.PROXY_V6}
GENERAL_FAILURE, NETWORK_UNREACHABLE = 1, 3
IP_BIND_ADDRESS_NO_PORT = 24
# linux/if_ether.h, linux/if_packet.h, asm-generic/socket.h
ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS = 0x0003, 263, 6
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35

CONFIG = """
{top}
[incoming]
port = 1080
addresses = ["127.0.0.1"]
metrics_port = 9100
[outgoing]
addresses = {addresses}
[timeouts]
connect = 3
"""


def usocksd(net: lab.Net, folder: Path, *addresses: str, top: str = "", more: str = "") -> Daemon:
    config = CONFIG.format(top=top, addresses=json.dumps(addresses)) + more
    return Daemon("usocksd", config, folder, popen=net.proxy.popen)


def connected(net: lab.Net, client: str) -> Socket:
    """A connection to the daemon from this address of loopback."""
    sock = net.proxy.socket()
    sock.settimeout(daemons.PATIENCE)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((client, 0))
    sock.connect(("127.0.0.1", 1080))
    return sock


def ask(net: lab.Net, client: str, host: str, port: int) -> tuple[int, str]:
    """The reply to one request, and the address that the connection leaves from."""
    with connected(net, client) as sock:
        reply, bound, _ = socks5(sock, host, port)
        return reply, bound


def metric(net: lab.Net, line: str) -> float | None:
    """The value of a metric, by its name and labels as they are rendered."""
    with net.proxy.socket() as sock:
        sock.connect(("127.0.0.1", 9100))
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        for each in daemons.receive_all(sock).decode().splitlines():
            if each.startswith(line):
                return float(each.removeprefix(line))
    return None


# ---- addresses that come and go


class Sniffer(contextlib.AbstractContextManager["Sniffer"]):
    """Sees the first SYN of each connection that arrives at a host for a port, with its time, answered or not.

    The kernel repeats an unanswered SYN a second later, from an address that may be gone by then. Only the first SYN
    tells when a connection was begun. All of them are seen once the `with` block is left, and not a moment earlier:
    this process may be behind.
    """

    def __init__(self, host: lab.Host, port: int) -> None:
        self.seen: list[tuple[float, str]] = []
        self._begun: set[tuple[str, bytes]] = set()
        self._port = port
        self._sock = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._sock.settimeout(0.1)
        with contextlib.suppress(PermissionError):
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._offset = time.time() - time.monotonic()
        self._done = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                packet, more, _, (_, _, kind, *_) = self._sock.recvmsg(65536, 256)
            except TimeoutError:
                if self._done:
                    return
                continue
            if kind == socket.PACKET_OUTGOING or not packet:
                continue
            source: IPv4Address | IPv6Address
            if packet[0] >> 4 == 4:
                protocol, source, tcp = packet[9], IPv4Address(packet[12:16]), packet[(packet[0] & 15) * 4 :]
            else:
                protocol, source, tcp = packet[6], IPv6Address(packet[8:24]), packet[40:]
            if protocol == socket.IPPROTO_TCP and int.from_bytes(tcp[2:4]) == self._port and tcp[13] & 0x12 == 0x02:
                # Source address, and both ports with the sequence number: a port may be used again.
                if (connection := (str(source), tcp[:8])) in self._begun:
                    continue
                self._begun.add(connection)
                # When it arrived, not when it is read.
                (when,) = (data for _, kind, data in more if kind == SO_TIMESTAMPNS)
                seconds, nanoseconds = struct.unpack("@ll", when)
                self.seen.append((seconds + nanoseconds / 1e9 - self._offset, str(source)))

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()
        _, dropped = struct.unpack("@II", self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._sock.close()
        assert not dropped


class Connection(NamedTuple):
    """The result of one, and when it began and ended."""

    began: float
    ended: float
    reply: int
    bound: str
    """Where it left from."""


class Load(contextlib.AbstractContextManager["Load"]):
    """Clients that connect again and again, from many addresses, so that all egress addresses have some."""

    def __init__(self, net: lab.Net, host: str, port: int) -> None:
        self.done: list[Connection] = []
        self._where = net, host, port
        self._stopped = False
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        net, host, port = self._where
        turn = 0
        while not self._stopped:
            turn += 1
            began = time.monotonic()
            try:
                reply, bound = ask(net, f"127.0.{number + 1}.{turn % 200 + 1}", host, port)
            except OSError as error:
                reply, bound = -1, str(error)
            self.done.append(Connection(began, time.monotonic(), reply, bound))

    def until(self, condition: Callable[[Connection], bool], what: str) -> None:
        """Wait until a connection is like this."""
        wait_until(lambda: any(map(condition, self.done[-100:])), what)

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("version", [4, 6])
def test_an_address_goes_under_load_and_comes_back(host_net: lab.Net, tmp_path: Path, version: int) -> None:
    net, pool, bits = host_net, POOL[version], 24 if version == 4 else 64
    flags = ["nodad"] if version == 6 else []
    gone = pool[1]
    # Where bind succeeds on absent addresses too, the list of addresses alone tells.
    net.proxy.sysctl(f"net.ipv{version}.ip_nonlocal_bind", 1)
    with (
        Served(net.outside.listen(WEB[version], 80), daemons.echo),
        usocksd(net, tmp_path, *pool, top="workers = 2") as server,
        Sniffer(net.outside, 80) as sniffer,
    ):
        with Load(net, WEB[version], 80) as load:
            load.until(lambda each: (each.reply, each.bound) == (GRANTED, gone), "all are used")
            removing = time.monotonic()
            net.proxy.run("ip", "addr", "del", f"{gone}/{bits}", "dev", "eth0")
            removed = time.monotonic()
            load.until(lambda each: each.began > removed + 2, "life goes on")
            put_back = time.monotonic()
            net.proxy.run("ip", "addr", "add", f"{gone}/{bits}", "dev", "eth0", *flags)
            back = time.monotonic()
            load.until(lambda each: each.began > back and each.bound == gone, "it is used again")
            again = next(each.began for each in load.done if each.began > back and each.bound == gone)
            assert again < back + 1
            load.until(lambda each: each.began > back + 1, "life goes on")
        assert len(server.records("addresses of this host changed", removed=[gone])) == 2  # workers
    # From a second after, at the latest, all is well; and nothing has ever left from anywhere else.
    later = [each for each in load.done if removed + 1 < each.began and each.ended < put_back]
    assert len(later) > 20
    assert Counter(each.reply for each in later) == {GRANTED: len(later)}
    assert {each.bound for each in later} == {pool[0], pool[2]}
    assert all(each.reply == GRANTED for each in load.done if each.ended < removing or each.began > back + 1)
    assert {source for _, source in sniffer.seen} == set(pool)
    assert {source for when, source in sniffer.seen if removed + 1 < when < put_back} == {pool[0], pool[2]}
    assert len(sniffer.seen) >= len([each for each in load.done if each.reply == GRANTED])


def test_with_no_address_left_nothing_leaves(host_net: lab.Net, tmp_path: Path) -> None:
    net = host_net
    with (
        Served(net.outside.listen(WEB[4], 80), daemons.echo),
        usocksd(net, tmp_path, lab.PROXY_V4[1]) as server,
        Sniffer(net.outside, 80) as sniffer,
    ):
        assert ask(net, "127.0.0.1", WEB[4], 80) == (GRANTED, lab.PROXY_V4[1])
        net.proxy.run("ip", "addr", "del", f"{lab.PROXY_V4[1]}/24", "dev", "eth0")
        server.record("addresses of this host changed")
        assert ask(net, "127.0.0.1", WEB[4], 80)[0] == NETWORK_UNREACHABLE
        error = 'no usable egress address for IPv4 in pool "default": 1 not on this host'
        assert server.record("dial to destination failed")["error"] == error
        # For IPv6 there is none to begin with.
        assert ask(net, "127.0.0.1", WEB[6], 80)[0] == NETWORK_UNREACHABLE
    assert {source for _, source in sniffer.seen} == {lab.PROXY_V4[1]}


@pytest.mark.parametrize("version", [4, 6])
def test_a_udp_mapping_moves_when_its_address_is_gone_and_not_before(
    host_net: lab.Net, tmp_path: Path, version: int
) -> None:
    net, pool, bits = host_net, POOL[version], 24 if version == 4 else 64
    with (
        usocksd(net, tmp_path, *pool) as server,
        connected(net, "127.0.0.1") as control,
        net.proxy.socket(kind=socket.SOCK_DGRAM) as client,
        net.outside.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as far,
    ):
        far.bind((WEB[version], 5000))
        for sock in (far, client):
            sock.settimeout(daemons.PATIENCE)
        control.sendall(daemons.GREETING + daemons.request("0.0.0.0", 0, command=3))
        daemons.receive_exactly(control, 2)
        reply, *relay = daemons.receive_reply(control)
        assert reply == GRANTED

        def source() -> str:
            client.sendto(header(WEB[version], 5000) + b"x", (relay[0], relay[1]))
            return str(far.recvfrom(100)[1][0])

        first = source()
        other, unused = (address for address in pool if address != first)
        net.proxy.run("ip", "addr", "del", f"{unused}/{bits}", "dev", "eth0")
        server.record("addresses of this host changed")
        assert source() == first, "it stays while its own address is there"
        net.proxy.run("ip", "addr", "del", f"{first}/{bits}", "dev", "eth0")
        wait_until(lambda: server.records("addresses of this host changed", removed=[first]), "it knows")
        assert source() == other
        moved = server.record("egress address changes")
        assert (moved["pool"], moved["before"], moved["after"]) == ("default", first, other)
        net.proxy.run("ip", "addr", "add", f"{first}/{bits}", "dev", "eth0")
        wait_until(lambda: server.records("addresses of this host changed", added=[first]), "it knows")
        assert source() == other, "nor does it move back"


ROUTED = {4: ("192.0.2.16/28", "192.0.2.19"), 6: ("2001:db8:9::/64", "2001:db8:9::1234")}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("whole", [False, True])
def test_an_address_of_a_network_that_is_routed_here(
    host_net: lab.Net, tmp_path: Path, version: int, whole: bool
) -> None:
    """No interface has the address (AnyIP), but the kernel accepts it as this host's."""
    net, (network, address) = host_net, ROUTED[version]
    net.proxy.run("ip", "route", "add", "local", network, "dev", "lo")
    net.outside.run("ip", "route", "add", network, "via", POOL[version][0])
    with (
        Served(net.outside.listen(WEB[version], 80), daemons.echo),
        usocksd(net, tmp_path, network if whole else address) as server,
        Sniffer(net.outside, 80) as sniffer,
    ):
        answers = [ask(net, f"127.0.0.{client}", WEB[version], 80) for client in range(1, 9)]
        assert {reply for reply, _ in answers} == {GRANTED}
        used = {bound for _, bound in answers}
        if whole:
            assert len(used) > 1
            assert all(ip_address(each) in ip_network(network) for each in used)
        else:
            assert used == {address}
        # Nor does it lead into this host.
        assert ask(net, "127.0.0.1", address, 80)[0] == 2
        net.proxy.run("ip", "route", "del", "local", network, "dev", "lo")
        server.record("addresses of this host changed", removed=[network])
        assert ask(net, "127.0.0.1", WEB[version], 80)[0] == NETWORK_UNREACHABLE
    assert {source for _, source in sniffer.seen} == used


def test_the_same_address_from_every_worker_and_after_a_restart(host_net: lab.Net, tmp_path: Path) -> None:
    net, clients = host_net, [f"127.0.0.{number}" for number in range(1, 13)]

    def sources() -> dict[str, set[str]]:
        """The egress address of each client, over enough connections for all workers to have some."""
        return {client: {ask(net, client, WEB[4], 80)[1] for _ in range(8)} for client in clients}

    with Served(net.outside.listen(WEB[4], 80), daemons.echo):
        with usocksd(net, tmp_path, *lab.PROXY_V4, top="workers = 2") as server:
            first = sources()
            assert all(len(found) == 1 for found in first.values())
            assert set().union(*first.values()) == set(lab.PROXY_V4)
            server.signal(signal.SIGHUP)
            server.record("reloaded")
            assert sources() == first
        server.log.unlink()
        # The configured order has no influence.
        with usocksd(net, tmp_path, *reversed(lab.PROXY_V4), top="workers = 2") as server:
            assert sources() == first


# ---- ports that run out


@contextlib.contextmanager
def queue(net: lab.Net) -> Iterator[Socket]:
    """A listener at the destination that takes no connection from its queue, so that all stay open."""
    with net.outside.listen(WEB[4], 80, backlog=4000) as listener:
        yield listener


def peers(listener: Socket, count: int) -> Counter[str]:
    """The clients in its queue; takes them out and ends them."""
    found: Counter[str] = Counter()
    for _ in range(count):
        sock, (host, _) = listener.accept()
        sock.close()
        found[host] += 1
    return found


@pytest.mark.parametrize("addresses", [1, 2])
def test_1500_connections_to_one_destination(host_net: lab.Net, tmp_path: Path, addresses: int) -> None:
    net, pool = host_net, lab.PROXY_V4[1 : 1 + addresses]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:  # a login's is 1024
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    net.proxy.sysctl("net.ipv4.ip_local_port_range", "40000 40999")
    with queue(net) as listener, usocksd(net, tmp_path, *pool) as server, contextlib.ExitStack() as clients:
        replies: Counter[int] = Counter()
        for number in range(1500):
            client = clients.enter_context(connected(net, f"127.0.0.{number // 500 + 1}"))
            replies[socks5(client, WEB[4], 80)[0]] += 1
        if addresses == 2:
            assert replies == {GRANTED: 1500}
            found = peers(listener, 1500)
            assert set(found) == set(pool)
            assert max(found.values()) <= 1000
            return
        # Exactly the excess fails.
        assert replies == {GRANTED: 1000, GENERAL_FAILURE: 500}
        assert peers(listener, 1000) == {pool[0]: 1000}
        wait_until(lambda: len(server.records("dial to destination failed")) == 500, "the log has them all")
        errors = {record["error"] for record in server.records("dial to destination failed")}
        where = f"out of ports towards {WEB[4]}:80 on {pool[0]} (EADDRNOTAVAIL)"
        assert errors == {f"{where}; 0 connections of this host are in TIME_WAIT"}
        line = 'usocksd_dial_errors_total{cause="out_of_ports"} '
        wait_until(lambda: metric(net, line) == 500.0, lambda: f"the metric counts them: {metric(net, line)}")


def test_reconnecting_says_that_time_wait_has_the_ports(host_net: lab.Net, tmp_path: Path) -> None:
    net = host_net
    net.proxy.sysctl("net.ipv4.ip_local_port_range", "40000 40999")
    with Served(net.outside.listen(WEB[4], 80), daemons.echo) as web, usocksd(net, tmp_path, lab.PROXY_V4[1]) as server:

        def reconnect(number: int) -> int:
            # The client ends first, and so do we towards the destination.
            with connected(net, f"127.0.0.{number // 500 + 1}") as client:
                reply = socks5(client, web.address[0], 80)[0]
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
                return reply

        replies = [reconnect(number) for number in range(1050)]
        assert replies[:900] == [GRANTED] * 900
        assert set(replies[900:]) == {GRANTED, GENERAL_FAILURE}
        error = server.record("dial to destination failed")["error"]
        what, _, rest = error.rpartition("; ")
        assert what == f"out of ports towards {WEB[4]}:80 on {lab.PROXY_V4[1]} (EADDRNOTAVAIL)"
        count, _, words = rest.partition(" ")
        assert words == "connections of this host are in TIME_WAIT"
        assert int(count) >= 1000
        # The remedy of the operator's guide. (A port is reused when it has been idle for a second.)
        net.proxy.sysctl("net.ipv4.tcp_tw_reuse", 1)
        numbers = iter(range(100_000))
        wait_until(lambda: reconnect(next(numbers) % 5000) == GRANTED, "ports in TIME_WAIT serve again")


# ---- block lists


class Zone:
    """dnsmasq on the outside host: a block list; tells when its data has changed."""

    def __init__(self, net: lab.Net, folder: Path) -> None:
        self._net = net
        self._hosts = folder / "zone"
        self.put()

    def start(self) -> None:
        self._process = self._net.outside.popen(
            "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--user=", "--bind-interfaces",
            f"--listen-address={lab.NEXT_V4}", "--no-resolv", "--no-hosts", f"--addn-hosts={self._hosts}",
            f"--auth-server=ns.bl.example,{lab.NEXT_V4}", "--auth-zone=bl.example", "--auth-ttl=1",
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def put(self, *listed: str) -> None:
        """The listed addresses from now on."""
        names = [IPv4Address(address).reverse_pointer.removesuffix("in-addr.arpa") for address in listed]
        self._hosts.write_text("".join(f"127.0.0.2 {name}bl.example\n" for name in names))

    def reread(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


ONE, TWO, THREE = lab.PROXY_V4
LISTED = f"""
workers = 2
control = "{{control}}"
[[rule]]
action = "allow"
ports = [81]
egress = "strict"
[egress.strict]
addresses = ["{THREE}"]
dnsbl_domains = ["bl.example"]
when_all_listed = "refuse"
[incoming]
port = 1080
addresses = ["127.0.0.1"]
metrics_port = 9100
[outgoing]
addresses = ["{ONE}", "{TWO}"]
dnsbl_domain = "bl.example"
[dns]
servers = ["{lab.NEXT_V4}"]
"""


class Listed(contextlib.AbstractContextManager["Listed"]):
    """A daemon with two pools that use a block list, and the list."""

    def __init__(self, net: lab.Net, folder: Path) -> None:
        if shutil.which("dnsmasq") is None:
            pytest.skip("not installed: dnsmasq (Debian: dnsmasq-base)")
        self._net = net
        self._folder = folder
        self._stack = contextlib.ExitStack()
        for port in (80, 81):
            self._stack.enter_context(Served(net.outside.listen(WEB[4], port), daemons.echo))
        self.zone = Zone(net, folder)
        self.zone.start()
        config = LISTED.format(control=folder / "control.sock")
        self.server = self._stack.enter_context(Daemon("usocksd", config, folder, popen=net.proxy.popen))

    def __enter__(self) -> Listed:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def sources(self, port: int) -> set[tuple[int, str]]:
        """Replies to many clients, and their egress addresses, over all workers."""
        return {ask(self._net, f"127.0.1.{number}", WEB[4], port) for number in range(1, 41)}

    def replies(self, port: int) -> set[int]:
        return {reply for reply, _ in self.sources(port)}

    def status(self) -> Any:
        return ControlClient("usocksd", str(self._folder / "control.sock")).ask("status")

    def listed(self) -> dict[str, list[str]]:
        """The listed addresses by pool, as `status` shows them."""
        return {name: sorted(pool["listed"]) for name, pool in self.status()["daemon"]["pools"].items()}

    def keeper(self) -> int:
        """The worker of the first slot."""
        workers = [worker for row in self.status()["generations"] for worker in row["workers"]]
        (pid,) = [worker["pid"] for worker in workers if worker["slot"] == 0]
        return int(pid)


def test_a_block_list(host_net: lab.Net, tmp_path: Path) -> None:
    with Listed(host_net, tmp_path) as world:
        server, zone = world.server, world.zone
        assert world.sources(80) == {(GRANTED, ONE), (GRANTED, TWO)}
        assert world.sources(81) == {(GRANTED, THREE)}
        # Seen within seconds, since the zone says that its answers are good for one.
        zone.put(ONE)
        zone.reread()
        record = server.record("detect black-listed IP")
        assert (record["_bad_ips"], record["domain"], record["severity"]) == ([ONE], "bl.example", "warning")
        wait_until(lambda: world.sources(80) == {(GRANTED, TWO)}, "no worker leaves from it")
        assert world.listed() == {"default": [ONE], "strict": []}
        line = f'usocksd_egress_listed{{address="{ONE}",pool="default"}} '
        wait_until(lambda: metric(host_net, line) == 1.0, lambda: f"the metric: {metric(host_net, line)}")
        # Unlisted, and another one that is alone in its pool.
        zone.put(THREE)
        zone.reread()
        server.record("detect black-listed IP", _bad_ips=[THREE])
        wait_until(lambda: world.sources(80) == {(GRANTED, ONE), (GRANTED, TWO)}, "it is used again")
        wait_until(lambda: world.replies(81) == {NETWORK_UNREACHABLE}, "this pool refuses")
        wait_until(lambda: metric(host_net, line) == 0.0, lambda: f"the metric: {metric(host_net, line)}")
        error = server.record("dial to destination failed", dest_port=81)["error"]
        assert error == 'no usable egress address for IPv4 in pool "strict": 1 listed'


def test_listings_outlive_their_keeper(host_net: lab.Net, tmp_path: Path) -> None:
    with Listed(host_net, tmp_path) as world:
        server, zone = world.server, world.zone
        zone.put(THREE)
        zone.reread()
        wait_until(lambda: world.replies(81) == {NETWORK_UNREACHABLE}, "this pool refuses")
        zone.stop()
        keeper, others = world.keeper(), set(server.workers())
        os.kill(keeper, signal.SIGKILL)
        server.record("a worker was replaced")
        assert others - {keeper} < set(server.workers())
        server.record("DNSBL does not answer: its last answers stay in force")
        assert world.listed() == {"default": [], "strict": [THREE]}
        assert world.replies(81) == {NETWORK_UNREACHABLE}
        # Nor does a reload forget it.
        server.signal(signal.SIGHUP)
        server.record("reloaded", generation=2)
        assert world.replies(81) == {NETWORK_UNREACHABLE}
        wait_until(
            lambda: len(server.records("DNSBL does not answer: its last answers stay in force")) == 2,
            "the new keeper asks",
        )
        assert world.replies(81) == {NETWORK_UNREACHABLE}
        # A keeper that starts asks at once, and is heard.
        zone.put()
        zone.start()
        server.signal(signal.SIGHUP)
        server.record("no longer black-listed", removed=[THREE])
        wait_until(lambda: world.sources(81) == {(GRANTED, THREE)}, "it is used again")
        assert len(server.records("detect black-listed IP")) == 1

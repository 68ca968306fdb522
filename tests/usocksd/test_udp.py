"""UDP ASSOCIATE over loopback: what is relayed, what is dropped and why, and what the records say."""

from __future__ import annotations

import gc
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from socket import socket as Socket

import daemons
import pytest
import trio
from daemons import Daemon, NameServer, request
from inside import usocksd_inside

from usocksd.association import ClientAssociation
from usocksd.mapping import NOBODY, Destination, Mapping
from usocksd.socks.datagram import header

NAMES = {
    "one.test": ["127.0.0.1"],
    "two.test": ["127.0.0.66", "127.0.0.1"],  # the rules deny the first
    "denied.test": ["127.0.0.66"],
    "empty.test": [],
    "silent.test": None,
}
CONFIG = """
control = "{folder}/control.sock"
[incoming]
port = {port}
metrics_port = {metrics}
addresses = ["127.0.0.1", "::1"]
[outgoing]
allow_sites = ["127.0.0.0/8", ".test", "::1"]
deny_sites = ["forbidden.test", "127.0.0.66"]
deny_ports = [25]
[dns]
servers = ["{dns}"]
[timeouts]
connect = 1
[udp]
queue = 4
{udp}
"""


@pytest.fixture(scope="module")
def dns() -> Iterator[NameServer]:
    with NameServer(NAMES) as server:
        yield server


class Server(Daemon):
    """usocksd with this in [udp]."""

    def __init__(self, folder: Path, dns: NameServer, udp: str = "") -> None:
        self.folder = folder
        self.metrics = daemons.free_port()
        config = CONFIG.format(folder=folder, port=daemons.free_port(), metrics=self.metrics, dns=dns.address, udp=udp)
        super().__init__("usocksd", config, folder)

    def udp_ports(self) -> set[int]:
        """The ports of UDP sockets of this host."""
        text = Path("/proc/net/udp").read_text() + Path("/proc/net/udp6").read_text()
        return {int(port, 16) for port in re.findall(r"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) ", text, re.MULTILINE)}

    def dropped(self) -> dict[str, float]:
        """The datagrams dropped so far, by cause."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics") as answer:
            text = answer.read().decode()
        return {cause: float(number) for cause, number in re.findall(r'udp_dropped_total{cause="(.*)"} (.*)', text)}


@pytest.fixture(scope="module")
def server(dns: NameServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("usocksd"), dns) as daemon:
        yield daemon


class Client:
    """A SOCKS client with an association."""

    def __init__(self, server: Server, host: str = "127.0.0.1", asks: tuple[str, int] = ("0.0.0.0", 0)) -> None:
        self.tcp = socket.create_connection((host, server.port), daemons.PATIENCE)
        self.tcp.sendall(daemons.GREETING + request(*asks, command=3))
        daemons.receive_exactly(self.tcp, 2)
        self.reply, *relay = daemons.receive_reply(self.tcp)
        self.relay = relay[0], relay[1]
        self.udp = udp_socket(host)

    def send(self, host: str, port: int, payload: bytes = b"asked") -> None:
        self.udp.sendto(header(host, port) + payload, self.relay)

    def receive(self) -> tuple[bytes, bytes]:
        """Header and payload of the next datagram."""
        data = self.udp.recv(65536)
        size = 10 if data[3] == 1 else 22
        return data[:size], data[size:]

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()


def udp_socket(host: str = "127.0.0.1", port: int = 0) -> Socket:
    sock = Socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(daemons.PATIENCE)
    sock.bind((host, port))
    return sock


@contextmanager
def associated(server: Server, host: str = "127.0.0.1", **options: tuple[str, int]) -> Iterator[Client]:
    with closing(Client(server, host, **options)) as client:
        assert client.reply == 0
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with associated(server) as client:
        yield client


@pytest.fixture
def destination() -> Iterator[Socket]:
    with udp_socket() as sock:
        yield sock


def port_of(sock: Socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def test_relays_both_ways_and_records_each_destination(server: Server, client: Client, destination: Socket) -> None:
    for number in range(3):
        client.send("127.0.0.1", port_of(destination), b"%d" % number)
        data, sender = destination.recvfrom(100)
        assert data == b"%d" % number
        destination.sendto(b"answer", sender)
        assert client.receive() == (header("127.0.0.1", port_of(destination)), b"answer")
    with udp_socket() as another:
        client.send("127.0.0.1", port_of(another))
        assert another.recvfrom(100)[1] == sender  # one outgoing port, whatever the destination
    client.tcp.close()
    ident = daemons.wait_until(lambda: server.records("association ends"), "it ends")[-1]["request_id"]
    flows = {flow["dest_port"]: flow for flow in server.records("udp flow", request_id=ident)}
    flow = flows[port_of(destination)]
    assert (flow["tx_packets"], flow["rx_packets"], flow["tx_bytes"], flow["rx_bytes"]) == (3, 3, 3, 18)
    assert (flow["src_addr"], flow["rule"]) == (f"127.0.0.1:{sender[1]}", 'allow_sites "127.0.0.0/8"')
    assert flow["command"] == "udp_associate"
    assert len(flows) == 2
    assert server.record("association starts", request_id=ident)["relay_addr"] == f"127.0.0.1:{client.relay[1]}"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_clients_reach_the_other_family(server: Server, host: str) -> None:
    other = "::1" if host == "127.0.0.1" else "127.0.0.1"
    with associated(server, host) as client, udp_socket(other) as far:
        assert client.relay[0] == host
        client.send(other, port_of(far))
        data, sender = far.recvfrom(100)
        far.sendto(data, sender)
        assert client.receive() == (header(other, port_of(far)), b"asked")


@pytest.mark.parametrize("name", ["one.test", "two.test"])
def test_names(client: Client, destination: Socket, name: str) -> None:
    for _ in range(2):
        client.send(name, port_of(destination))
        data, sender = destination.recvfrom(100)
        destination.sendto(data, sender)
        assert client.receive()[0] == header("127.0.0.1", port_of(destination))  # numeric always


def test_datagrams_wait_for_a_name_but_not_many(server: Server, client: Client) -> None:
    before = server.dropped()["queue_full"]
    for _ in range(10):
        client.send("silent.test", 9)
    daemons.wait_until(lambda: server.dropped()["queue_full"] == before + 6, "the queue is full")


@pytest.mark.parametrize(
    ("host", "port", "cause"),
    [
        ("forbidden.test", 9, "denied"),
        ("127.0.0.66", 9, "denied"),
        ("127.0.0.1", 25, "denied"),
        ("denied.test", 9, "denied"),
        ("empty.test", 9, "unresolved"),
        ("bad name.test", 9, "name"),
    ],
)
def test_refused_destinations_are_recorded_once(server: Server, host: str, port: int, cause: str) -> None:
    before = server.dropped()[cause]
    with associated(server) as client:
        for _ in range(3):
            client.send(host, port)
            time.sleep(0.01)
        daemons.wait_until(lambda: server.dropped()[cause] >= before + 3, "three are dropped")
    daemons.wait_until(lambda: server.records("association ends"), "it ends")
    ident = server.records("association starts")[-1]["request_id"]
    message = "ruleset mismatch" if cause == "denied" else "udp flow failed"
    assert len(server.records(message, request_id=ident)) == (cause != "name")


@pytest.mark.parametrize(
    ("datagram", "cause"),
    [
        (b"", "short"),
        (b"\0\0\0\x01\x7f", "short"),
        (b"\0\0\0\x03\xff", "short"),
        (b"\0\0\x01\x01\x7f\0\0\x01\0\x09", "fragment"),
        (b"\0\x01\0\x01\x7f\0\0\x01\0\x09", "reserved"),
        (b"\0\0\0\x09\x7f\0\0\x01\0\x09xxxxxxxxxxxxxxxxxx", "address_type"),
    ],
)
def test_bad_datagrams_are_dropped(
    server: Server, client: Client, destination: Socket, datagram: bytes, cause: str
) -> None:
    before = server.dropped()[cause]
    client.udp.sendto(datagram, client.relay)
    daemons.wait_until(lambda: server.dropped()[cause] == before + 1, "it is dropped")
    client.send("127.0.0.1", port_of(destination), b"good")
    assert destination.recv(100) == b"good"


def test_strangers_reach_neither_side(server: Server, client: Client, destination: Socket) -> None:
    before = server.dropped()["stranger"]
    with udp_socket("127.0.0.2") as stranger:
        stranger.sendto(header("127.0.0.1", port_of(destination)) + b"stranger", client.relay)
        daemons.wait_until(lambda: server.dropped()["stranger"] == before + 1, "it is dropped")
        client.send("127.0.0.1", port_of(destination), b"mine")
        data, sender = destination.recvfrom(100)
        assert data == b"mine"
        stranger.sendto(b"not asked", sender)
        daemons.wait_until(lambda: server.dropped()["stranger"] == before + 2, "it is dropped")
        with udp_socket("127.0.0.1") as other_port:  # of an address that was asked
            other_port.sendto(b"other port", sender)
            assert client.receive() == (header("127.0.0.1", port_of(other_port)), b"other port")


def test_full_cone(tmp_path: Path, dns: NameServer, destination: Socket) -> None:
    with Server(tmp_path, dns, 'filtering = "any"') as server, associated(server) as client:
        client.send("127.0.0.1", port_of(destination))
        sender = destination.recvfrom(100)[1]
        with udp_socket("127.0.0.66") as forbidden, udp_socket("127.0.0.7") as stranger:
            forbidden.sendto(b"denied", sender)
            stranger.sendto(b"hello", sender)
            assert client.receive() == (header("127.0.0.7", port_of(stranger)), b"hello")
            client.send("127.0.0.7", port_of(stranger), b"back")
            assert stranger.recv(100) == b"back"


def test_the_client_may_say_its_port(server: Server, destination: Socket) -> None:
    with udp_socket() as udp, associated(server, asks=udp.getsockname()) as client:
        client.send("127.0.0.1", port_of(destination), b"another port")
        udp.sendto(header("127.0.0.1", port_of(destination)) + b"said", client.relay)
        assert destination.recv(100) == b"said"


def test_dns_gives_its_port_back_at_once(server: Server) -> None:
    with associated(server) as client:
        try:
            name_server = udp_socket("127.0.0.53", 53)
        except OSError as error:
            pytest.skip(f"port 53 needs root: {error}")
        with name_server:
            client.send("127.0.0.53", 53, b"query")
            data, sender = name_server.recvfrom(100)
            assert sender[1] in server.udp_ports()
            name_server.sendto(data, sender)
            client.receive()
            daemons.wait_until(lambda: sender[1] not in server.udp_ports(), "the mapping is closed")


@pytest.mark.parametrize("how", ["end", "reset"])
def test_nothing_is_left_when_the_connection_is_over(server: Server, destination: Socket, how: str) -> None:
    with closing(Client(server)) as client:
        me = f"127.0.0.1:{port_of(client.tcp)}"
        client.send("127.0.0.1", port_of(destination))
        ports = {destination.recvfrom(100)[1][1], client.relay[1]}
        assert ports <= server.udp_ports()
        if how == "reset":
            daemons.reset(client.tcp)
        else:
            client.tcp.close()
        daemons.wait_until(lambda: not ports & server.udp_ports(), "its sockets are closed")
    (ended,) = daemons.wait_until(lambda: server.records("association ends", client_addr=me), "it ends")
    assert (ended["reason"], ended["ended_by"]) == ("reset" if how == "reset" else "closed", "client")


def test_idle_mappings_are_closed(tmp_path: Path, dns: NameServer, destination: Socket) -> None:
    with Server(tmp_path, dns, "idle = 0.5") as server:
        with associated(server) as client:
            client.send("127.0.0.1", port_of(destination))
            port = destination.recvfrom(100)[1][1]
            daemons.wait_until(lambda: server.records("udp flow"), "the flow is over")
            assert port not in server.udp_ports()
            client.send("127.0.0.1", port_of(destination), b"again")
            assert destination.recv(100) == b"again"


def test_limits(tmp_path: Path, dns: NameServer) -> None:
    udp = 'per_client = 1\nports = "20000-20001"\npublic = "203.0.113.5"'
    with Server(tmp_path, dns, udp) as server, associated(server) as client:
        assert client.relay[0] == "203.0.113.5"
        assert client.relay[1] in (20000, 20001)
        with closing(Client(server)) as second:
            assert second.reply == 2
        assert server.record("ruleset mismatch")["rule"] == "udp.per_client"
        with closing(Client(server, "::1")) as other:
            assert other.reply == 0
            assert other.relay[0] == "::1"
        client.tcp.close()
        daemons.wait_until(lambda: server.records("association ends"), "it ends")
        with associated(server):
            pass


def test_disabled(tmp_path: Path, dns: NameServer) -> None:
    with Server(tmp_path, dns, "enabled = false") as server:
        with closing(Client(server)) as client:
            assert client.reply == 7


def test_connections_lists_it(server: Server, client: Client, destination: Socket) -> None:
    client.send("127.0.0.1", port_of(destination), b"12345")
    destination.recv(100)
    me = f"127.0.0.1:{port_of(client.tcp)}"
    command = [sys.executable, "-m", "usocksd", "-f", server.folder / "usocksd.toml", "connections", "--json"]
    answer = json.loads(subprocess.check_output(command))
    rows = [row for row in answer["connections"] if row["client"] == me]
    assert [(row["state"], row["tx_bytes"], row["rx_bytes"]) for row in rows] == [("association", 5, 0)]


def test_rules_by_protocol(tmp_path: Path, dns: NameServer, destination: Socket) -> None:
    rules = """
[[rule]]
action = "deny"
protocol = "udp"
to = ["127.0.0.9"]
[[rule]]
action = "deny"
protocol = "tcp"
to = ["one.test"]
"""
    with Server(tmp_path, dns, rules) as server, associated(server) as client:
        client.send("127.0.0.9", 9)
        daemons.wait_until(lambda: server.dropped()["denied"] == 1, "it is dropped")
        client.send("one.test", port_of(destination))
        assert destination.recv(100) == b"asked"
        with socket.create_connection(("127.0.0.1", server.port)) as tcp:
            assert daemons.socks5(tcp, "one.test", 9, as_name=True)[0] == 2
        with socket.create_connection(("127.0.0.1", server.port)) as tcp:
            assert daemons.socks5(tcp, "127.0.0.9", 9)[0] == 5
        command = [sys.executable, "-m", "usocksd", "-f", tmp_path / "usocksd.toml", "explain", "--from", "127.0.0.1"]
        for options, status in ((["--udp", "--live"], 1), (["--udp"], 1), ([], 0)):
            assert subprocess.run([*command, *options, "127.0.0.9:9"], check=False).returncode == status


async def test_an_association_leaves_no_garbage(tmp_path: Path) -> None:
    """Cycles would wait for the collector, which runs seldom."""
    async with usocksd_inside(tmp_path, '[[rule]]\naction = "allow"\nto = ["127.0.0.0/8"]') as proxy:

        async def associate() -> None:
            with udp_socket() as destination, udp_socket() as udp:
                async with await proxy.connect() as tcp:
                    await tcp.send_all(daemons.GREETING + request("0.0.0.0", 0, command=3))
                    reply = b""
                    while len(reply) < 12:
                        reply += await tcp.receive_some()
                    relay = "127.0.0.1", int.from_bytes(reply[10:12])
                    udp.sendto(header("127.0.0.1", port_of(destination)) + b"asked", relay)
                    data, sender = await trio.to_thread.run_sync(destination.recvfrom, 100)
                    destination.sendto(data, sender)
                    await trio.to_thread.run_sync(udp.recv, 100)
            await proxy.over()

        await associate()
        gc.collect()
        gc.disable()
        try:
            await associate()
            found = [each for each in gc.get_objects() if isinstance(each, ClientAssociation | Mapping | Destination)]
        finally:
            gc.enable()
        assert not [each for each in found if each is not NOBODY]


def test_a_reload_keeps_it_and_a_stop_ends_it(tmp_path: Path, dns: NameServer, destination: Socket) -> None:
    with Server(tmp_path, dns) as server, associated(server) as client:
        client.send("127.0.0.1", port_of(destination))
        sender = destination.recvfrom(100)[1]
        before = server.worker
        server.signal(signal.SIGHUP)
        daemons.wait_until(lambda: before in server.workers() and len(server.workers()) == 2, "the old one drains")
        destination.sendto(b"still", sender)
        assert client.receive()[1] == b"still"
        client.send("127.0.0.1", port_of(destination), b"here")
        assert destination.recvfrom(100) == (b"here", sender)
        server.end()
        ended = server.record("association ends")
        assert (ended["reason"], ended["ended_by"], ended["tx_packets"]) == ("stopped", "proxy", 2)

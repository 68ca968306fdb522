"""The main job: connections redirected by the rule files reach their destinations through both daemons."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket
from typing import Any, NamedTuple

import daemons
import lab
import pytest
import trio
from daemons import Daemon, Served, is_reset, lives, name_of, receive_all, receive_exactly, reset
from scene import python_for_others

from transocks.original_dst import original_destination

RULES = Path(__file__).parents[2] / "iptables"
WEB = {4: lab.WEB_V4, 6: lab.WEB_V6}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
MARK = 0x7473
TRANSFERS = 100

USOCKSD = """
[incoming]
port = 1080
addresses = ["127.0.0.1"]
[outgoing]
mark = 0x7473
"""
TRANSOCKS = """
listen = {listen}
proxy_url = "{url}"
mark = 0x7473
[timeouts]
connect = 5
"""
# Many clients here send nothing at first.
NAMES = """
[names]
long_wait = 1
"""


@pytest.fixture(params=["host", "gateway"])
def net(request: pytest.FixtureRequest) -> lab.Net:
    net: lab.Net = request.getfixturevalue(f"{request.param}_net")
    return net


def load(net: lab.Net, tool: str, *, exempt: bool = True) -> None:
    """The rule files as they stand; without the exemption for the proxies' own traffic on demand."""
    place = "host" if net.proxy is net.client else "gateway"
    for kind in ("nft",) if tool == "nft" else ("v4", "v6"):
        text = (RULES / f"{place}.{kind}").read_text()
        if not exempt:
            text = re.sub(r"^.*(meta mark \$transocks_mark accept|--mark 0x7473 -j RETURN)$", "", text, flags=re.M)
        command = {"nft": ["nft", "-f", "-"], "v4": ["iptables-restore", "--noflush"]}.get(
            kind, ["ip6tables-restore", "--noflush"]
        )
        net.proxy.run(*command, input=text)


def transocks(
    net: lab.Net, folder: Path, url: str = "socks5://127.0.0.1:1080", listen: str | None = None, more: str = ""
) -> Daemon:
    listen = listen or ('"localhost:1081"' if net.proxy is net.client else '":1081"')
    config = TRANSOCKS.format(listen=listen, url=url) + ("" if "[names]" in more else NAMES) + more
    return Daemon("transocks", config, folder, popen=net.proxy.popen)


def usocksd(net: lab.Net, folder: Path, config: str = USOCKSD) -> Daemon:
    return Daemon("usocksd", config, folder, popen=net.proxy.popen)


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, tool: str = "nft") -> Iterator[tuple[Daemon, Daemon]]:
    with usocksd(net, folder) as server, transocks(net, folder) as client:
        load(net, tool)
        yield client, server


def connect(net: lab.Net, version: int, port: int, host: str | None = None) -> Socket:
    sock = net.client.socket(FAMILY[version])
    sock.settimeout(daemons.PATIENCE)
    try:
        sock.connect((host or WEB[version], port))
    except BaseException:  # a reset may come before connect(2) has returned
        sock.close()
        raise
    return sock


def is_refused(net: lab.Net, version: int, port: int, host: str | None = None) -> bool:
    """Whether a connection is reset before anything came, which may be before connect(2) has returned."""
    try:
        with connect(net, version, port, host) as sock:
            return is_reset(sock)
    except ConnectionResetError:
        return True


class Pair(NamedTuple):
    net: lab.Net
    client: Daemon
    server: Daemon


@pytest.fixture(scope="module")
def pair(shared_host_net: lab.Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both on a host, for all tests that need nothing else."""
    with both(shared_host_net, tmp_path_factory.mktemp("pair")) as (client, server):
        yield Pair(shared_host_net, client, server)


def test_original_destinations(net: lab.Net, tmp_path: Path) -> None:
    with both(net, tmp_path, "iptables") as (client, server):
        for tool, version in (("iptables", 4), ("iptables", 6), ("nft", 4), ("nft", 6)):
            if (tool, version) == ("nft", 4):
                net.proxy.run("sh", "-ec", "iptables -t nat -F; ip6tables -t nat -F")
                load(net, tool)
            with Served(net.outside.listen(WEB[version]), daemons.echo) as web:
                with connect(net, version, web.port) as sock:
                    assert lives(sock, b"hello")
                    own = name_of(*sock.getsockname()[:2])
                wanted = name_of(WEB[version], web.port)
                mine = client.record("proxy ends", client_addr=own)
                assert (mine["dest_addr"], mine["tx_bytes"], mine["rx_bytes"]) == (wanted, 5, 5)
                theirs = server.record("proxy ends", client_addr=mine["src_addr"])
                assert (theirs["dest_addr"], theirs["reason"], theirs["ended_by"]) == (wanted, "closed", "client")
                # It left through the SOCKS server, not by itself.
                assert theirs["src_addr"] == name_of(*web.peers[0])


def test_names_and_a_web_server(pair: Pair) -> None:
    pair.net.lab.etc("hosts", f"{lab.WEB_V4} www.beyond.example\n")
    with Served(pair.net.outside.listen(lab.WEB_V4, 80), page):
        assert pair.net.client.run("curl", "-sS", "http://www.beyond.example/").stdout == "it works"


def page(sock: Socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nit works")


async def test_concurrent_transfers_arrive_intact(net: lab.Net, tmp_path: Path) -> None:
    """Each sends a random amount and gets back that much of something else; both ends compare digests."""
    rng = random.Random(4)
    block = os.urandom(1 << 20)

    def size() -> int:
        return rng.choice((0, 1, rng.randrange(70_000), rng.randrange(4_000_000)))

    sizes = [(size(), size()) for _ in range(TRANSFERS)]
    listener = trio.socket.from_stdlib_socket(net.outside.listen(backlog=512))

    def chunks(number: int, size: int) -> Iterator[memoryview]:
        offset = number * 1009 % 4096
        while size:
            piece = memoryview(block)[offset : offset + min(size, 1 << 19)]
            yield piece
            size -= len(piece)

    async def send(stream: trio.SocketStream, number: int, size: int) -> None:
        for piece in chunks(number, size):
            await stream.send_all(piece)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream, number: int, size: int) -> None:
        found, wanted = hashlib.md5(), hashlib.md5()
        async for data in stream:
            found.update(data)
        for piece in chunks(number, size):
            wanted.update(piece)
        assert found.digest() == wanted.digest()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream, trio.open_nursery() as nursery:
            number = struct.unpack("!I", await stream.receive_some(4))[0]
            nursery.start_soon(send, stream, number + 7, sizes[number][1])
            await receive(stream, number, sizes[number][0])

    async def transfer(number: int) -> None:
        version = (4, 6)[number % 2]
        sock = trio.socket.from_stdlib_socket(net.client.socket(FAMILY[version]))
        await sock.connect((WEB[version], listener.getsockname()[1]))
        stream = trio.SocketStream(sock)
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(struct.pack("!I", number))
            nursery.start_soon(send, stream, number, sizes[number][0])
            await receive(stream, number + 7, sizes[number][1])

    with both(net, tmp_path, "iptables") as (client, server), trio.fail_after(60):
        before = client.fds(), server.fds()
        async with trio.open_nursery() as servers:
            servers.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            async with trio.open_nursery() as clients:
                for number in range(TRANSFERS):
                    clients.start_soon(transfer, number)
            servers.cancel_scope.cancel()
        daemons.wait_until(lambda: len(client.records("proxy ends", reason="closed")) == TRANSFERS, "all have ended")
        # Pipes of the pool stay open; sockets do not.
        assert sockets_of(client) <= before[0]
        assert sockets_of(server) <= before[1]


def sockets_of(daemon: Daemon) -> int:
    folder = Path(f"/proc/{daemon.worker}/fd")
    return sum(os.readlink(entry).startswith("socket:") for entry in folder.iterdir())


@pytest.mark.parametrize("version", [4, 6])
def test_half_closed_both_ways(pair: Pair, version: int) -> None:
    def late(sock: Socket) -> None:
        said = receive_all(sock)  # until the client's end
        sock.sendall(said.upper())

    def early(sock: Socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        heard.append(receive_all(sock))

    heard: list[bytes] = []
    with Served(pair.net.outside.listen(WEB[version]), late) as web, connect(pair.net, version, web.port) as sock:
        sock.sendall(b"abc" * 100_000)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b"ABC" * 100_000
    with Served(pair.net.outside.listen(WEB[version]), early) as web, connect(pair.net, version, web.port) as sock:
        assert receive_all(sock) == b"bye"
        sock.sendall(b"so long")
        sock.shutdown(socket.SHUT_WR)
        daemons.wait_until(lambda: heard, "the server has heard the rest")
    assert heard == [b"so long"]


@pytest.mark.parametrize("version", [4, 6])
def test_resets_arrive_as_resets(pair: Pair, version: int) -> None:
    net, client, server = pair
    seen: list[object] = []

    def resets(sock: Socket) -> None:
        receive_exactly(sock, 2)
        sock.sendall(b"last words")
        reset(sock)

    def ends(sock: Socket) -> None:
        try:
            seen.append(receive_all(sock))
        except OSError as error:
            seen.append(error.errno)

    with Served(net.outside.listen(WEB[version]), resets) as web, connect(net, version, web.port) as sock:
        sock.sendall(b"hi")
        assert receive_exactly(sock, 10) == b"last words"
        assert is_reset(sock)
    assert client.record("proxy ends", dest_addr=name_of(*web.address), reason="reset")["ended_by"] == "upstream"
    with Served(net.outside.listen(WEB[version]), ends) as web:
        sock = connect(net, version, web.port)
        daemons.wait_until(lambda: web.peers, "it is connected")
        reset(sock)
        daemons.wait_until(lambda: seen, "the server has seen the end")
    assert seen == [errno.ECONNRESET]
    server.record("proxy ends", dest_addr=name_of(*web.address), reason="reset", ended_by="client")


@pytest.mark.parametrize("version", [4, 6])
def test_a_refused_connection_is_reset(pair: Pair, version: int) -> None:
    assert is_refused(pair.net, version, 9)
    name = name_of(WEB[version], 9)
    assert "refused" in pair.client.record("failed to connect to proxy server", dest_addr=name)["error"]
    assert "ECONNREFUSED" in pair.server.record("dial to destination failed", dest_host=WEB[version])["error"]


def test_the_upstream_is_not_there(host_net: lab.Net, tmp_path: Path) -> None:
    with transocks(host_net, tmp_path) as client:
        load(host_net, "nft")
        assert is_refused(host_net, 4, 80)
        assert "ECONNREFUSED" in client.record("failed to connect to proxy server")["error"]


def test_listeners(host_net: lab.Net, tmp_path: Path) -> None:
    load(host_net, "iptables")
    listen = ('":1081"', '["0.0.0.0:1081", "[::]:1081"]', '["127.0.0.1:1081", "[::1]:1081"]', '"localhost:1081"')
    with usocksd(host_net, tmp_path), Served(host_net.outside.listen(), daemons.echo) as web:
        for number, places in enumerate(listen):
            folder = tmp_path / str(number)
            folder.mkdir()
            with transocks(host_net, folder, listen=places):
                for version in (4, 6):
                    with connect(host_net, version, web.port) as sock:
                        assert lives(sock), (places, version)


def test_dnat(gateway_net: lab.Net, tmp_path: Path) -> None:
    """DNAT instead of REDIRECT, to an address of the gateway."""
    with usocksd(gateway_net, tmp_path), transocks(gateway_net, tmp_path) as client:
        for tool, target, match in (
            ("iptables", f"{lab.LAN_GATEWAY_V4}:1081", lab.WEB_V4),
            ("ip6tables", f"[{lab.LAN_GATEWAY_V6}]:1081", lab.WEB_V6),
        ):
            rule = f"-A PREROUTING -p tcp -d {match} -j DNAT --to-destination {target}"
            gateway_net.proxy.run(tool, "-t", "nat", *rule.split())
        for version in (4, 6):
            with Served(gateway_net.outside.listen(WEB[version]), daemons.echo) as web:
                with connect(gateway_net, version, web.port) as sock:
                    assert lives(sock)
                daemons.wait_until(
                    lambda web=web: [
                        r for r in client.records("proxy ends") if r["dest_addr"].endswith(f":{web.port}")
                    ],
                    "the destination is the original one",
                )


def test_a_loop_is_refused(host_net: lab.Net, tmp_path: Path) -> None:
    """No rule exempts the proxies. Their connections come back, and are refused instead of looping."""
    config = USOCKSD.replace('["127.0.0.1"]', f'["{lab.PROXY_V4[0]}"]').replace("mark = 0x7473\n", "")
    url = f"socks5://{lab.PROXY_V4[0]}:1080"
    with usocksd(host_net, tmp_path, config), transocks(host_net, tmp_path, url) as client:
        # Both the upstream on this host and the way out are redirected.
        for tool, own in (("iptables", lab.PROXY_V4[0]), ("ip6tables", lab.PROXY_V6[0])):
            for to in (own, WEB[4] if tool == "iptables" else WEB[6]):
                rule = f"-A OUTPUT -p tcp -d {to} -j REDIRECT --to-ports 1081"
                host_net.proxy.run(tool, "-t", "nat", *rule.split())
        before = client.fds()
        for version in (4, 6):
            assert is_refused(host_net, version, 80)
            assert "its destination is the upstream" in client.record("loop refused")["error"]
        client.wait_for_fds(before)


def test_its_own_port_is_a_loop(host_net: lab.Net, tmp_path: Path) -> None:
    """The listener's port on any address of this host, redirected to the listener."""
    with usocksd(host_net, tmp_path), transocks(host_net, tmp_path, listen='":1081"') as client:
        rule = f"-A OUTPUT -p tcp -d {lab.PROXY_V4[1]} -j DNAT --to-destination {lab.PROXY_V4[0]}:1081"
        host_net.proxy.run("iptables", "-t", "nat", *rule.split())
        assert is_refused(host_net, 4, 1081, lab.PROXY_V4[1])
        assert "own port" in client.record("loop refused")["error"]


def test_two_daemons_of_their_own_users_and_no_exemption(host_net: lab.Net) -> None:
    """The rules of an operator who forgot the exemption, and the users that deploy/ makes."""
    if host_net.lab.rootless:
        pytest.skip("a user namespace with one uid has no other user to be")
    users = {"transocks": 4710, "usocksd": 4711}
    host_net.lab.etc("passwd", "root:x:0:0::/:/bin/sh\n" + "".join(f"{n}:x:{i}:{i}::/:\n" for n, i in users.items()))
    words = {name: ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] for name, uid in users.items()}
    python, environment = python_for_others(
        lambda *command: host_net.client.run(*words["usocksd"], *command, check=False)
    )
    words = {name: [*switch, *environment] for name, switch in words.items()}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:  # pytest's own folders are private
        folder = Path(name)
        folder.chmod(0o777)
        configs = {
            "usocksd": USOCKSD.replace("mark = 0x7473\n", ""),
            "transocks": 'listen = "localhost:1081"\nproxy_url = "socks5://127.0.0.1:1080"\n',
        }
        server, client = (
            stack.enter_context(Daemon(n, c, folder, popen=host_net.proxy.popen, prefix=words[n], python=python))
            for n, c in configs.items()
        )
        load(host_net, "iptables", exempt=False)
        before = client.fds(), server.fds()
        for version in (4, 6):
            assert is_refused(host_net, version, 80)
        daemons.wait_until(lambda: len(client.records("loop refused")) == 2, "both are refused")
        for record in client.records("loop refused"):
            assert record["error"].startswith("user usocksd made it")
        client.wait_for_fds(before[0])
        server.wait_for_fds(before[1])


def test_no_exemption_and_nothing_to_tell_the_daemons_by(host_net: lab.Net, tmp_path: Path) -> None:
    """Both as root: the last resort ends the circle well before the descriptors do, and all of it."""
    limit = ["prlimit", "--nofile=500:500"]
    config = USOCKSD.replace("mark = 0x7473\n", "")
    popen = host_net.proxy.popen
    with (
        usocksd(host_net, tmp_path, config) as server,
        Daemon("transocks", 'proxy_url = "socks5://127.0.0.1:1080"\n', tmp_path, popen=popen, prefix=limit) as client,
    ):
        load(host_net, "nft", exempt=False)
        before = client.fds(), server.fds()
        with connect(host_net, 4, 80) as sock:
            sock.sendall(b"\0")  # else each round of the circle waits for it
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert "exempt the proxies" in client.record("loop refused")["error"]
        client.wait_for_fds(before[0])
        server.wait_for_fds(before[1])
        assert client.records("accepting is paused") == []


def test_an_upstream_behind_the_gateway_is_a_loop(gateway_net: lab.Net, tmp_path: Path) -> None:
    config = USOCKSD.replace("127.0.0.1", lab.LAN_CLIENT_V4).replace("mark = 0x7473\n", "")
    url = f"socks5://{lab.LAN_CLIENT_V4}:1080"
    with (
        Daemon("usocksd", config, tmp_path, popen=gateway_net.client.popen),
        transocks(gateway_net, tmp_path, url) as client,
    ):
        load(gateway_net, "nft")
        assert is_refused(gateway_net, 4, 80)
        assert "the upstream's host made it" in client.record("loop refused")["error"]


def test_its_own_users_are_a_loop(host_net: lab.Net, tmp_path: Path) -> None:
    if host_net.lab.rootless:
        pytest.skip("a user namespace with one uid has no other user to be")
    host_net.lab.etc("passwd", "root:x:0:0::/:/bin/sh\nusocksd:x:4711:4711::/:/bin/sh\n")
    with usocksd(host_net, tmp_path), transocks(host_net, tmp_path) as client:
        load(host_net, "nft")
        words = ["setpriv", "--reuid=4711", "--clear-groups", "curl", "-sS", f"http://{lab.WEB_V4}/"]
        assert host_net.client.run(*words, check=False).returncode in (7, 56)
        assert "user usocksd made it" in client.record("loop refused")["error"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_direct_connection_is_refused(pair: Pair, address: str) -> None:
    before = len(pair.client.records("not redirected"))
    assert is_refused(pair.net, 6 if ":" in address else 4, 1081, address)
    daemons.wait_until(lambda: len(pair.client.records("not redirected")) > before, "it is recorded")


def test_a_link_local_connection_to_a_gateway_is_refused(gateway_net: lab.Net, tmp_path: Path) -> None:
    """A local address that comes with a zone, where the original destination has none."""

    def interface(host: lab.Host, name: str) -> Any:
        return json.loads(host.run("ip", "-j", "addr", "show", "dev", name).stdout)[0]

    addresses = interface(gateway_net.proxy, "lan0")["addr_info"]
    (address,) = [a["local"] for a in addresses if a["scope"] == "link" and a["family"] == "inet6"]
    index = interface(gateway_net.client, "eth0")["ifindex"]
    with transocks(gateway_net, tmp_path) as client:
        load(gateway_net, "nft")
        with gateway_net.client.socket(socket.AF_INET6) as sock:
            sock.settimeout(daemons.PATIENCE)
            with pytest.raises(ConnectionResetError):  # noqa: PT012  (whichever sees it first)
                sock.connect((address, 1081, 0, index))
                sock.recv(1)
        client.record("not redirected")


@pytest.mark.parametrize("version", [4, 6])
def test_a_dual_stack_listener(net: lab.Net, version: int) -> None:
    """One socket for both families, as a service manager may hand it over: the connection's family counts."""
    load(net, "nft")
    with net.proxy.listen("", 1081) as listener, connect(net, version, 80):
        accepted, _ = listener.accept()
        with accepted:
            assert original_destination(accepted) == (WEB[version], 80)


def test_a_denied_connection_is_reset(host_net: lab.Net, tmp_path: Path) -> None:
    config = USOCKSD + f'deny_sites = ["{lab.OTHER_V4}", "2001:db8:80::/120"]\ndeny_ports = [25]\n'
    with usocksd(host_net, tmp_path, config) as server, transocks(host_net, tmp_path) as client:
        load(host_net, "iptables")
        for version, host, port, rule in (
            (4, lab.OTHER_V4, 80, f'deny_sites "{lab.OTHER_V4}"'),
            (6, lab.OTHER_V6, 80, 'deny_sites "2001:db8:80::/120"'),
            (4, lab.WEB_V4, 25, "deny_ports 25"),
        ):
            assert is_refused(host_net, version, port, host)
            record = server.record("ruleset mismatch", dest_host=host)
            assert (record["rule"], record["dest_port"]) == (rule, port)
            name = f"{host}:{port}" if version == 4 else f"[{host}]:{port}"
            assert "not allowed" in client.record("failed to connect to proxy server", dest_addr=name)["error"]


def test_egress_addresses_come_and_go(host_net: lab.Net, tmp_path: Path) -> None:
    """A destination keeps its address while that is there; with none left nothing leaves."""
    pool = lab.PROXY_V4[1:]
    config = USOCKSD + f"addresses = {json.dumps([*pool, lab.PROXY_V6[1]])}\n"
    with usocksd(host_net, tmp_path, config) as server, transocks(host_net, tmp_path):
        load(host_net, "nft")
        with Served(host_net.outside.listen(""), daemons.echo) as web:

            def used(version: int) -> str:
                seen = len(web.peers)
                with connect(host_net, version, web.port) as sock:
                    assert lives(sock)
                return web.peers[seen][0]

            assert used(6) == lab.PROXY_V6[1]
            first = used(4)
            assert first in pool
            assert [used(4) for _ in range(5)] == [first] * 5
            (second,) = set(pool) - {first}
            host_net.lab.ip(host_net.proxy, f"addr del {first}/24 dev eth0")
            server.record("addresses of this host changed", removed=[first])
            assert used(4) == second
            host_net.lab.ip(host_net.proxy, f"addr del {second}/24 dev eth0")
            server.record("addresses of this host changed", removed=[second])
            assert is_refused(host_net, 4, web.port)
            assert server.record("dial to destination failed")["error"].startswith("no usable egress address for IPv4")
            host_net.lab.ip(host_net.proxy, f"addr add {first}/24 dev eth0")
            server.record("addresses of this host changed", added=[first])
            assert used(4) == first


PROBE = b"CONNECT 255.255.255.255:1 "


def connect_proxy(sock: Socket, upstream: lab.Host, seen: list[bytes]) -> None:
    """An HTTP proxy that knows CONNECT, one user, and a head with a body that is none."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(65536)
    if not head.startswith(PROBE):
        seen.append(head)
    if b"Basic " + base64.b64encode(b"alice:p@ss:word") not in head:
        sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        return
    if head.startswith(PROBE):
        sock.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        return
    host, _, port = head.split()[1].decode().rpartition(":")
    with upstream.socket(FAMILY[6 if ":" in host else 4]) as onward:
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        onward.connect((host.strip("[]"), int(port)))
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 Fine\r\nContent-Length: 5\r\n\r\nearly")
        back = threading.Thread(target=lambda: pump(onward, sock))
        back.start()
        pump(sock, onward)
        back.join()


def pump(source: Socket, sink: Socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_http_connect_upstream(host_net: lab.Net, tmp_path: Path) -> None:
    seen: list[bytes] = []
    with Served(host_net.proxy.listen("127.0.0.1"), lambda sock: connect_proxy(sock, host_net.proxy, seen)) as proxy:
        with transocks(host_net, tmp_path, f"http://alice:p%40ss%3Aword@127.0.0.1:{proxy.port}") as client:
            load(host_net, "nft")
            with Served(host_net.outside.listen(), daemons.echo) as web:
                for version in (4, 6):
                    with connect(host_net, version, web.port) as sock:
                        sock.sendall(b"hello")
                        assert receive_exactly(sock, 10) == b"earlyhello"
            assert "alice" not in client.log.read_text()
            assert "word" not in client.log.read_text()
    for head, host in zip(seen, WEB.values(), strict=True):
        assert head.startswith(f"CONNECT {name_of(host, web.port)} HTTP/1.1\r\n".encode())


def test_socks_upstream_with_a_password(host_net: lab.Net, tmp_path: Path) -> None:
    bcrypt = pytest.importorskip("bcrypt")
    hashed = bcrypt.hashpw(b"s3cret", bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"host1:{hashed}\n")
    config = USOCKSD + f'[auth]\nusers_file = "{tmp_path / "users"}"\n'
    with (
        Served(host_net.outside.listen(lab.WEB_V4), daemons.echo) as web,
        usocksd(host_net, tmp_path, config) as server,
    ):
        with transocks(host_net, tmp_path, "socks5://host1:s3cret@127.0.0.1:1080") as client:
            load(host_net, "nft")
            with connect(host_net, 4, web.port) as sock:
                assert lives(sock)
            assert server.record("proxy ends")["user"] == "host1"
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        with transocks(host_net, wrong, "socks5://host1:guess@127.0.0.1:1080") as client:
            assert is_refused(host_net, 4, web.port)
            client.record("failed to connect to proxy server")
            assert "guess" not in client.log.read_text()


@pytest.mark.skipif(shutil.which("microsocks") is None, reason="microsocks is not installed")
def test_another_socks_server_with_a_password(host_net: lab.Net, tmp_path: Path) -> None:
    words = ["microsocks", "-i", lab.NEXT_V4, "-p", "1080", "-u", "alice", "-P", "s3cret"]
    server = host_net.outside.popen(*words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listening() -> bool:
        with host_net.outside.socket() as probe:
            return probe.connect_ex((lab.NEXT_V4, 1080)) == 0

    daemons.wait_until(listening, "microsocks listens")
    with Served(host_net.outside.listen(), daemons.echo) as web:
        with transocks(host_net, tmp_path, f"socks5://alice:s3cret@{lab.NEXT_V4}:1080") as client:
            load(host_net, "nft")
            for version, host in WEB.items():
                with connect(host_net, version, web.port) as sock:
                    assert lives(sock, b"hello")
                end = client.record("proxy ends", dest_addr=name_of(host, web.port))
                assert (end["reason"], end["upstream"]) == ("closed", f"socks5://{lab.NEXT_V4}:1080")
                with pytest.raises(ConnectionResetError), connect(host_net, version, 9) as sock:
                    sock.recv(1)  # refused there
    server.kill()
    server.wait()

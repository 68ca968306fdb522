"""deploy/haproxy in front of two usocksd: who the client is, and what becomes of new connections when one dies."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import lab
import pytest
from daemons import GRANTED, Daemon, Served, echo, lives, socks5, wait_until

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
SERVERS = ("192.0.2.10", "192.0.2.11")
USOCKSD = """
[incoming]
port = 0
addresses = ["{address}"]
allow_from = ["198.51.100.1"]
metrics_address = "{address}"
metrics_port = 1082
[incoming.proxy_protocol]
port = 1090
trusted = ["192.0.2.0/24"]
"""


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_clients_move_from_a_dead_one_to_the_other(host_net: lab.Net, tmp_path: Path) -> None:
    if host_net.lab.rootless:
        pytest.skip("a user namespace with one uid has no user of HAProxy's own")
    here, outside = host_net.proxy, host_net.outside
    host_net.lab.ip(here, *(f"addr add {address}/32 dev lo" for address in SERVERS))
    with ExitStack() as stack:
        stack.enter_context(Served(outside.listen("", 80), echo))
        both = {}
        for address in SERVERS:
            (folder := tmp_path / address).mkdir()
            config = USOCKSD.format(address=address)
            both[address] = stack.enter_context(Daemon("usocksd", config, folder, popen=here.popen))
        here.popen("haproxy", "-db", "-q", "-f", CONFIG, stderr=subprocess.DEVNULL)

        def through() -> str:
            """The server that a new connection goes through; it is kept."""
            sock = stack.enter_context(outside.socket())
            sock.settimeout(5)
            sock.bind((lab.NEXT_V4, 0))
            sock.connect((lab.PROXY_V4[0], 1080))
            assert socks5(sock, lab.WEB_V4, 80)[0] == GRANTED
            assert lives(sock)
            client = lab.NEXT_V4 + ":" + str(sock.getsockname()[1])
            ((address, record),) = wait_until(
                lambda: [(a, r) for a, each in both.items() for r in each.records("proxy starts", client_addr=client)],
                "one of them has the client in its records",
            )
            assert record["peer_addr"].startswith(f"{address}:")
            return address

        wait_until(lambda: is_bound(outside, lab.PROXY_V4[0], 1080), "haproxy listens")
        first = through()
        assert through() == first, "a client stays"
        dead = both[first]
        dead.STATUS = None
        here.run("kill", "-9", str(dead.pid), *map(str, dead.workers()))
        dead.process.wait()
        wait_until(lambda: not is_bound(here, first, 1090), "all of its processes have closed their sockets")
        (other,) = {*SERVERS} - {first}
        assert [through() for _ in range(3)] == [other] * 3


def is_bound(host: lab.Host, address: str, port: int) -> bool:
    """Whether something accepts there."""
    with host.socket() as sock:
        return sock.connect_ex((address, port)) == 0

"""Programs that know nothing of SOCKS, under socksify: their datagrams go through UDP ASSOCIATE."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import lab
import pytest
from daemons import Daemon
from test_tproxy_udp import ADDRESS, NAME, WEB, dnsmasq

USOCKSD = """
[incoming]
port = 1080
addresses = ["127.0.0.1"]
[outgoing]
addresses = ["{egress}"]
"""
SOCKS_CONF = """
route {
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = 1080
    protocol: tcp udp
    command: connect udpassociate
    proxyprotocol: socks_v5
    method: none
}
"""
# A stub resolver that asks one name server, with an ordinary connected socket.
RESOLVER = """
import socket, struct, sys
server, name = sys.argv[1:]
query = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes((len(l),)) + l.encode() for l in name.split("."))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(10)
sock.connect((server, 53))
sock.send(query + b"\\0\\0\\1\\0\\1")
print(socket.inet_ntoa(sock.recv(500)[-4:]))
"""


def test_a_resolver_under_socksify(host_net: lab.Net, tmp_path: Path) -> None:
    if shutil.which("socksify") is None:
        pytest.skip("socksify is not installed (package dante-client, which Debian 13 lacks)")
    conf = tmp_path / "socks.conf"
    conf.write_text(SOCKS_CONF)
    egress = lab.PROXY_V4[1]
    with (
        dnsmasq(host_net),
        Daemon("usocksd", USOCKSD.format(egress=egress), tmp_path, popen=host_net.proxy.popen) as usocksd,
    ):
        command = ["socksify", sys.executable, "-c", RESOLVER, WEB[4], NAME]
        assert host_net.proxy.run("env", f"SOCKS_CONF={conf}", *command).stdout.strip() == ADDRESS
    flow = usocksd.record("udp flow", dest_addr=f"{WEB[4]}:53")
    assert flow["src_addr"].partition(":")[0] == egress
    assert (flow["tx_packets"], flow["rx_packets"]) == (1, 1)

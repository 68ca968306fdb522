"""Link-local addresses, which are nothing without their interface: listened on, connected to, asked for."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import daemons
import lab
import pytest
from daemons import Daemon, Served
from test_redirect import MARK, RULES, USOCKSD, page, transocks, usocksd

from usocksd.socks.datagram import header

NEAR, FAR = "fe80::a:1", "fe80::a:2"
WEB = f"http://{lab.WEB_V4}/"


def link(host: lab.Host, name: str, address: str) -> int:
    """Give it this address there; the number of the interface."""
    host.run("ip", "addr", "add", f"{address}/64", "dev", name, "nodad")
    return int(json.loads(host.run("ip", "-j", "link", "show", "dev", name).stdout)[0]["ifindex"])


def listening(host: lab.Host, address: str, index: int, port: int = 0) -> socket.socket:
    sock = host.socket(socket.AF_INET6)
    sock.bind((address, port, 0, index))
    sock.listen()
    return sock


def curl(host: lab.Host, *words: str) -> str:
    done = host.run("curl", "-gsS", "--max-time", "20", *words, check=False)
    print(done.stderr)
    return done.stdout


def uplink(host: lab.Host) -> str:
    (name,) = [each["ifname"] for each in json.loads(host.run("ip", "-j", "link").stdout) if each["ifname"] != "lo"]
    return str(name)


def test_listened_on_and_left_to(host_net: lab.Net, tmp_path: Path) -> None:
    """usocksd at the end of a link: a client and a destination on the link, and a pool with its interface."""
    outside = host_net.outside
    near, far = uplink(host_net.proxy), uplink(outside)
    link(host_net.proxy, near, NEAR)
    index = link(outside, far, FAR)
    config = f"""
    [incoming]
    addresses = ["{NEAR}%{near}"]
    [[rule]]
    action = "allow"
    to = ["{FAR}"]
    ports = [8080]
    egress = "link"
    [[rule]]
    action = "allow"
    to = ["{FAR}", "{lab.WEB_V4}"]
    [egress.link]
    iface = "{near}"
    """
    with (
        usocksd(host_net, tmp_path, config) as server,
        Served(listening(outside, FAR, index, 8080), page),
        Served(listening(outside, FAR, index, 8081), page),
        Served(outside.listen(lab.WEB_V4, 80), page) as web,
    ):
        assert server.record("listening")["address"] == f"[{NEAR}%{near}]:1080"
        proxy = f"socks5h://[{NEAR}%25{far}]:1080"
        assert curl(outside, "-x", proxy, WEB) == "it works"
        assert web.peers[0][0] in lab.PROXY_V4
        # The zone in a request means an interface of the client's host: the pool's interface counts.
        assert curl(outside, "-x", proxy, f"http://[{FAR}%25{far}]:8080/") == "it works"
        assert curl(outside, "-x", proxy, f"http://[{FAR}]:8081/") == ""
        assert "nothing says by which interface" in server.record("dial to destination failed")["error"]
        with (
            outside.socket(socket.AF_INET6) as tcp,
            outside.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
            outside.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        ):
            for sock in (tcp, udp, there):
                sock.settimeout(daemons.PATIENCE)
            there.bind((lab.WEB_V4, 7))
            tcp.connect((NEAR, 1080, 0, index))
            tcp.sendall(daemons.GREETING + daemons.request("0.0.0.0", 0, command=3))
            daemons.receive_exactly(tcp, 2)
            relay = daemons.receive_reply(tcp)
            assert relay[:2] == (0, NEAR)
            udp.sendto(header(lab.WEB_V4, 7) + b"datagram", (NEAR, relay[2], 0, index))
            data, sender = there.recvfrom(100)
            there.sendto(data, sender)
            assert udp.recv(100) == header(lab.WEB_V4, 7) + b"datagram"
        for port, status, said in ((8080, 0, ""), (8081, 1, 'it is link-local, and pool "default" has no iface')):
            words = ["explain", "--from", "10.0.0.1", tmp_path / "usocksd.toml", f"[{FAR}]:{port}"]
            told = host_net.proxy.run(sys.executable, "-m", "usocksd", *words, check=False)
            assert told.returncode == status
            assert said in told.stdout
        server.process.send_signal(signal.SIGHUP)
        server.record("reloaded")
        assert curl(outside, "-x", proxy, WEB) == "it works"


def test_there_is_no_such_interface(host_net: lab.Net, tmp_path: Path) -> None:
    server = usocksd(host_net, tmp_path, USOCKSD.replace("127.0.0.1", f"{NEAR}%nosuch0"))
    assert server.process.wait(daemons.PATIENCE) == 1
    assert server.record("can't start")["error"] == f"can't listen on [{NEAR}%nosuch0]:1080: No such device"


def test_an_upstream_on_the_link(host_net: lab.Net, tmp_path: Path) -> None:
    near, far = uplink(host_net.proxy), uplink(host_net.outside)
    link(host_net.proxy, near, NEAR)
    link(host_net.outside, far, FAR)
    (tmp_path / "far").mkdir()
    config = USOCKSD.replace("127.0.0.1", f"{FAR}%{far}").replace("[outgoing]\nmark = 0x7473\n", "")
    config += f'[[rule]]\naction = "allow"\nto = ["{lab.WEB_V4}"]\n'
    with (
        Daemon("usocksd", config, tmp_path / "far", popen=host_net.outside.popen) as server,
        transocks(host_net, tmp_path, f"socks5://[{FAR}%25{near}]:1080") as client,
        Served(host_net.outside.listen(lab.WEB_V4, 80), page),
    ):
        host_net.proxy.run("nft", "-f", "-", input=(RULES / "host.nft").read_text())
        assert curl(host_net.client, WEB) == "it works"
        mine, theirs = client.record("proxy ends"), server.record("proxy ends")
        # Each host has its own name for the link, so the ends of a connection are called by the address alone.
        assert mine["upstream_addr"] == theirs["local_addr"] == f"[{FAR}]:1080"
        assert theirs["client_addr"] == mine["src_addr"]
        verdict = host_net.proxy.run(
            sys.executable, "-m", "transocks", "doctor", "-f", tmp_path / "transocks.toml", "--json", check=False
        )
        findings = json.loads(verdict.stdout)["findings"]
        (upstream,) = [each for each in findings if each["check"] == "upstream"]
        assert upstream["state"] == "ok", findings


REDIRECT = "chain p {{ type nat hook prerouting priority -100; {}tcp dport 80 redirect to :1081; }}"
TPROXY = """chain p {{
    type filter hook prerouting priority -150; {}tcp dport 80 tproxy to :1084 meta mark set 0x7474 accept;
}}"""


@pytest.mark.parametrize("chain", [REDIRECT, TPROXY], ids=["redirect", "tproxy"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_destination_on_the_link(gateway_net: lab.Net, tmp_path: Path, chain: str, direct: bool) -> None:
    """Unlike the usual rules, these redirect link-local addresses too. Such connections are for the gateway."""
    net = gateway_net
    near = link(net.proxy, "lan0", NEAR)
    route = f'[[route]]\nto = ["{NEAR}"]\nvia = "direct"\n' if direct else ""
    with (
        transocks(net, tmp_path, listen='":1081"\nlisten_tproxy = ":1084"', more=route) as client,
        Served(listening(net.proxy, NEAR, near, 80), page),
    ):
        net.proxy.run("nft", "-f", "-", input=f"table ip6 x {{ {chain.format(f'meta mark != {MARK} ')}\n}}")
        net.proxy.run("ip", "-6", "rule", "add", "fwmark", "0x7474", "lookup", "100")
        net.proxy.run("ip", "-6", "route", "add", "local", "default", "dev", "lo", "table", "100")
        said = curl(net.client, f"http://[{NEAR}%25eth0]/")
        if direct:
            assert said == "it works"
            assert client.record("proxy ends")["dest_addr"] == f"[{NEAR}%lan0]:80"
        else:
            assert said == ""
            assert "no proxy reaches a link-local address" in client.record("rejected by route")["error"]

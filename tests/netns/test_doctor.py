"""`transocks doctor` on setups that are well, where it has nothing to complain of, and on broken ones, each for real."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from socket import socket as Socket
from typing import Any

import daemons
import lab
import pytest
from daemons import Daemon, Served
from forks import Commands
from scene import clients_packets

from usocksd.socks.wire import HTTP_ERROR

RULES = Path(__file__).parents[2] / "iptables"
FAR = lab.NEXT_V4  # where the upstream is, if not on the host itself
CONFIG = """
listen = {listen}
proxy_url = "{url}"
mark = 0x7473
"""


@pytest.fixture
def gateway_net(gateway_net: lab.Net) -> lab.Net:
    if not clients_packets():
        pytest.skip("no BPF here: clients' packets can't be made")
    return gateway_net


class Verdict:
    """What doctor said."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        self.status = status
        self.ok = answer["ok"]
        self.findings = answer["findings"]

    def remedy(self, check: str) -> str:
        """What is to be typed for the first fault of this check."""
        do = next(f["do"] for f in self.findings if f["state"] == "fault" and f["check"] == check)
        found = re.match(r"(?:sysctl|ip|nft|transocks) .*?(?=, or |, with |; or|; and|: what| \(|$)", do)
        assert found is not None, do
        return found[0]

    def of(self, state: str, check: str | None = None) -> list[str]:
        return [f["seen"] for f in self.findings if f["state"] == state and check in {None, f["check"]}]

    @property
    def faults(self) -> dict[str, str]:
        return {f["check"]: f["seen"] for f in self.findings if f["state"] == "fault"}

    @property
    def warnings(self) -> dict[str, str]:
        return {f["check"]: f["seen"] for f in self.findings if f["state"] == "warning"}


def follow(net: lab.Net, file: Path, found: Verdict, check: str) -> None:
    """Type what doctor says."""
    words = found.remedy(check).replace("transocks ", f"{sys.executable} -m transocks ", 1)
    if " rules apply" in words:
        words += f" --force -f {file}"
    net.proxy.run("sh", "-ec", words)


def doctor(net: lab.Net, file: Path, *prefix: str, options: Sequence[str] = ()) -> Verdict:
    command = ["doctor", "-f", str(file), "--json", *options]
    if prefix:
        done = net.proxy.run(*prefix, sys.executable, "-m", "transocks", *command, check=False)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        with contextlib.closing(Commands(net.proxy)) as commands:
            status, out, err = commands.run(*command)
    assert status in {0, 1}, err
    verdict = Verdict(status, json.loads(out))
    print(json.dumps(verdict.findings, indent=1))
    assert verdict.ok is (status == 0)
    assert not [f for f in verdict.of("not checked") if "the check itself failed" in f]
    return verdict


def socks(sock: Socket) -> None:
    """An upstream, as far as doctor asks it."""
    if sock.recv(100).startswith(b"\x05"):
        sock.sendall(b"\x05\x00")
        sock.recv(1)


def load(net: lab.Net, tool: str, *, name: str | None = None, edit: tuple[str, str] | None = None) -> None:
    """The rule files as they stand, or with something replaced."""
    name = name or ("host" if net.proxy is net.client else "gateway")
    for kind in {"nft": ("nft",), "iptables": ("v4", "v6")}.get(tool, (tool,)):
        text = (RULES / f"{name}.{kind}").read_text()
        if edit is not None:
            text, found = re.subn(*edit, text, flags=re.M)
            assert found
        command = {"nft": ["nft", "-f", "-"], "v4": ["iptables-restore", "--noflush"]}.get(
            kind, ["ip6tables-restore", "--noflush"]
        )
        net.proxy.run(*command, input=text)


@contextlib.contextmanager
def standing(net: lab.Net, folder: Path, *, url: str | None = None, listen: str | None = None) -> Iterator[Path]:
    """Sockets that listen as transocks and an upstream far away would, without rules; yields the configuration."""
    gateway = net.proxy is not net.client
    listen = listen or ('":1081"' if gateway else '"localhost:1081"')
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Served(net.outside.listen(FAR, 1080), socks))
        del upstream
        for address in ("0.0.0.0", "::") if gateway else ("127.0.0.1", "::1"):
            stack.enter_context(listener(net, address))
        file = folder / "doctor.toml"
        file.write_text(daemons.settings("transocks", CONFIG.format(listen=listen, url=url or f"socks5://{FAR}:1080")))
        yield file


IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # <linux/in.h>, <linux/in6.h>


def listener(net: lab.Net, address: str, port: int = 1081, *, transparent: bool = False) -> Socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = net.proxy.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if transparent and family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    elif transparent:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    sock.bind((address, port))
    sock.listen()
    return sock


@pytest.mark.parametrize("tool", ["nft", "iptables"])
@pytest.mark.parametrize("mode", ["host", "gateway"])
def test_healthy(request: pytest.FixtureRequest, mode: str, tool: str, tmp_path: Path) -> None:
    net: lab.Net = request.getfixturevalue(f"{mode}_net")
    with standing(net, tmp_path) as config:
        load(net, tool)
        found = doctor(net, config)
    assert (found.status, found.faults, found.warnings) == (0, {}, {})
    assert f"{mode}, IPv4" in found.of("ok", "rules")[0]
    assert f"{mode}, IPv6" in found.of("ok", "rules")[1]


# What Docker, kube-proxy and ufw load, cut down to one of each kind.
OTHERS = """*nat
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.7:6443
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:ufw-before-input - [0:0]
:ufw-after-input - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-user-input
-A INPUT -j ufw-after-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW] "
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-user-input -i lan0 -p tcp -m tcp --dport 1081 -j ACCEPT
-A ufw-after-input -m addrtype --dst-type BROADCAST -j RETURN
COMMIT
"""


@pytest.mark.parametrize(("mode", "tool"), [("host", "nft"), ("gateway", "iptables")])
def test_healthy_beside_others(request: pytest.FixtureRequest, mode: str, tool: str, tmp_path: Path) -> None:
    net: lab.Net = request.getfixturevalue(f"{mode}_net")
    with standing(net, tmp_path) as config:
        net.proxy.run("iptables-restore", "--noflush", input=OTHERS)
        load(net, tool)
        found = doctor(net, config)
    assert (found.status, found.faults, found.warnings) == (0, {}, {})
    assert {f["check"] for f in found.findings if f["state"] == "not checked"} == {"descriptors"}


def test_no_rules(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        found = doctor(host_net, config)
        assert list(found.faults) == ["rules"]
        assert "none sends connections to transocks (port 1081)" in found.faults["rules"]
        config.write_text(config.read_text() + '[rules]\nmode = "host"\n')  # as it says
        follow(host_net, config, found, "rules")
        assert doctor(host_net, config).faults == {}


def test_no_route(host_net: lab.Net, tmp_path: Path) -> None:
    """Then no rule is asked, though what they redirect goes nowhere."""
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.proxy.run("sh", "-ec", "ip route del default; ip -6 route del default")
        for missing in ([4, 6], [6]):
            found = doctor(host_net, config)
            assert ("routes" in found.faults) is (4 in missing), "without IPv6 applications take IPv4"
            if found.faults:
                assert "no rule is asked (Network is unreachable)" in found.faults["routes"]
                follow(host_net, config, found, "routes")


def test_rules_for_another_port(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft", edit=("transocks_port = 1081", "transocks_port = 1091"))
        found = doctor(host_net, config)
    assert list(found.faults) == ["rules"]
    assert "sends it to port 1091 of ::1, and transocks has 1081" in found.faults["rules"]


@pytest.mark.parametrize(("kind", "missing"), [("v4", 6), ("v6", 4)])
def test_rules_for_one_family(host_net: lab.Net, tmp_path: Path, kind: str, missing: int) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, kind)
        found = doctor(host_net, config)
        assert list(found.faults) == ["families"]
        assert f"IPv{missing} has no rules, and goes out by eth0, past transocks" in found.faults["families"]
        # Closed for the other family is well too.
        tool = "ip6tables" if missing == 6 else "iptables"
        host_net.proxy.run(tool, "-A", "OUTPUT", "!", "-o", "lo", "-m", "mark", "!", "--mark", "0x7473", "-j", "DROP")
        assert "families" not in doctor(host_net, config).faults


def test_rules_for_one_family_without_a_way_out_for_the_other(host_net: lab.Net, tmp_path: Path) -> None:
    """It may be in a routing table of its own, as a VPN's is."""
    with standing(host_net, tmp_path) as config:
        load(host_net, "v4")
        host_net.proxy.run("ip", "-6", "route", "del", "default")
        found = doctor(host_net, config)
        assert (found.faults, found.of("ok", "families")) == (
            {},
            ["host: IPv6 has no rules that are met, and no way out either"],
        )
        host_net.proxy.run("ip", "-6", "route", "add", "default", "via", lab.NEXT_V6, "table", "51")
        host_net.proxy.run("ip", "-6", "rule", "add", "lookup", "51")
        assert "goes out by eth0" in doctor(host_net, config).faults["families"]


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_no_exemption(host_net: lab.Net, tmp_path: Path, tool: str) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, tool, edit=(r"^.*(meta mark \$transocks_mark accept|--mark 0x7473 -j RETURN)$", ""))
        found = doctor(host_net, config)
    assert "transocks's own connections to its upstream are redirected to it" in found.faults["loops"]


def test_no_exemption_for_the_server_behind(host_net: lab.Net, tmp_path: Path) -> None:
    """transocks sets the mark, the SOCKS server on the same host does not."""
    usocksd = '[incoming]\nport = 1080\naddresses = ["127.0.0.1"]\n[outgoing]\n'
    with Daemon("usocksd", usocksd, tmp_path, popen=host_net.proxy.popen) as server:
        server.ready()
        with standing(host_net, tmp_path, url="socks5://127.0.0.1:1080") as config:
            load(host_net, "nft")
            found = doctor(host_net, config)
            assert list(found.faults) == ["loops"]
            assert (
                "the upstream on this host (port 1080), IPv4: its connections come back"
                in found.of("fault", "loops")[0]
            )
            (tmp_path / "usocksd.toml").write_text(f"{usocksd}mark = 0x7473\n")
            assert doctor(host_net, config).faults == {}


def test_listening_on_loopback_of_a_gateway(gateway_net: lab.Net, tmp_path: Path) -> None:
    with standing(host := gateway_net, tmp_path) as config:
        load(host, "nft")
    with listener(host, "127.0.0.1"), listener(host, "::1"), Served(host.outside.listen(FAR, 1080), socks):
        found = doctor(host, config)
    assert list(found.faults) == ["listeners"]
    assert f"{lab.LAN_GATEWAY_V4}:1081, where nobody accepts" in found.of("fault", "listeners")[0]
    assert f"[{lab.LAN_GATEWAY_V6}]:1081, where nobody accepts" in found.of("fault", "listeners")[1]


def test_input_drops(gateway_net: lab.Net, tmp_path: Path) -> None:
    with standing(gateway_net, tmp_path) as config:
        load(gateway_net, "iptables")
        rules = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n"
        policy = f"*filter\n:INPUT DROP [0:0]\n{rules}-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n"
        gateway_net.proxy.run("iptables-restore", "--noflush", input=policy)
        with Served(gateway_net.outside.listen(lab.WEB_V4, 80), socks) as web:
            del web
            found = doctor(gateway_net, config)
            assert list(found.faults) == ["input"]
            assert "IPv4 table filter, chain INPUT (its policy) drops it" in found.faults["input"]
        gateway_net.proxy.run("iptables", "-A", "INPUT", "-i", "lan0", "-p", "tcp", "--dport", "1081", "-j", "ACCEPT")
        assert doctor(gateway_net, config).faults == {}


def test_resolver_is_redirected(host_net: lab.Net, tmp_path: Path) -> None:
    host_net.lab.etc("resolv.conf", f"nameserver {lab.WEB_V4}\n")
    host_net.lab.etc("hosts", f"{FAR} proxy.example\n")
    with standing(host_net, tmp_path, url="socks5://proxy.example:1080") as config:
        load(host_net, "nft", edit=(r"tcp dport \{ 53, 853 \} accept", ""))
        found = doctor(host_net, config)
    assert list(found.faults) == ["resolver"]
    assert f"queries to {lab.WEB_V4} over TCP are redirected" in found.faults["resolver"]


def test_others_rules_come_first(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "iptables")
        theirs = "type nat hook output priority -110; tcp dport { 80, 443 } dnat to 198.51.100.1:3128;"
        host_net.proxy.run("nft", f"table ip squid {{ chain out {{ {theirs} }}; }}")
        found = doctor(host_net, config)
    assert list(found.faults) == ["rules"]
    assert "host, IPv4: others' rules take it before ours: table ip squid, chain out: " in found.faults["rules"]


@pytest.mark.skipif(
    "nft" not in os.path.realpath(shutil.which("iptables") or "") or shutil.which("iptables-legacy") is None,
    reason="there is no other variant beside iptables",
)
def test_rules_that_iptables_does_not_show(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "iptables")
        host_net.proxy.run("iptables-legacy", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-j", "ACCEPT")
        assert "rules of iptables-legacy too" in doctor(host_net, config).warnings["tools"]
        host_net.proxy.run("iptables-legacy", "-t", "nat", "-F")  # the table stays
        assert doctor(host_net, config).warnings == {}


def test_not_tracked(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.proxy.run("iptables", "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "-j", "CT", "--notrack")
        found = doctor(host_net, config)
    assert "not tracked, and so never redirected" in found.faults["rules"]


def test_upstream(host_net: lab.Net, tmp_path: Path) -> None:
    behaviours: list[tuple[Any, str]] = [
        (None, "Connection refused"),
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "which is not SOCKS"),
        (lambda sock: sock.recv(10), "closed within the handshake"),
        (lambda sock: [sock.recv(10), sock.recv(10)], "no answer within 3 s"),
    ]
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        for port, (behaviour, complaint) in enumerate(behaviours, 1085):
            config.write_text(config.read_text().replace(f":{port - 1}" if port > 1085 else ":1080", f":{port}"))
            with contextlib.ExitStack() as stack:
                if behaviour is not None:
                    stack.enter_context(Served(host_net.outside.listen(FAR, port), behaviour))
                found = doctor(host_net, config)
            assert list(found.faults) == ["upstream"]
            assert complaint in found.faults["upstream"]


def test_what_upstreams_answer(host_net: lab.Net, tmp_path: Path) -> None:
    """One look at all of them: what each answers to what asks for no connection, and what is said of that."""
    answers = [
        ("http://{}", b"HTTP/1.1 400 Bad Request\r\n\r\n", "ok", "answers"),
        ("http://{}", HTTP_ERROR, "fault", "501 SOCKS proxy, not HTTP"),
        ("http://{}", b"220 mail\r\n", "fault", "not HTTP/1"),
        ("http://{}", b"HTTP/1.1 407 You?\r\n\r\n", "fault", "407 You?"),
        ("http://user:wrong@{}", b"HTTP/1.1 407 Who?\r\n\r\n", "fault", "407 Who?"),
        ("http://{}", b"", "not checked", "closes without an answer"),
        ("socks4a://{}", b"\0\x5b" + bytes(6), "ok", "answers"),
        ("socks4a://{}", b"\5\xff", "fault", "not SOCKS4"),
        ("socks5://{}", b"\5\xff", "fault", "other than no credentials"),
        ("socks5://{}", b"", "fault", "closed within the handshake"),
    ]
    asked: list[bytes] = []

    def serve(answer: bytes) -> Callable[[Socket], None]:
        def one(sock: Socket) -> None:
            asked.append(sock.recv(1000))
            sock.sendall(answer)

        return one

    with standing(host_net, tmp_path) as config, contextlib.ExitStack() as stack:
        load(host_net, "nft")
        servers = [
            stack.enter_context(Served(host_net.outside.listen(FAR), serve(answer))) for _, answer, _, _ in answers
        ]
        urls = [url.format(f"{FAR}:{server.port}") for (url, *_), server in zip(answers, servers, strict=True)]
        config.write_text(config.read_text().replace(f'"socks5://{FAR}:1080"', str(urls)))
        found = doctor(host_net, config)
    for (_, _, state, said), server in zip(answers, servers, strict=True):
        assert [said in seen for seen in found.of(state, "upstream") if f":{server.port}" in seen] == [True]
    assert sum(b"\r\nProxy-Authorization: Basic dXNlcjp3cm9uZw==\r\n" in question for question in asked) == 1
    closed = [f["do"] for f in found.findings if "closed within" in f["seen"]]
    assert ["`allow_from`" in do and "PROXY header" in do for do in closed] == [True]
    mends = [f["do"] for f in found.findings if " 407 " in f["seen"] or "credentials" in f["seen"]]
    assert sorted(mend.split(" proxy_url")[0] for mend in mends) == [
        "put user and password in",
        "put user and password into",
        "put user and password into",
    ]


def test_kernel_settings(gateway_net: lab.Net, tmp_path: Path) -> None:
    settings: list[tuple[str, object, str, str]] = [
        ("net.ipv4.ip_forward", 0, "fault", "forwarding"),
        ("net.ipv6.conf.all.forwarding", 0, "fault", "forwarding"),
        ("net.ipv4.tcp_fastopen", 0, "warning", "tcp_fastopen"),
        ("net.ipv4.ip_local_port_range", "1024 65535", "warning", "port range"),
        ("net.ipv4.ip_nonlocal_bind", 1, "warning", "ip_nonlocal_bind"),
    ]
    with standing(gateway_net, tmp_path) as config:
        load(gateway_net, "nft")
        for name, value, state, check in settings:
            before = gateway_net.proxy.run("sysctl", "-n", name).stdout.strip()
            gateway_net.proxy.sysctl(name, value)
            found = doctor(gateway_net, config)
            assert [f["check"] for f in found.findings if f["state"] in {"fault", "warning"}] == [check]
            assert str(value).replace(" ", "-") in found.of(state, check)[0]
            if state == "fault":
                follow(gateway_net, config, found, check)
                assert doctor(gateway_net, config).faults == {}
            gateway_net.proxy.sysctl(name, before)


def test_connection_tracking_is_full(host_net: lab.Net, tmp_path: Path) -> None:
    """nf_conntrack_max is the whole machine's, so only doctor sees another one here."""
    (tmp_path / "max").write_text("2\n")
    with standing(host_net, tmp_path) as config, Served(host_net.outside.listen(FAR, 80), socks) as web:
        load(host_net, "nft")
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                sock = stack.enter_context(host_net.client.socket())
                sock.connect((FAR, web.port))
            mount = f'mount --bind {tmp_path}/max /proc/sys/net/netfilter/nf_conntrack_max && exec "$@"'
            found = doctor(host_net, config, "unshare", "--mount", "sh", "-c", mount, "sh")
    assert list(found.faults) == ["conntrack"]
    assert "of 2 entries" in found.faults["conntrack"]


def test_dnat_to_loopback(gateway_net: lab.Net, tmp_path: Path) -> None:
    with standing(gateway_net, tmp_path) as config:
        load(gateway_net, "v6")
        gateway_net.proxy.run(
            "iptables", "-t", "nat", "-A", "PREROUTING", "-i", "lan0", "-p", "tcp", "-j", "DNAT",
            "--to-destination", "127.0.0.1:1081",
        )  # fmt: skip
        found = doctor(gateway_net, config)
    assert list(found.faults) == ["route_localnet"]


def test_quic_is_open(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft", edit=(r"^\t\tudp dport 443 jump reject_quic$", ""))
        found = doctor(host_net, config)
    assert (found.faults, list(found.warnings)) == ({}, ["quic"])


def test_few_descriptors(host_net: lab.Net, tmp_path: Path) -> None:
    """Of the running daemon."""
    control = tmp_path / "transocks.sock"
    config = CONFIG.format(listen='"localhost:1081"', url=f"socks5://{FAR}:1080") + f'control = "{control}"\n'
    limited = ("prlimit", "--nofile=300")
    with (
        Served(host_net.outside.listen(FAR, 1080), socks),
        Daemon("transocks", config, tmp_path, popen=host_net.proxy.popen, prefix=limited) as transocks,
    ):
        transocks.ready()
        load(host_net, "nft")
        found = doctor(host_net, tmp_path / "transocks.toml")
    assert (found.faults, list(found.warnings)) == ({}, ["descriptors"])
    assert "300 files" in found.warnings["descriptors"]


TPROXY_PORT = int(re.findall(r"^define transocks_port = (\d+)", (RULES / "tproxy.nft").read_text(), re.M)[0])
TPROXY_MARK = "0x7474"


@contextlib.contextmanager
def tproxy(
    net: lab.Net, folder: Path, tool: str = "nft", *, routes: bool = True, transparent: bool = True
) -> Iterator[Path]:
    """Rules, routes and transparent sockets; yields the configuration."""
    with standing(net, folder) as config, contextlib.ExitStack() as stack:
        config.write_text(f'listen_tproxy = ":{TPROXY_PORT}"\n{config.read_text()}')
        for address in ("0.0.0.0", "::"):
            stack.enter_context(listener(net, address, TPROXY_PORT, transparent=transparent))
        for version in (4, 6) if routes else ():
            net.proxy.run("ip", f"-{version}", "rule", "add", "pref", "7474", "fwmark", TPROXY_MARK, "lookup", "100")
            net.proxy.run("ip", f"-{version}", "route", "add", "local", "default", "dev", "lo", "table", "100")
        load(net, tool, name="tproxy")
        yield config


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_healthy_tproxy(gateway_net: lab.Net, tmp_path: Path, tool: str) -> None:
    with tproxy(gateway_net, tmp_path, tool) as config:
        found = doctor(gateway_net, config)
    assert (found.status, found.faults, found.warnings) == (0, {}, {})
    assert [text[:12] for text in found.of("ok", "listeners")] == ["tproxy, IPv4", "tproxy, IPv6"]


def test_tproxy_without_a_routing_rule(gateway_net: lab.Net, tmp_path: Path) -> None:
    with tproxy(gateway_net, tmp_path, routes=False) as config:
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["routes"]
        assert f"(mark {TPROXY_MARK}) is not routed to this host" in found.faults["routes"]
        for check in ["routes"] * 2:  # IPv4, then IPv6
            follow(gateway_net, config, doctor(gateway_net, config), check)
        assert doctor(gateway_net, config).faults == {}
        gateway_net.proxy.run(sys.executable, "-m", "transocks", "rules", "remove")
        assert "29812" not in gateway_net.proxy.run("ip", "rule").stdout
        assert gateway_net.proxy.run("ip", "route", "show", "table", "29812", check=False).stdout == ""


def test_tproxy_and_src_valid_mark(gateway_net: lab.Net, tmp_path: Path) -> None:
    gateway_net.lab.ip(  # a name as of a VLAN, whose dot is none of sysctl's
        gateway_net.proxy, "link set lan0 down", "link set lan0 name lan.0", "link set lan.0 up",
        f"addr add {lab.LAN_GATEWAY_V6}/64 dev lan.0 nodad",
    )  # fmt: skip
    with tproxy(gateway_net, tmp_path) as config:
        gateway_net.proxy.sysctl("net.ipv4.conf.all.src_valid_mark", 1)
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["reverse path"]
        assert "src_valid_mark=1" in found.faults["reverse path"]
        follow(gateway_net, config, found, "reverse path")
        assert doctor(gateway_net, config).faults == {}


@pytest.mark.parametrize("setting", ["all", "lan0"])
def test_tproxy_and_a_strict_reverse_path_filter(gateway_net: lab.Net, tmp_path: Path, setting: str) -> None:
    """It drops nobody whose way back is by the interface that he came in by."""
    with tproxy(gateway_net, tmp_path) as config:
        gateway_net.proxy.sysctl(f"net.ipv4.conf.{setting}.rp_filter", 1)
        assert doctor(gateway_net, config).faults == {}
        gateway_net.lab.ip(gateway_net.client, "addr add 10.50.0.2/32 dev lo")
        with gateway_net.client.socket() as sock:  # so that the gateway is known to it: ARP is filtered likewise
            sock.connect((lab.WEB_V4, 443))
        found = waiting_for(gateway_net, config, "10.50.0.2")
        assert list(found.faults) == ["reverse path"]
        assert any("clients behind lan0 are dropped" in seen for seen in found.of("fault", "reverse path"))
        follow(gateway_net, config, found, "reverse path")
        gateway_net.proxy.sysctl("net.ipv4.conf.all.rp_filter", 0)
        gateway_net.lab.ip(gateway_net.proxy, "route add 10.50.0.2 dev lan0")
        assert waiting_for(gateway_net, config, "10.50.0.2").faults == {}


def waiting_for(net: lab.Net, config: Path, client: str) -> Verdict:
    """What doctor says of a connection of this client, which is opened when it asks for one."""
    words = [sys.executable, "-m", "transocks", "doctor", "-f", str(config), "--json", "--client", client]
    process = net.proxy.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"{client} to open a new TCP connection" in process.stderr.readline()
    with net.client.socket(socket.AF_INET6 if ":" in client else socket.AF_INET) as sock:
        sock.bind((client, 0))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((lab.WEB_V6 if ":" in client else lab.WEB_V4, 443))
        out, err = process.communicate()
    assert process.returncode in {0, 1}, err
    return Verdict(process.returncode, json.loads(out))


def test_tproxy_to_a_socket_that_is_not_transparent(gateway_net: lab.Net, tmp_path: Path) -> None:
    with tproxy(gateway_net, tmp_path, transparent=False) as config:
        found = doctor(gateway_net, config)
    assert list(found.faults) == ["listeners"]
    assert "lacks IP_TRANSPARENT" in found.faults["listeners"]


def test_tproxy_to_a_port_for_redirect(gateway_net: lab.Net, tmp_path: Path) -> None:
    with tproxy(gateway_net, tmp_path) as config:
        load(gateway_net, "nft", name="tproxy", edit=("transocks_port = [0-9]+", "transocks_port = 1081"))
        found = doctor(gateway_net, config)
    assert list(found.faults) == ["rules"]
    assert "TPROXY takes only what a transparent socket listens for" in found.faults["rules"]


def test_tproxy_and_input(gateway_net: lab.Net, tmp_path: Path) -> None:
    """What TPROXY sends in still has the port that the client asked for."""
    with tproxy(gateway_net, tmp_path) as config:
        gateway_net.proxy.run("ip6tables", "-P", "INPUT", "DROP")
        gateway_net.proxy.run("ip6tables", "-A", "INPUT", "-p", "tcp", "--dport", str(TPROXY_PORT), "-j", "ACCEPT")
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["input"]
        assert "tproxy, IPv6" in found.faults["input"]
        gateway_net.proxy.run("ip6tables", "-A", "INPUT", "-m", "mark", "--mark", TPROXY_MARK, "-j", "ACCEPT")
        assert doctor(gateway_net, config).faults == {}


def test_applied_rules(host_net: lab.Net, tmp_path: Path) -> None:
    """With [rules] in the configuration they are held against what is loaded."""
    with standing(host_net, tmp_path) as config:
        config.write_text(config.read_text() + '[rules]\nmode = "host"\n')
        host_net.proxy.run(sys.executable, "-m", "transocks", "rules", "apply", "--force", "-f", config)
        assert doctor(host_net, config).faults == {}
        host_net.proxy.run("nft", "insert rule inet transocks redirect_tcp tcp dport 22 accept")
        found = doctor(host_net, config)
        assert list(found.faults) == ["applied rules"]
        follow(host_net, config, found, "applied rules")
        assert doctor(host_net, config).faults == {}


def test_without_root(host_net: lab.Net, tmp_path: Path) -> None:
    """What can't be seen is said to be so, and nothing is made up."""
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        found = doctor(host_net, config, "setpriv", "--bounding-set=-all", "--inh-caps=-all")
        assert found.faults == {}
        assert found.of("not checked", "rules")
        assert found.of("not checked", "loops")


@contextlib.contextmanager
def bridged(net: lab.Net) -> Iterator[None]:
    """The inside interface of the gateway is a port of a bridge, which has its addresses."""
    net.lab.ip(
        net.proxy, "link add br0 type bridge", "addr flush dev lan0", "link set lan0 master br0", "link set br0 up",
        f"addr add {lab.LAN_GATEWAY_V4}/24 dev br0", f"addr add {lab.LAN_GATEWAY_V6}/64 dev br0 nodad",
    )  # fmt: skip
    net.lab.wait_for_addresses(net.proxy)
    yield


@pytest.mark.skipif(not Path("/proc/sys/net/bridge").exists(), reason="this kernel has no br_netfilter")
def test_tproxy_on_a_bridge_whose_packets_the_rules_see(gateway_net: lab.Net, tmp_path: Path) -> None:
    """Docker and Kubernetes switch that on."""
    settings = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    with tproxy(gateway_net, tmp_path) as config, bridged(gateway_net):
        for setting in settings:
            gateway_net.proxy.sysctl(setting, 0)
        assert doctor(gateway_net, config).faults == {}
        for setting in settings:
            gateway_net.proxy.sysctl(setting, 1)
        config.write_text(config.read_text() + '[rules]\nmode = "tproxy"\n')
        applied = gateway_net.proxy.run(sys.executable, "-m", "transocks", "rules", "apply", "--force", "-f", config)
        assert "br0 is a bridge and net.bridge.bridge-nf-call-iptables=1" in applied.stdout
        for _ in settings:
            found = doctor(gateway_net, config)
            assert list(found.faults) == ["bridge"]
            follow(gateway_net, config, found, "bridge")
        assert doctor(gateway_net, config).faults == {}


def test_loopback_is_down(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.lab.ip(host_net.proxy, "link set lo down")
        found = doctor(host_net, config)
        assert "lo" in found.faults
        follow(host_net, config, found, "lo")
        host_net.lab.wait_for_addresses(host_net.proxy)
        assert doctor(host_net, config).faults == {}


@pytest.mark.parametrize("theirs", ["iptables -t nat -{} OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 1081",
                                    "iptables -{} OUTPUT -p udp --dport 53 -j DROP"])  # fmt: skip
def test_queries_that_get_nowhere(host_net: lab.Net, tmp_path: Path, theirs: str) -> None:
    host_net.lab.etc("resolv.conf", f"nameserver {lab.WEB_V4}\n")
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        assert doctor(host_net, config).faults == {}
        host_net.proxy.run(*theirs.format("A").split())
        found = doctor(host_net, config)
        assert list(found.faults) == ["resolver"]
        assert "chain OUTPUT" in found.faults["resolver"]
        host_net.proxy.run(*theirs.format("D").split())  # "take that rule out"
        assert doctor(host_net, config).faults == {}


def test_a_table_that_is_switched_off(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.proxy.run("nft", "add table inet transocks { flags dormant; }")
        found = doctor(host_net, config)
        assert "table inet transocks is switched off" in found.faults["rules"]
        follow(host_net, config, found, "rules")
        assert doctor(host_net, config).faults == {}
        # The same by [rules], where `verify` says it.
        host_net.proxy.run("nft", "add table inet transocks { flags dormant; }")
        config.write_text(config.read_text() + '[rules]\nmode = "host"\n')
        found = doctor(host_net, config)
        assert "dormant: table inet transocks" in found.faults["applied rules"]
        follow(host_net, config, found, "applied rules")
        assert doctor(host_net, config).faults == {}


def test_a_chain_of_a_device_drops(gateway_net: lab.Net, tmp_path: Path) -> None:
    with standing(gateway_net, tmp_path) as config:
        load(gateway_net, "nft")
        chain = "type filter hook ingress device lan0 priority 0; tcp dport 443 drop;"
        gateway_net.proxy.run("nft", f"table netdev theirs {{ chain in {{ {chain} }}; }}")
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["rules"]
        assert 'table netdev theirs, chain in: "tcp dport 443 drop" drops it' in found.faults["rules"]
        gateway_net.proxy.run("nft", "delete table netdev theirs")  # "let it pass there"
        assert doctor(gateway_net, config).faults == {}


def test_an_mtu_blackhole_towards_the_upstream(host_net: lab.Net, tmp_path: Path) -> None:
    """Behind the next hop, large packets get lost, and nothing says so."""
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        drop = "type filter hook prerouting priority 0; meta length > 1420 drop;"
        host_net.outside.run("nft", f"table inet narrow {{ chain in {{ {drop} }}; }}")
        found = doctor(host_net, config)
        assert list(found.faults) == ["upstream"]
        assert "large ones don't (an MTU blackhole); 1420 bytes do" in found.faults["upstream"]
        follow(host_net, config, found, "upstream")
        assert doctor(host_net, config).faults == {}


def test_connection_tracking_that_forgets_within_seconds(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        for name in ("established", "close_wait"):
            host_net.proxy.sysctl(f"net.netfilter.nf_conntrack_tcp_timeout_{name}", 5)
        found = doctor(host_net, config)
        assert list(found.faults) == ["conntrack timers"]
        follow(host_net, config, found, "conntrack timers")
        assert doctor(host_net, config).faults == {}


@pytest.mark.parametrize(
    ("do", "undo", "said"),
    [
        ("iptables -A OUTPUT -p tcp --dport 1080 -j DROP", "iptables -D OUTPUT -p tcp --dport 1080 -j DROP",
         'IPv4 table filter, chain OUTPUT: "-A OUTPUT -p tcp -m tcp --dport 1080 -j DROP" drops it'),
        ("iptables-legacy -A OUTPUT -p tcp --dport 1080 -j DROP", "iptables-legacy -F OUTPUT",
         "IPv4 table filter of iptables-legacy, chain OUTPUT"),
        ("iptables -A INPUT -p tcp --sport 1080 -j DROP", "iptables -D INPUT -p tcp --sport 1080 -j DROP",
         'its answer: IPv4 table filter, chain INPUT: "-A INPUT -p tcp -m tcp --sport 1080 -j DROP" drops it'),
        ("ip rule add pref 100 fwmark 0x7473 prohibit", "ip rule del pref 100",
         '"100: from all fwmark 0x7473 prohibit"'),
        ("ip rule add pref 100 fwmark 0x7473 blackhole", "ip rule del pref 100",
         '"100: from all fwmark 0x7473 blackhole"'),
        ("ip link add gone type veth peer name away && ip link set away up && ip link set gone up && ip route add default dev gone table 77 &&"
         " ip rule add pref 100 fwmark 0x7473 lookup 77", "ip rule del pref 100",
         '"100: from all fwmark 0x7473 lookup 77"'),
    ],
    ids=["output", "output-legacy", "input", "prohibit", "blackhole", "elsewhere"],
)  # fmt: skip
def test_what_stands_between_transocks_and_its_upstream(
    host_net: lab.Net, tmp_path: Path, do: str, undo: str, said: str
) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.proxy.run("sh", "-ec", do)
        found = doctor(host_net, config)
        assert list(found.faults) == ["upstream"]
        assert said in found.faults["upstream"]
        host_net.proxy.run("sh", "-ec", undo)  # "take that out"
        assert doctor(host_net, config).faults == {}


@pytest.mark.parametrize("tool", ["nft", "iptables", "iptables-legacy"])
def test_others_clear_the_mark_of_tproxy(gateway_net: lab.Net, tmp_path: Path, tool: str) -> None:
    """The remedy must be none that routes packets without a mark to this host."""
    theirs = {
        "nft": ("nft add table ip theirs; nft 'add chain ip theirs c { type filter hook prerouting priority -140; }';"
                " nft add rule ip theirs c meta mark set 0", "nft delete table ip theirs"),
    }.get(tool, (f"{tool} -t mangle -A PREROUTING -j MARK --set-mark 0", f"{tool} -t mangle -D PREROUTING -j MARK --set-mark 0"))  # fmt: skip
    with tproxy(gateway_net, tmp_path, "nft") as config:
        if tool != "nft":  # iptables's table is asked at the same place, and our chain before
            text = gateway_net.proxy.run("nft", "list", "table", "inet", "transocks_tproxy").stdout
            gateway_net.proxy.run("nft", "delete", "table", "inet", "transocks_tproxy")
            gateway_net.proxy.run("nft", "-f", "-", input=text.replace("priority mangle", "priority -160"))
        gateway_net.proxy.run("sh", "-ec", theirs[0])
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["rules"]
        assert "makes mark 0x7474, which routes it here, 0x0" in found.faults["rules"]
        assert {"nft": "table ip theirs", "iptables": "IPv4 table mangle, chain PREROUTING: "}.get(
            tool, "IPv4 table mangle of iptables-legacy, chain PREROUTING: "
        ) in found.faults["rules"]
        assert not [f for f in found.findings if f["do"] and "fwmark 0x0" in f["do"]]
        gateway_net.proxy.run("sh", "-ec", theirs[1])  # "take that rule out"
        assert doctor(gateway_net, config).faults == {}


def test_an_answer_that_gets_lost(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        host_net.proxy.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--sport", "1081", "-j", "DROP")
        found = doctor(host_net, config)
        assert list(found.faults) == ["answers"]
        assert "--sport 1081 -j DROP" in found.faults["answers"]
        host_net.proxy.run("iptables", "-F", "OUTPUT")
        assert doctor(host_net, config).faults == {}


FIREWALLD = """table inet firewalld {
	chain nat_PREROUTING { type nat hook prerouting priority -90; jump nat_PRE_public; }
	chain nat_PRE_public { ip daddr 192.168.77.1 tcp dport 8080 dnat ip to 10.99.0.1:80; }
	chain filter_INPUT {
		type filter hook input priority 10; policy accept;
		ct state { established, related, new } accept
		reject with icmpx admin-prohibited
	}
}
table ip kube-proxy {
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 10.96.0.1 . tcp . 80 : goto web }; }
	chain web { meta l4proto tcp dnat ip to 10.99.0.1:80; }
	chain nat-prerouting { type nat hook prerouting priority -100; ip daddr . meta l4proto . th dport vmap @service-ips; }
	chain nat-output { type nat hook output priority -100; ip daddr . meta l4proto . th dport vmap @service-ips; }
}
"""


@pytest.mark.parametrize("mode", ["host", "gateway", "tproxy"])
def test_healthy_by_its_own_rules_beside_firewalld_and_kubernetes(
    request: pytest.FixtureRequest, mode: str, tmp_path: Path
) -> None:
    net: lab.Net = request.getfixturevalue("host_net" if mode == "host" else "gateway_net")
    with standing(net, tmp_path) as config, contextlib.ExitStack() as stack:
        if mode == "tproxy":
            config.write_text(f'listen_tproxy = ":{TPROXY_PORT}"\n{config.read_text()}')
            for address in ("0.0.0.0", "::"):
                stack.enter_context(listener(net, address, TPROXY_PORT, transparent=True))
        config.write_text(config.read_text() + f'[rules]\nmode = "{mode}"\n')
        net.proxy.run("nft", "-f", "-", input=FIREWALLD)
        net.proxy.run(sys.executable, "-m", "transocks", "rules", "apply", "--force", "-f", config)
        found = doctor(net, config)
        assert (found.status, found.faults, found.warnings) == (0, {}, {})
        assert net.proxy.run(sys.executable, "-m", "transocks", "rules", "verify", "-f", config).stdout.startswith("as")


@pytest.mark.parametrize("when_down", ["open", "closed"])
def test_rules_that_are_held(host_net: lab.Net, tmp_path: Path, when_down: str) -> None:
    """They end within seconds unless `hold` goes on, which is no news while it does."""
    with standing(host_net, tmp_path) as config:
        config.write_text(config.read_text() + f'[rules]\nmode = "host"\nwhen_down = "{when_down}"\n')
        hold = host_net.proxy.popen(
            sys.executable, "-m", "transocks", "rules", "hold", "-f", str(config), stdout=subprocess.PIPE, text=True
        )
        assert hold.stdout is not None
        assert hold.stdout.readline() == "in force\n"
        found = doctor(host_net, config)
        assert (found.faults, found.warnings) == ({}, {})
        hold.kill()
        hold.wait()


def test_without_bpf(gateway_net: lab.Net, tmp_path: Path) -> None:
    """As in an unprivileged container: what clients' packets would meet can't be tried, which is no fault."""
    without = ("setpriv", "--bounding-set=-bpf,-sys_admin")
    with standing(gateway_net, tmp_path) as config:
        for _ in range(2):  # without rules, and with
            found = doctor(gateway_net, config, *without)
            assert (found.faults, found.warnings) == ({}, {})
            assert "a client's packet can't be made here" in found.of("not checked", "rules")[0]
            load(gateway_net, "nft")


def test_a_client_that_says_nothing(gateway_net: lab.Net, tmp_path: Path) -> None:
    """And one that does: its real connection is looked at."""
    with standing(gateway_net, tmp_path) as config:
        load(gateway_net, "nft")
        for client in (lab.LAN_CLIENT_V4, lab.LAN_CLIENT_V6):
            found = waiting_for(gateway_net, config, client)
            assert found.faults == {}
            assert any("gateway, IPv" in text for text in found.of("ok", "rules"))


def test_nothing_is_left_and_nobody_is_connected_to(host_net: lab.Net, tmp_path: Path) -> None:
    """The packets that are tried leave no connection, here or anywhere else, and no rule."""
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        before = host_net.proxy.run("nft", "list", "ruleset").stdout
        with Served(host_net.outside.listen(lab.WEB_V4, 443), socks) as web:
            assert doctor(host_net, config).faults == {}
            assert web.peers == []
        assert host_net.proxy.run("nft", "list", "ruleset").stdout == before
        assert "203.0.113.1" not in host_net.proxy.run("ss", "-tan").stdout


AGAIN = """
import socket
from transocks.tracing.tracer import Tracer
with Tracer() as tracer:
    for mark in (0, 0x7473):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            sock.bind(("0.0.0.0", 45678))
            sock.setblocking(False)
            with tracer.watching(6, 45678, keep=True):
                sock.connect_ex(("203.0.113.1", 443))
                print(tracer.path(6, 45678).turn is not None)
"""


def test_a_port_that_is_used_again(host_net: lab.Net) -> None:
    """What was told of one connection is not told of the next one that has its port."""
    load(host_net, "nft")
    assert host_net.proxy.run(sys.executable, "-c", AGAIN).stdout.split() == ["True", "False"]


def test_a_comment_that_is_not_utf_8(host_net: lab.Net, tmp_path: Path) -> None:
    with standing(host_net, tmp_path) as config:
        load(host_net, "nft")
        rule = b'table ip theirs { chain c { type filter hook output priority -150; tcp dport 443 drop comment "\xff\xe9"; }; }'
        (tmp_path / "theirs.nft").write_bytes(rule)
        host_net.proxy.run("nft", "-f", str(tmp_path / "theirs.nft"))
        found = doctor(host_net, config)
        assert list(found.faults) == ["rules"]
        told = host_net.proxy.run(sys.executable, "-m", "transocks", "doctor", "-f", config, check=False)
        assert "tcp dport 443 drop comment" in told.stdout
        assert told.returncode == 1


def test_an_upstream_behind_the_gateway(gateway_net: lab.Net, tmp_path: Path) -> None:
    """What it sends on comes through the gateway, and back to transocks."""
    url = f"socks5://{lab.LAN_CLIENT_V4}:1080"
    with (
        standing(gateway_net, tmp_path, url=url) as config,
        Served(gateway_net.client.listen(lab.LAN_CLIENT_V4, 1080), socks),
    ):
        load(gateway_net, "nft")
        found = doctor(gateway_net, config)
        assert list(found.faults) == ["loops"]
        assert f"the upstream {lab.LAN_CLIENT_V4} is behind lan0" in found.faults["loops"]
        leave_out = f"insert rule inet transocks_gateway redirect_tcp ip saddr {lab.LAN_CLIENT_V4} accept"
        gateway_net.proxy.run("nft", leave_out)  # as it says
        found = doctor(gateway_net, config)
        assert found.faults == {}

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
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket as Socket
from typing import Any, NamedTuple

import daemons
import lab
import pytest
from daemons import Daemon, Served
from forks import Commands
from scene import DOCKER_KUBE, FIREWALLD_KUBE, clients_packets

from usocksd.socks.wire import HTTP_ERROR

RULES = Path(__file__).parents[2] / "iptables"
FAR = lab.NEXT_V4  # where the upstream is, if not on the host itself
CONFIG = """
listen = {listen}
proxy_url = "{url}"
mark = 0x7473
"""
TPROXY_PORT = int(re.findall(r"^define transocks_port = (\d+)", (RULES / "tproxy.nft").read_text(), re.M)[0])
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # <linux/in.h>, <linux/in6.h>


class Verdict:
    """doctor's output."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        self.findings = answer["findings"]
        print(json.dumps(self.findings, indent=1))
        assert answer["ok"] is (status == 0)
        assert not [f for f in self.of("not checked") if "the check itself failed" in f]

    def remedy(self, check: str) -> str:
        """The command that this check's first fault proposes."""
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
    def bad(self) -> dict[str, str]:
        """Faults, or else warnings."""
        return self.faults or {f["check"]: f["seen"] for f in self.findings if f["state"] == "warning"}


class Setup(contextlib.ExitStack):
    """A host or gateway where sockets listen as transocks would, and one far away as its upstream; without rules."""

    def __init__(self, net: lab.Net, folder: Path, mode: str) -> None:
        super().__init__()
        self.net, self.proxy, self.folder, self.mode = net, net.proxy, folder, mode
        self.enter_context(Served(net.outside.listen(FAR, 1080), socks))
        self.listeners = [
            self.listen(lo if mode == "host" else any_) for any_, lo in (("0.0.0.0", "127.0.0.1"), ("::", "::1"))
        ]
        self.config = folder / "doctor.toml"
        self._commands = self.enter_context(contextlib.closing(Commands(net.proxy)))
        self.configure()

    def configure(self, url: str = f"socks5://{FAR}:1080", more: str = "") -> None:
        listen = '"localhost:1081"' if self.mode == "host" else '":1081"'
        if self.mode == "tproxy":
            more = f'listen_tproxy = ":{TPROXY_PORT}"\n{more}'
        text = CONFIG.format(listen=listen, url=url) + more
        self.config.write_text(daemons.settings("transocks", text))

    def listen(self, address: str, port: int = 1081, *, transparent: bool = False) -> Socket:
        six = ":" in address
        sock = self.enter_context(self.proxy.socket(socket.AF_INET6 if six else socket.AF_INET))
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            level, option = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if six else (socket.IPPROTO_IP, IP_TRANSPARENT)
            sock.setsockopt(level, option, 1)
        sock.bind((address, port))
        sock.listen()
        return sock

    def load(self, tool: str = "nft", *, edit: tuple[str, str] | None = None, transparent: bool = True) -> None:
        """The rule files as they stand, or with something replaced; for TPROXY also listeners and routes."""
        for kind in {"nft": ("nft",), "iptables": ("v4", "v6")}.get(tool, (tool,)):
            text = (RULES / f"{self.mode}.{kind}").read_text()
            if edit is not None:
                text, found = re.subn(*edit, text, flags=re.M)
                assert found
            restore = {"v4": "iptables-restore --noflush", "v6": "ip6tables-restore --noflush"}.get(kind, "nft -f -")
            self.proxy.run(*restore.split(), input=text)
        if self.mode == "tproxy":
            self.listen("0.0.0.0", TPROXY_PORT, transparent=transparent)
            self.listen("::", TPROXY_PORT, transparent=transparent)
            for ip in ("ip", "ip -6"):
                self.run(f"{ip} rule add pref 7474 fwmark 0x7474 lookup 100")
                self.run(f"{ip} route add local default dev lo table 100")

    def run(self, script: str) -> str:
        """Run a script of the shell on this host; TRANSOCKS and CONFIG stand for the program and the configuration."""
        words = script.replace("TRANSOCKS", f"{sys.executable} -m transocks").replace("CONFIG", str(self.config))
        return self.proxy.run("sh", "-ec", words).stdout

    def rules(self, *words: str) -> str:
        """Run `transocks rules` with this configuration; what it says."""
        status, out, err = self._commands.run("rules", *words, "-f", str(self.config))
        assert status == 0, err
        return out

    def doctor(self, *prefix: str) -> Verdict:
        command = ["doctor", "-f", str(self.config), "--json"]
        if prefix:
            done = self.proxy.run(*prefix, sys.executable, "-m", "transocks", *command, check=False)
            status, out, err = done.returncode, done.stdout, done.stderr
        else:
            status, out, err = self._commands.run(*command)
        assert status in {0, 1}, err
        return Verdict(status, json.loads(out))

    def follow(self, found: Verdict, check: str) -> None:
        """Type the command that doctor proposes."""
        words = found.remedy(check)
        if words.startswith("transocks rules apply"):
            self.rules(*words.split()[2:], "--force")
        else:
            self.run(words)

    def is_well(self) -> bool:
        return self.doctor().bad == {}


def socks(sock: Socket) -> None:
    """An upstream, as far as doctor asks it."""
    if sock.recv(100).startswith(b"\x05"):
        sock.sendall(b"\x05\x00")
        sock.recv(1)


@pytest.fixture
def host(host_net: lab.Net, tmp_path: Path) -> Iterator[Setup]:
    with Setup(host_net, tmp_path, "host") as made:
        yield made


@pytest.fixture
def gateway(gateway_net: lab.Net, tmp_path: Path) -> Iterator[Setup]:
    if not clients_packets():
        pytest.skip("no BPF here: clients' packets can't be made")
    with Setup(gateway_net, tmp_path, "gateway") as made:
        yield made


@pytest.fixture
def tproxy(gateway: Setup) -> Setup:
    gateway.mode = "tproxy"
    gateway.configure()
    return gateway


@pytest.fixture
def setup(request: pytest.FixtureRequest, mode: str) -> Setup:
    """The one of this mode."""
    made: Setup = request.getfixturevalue(mode)
    return made


# ---- setups that are well

# The rules of ufw, reduced to one of each kind.
UFW = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:ufw-before-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -i lan0 -p tcp -m tcp --dport 1081 -j ACCEPT
-A INPUT -m addrtype --dst-type BROADCAST -j RETURN
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW] "
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
COMMIT
"""
OTHERS = DOCKER_KUBE + UFW
BOTH = [*((mode, tool, "") for mode in ("host", "gateway", "tproxy") for tool in ("nft", "iptables")),
        ("host", "nft", OTHERS), ("gateway", "iptables", OTHERS)]  # fmt: skip


@pytest.mark.parametrize(("mode", "tool", "others"), BOTH, ids=lambda value: value if len(value) < 20 else "others")
def test_healthy(setup: Setup, mode: str, tool: str, others: str) -> None:
    setup.proxy.run("iptables-restore", "--noflush", input=others)
    setup.load(tool)
    found = setup.doctor()
    assert found.bad == {}
    for check in ("rules", "listeners"):
        assert [text.split(":")[0] for text in found.of("ok", check)] == [f"{mode}, IPv4", f"{mode}, IPv6"]
    assert {f["check"] for f in found.findings if f["state"] == "not checked"} == {"descriptors"}


@pytest.mark.parametrize("mode", ["host", "gateway", "tproxy"])
def test_healthy_by_its_own_rules_beside_firewalld_and_kubernetes(setup: Setup, mode: str) -> None:
    if mode == "tproxy":
        for address in ("0.0.0.0", "::"):
            setup.listen(address, TPROXY_PORT, transparent=True)
    setup.configure(more=f'[rules]\nmode = "{mode}"\n')
    setup.proxy.run("nft", "-f", "-", input=FIREWALLD_KUBE)
    setup.rules("apply", "--force")
    assert setup.is_well()
    assert setup.rules("verify").startswith("as")


@pytest.mark.parametrize("when_down", ["open", "closed"])
def test_rules_that_are_held(host: Setup, when_down: str) -> None:
    """They end within seconds unless `hold` goes on, which is no news while it does."""
    host.configure(more=f'{RULES_HOST}when_down = "{when_down}"\n')
    words = [sys.executable, "-m", "transocks", "rules", "hold", "-f", str(host.config)]
    hold = host.proxy.popen(*words, stdout=subprocess.PIPE, text=True)
    assert hold.stdout is not None
    assert hold.stdout.readline() == "in force\n"
    assert host.is_well()
    hold.kill()
    hold.wait()


def test_nothing_is_left_and_nobody_is_connected_to(host: Setup) -> None:
    """The packets that are tried leave no connection, here or anywhere else, and no rule."""
    host.load()
    before = host.run("nft list ruleset")
    with Served(host.net.outside.listen(lab.WEB_V4, 443), socks) as web:
        assert host.is_well()
        assert web.peers == []
    assert host.run("nft list ruleset") == before
    assert "203.0.113.1" not in host.run("ss -tan")


# ---- setups that one command breaks, or another line in the rule files

FOLLOW = "as doctor says"


class Case(NamedTuple):
    """What breaks a healthy setup, which checks report it, the last one's message, and the repair."""

    mode: str
    breaks: str
    checks: str
    says: str
    mends: str | None = FOLLOW
    """None: other rules would"""
    tool: str = "nft"
    edit: tuple[str, str] | None = None
    """of the rule files"""
    more: str = ""
    """of the configuration"""


def others(family: str, hook: str, priority: int, rule: str) -> str:
    """A table of somebody else."""
    kind = "nat" if "dnat" in rule else "filter"
    return f"nft 'table {family} theirs {{ chain c {{ type {kind} hook {hook} priority {priority}; {rule}; }}; }}'"


def appends(rule: str, tool: str = "iptables") -> tuple[str, str]:
    """Two commands: to append a rule, and to delete it."""
    return f"{tool} -A {rule}", f"{tool} -D {rule}"


def case(mode: str, commands: tuple[str, str], checks: str, says: str) -> Case:
    return Case(mode, commands[0], checks, says, commands[1])


EXEMPTIONS = {"nft": r"^.*meta mark \$transocks_mark accept$", "iptables": r"^.*--mark 0x7473 -j RETURN$"}
RULES_HOST = '[rules]\nmode = "host"\n'
DORMANT = "nft add table inet transocks '{ flags dormant; }'"
WITHOUT_THEIRS = "nft delete table {} theirs".format
TIMERS = [f"net.netfilter.nf_conntrack_tcp_timeout_{name}=5" for name in ("established", "close_wait")]
# Another name for the interface, as of a VLAN, whose dot is none of sysctl's.
RENAME = f"""ip link set lan0 down; ip link set lan0 name lan.0; ip link set lan.0 up
ip addr add {lab.LAN_GATEWAY_V6}/64 dev lan.0 nodad"""
# At the same priority as iptables's table, with our chain first.
EARLIER = """ours=$(nft list table inet transocks_tproxy | sed 's/priority mangle/priority -160/')
nft delete table inet transocks_tproxy; echo "$ours" | nft -f -"""
INPUT = """iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables -A INPUT -i lo -j ACCEPT
iptables -A INPUT -p tcp --dport 22 -j ACCEPT; iptables -P INPUT DROP"""
ELSEWHERE = """ip link add gone type veth peer name away; ip link set away up; ip link set gone up
ip route add default dev gone table 77; ip rule add pref 100 fwmark 0x7473 lookup 77"""
UNMARK = "PREROUTING -t mangle -j MARK --set-mark 0"

CASES = {
    "another port": Case(
        "host", "", "rules", "sends it to port 1091 of ::1, and transocks has 1081", None,
        edit=("transocks_port = 1081", "transocks_port = 1091"),
    ),
    "others come first": Case(
        "host", others("ip", "output", -110, "tcp dport { 80, 443 } dnat to 198.51.100.1:3128"), "rules",
        "host, IPv4: other rules take it before ours: table ip theirs, chain c: ", WITHOUT_THEIRS("ip"), "iptables",
    ),
    "not tracked": case(
        "host", appends("OUTPUT -t raw -p tcp -j CT --notrack"), "rules",
        "not tracked, and so never redirected: IPv4 table raw, chain OUTPUT",
    ),
    "switched off": Case("host", DORMANT, "rules", "table inet transocks is switched off"),
    "switched off, with [rules]": Case(
        "host", DORMANT, "rules, applied rules", "dormant: table inet transocks", more=RULES_HOST
    ),
    "other rules than [rules]": Case(
        "host", "TRANSOCKS rules apply --force -f CONFIG; nft insert rule inet transocks redirect_tcp tcp dport 22 accept",
        "applied rules", "tcp dport 22 accept", more=RULES_HOST,
    ),
    "a comment that is not UTF-8": Case(
        "host", others("ip", "output", -150, 'tcp dport 443 drop comment "\udcff\udce9"'), "rules",
        "tcp dport 443 drop comment", WITHOUT_THEIRS("ip"),
    ),
    "a chain of a device": Case(
        "gateway", others("netdev", "ingress device lan0", 0, "tcp dport 443 drop"), "rules",
        'table netdev theirs, chain c: "tcp dport 443 drop" drops it', WITHOUT_THEIRS("netdev"),
    ),
    "INPUT": Case(
        "gateway", INPUT, "input", "IPv4 table filter, chain INPUT (its policy) drops it",
        "iptables -A INPUT -i lan0 -p tcp --dport 1081 -j ACCEPT", "iptables",
    ),
    "INPUT, TPROXY": Case(
        "tproxy", f"ip6tables -P INPUT DROP; ip6tables -A INPUT -p tcp --dport {TPROXY_PORT} -j ACCEPT", "input",
        "tproxy, IPv6", "ip6tables -A INPUT -m mark --mark 0x7474 -j ACCEPT",
    ),
    "answers": case(
        "host", appends("OUTPUT -p tcp --sport 1081 -j DROP"), "answers", "--sport 1081 -j DROP"
    ),
    "no exemption, nft": Case(
        "host", "", "loops", "transocks's own connections to its upstream are redirected to it", None,
        edit=(EXEMPTIONS["nft"], ""),
    ),
    "no exemption, iptables": Case(
        "host", "", "loops", "transocks's own connections to its upstream are redirected to it", None, "iptables",
        (EXEMPTIONS["iptables"], ""),
    ),
    "OUTPUT, upstream": case(
        "host", appends("OUTPUT -p tcp --dport 1080 -j DROP"), "upstream",
        'IPv4 table filter, chain OUTPUT: "-A OUTPUT -p tcp -m tcp --dport 1080 -j DROP" drops it',
    ),
    "OUTPUT, upstream, legacy": case(
        "host", appends("OUTPUT -p tcp --dport 1080 -j DROP", "iptables-legacy"), "upstream",
        "IPv4 table filter of iptables-legacy, chain OUTPUT",
    ),
    "INPUT, upstream": case(
        "host", appends("INPUT -p tcp --sport 1080 -j DROP"), "upstream",
        'its answer: IPv4 table filter, chain INPUT: "-A INPUT -p tcp -m tcp --sport 1080 -j DROP" drops it',
    ),
    **{
        f"ip rule, {kind}": Case(
            "host", ELSEWHERE if "lookup" in kind else f"ip rule add pref 100 fwmark 0x7473 {kind}", "upstream",
            f'"100: from all fwmark 0x7473 {kind}"', "ip rule del pref 100",
        )
        for kind in ("prohibit", "blackhole", "lookup 77")
    },
    "queries redirected": case(
        "host", appends("OUTPUT -t nat -p udp --dport 53 -j REDIRECT --to-ports 1081"), "resolver", "chain OUTPUT"
    ),
    "queries dropped": case("host", appends("OUTPUT -p udp --dport 53 -j DROP"), "resolver", "chain OUTPUT"),
    "timers": Case("host", f"sysctl -qw {' '.join(TIMERS)}", "conntrack timers", TIMERS[0]),
    "DNAT to loopback": Case(
        "gateway", "iptables -t nat -A PREROUTING -i lan0 -p tcp -j DNAT --to-destination 127.0.0.1:1081",
        "route_localnet", "DNAT to 127.0.0.1 from lan0, and route_localnet is 0", None, "v6",
    ),
    "src_valid_mark": Case(
        "tproxy", f"{RENAME}; sysctl -qw net.ipv4.conf.all.src_valid_mark=1", "reverse path", "src_valid_mark=1"
    ),
    "TPROXY to a port for REDIRECT": Case(
        "tproxy", "", "rules", "TPROXY takes only what a transparent socket listens for", None,
        edit=("transocks_port = [0-9]+", "transocks_port = 1081"),
    ),
    "unmarked by nft": Case(
        "tproxy", others("ip", "prerouting", -140, "meta mark set 0"), "rules",
        'table ip theirs, chain c: "meta mark set 0x00000000" changes mark 0x7474, which routes it here, to 0x0',
        WITHOUT_THEIRS("ip"),
    ),
    **{
        f"unmarked by {tool}": Case(
            "tproxy", f"{EARLIER}; {appends(UNMARK, tool)[0]}", "rules", f"IPv4 table mangle{says}, chain PREROUTING: ",
            appends(UNMARK, tool)[1],
        )
        for tool, says in (("iptables", ""), ("iptables-legacy", " of iptables-legacy"))
    },
    "QUIC": Case("host", "", "quic", "HTTP/3", None, edit=(r"^\t\tudp dport 443 jump reject_quic$", "")),
    "two kinds of iptables": case(
        "host", appends("PREROUTING -t nat -p tcp -j ACCEPT", "iptables-legacy"), "tools", "rules of iptables-legacy too"
    ),
}  # fmt: skip
LEGACY_BESIDE = "nft" in os.path.realpath(shutil.which("iptables") or "") and shutil.which("iptables-legacy")


@pytest.mark.parametrize(("mode", "case"), [pytest.param(case.mode, case, id=name) for name, case in CASES.items()])
def test_broken(setup: Setup, case: Case) -> None:
    if "-legacy" in case.breaks and not LEGACY_BESIDE:
        pytest.skip("there is no other variant beside iptables")
    if case.mode == "host":
        setup.net.lab.etc("resolv.conf", f"nameserver {lab.WEB_V4}\n")
    setup.configure(more=case.more)
    setup.load(case.tool, edit=case.edit)
    setup.run(case.breaks)
    found = setup.doctor()
    assert ", ".join(found.bad) == case.checks
    check = list(found.bad)[-1]
    assert any(case.says in seen for seen in found.of("fault", check) or found.of("warning", check))
    assert "fwmark 0x0" not in str(found.findings), "it would route all packets without a mark to this host"
    if case.mends == FOLLOW:
        setup.follow(found, check)
    elif case.mends is not None:
        setup.run(case.mends)
    assert case.mends is None or setup.is_well()


# ---- setups that are broken in other ways


def test_no_rules(host: Setup) -> None:
    found = host.doctor()
    assert list(found.faults) == ["rules"]
    assert "no rule sends connections to transocks (port 1081)" in found.faults["rules"]
    host.configure(more=RULES_HOST)  # as it says
    host.follow(found, "rules")
    assert host.is_well()


def test_no_route(host: Setup) -> None:
    """Then no rule is asked, though what they redirect goes nowhere."""
    host.load()
    host.run("ip route del default; ip -6 route del default")
    for missing in ([4, 6], [6]):
        found = host.doctor()
        assert ("routes" in found.faults) is (4 in missing), "without IPv6 applications take IPv4"
        if found.faults:
            assert "no rule is asked (Network is unreachable)" in found.faults["routes"]
            host.follow(found, "routes")


@pytest.mark.parametrize(("kind", "missing"), [("v4", 6), ("v6", 4)])
def test_rules_for_one_family(host: Setup, kind: str, missing: int) -> None:
    host.load(kind)
    found = host.doctor()
    assert list(found.faults) == ["families"]
    assert f"IPv{missing} has no rules, and goes out by eth0, past transocks" in found.faults["families"]
    # Closed for the other family is well too.
    host.run(f"{'ip6tables' if missing == 6 else 'iptables'} -A OUTPUT ! -o lo -m mark ! --mark 0x7473 -j DROP")
    assert "families" not in host.doctor().faults


def test_rules_for_one_family_without_a_way_out_for_the_other(host: Setup) -> None:
    """The route may be in a separate routing table, like a VPN's."""
    host.load("v4")
    host.run("ip -6 route del default")
    found = host.doctor()
    assert found.faults == {}
    assert found.of("ok", "families") == ["host: IPv6 has no rules that are met, and no way out either"]
    host.run(f"ip -6 route add default via {lab.NEXT_V6} table 51; ip -6 rule add lookup 51")
    assert "goes out by eth0" in host.doctor().faults["families"]


def test_no_exemption_for_the_server_behind(host: Setup) -> None:
    """transocks sets the mark, the SOCKS server on the same host does not."""
    usocksd = '[incoming]\nport = 1080\naddresses = ["127.0.0.1"]\n[outgoing]\n'
    with Daemon("usocksd", usocksd, host.folder, popen=host.proxy.popen):
        host.configure("socks5://127.0.0.1:1080")
        host.load()
        found = host.doctor()
        assert list(found.faults) == ["loops"]
        says = "the upstream on this host (port 1080), IPv4: its connections come back"
        assert says in found.of("fault", "loops")[0]
        (host.folder / "usocksd.toml").write_text(f"{usocksd}mark = 0x7473\n")
        assert host.doctor().faults == {}


def test_an_upstream_behind_the_gateway(gateway: Setup) -> None:
    """Its own connections come through the gateway, and back to transocks."""
    gateway.configure(f"socks5://{lab.LAN_CLIENT_V4}:1080")
    gateway.load()
    with Served(gateway.net.client.listen(lab.LAN_CLIENT_V4, 1080), socks):
        found = gateway.doctor()
        assert list(found.faults) == ["loops"]
        assert f"the upstream {lab.LAN_CLIENT_V4} is behind lan0" in found.faults["loops"]
        # As it says.
        gateway.run(f"nft insert rule inet transocks_gateway redirect_tcp ip saddr {lab.LAN_CLIENT_V4} accept")
        assert gateway.is_well()


def test_listening_on_loopback_of_a_gateway(gateway: Setup) -> None:
    gateway.load()
    for listener in gateway.listeners:
        listener.close()
    for address in ("127.0.0.1", "::1"):
        gateway.listen(address)
    found = gateway.doctor()
    assert list(found.faults) == ["listeners"]
    assert f"{lab.LAN_GATEWAY_V4}:1081, where nobody accepts" in found.of("fault", "listeners")[0]
    assert f"[{lab.LAN_GATEWAY_V6}]:1081, where nobody accepts" in found.of("fault", "listeners")[1]


def test_tproxy_to_a_socket_that_is_not_transparent(tproxy: Setup) -> None:
    tproxy.load(transparent=False)
    found = tproxy.doctor()
    assert list(found.faults) == ["listeners"]
    assert "lacks IP_TRANSPARENT" in found.faults["listeners"]


def test_resolver_is_redirected(host: Setup) -> None:
    host.net.lab.etc("resolv.conf", f"nameserver {lab.WEB_V4}\n")
    host.net.lab.etc("hosts", f"{FAR} proxy.example\n")
    host.configure("socks5://proxy.example:1080")
    host.load(edit=(r"tcp dport \{ 53, 853 \} accept", ""))
    found = host.doctor()
    assert list(found.faults) == ["resolver"]
    assert f"queries to {lab.WEB_V4} over TCP are redirected" in found.faults["resolver"]


def test_what_upstreams_answer(host: Setup) -> None:
    """All upstreams in one run: the answer of each to a probe, and the finding about it."""
    answers: list[tuple[str, bytes | None, str, str, str]] = [
        ("http://{}", b"HTTP/1.1 400 Bad Request\r\n\r\n", "ok", "answers", ""),
        ("http://{}", HTTP_ERROR, "fault", "501 SOCKS proxy, not HTTP", "a proxy of this kind"),
        ("http://{}", b"220 mail\r\n", "fault", "not HTTP/1", "a proxy of this kind"),
        ("http://{}", b"HTTP/1.1 407 You?\r\n\r\n", "fault", "407 You?", "put user and password into"),
        ("http://user:wrong@{}", b"HTTP/1.1 407 Who?\r\n\r\n", "fault", "407 Who?", "put user and password in proxy_url"),
        ("http://{}", b"", "not checked", "closes without an answer", ""),
        ("socks4a://{}", b"\0\x5b" + bytes(6), "ok", "answers", ""),
        ("socks4a://{}", b"\5\xff", "fault", "not SOCKS4", "a proxy of this kind"),
        ("socks5://{}", b"HTTP/1.1 400 Bad Request\r\n\r\n", "fault", "which is not SOCKS", "a proxy of this kind"),
        ("socks5://{}", b"\5\xff", "fault", "other than no credentials", "put user and password into"),
        ("socks5://{}", b"", "fault", "closed within the handshake", "`allow_from`), or expects a PROXY header"),
        ("socks5://{}", None, "fault", "no answer within 3 s", "look for a firewall on the way"),
    ]  # fmt: skip
    asked: list[bytes] = []

    def serve(answer: bytes | None) -> Callable[[Socket], None]:
        def one(sock: Socket) -> None:
            asked.append(sock.recv(1000))
            sock.sendall(answer) if answer is not None else sock.recv(1)

        return one

    host.load()
    servers = [host.enter_context(Served(host.net.outside.listen(FAR), serve(answer))) for _, answer, *_ in answers]
    urls = [url.format(f"{FAR}:{server.port}") for (url, *_), server in zip(answers, servers, strict=True)]
    host.configure('", "'.join([*urls, f"socks5://{FAR}:9"]))
    host.config.write_text(re.sub(r"proxy_url = (.*)", r"proxy_url = [\1]", host.config.read_text()))
    found = host.doctor()
    told = {f["seen"].split(":")[2].split()[0]: f for f in found.findings if f["check"] == "upstream"}
    assert "Connection refused" in told["9"]["seen"]
    for (_, _, state, seen, do), server in zip(answers, servers, strict=True):
        finding = told[str(server.port)]
        assert (finding["state"], seen in finding["seen"], do in (finding["do"] or "")) == (state, True, True)
    assert sum(b"\r\nProxy-Authorization: Basic dXNlcjp3cm9uZw==\r\n" in question for question in asked) == 1


def test_an_mtu_blackhole_towards_the_upstream(host: Setup) -> None:
    """Behind the next hop, large packets are lost without an ICMP message."""
    host.load()
    drop = "type filter hook prerouting priority 0; meta length > 1420 drop;"
    host.net.outside.run("nft", f"table inet narrow {{ chain in {{ {drop} }}; }}")
    found = host.doctor()
    assert list(found.faults) == ["upstream"]
    assert "large ones don't (an MTU blackhole); 1420 bytes do" in found.faults["upstream"]
    host.follow(found, "upstream")
    assert host.is_well()


def test_kernel_settings(gateway: Setup) -> None:
    settings = [
        ("net.ipv4.ip_forward", "0", "fault", "forwarding"),
        ("net.ipv6.conf.all.forwarding", "0", "fault", "forwarding"),
        ("net.ipv4.tcp_fastopen", "0", "warning", "tcp_fastopen"),
        ("net.ipv4.ip_local_port_range", "1024 65535", "warning", "port range"),
        ("net.ipv4.ip_nonlocal_bind", "1", "warning", "ip_nonlocal_bind"),
    ]
    gateway.load()
    for name, value, state, check in settings:
        before = gateway.run(f"sysctl -n {name}").strip()
        gateway.proxy.sysctl(name, value)
        found = gateway.doctor()
        assert [f["check"] for f in found.findings if f["state"] in {"fault", "warning"}] == [check]
        assert value.replace(" ", "-") in found.of(state, check)[0]
        if state == "fault":
            gateway.follow(found, check)
            assert gateway.is_well()
        gateway.proxy.sysctl(name, before)


def test_connection_tracking_is_full(host: Setup) -> None:
    """nf_conntrack_max is the whole machine's, so only doctor sees another one here."""
    (host.folder / "max").write_text("2\n")
    web = host.enter_context(Served(host.net.outside.listen(FAR, 80), socks))
    host.load()
    for _ in range(2):
        host.enter_context(host.net.client.socket()).connect((FAR, web.port))
    mount = f'mount --bind {host.folder}/max /proc/sys/net/netfilter/nf_conntrack_max && exec "$@"'
    found = host.doctor("unshare", "--mount", "sh", "-c", mount, "sh")
    assert list(found.faults) == ["conntrack"]
    assert "of 2 entries" in found.faults["conntrack"]


def test_few_descriptors(host: Setup) -> None:
    """Of the running daemon."""
    for listener in host.listeners:
        listener.close()
    host.configure(more=f'control = "{host.folder}/transocks.sock"\n')
    text, limited = host.config.read_text(), ("prlimit", "--nofile=300")
    with Daemon("transocks", text, host.folder, popen=host.proxy.popen, prefix=limited):
        host.load()
        found = host.doctor()
    assert list(found.bad) == ["descriptors"]
    assert "300 files" in found.bad["descriptors"]


def test_tproxy_without_a_routing_rule(tproxy: Setup) -> None:
    tproxy.load()
    tproxy.run("ip rule del pref 7474; ip -6 rule del pref 7474")
    for _ in range(2):  # IPv4, then IPv6
        found = tproxy.doctor()
        assert list(found.faults) == ["routes"]
        assert "(mark 0x7474) is not routed to this host" in found.faults["routes"]
        tproxy.follow(found, "routes")
    assert tproxy.is_well()
    tproxy.rules("remove")
    assert "29812" not in tproxy.run("ip rule")
    assert tproxy.run("ip route show table 29812 || true") == ""


@pytest.mark.parametrize("setting", ["all", "lan0"])
def test_tproxy_and_a_strict_reverse_path_filter(tproxy: Setup, setting: str) -> None:
    """It drops no client whose route leads out of the interface by which it came in."""
    tproxy.load()
    tproxy.proxy.sysctl(f"net.ipv4.conf.{setting}.rp_filter", 1)
    assert tproxy.is_well()
    tproxy.net.lab.ip(tproxy.net.client, "addr add 10.50.0.2/32 dev lo")
    with tproxy.net.client.socket() as sock:  # so that the gateway is known to it: ARP is filtered likewise
        sock.connect((lab.WEB_V4, 443))
    found = waiting_for(tproxy, "10.50.0.2")
    assert list(found.faults) == ["reverse path"]
    assert any("clients behind lan0 are dropped" in seen for seen in found.of("fault", "reverse path"))
    tproxy.follow(found, "reverse path")
    tproxy.proxy.sysctl("net.ipv4.conf.all.rp_filter", 0)
    tproxy.run("ip route add 10.50.0.2 dev lan0")
    assert waiting_for(tproxy, "10.50.0.2").faults == {}


def test_a_client_that_is_waited_for(gateway: Setup) -> None:
    """doctor examines the client's real connection."""
    gateway.load()
    for client in (lab.LAN_CLIENT_V4, lab.LAN_CLIENT_V6):
        found = waiting_for(gateway, client)
        assert found.faults == {}
        assert any("gateway, IPv" in text for text in found.of("ok", "rules"))


def waiting_for(setup: Setup, client: str) -> Verdict:
    """doctor's output about a connection of this client, opened when doctor waits for it."""
    words = [sys.executable, "-m", "transocks", "doctor", "-f", str(setup.config), "--json", "--client", client]
    process = setup.proxy.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"{client} to open a new TCP connection" in process.stderr.readline()
    with setup.net.client.socket(socket.AF_INET6 if ":" in client else socket.AF_INET) as sock:
        sock.bind((client, 0))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((lab.WEB_V6 if ":" in client else lab.WEB_V4, 443))
        out, err = process.communicate()
    assert process.returncode in {0, 1}, err
    return Verdict(process.returncode, json.loads(out))


@pytest.mark.skipif(not Path("/proc/sys/net/bridge").exists(), reason="this kernel has no br_netfilter")
def test_tproxy_on_a_bridge_whose_packets_the_rules_see(tproxy: Setup) -> None:
    """Docker and Kubernetes switch that on."""
    settings = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    tproxy.load()
    tproxy.net.lab.ip(
        tproxy.proxy, "link add br0 type bridge", "addr flush dev lan0", "link set lan0 master br0", "link set br0 up",
        f"addr add {lab.LAN_GATEWAY_V4}/24 dev br0", f"addr add {lab.LAN_GATEWAY_V6}/64 dev br0 nodad",
    )  # fmt: skip
    tproxy.net.lab.wait_for_addresses(tproxy.proxy)
    for setting in settings:
        tproxy.proxy.sysctl(setting, 0)
    assert tproxy.is_well()
    for setting in settings:
        tproxy.proxy.sysctl(setting, 1)
    tproxy.configure(more='[rules]\nmode = "tproxy"\n')
    applied = tproxy.rules("apply", "--force")
    assert "br0 is a bridge and net.bridge.bridge-nf-call-iptables=1" in applied
    for _ in settings:
        found = tproxy.doctor()
        assert list(found.faults) == ["bridge"]
        tproxy.follow(found, "bridge")
    assert tproxy.doctor().faults == {}


def test_loopback_is_down(host: Setup) -> None:
    host.load()
    host.run("ip link set lo down")
    found = host.doctor()
    assert "lo" in found.faults
    host.follow(found, "lo")
    host.net.lab.wait_for_addresses(host.proxy)
    assert host.is_well()


@pytest.mark.parametrize("without", ["all", "net_raw"])
def test_without_root(host: Setup, without: str) -> None:
    """Facts that can't be seen are reported as such, not invented."""
    host.load()
    found = host.doctor("setpriv", f"--bounding-set=-{without}", "--inh-caps=-all")
    assert found.faults == {}
    assert found.of("not checked", "rules")
    assert found.of("not checked", "loops")


def test_without_bpf(gateway: Setup) -> None:
    """As in an unprivileged container: the path of clients' packets can't be tried, which is no fault."""
    for load in (lambda: None, gateway.load):
        load()
        found = gateway.doctor("setpriv", "--bounding-set=-bpf,-sys_admin")
        assert found.bad == {}
        assert "a client's packet can't be made here" in found.of("not checked", "rules")[0]


@pytest.mark.skipif(not LEGACY_BESIDE, reason="there is no other variant beside iptables")
def test_one_packet_that_gets_lost_by_no_rule(host: Setup) -> None:
    """It is sent once more, since connection tracking drops one of two packets that want the same entry. Here
    iptables-legacy, whose rules the kernel does not report, drops each first packet of two.
    """
    host.load()
    first = "-m statistic --mode nth --every 2 --packet 0 -j DROP"
    for version in ("", "6"):
        host.run(f"ip{version}tables-legacy -t raw -A OUTPUT -p tcp --syn --dport 443 {first}")
    found = host.doctor()
    assert found.faults == {}
    assert any(":443 gets to port 1081" in seen for seen in found.of("ok", "rules"))


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
                print(tracer.trace(6, 45678).turn is not None)
"""


def test_a_port_that_is_used_again(host: Setup) -> None:
    """Reports about one connection are not used for the next one with the same port."""
    host.load()
    for listener in host.listeners:  # so that the first is reset, and its port free
        listener.close()
    assert host.proxy.run(sys.executable, "-c", AGAIN).stdout.split() == ["True", "False"]

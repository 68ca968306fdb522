"""`transocks rules` with the real tools, in namespaces: what it does to connections, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import lab
import pytest

from transocks.firewall.config import Mode
from transocks.firewall.render import render_iptables, render_nft
from transocks.firewall.wanted import Selection, Wanted

FOLDER = Path(__file__).parent
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed"))
    for name, tool in (("nft", "nft"), ("iptables-nft", "iptables-nft"), ("iptables-legacy", "iptables-legacy"))
]
BEYOND = (lab.WEB_V4, lab.WEB_V6)
PRIVATE = (lab.PRIVATE_V4, lab.PRIVATE_V6)
# The command line, again and again: a start of Python is most of what a command takes.
SERVE = """
import contextlib, io, json, sys
from transocks.cli import main
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(json.loads(line))
    print(json.dumps([status, said.getvalue()]), flush=True)
"""
REDIRECTED, DIRECT, REFUSED, NOTHING = "redirected", "direct", "refused", "no answer"


class Scene:
    """A host or a gateway with a stand-in for transocks, a web server beyond, and one of the tools.

    nft alone has no iptables beside it: its dump is compared byte for byte.
    """

    def __init__(self, net: lab.Net, mode: str, backend: str, folder: Path) -> None:
        self.net, self.mode, self.backend, self.folder = net, mode, backend, folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._tools()
        self.config = folder / "transocks.toml"
        self.configure()
        self.web = [net.outside.listen(address, 80) for address in (*BEYOND, *PRIVATE)]
        self.transocks: subprocess.Popen[str] | None = None
        pipe = subprocess.PIPE
        serve = ["env", f"PATH={self.bin}", sys.executable, "-c", SERVE]
        self._cli = net.proxy.popen(*serve, stdin=pipe, stdout=pipe, text=True)

    def _tools(self) -> None:
        names = {"ip": "ip", "sh": "sh", "unshare": "unshare", "env": "env"}
        if self.backend == "nft":
            names["nft"] = "nft"
        else:
            for family in ("iptables", "ip6tables"):
                for verb in ("", "-save", "-restore"):
                    names[f"{family}{verb}"] = f"{family}-{self.backend.removeprefix('iptables-')}{verb}"
        for name, program in names.items():
            target = shutil.which(program)
            assert target is not None, program
            (self.bin / name).symlink_to(target)

    def configure(self, rules: str = "", **settings: object) -> None:
        more = "".join(f"{key} = {value}\n" for key, value in settings.items())
        self.config.write_text(
            f'proxy_url = "socks5://10.0.0.1:1080"\nmark = 0x7473\ncontrol = ""\nlisten = "{self._listen}:1081"\n'
            f'listen_tproxy = "localhost:1084"\n[rules]\nmode = "{self.mode}"\n{more}{rules}'
        )

    @property
    def _listen(self) -> str:
        return "" if self.mode == "gateway" else "localhost"

    def argv(self, *words: str) -> list[str]:
        python = [sys.executable, "-m", "transocks", "rules", *words]
        return ["env", f"PATH={self.bin}", *python, *(["-f", str(self.config)])]

    def rules(self, *words: str, status: int = 0) -> str:
        """Run the verb; returns what it said."""
        assert self._cli.stdin is not None
        assert self._cli.stdout is not None
        self._cli.stdin.write(json.dumps(["rules", *words, "-f", str(self.config)]) + "\n")
        self._cli.stdin.flush()
        was, said = json.loads(self._cli.stdout.readline())
        assert was == status, said
        return str(said)

    def sh(self, script: str, *, check: bool = True) -> str:
        return self.net.proxy.run("env", f"PATH={self.bin}", "sh", "-ec", script, check=check).stdout

    def restore(self, text: str, six: bool = False) -> None:
        tool = "ip6tables-restore" if six else "iptables-restore"
        self.net.proxy.run("env", f"PATH={self.bin}", tool, "--noflush", input=text)

    def dump(self) -> str:
        """Rules (without counters, and without iptables's empty base chains), routing, and kernel settings."""
        if self.backend == "nft":
            rules = self.sh("nft list ruleset")
        else:
            saved = self.sh("iptables-save; ip6tables-save")
            saved = re.sub(r"\[\d+:\d+\]", "", re.sub(r"^#.*\n", "", saved, flags=re.M))
            saved = re.sub(r"^:[A-Z]+ ACCEPT *\n", "", saved, flags=re.M)
            rules = re.sub(r"^\*\w+\nCOMMIT\n", "", saved, flags=re.M)
        routing = self.sh("for f in -4 -6; do ip $f rule; ip $f route show table all; done")
        settings = self.sh("/bin/grep -rs . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/ipv4/ip_* || :")
        return rules + routing + settings

    def start(self) -> None:
        addresses = {"host": ("127.0.0.1", "::1"), "gateway": ("0.0.0.0", "::"), "tproxy": ("127.0.0.1", "::1")}
        kind, port = ("tproxy", "1084") if self.mode == "tproxy" else ("redirect", "1081")
        self.transocks = self.net.proxy.popen(
            sys.executable, str(FOLDER / "stand_in.py"), kind, port, *addresses[self.mode],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.transocks.stdout is not None
        assert self.transocks.stdout.readline() == "listening\n"

    def stop(self) -> None:
        assert self.transocks is not None
        self.transocks.kill()
        self.transocks.wait()

    @contextlib.contextmanager
    def connected(self, address: str, port: int = 80, *, timeout: float = 5) -> Iterator[tuple[socket.socket, str]]:
        """A connection of the client, and what became of it."""
        with self.net.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            client.settimeout(timeout)
            try:
                client.connect((address, port))
            except (ConnectionRefusedError, ConnectionResetError):
                yield client, REFUSED
                return
            except TimeoutError:
                yield client, NOTHING
                return
            ready, _, _ = select.select([client, *self.web], [], [], timeout)
            if ready == [client]:
                try:
                    said = client.recv(100).decode()
                except ConnectionResetError:
                    said = REFUSED
                yield client, REDIRECTED if said == f"redirected {address} {port}\n" else said
            else:
                accepted, _ = ready[0].accept()
                with accepted:
                    yield client, DIRECT

    def connect(self, address: str, *, timeout: float = 5) -> str:
        with self.connected(address, timeout=timeout) as (_, became):
            return became

    def close(self) -> None:
        for server in self.web:
            server.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["host", "gateway", "tproxy"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scene(mode: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    net = request.getfixturevalue("host_net" if mode == "host" else "gateway_net")
    made = Scene(net, mode, backend, tmp_path)
    yield made
    made.close()


def nft_only(test: object) -> object:
    return pytest.mark.parametrize("backend", [BACKENDS[0]], indirect=True)(test)  # type: ignore[operator]


def one_mode(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mode", [name], indirect=True)


# What others have on their hosts, after the real ones: Docker with a published port, kube-proxy with a service and a
# node port, firewalld with its own priorities and chains.

DOCKER_KUBE = """\
*nat
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-SEP-ONE - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-WEB
-A KUBE-SVC-WEB -j KUBE-SEP-ONE
-A KUBE-SEP-ONE -s 10.244.0.5/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-ONE -p tcp -m tcp -j DNAT --to-destination 10.99.0.1:80
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
*filter
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
"""

FIREWALLD_KUBE = """\
table inet firewalld {
	chain nat_PREROUTING {
		type nat hook prerouting priority -90; policy accept;
		jump nat_PREROUTING_ZONES
	}
	chain nat_PREROUTING_ZONES { goto nat_PRE_public; }
	chain nat_PRE_public { jump nat_PRE_public_allow; }
	chain nat_PRE_public_allow {
		ip daddr 192.168.77.1 tcp dport 8080 dnat ip to 10.99.0.1:80
	}
	chain nat_OUTPUT { type nat hook output priority -90; policy accept; }
	chain filter_PREROUTING {
		type filter hook prerouting priority 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
	}
	chain filter_FORWARD {
		type filter hook forward priority 10; policy accept;
		ct state { established, related } accept
	}
}
table ip kube-proxy {
	map service-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.1 . tcp . 80 : goto service-web }
	}
	chain service-web { meta l4proto tcp dnat ip to 10.99.0.1:80; }
	chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
}
"""


def load_foreign(scene: Scene) -> None:
    if scene.backend == "nft":
        scene.net.proxy.run("nft", "-f", "-", input=FIREWALLD_KUBE)
    else:
        scene.restore(DOCKER_KUBE)


INTRUDERS = {
    "nft": {
        "host": ("nft insert rule inet transocks redirect_tcp tcp dport 80 accept", "chain redirect_tcp"),
        "gateway": ("nft insert rule inet transocks_gateway redirect_tcp tcp dport 80 accept", "chain redirect_tcp"),
        "tproxy": ("nft insert rule inet transocks_tproxy tproxy_tcp tcp dport 80 accept", "chain tproxy_tcp"),
    },
    "iptables": {
        "host": ("iptables -t nat -I OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 9", "shadowed: IPv4 table nat"),
        "gateway": ("iptables -t nat -I PREROUTING -p tcp -j ACCEPT", "shadowed: IPv4 table nat"),
        "tproxy": ("iptables -t mangle -I PREROUTING -p tcp -j ACCEPT", "shadowed: IPv4 table mangle"),
    },
}


def test_from_before_to_after(scene: Scene) -> None:
    """Applied, applied again, looked at, disturbed, looked at, removed: traffic and rules at each step."""
    load_foreign(scene)
    before = scene.dump()
    assert "nobody listens on" in scene.rules("apply", status=1)
    assert scene.dump() == before
    scene.start()
    assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
    with scene.connected(lab.WEB_V4) as (early, became):
        assert became == DIRECT
        scene.rules("apply")
        applied = scene.dump()
        assert applied != before
        assert [scene.connect(a) for a in (*BEYOND, *PRIVATE)] == [REDIRECTED] * 2 + [DIRECT] * 2
        # A service of kube-proxy is still that.
        assert scene.connect("10.96.0.1") == DIRECT
        scene.rules("apply")
        assert scene.dump() == applied
        assert "as they should be" in scene.rules("verify")
        _still_works(scene, early)

        family = scene.backend.partition("-")[0]
        command, said = INTRUDERS[family][scene.mode]
        scene.sh(command)
        assert said in scene.rules("verify", status=1)
        if family == "nft":
            assert "chain" in scene.rules("verify", status=1)
            scene.rules("apply")  # puts it right
        else:
            scene.sh(command.replace(" -I ", " -D "))
        assert scene.dump() == applied
        scene.rules("remove")
        assert scene.dump() == before
        _still_works(scene, early)
    assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
    scene.rules("remove")  # there is nothing to complain of
    assert "missing" in scene.rules("verify", status=1)


def _still_works(scene: Scene, client: socket.socket) -> None:
    """The connection that `connected` has accepted in the web server still carries bytes: no reset came."""
    client.sendall(b"x")
    with pytest.raises(TimeoutError):
        client.settimeout(0.05)
        client.recv(1)


def _until(scene: Scene, wanted: str, *, within: float) -> None:
    deadline = time.monotonic() + within
    while (became := scene.connect(lab.WEB_V4, timeout=1)) != wanted:
        assert time.monotonic() < deadline, f"{became}, not {wanted}"
        time.sleep(0.05)


def _kill_after(scene: Scene, tool: str, times: int) -> None:
    """A tool that does its work, and at the so-manieth time kills who runs it: nothing more of that happens."""
    target = (scene.bin / tool).readlink()
    (scene.bin / tool).unlink()
    count = scene.folder / "count"
    # Named as the tool is: iptables goes by its own name.
    (scene.bin / tool).write_text(
        f"#!/bin/sh\nn=$(($(/bin/cat {count} 2>/dev/null || echo 0) + 1)); echo $n > {count}\n"
        f'{target} "$@"; s=$?\n[ $n -lt {times} ] || kill -9 $PPID\nexit $s\n'
    )
    (scene.bin / tool).chmod(0o755)


@one_mode("host")
@pytest.mark.parametrize("steps", [1, 3])
def test_killed_in_the_middle_of_a_trial_the_network_works_again(scene: Scene, steps: int) -> None:
    scene.start()
    # With iptables: when the chains are filled, and when one family is hooked in. With nft there is no middle; it is
    # killed right after the transaction.
    tool = "nft" if scene.backend == "nft" else "ip6tables-restore" if steps == 1 else "iptables-restore"
    times = 3 if scene.backend == "nft" else 1 if steps == 1 else 2
    _kill_after(scene, tool, times)
    process = scene.net.proxy.popen(*scene.argv("apply", "--confirm", "2"), stdout=subprocess.DEVNULL)
    assert process.wait(20) == -signal.SIGKILL
    scene.stop()
    _until(scene, DIRECT, within=10)
    shown = scene.net.proxy.run("curl", "-s", "-o", "/dev/null", "-m", "1", f"http://{lab.WEB_V4}/", check=False)
    assert shown.returncode == 28, "curl has connected, and waits for an answer"



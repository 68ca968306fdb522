"""The scene of the tests of `transocks rules`: a host or gateway with one of the tools, a stand-in, a web server."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lab
import pytest
from forks import Commands

FOLDER = Path(__file__).parent
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed"))
    for name, tool in (("nft", "nft"), ("iptables-nft", "iptables-nft"), ("iptables-legacy", "iptables-legacy"))
]
BEYOND = (lab.WEB_V4, lab.WEB_V6)
PRIVATE = (lab.PRIVATE_V4, lab.PRIVATE_V6)
# Programs that are not in PATH are not installed.
ONLY_PATH = "import sys; from transocks import cli, tools; tools.SBIN = (); {more} sys.exit(cli.main())"
REDIRECTED, DIRECT, REFUSED, NOTHING = "redirected", "direct", "refused", "no answer"


# Rules that other hosts have, modelled on real ones: Docker with a published port, kube-proxy with a service and a
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
	chain filter_INPUT {
		type filter hook input priority 10; policy accept;
		ct state { established, related, new } accept
		reject with icmpx admin-prohibited
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


def python_for_others(run: Callable[..., subprocess.CompletedProcess[str]]) -> tuple[str, Sequence[str]]:
    """An interpreter with which another user can run the daemons and their workers, and words to put before it; skips
    where there is none. `run` runs a command as that user.
    """
    # setpriv itself may start what its user may not, so what counts is what the interpreter can start in turn.
    trial = "import subprocess, sys, usocksd.session as s; subprocess.run([sys.executable, '-c', 'import trio'], check=True)"
    path = os.pathsep.join(filter(None, sys.path))
    for python, environment in ((sys.executable, ()), ("/usr/bin/python3", ("env", f"PYTHONPATH={path}"))):
        found = run(*environment, python, "-c", trial)
        if found.returncode == 0:
            return python, environment
    pytest.skip(f"other users can't read the source or the interpreter: {found.stderr.splitlines()[-1]}")


@functools.cache
def clients_packets() -> bool:
    """Whether an interface can be made to receive a packet that nobody has sent, which takes CAP_BPF of the host
    itself.
    """
    words = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--net", sys.executable, "-c"]
    script = "from ipaddress import ip_address as a; from transocks.tracing.packets import Packet, inject; inject('lo', Packet(17, a('127.0.0.1'), 9, a('127.0.0.1'), 9))"
    return subprocess.run([*words, script], capture_output=True, check=False).returncode == 0


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
        self.web = [net.outside.listen("", 80)]
        self.transocks: subprocess.Popen[str] | None = None
        self._cli = Commands(net.proxy, path=str(self.bin))

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
        more = "".join(f"{key} = {value!s}\n" for key, value in settings.items())
        self.config.write_text(
            f'proxy_url = "socks5://10.0.0.1:1080"\nmark = 0x7473\ncontrol = ""\nlisten = "{self._listen}:1081"\n'
            f'listen_tproxy = "localhost:1084"\n[rules]\nmode = "{self.mode}"\n{more}{rules}'
        )

    @property
    def _listen(self) -> str:
        return "" if self.mode == "gateway" else "localhost"

    def argv(self, *words: str, more: str = "") -> list[str]:
        python = [sys.executable, "-c", ONLY_PATH.format(more=more), "rules", *words]
        return ["env", f"PATH={self.bin}", *python, *(["-f", str(self.config)])]

    def rules(self, *words: str, status: int = 0) -> str:
        """Run the verb; returns its output."""
        was, out, err = self._cli.run("rules", *words, "-f", str(self.config))
        assert was == status, out + err
        return out + err

    def sh(self, script: str, *, check: bool = True) -> str:
        return self.net.proxy.run("env", f"PATH={self.bin}", "sh", "-ec", script, check=check).stdout

    @contextlib.contextmanager
    def instead_of(self, tool: str, script: str) -> Iterator[None]:
        """This shell script in the place of a tool, which is $tool there."""
        path = self.bin / tool
        target = path.readlink()
        path.unlink()
        path.write_text(f"#!/bin/sh\ntool={target}\n{script}\n")
        path.chmod(0o755)
        try:
            yield
        finally:
            path.unlink()
            path.symlink_to(target)

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
        # IPv6's link-local addresses come when they want to.
        routing = re.sub(r"^.* proto kernel .*\n", "", routing, flags=re.M)
        settings = self.sh(
            "/bin/grep -rs . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/ipv4/ip_* || :"
        )
        return rules + routing + settings

    def start(self, *listen: str, port: int | None = None) -> None:
        """Start the stand-in for transocks, on these addresses and this port instead of those of the mode."""
        addresses = {"host": ("127.0.0.1", "::1"), "gateway": ("0.0.0.0", "::"), "tproxy": ("127.0.0.1", "::1")}
        kind, usual = ("tproxy", 1084) if self.mode == "tproxy" else ("redirect", 1081)
        self.transocks = self.net.proxy.popen(
            sys.executable, str(FOLDER / "stand_in.py"), kind, str(port or usual), *(listen or addresses[self.mode]),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.transocks.stdout is not None
        assert self.transocks.stdout.readline() == "listening\n"

    def stop(self) -> None:
        assert self.transocks is not None
        self.transocks.kill()
        self.transocks.wait()

    @contextlib.contextmanager
    def connected(
        self, address: str, port: int = 80, *, timeout: float = 5, mark: int = 0
    ) -> Iterator[tuple[socket.socket, str]]:
        """A connection of the client, and its result."""
        with self.net.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            if mark:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
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

    @contextlib.contextmanager
    def pair(self, address: str, server: socket.socket | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of a connection of the client to the web server, or to another one."""
        server = server or self.web[0]
        with self.net.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            client.settimeout(5)
            client.connect((address, server.getsockname()[1]))
            accepted, _ = server.accept()
            with accepted:
                accepted.settimeout(5)
                yield client, accepted

    def connect(self, address: str, *, timeout: float = 5) -> str:
        with self.connected(address, timeout=timeout) as (_, became):
            return became

    def close(self) -> None:
        self._cli.close()
        for server in self.web:
            server.close()

    def until(self, wanted: str, *, within: float = 10) -> None:
        """Wait until a connection becomes this; it takes no longer than `within` seconds."""
        deadline = time.monotonic() + within
        while (became := self.connect(lab.WEB_V4, timeout=1)) != wanted:
            assert time.monotonic() < deadline, f"{became}, not {wanted}"
            time.sleep(0.05)


def one_mode(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mode", [name], indirect=True)


def backends(*which: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [BACKENDS[number] for number in which], indirect=True)

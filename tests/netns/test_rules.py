"""The files in iptables/, loaded by the commands in their headers with the real tools, judged by connections."""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import lab
import pytest

RULES = Path(__file__).parents[2] / "iptables"
MARK = 0x7473
SO_ORIGINAL_DST = 80  # <linux/netfilter_ipv4.h>, and IP6T_SO_ORIGINAL_DST alike
BACKENDS = [  # how the commands of the headers are provided
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed"))
    for name, tool in (("iptables-nft", "iptables-nft"), ("iptables-legacy", "iptables-legacy"), ("nft", "nft"))
]


@dataclass
class Rules:
    """The rule files of one place ("host", "gateway") for one backend, on the host they belong to."""

    place: str
    backend: str
    net: lab.Net
    folder: Path  # a copy of iptables/, to be edited at will
    bin: Path  # comes first in PATH: plain names that lead to the backend's tools

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{self.place}.{kind}" for kind in (["nft"] if self.backend == "nft" else ["v4", "v6"])]

    def sh(self, script: str, *, check: bool = True) -> str:
        words = [
            "env",
            f"--chdir={self.folder}",
            f"PATH={self.bin}:/usr/sbin:/usr/bin:/sbin:/bin",
            "sh",
            "-ec",
            script,
        ]
        return self.net.proxy.run(*words, check=check).stdout

    def header(self, verb: str, *, check: bool = True) -> None:
        """Run what the headers of the files say for load, reload or remove."""
        for file in self.files:
            found = re.search(rf"^# {verb} +(.*(?:\n#  +.*)*)", file.read_text(), re.MULTILINE)
            assert found is not None
            self.sh(re.sub(r"\n#  +", "\n", found[1]), check=check)

    def dump(self) -> str:
        """Everything that is loaded, without counters and without what iptables-save says of itself."""
        if self.backend == "nft":
            return self.sh("nft list ruleset")
        text = self.sh("iptables-save -t nat; iptables-save -t filter; ip6tables-save -t nat; ip6tables-save -t filter")
        return re.sub(r"^#.*\n", "", re.sub(r"\[\d+:\d+\]", "", text), flags=re.MULTILINE)

    def edit(self, old: str, new: str) -> None:
        for file in self.files:
            text = file.read_text()
            assert old in text
            file.write_text(text.replace(old, new))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["host", "gateway"])
def rules(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> Rules:
    net = request.getfixturevalue(f"{request.param}_net")
    folder, tools = tmp_path / "iptables", tmp_path / "bin"
    shutil.copytree(RULES, folder)
    tools.mkdir()
    if backend != "nft":
        variant = backend.removeprefix("iptables-")
        for family in ("iptables", "ip6tables"):
            for verb in ("", "-save", "-restore"):
                target = shutil.which(f"{family}-{variant}{verb}")
                assert target is not None
                (tools / f"{family}{verb}").symlink_to(target)
    made = Rules(request.param, backend, net, folder, tools)
    if backend != "nft":
        # Foreign rules, which must come through untouched; they also make the tables exist before the first dump.
        for tool in ("iptables", "ip6tables"):
            made.sh(f"{tool} -t nat -A OUTPUT -p tcp --dport 9 -j RETURN; {tool} -A INPUT -p tcp --dport 9 -j DROP")
    else:
        made.sh("nft add table inet foreign; nft add chain inet foreign c")
    return made


@dataclass
class Trial:
    """Listeners where a connection can end up: at transocks's port, or (directly) at the destination."""

    net: lab.Net
    listeners: dict[socket.socket, str]

    def connect(self, address: str, port: int, *, mark: int = 0) -> str:
        """Connect from the client: "redirected" if it ends at transocks's port, original destination and all."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.net.client.socket(family) as client:
            if mark:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.settimeout(5)
            client.connect((address, port))
            return self.arrived(address, port)

    def arrived(self, address: str, port: int) -> str:
        ready, _, _ = select.select(list(self.listeners), [], [], 5)
        (listener,) = ready
        accepted, _ = listener.accept()
        with accepted:
            if self.listeners[listener] == "redirected":
                assert original_destination(accepted) == (address, port)
            return self.listeners[listener]


def original_destination(accepted: socket.socket) -> tuple[str, int]:
    if accepted.family == socket.AF_INET:
        raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", raw)
    else:
        raw = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        port, packed = struct.unpack_from("!2xH4x16s", raw)
    return str(ip_address(packed)), port


def trial(rules: Rules, stack: ExitStack, *ports: int, transocks_port: int = 1081) -> Trial:
    net = rules.net
    # In OUTPUT the redirection goes to loopback, in PREROUTING to the incoming interface (DESIGN): listen just there.
    inside = ("127.0.0.1", "::1") if rules.place == "host" else (lab.LAN_GATEWAY_V4, lab.LAN_GATEWAY_V6)
    listeners = {stack.enter_context(net.proxy.listen(a, transocks_port)): "redirected" for a in inside}
    listeners |= {stack.enter_context(net.outside.listen("", port)): "direct" for port in ports}
    own = net.proxy.listen("", 9999)  # a service of the host itself
    return Trial(net, listeners | {stack.enter_context(own): "direct"})


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


BEYOND = (lab.WEB_V4, lab.WEB_V6)
PRIVATE = (lab.PRIVATE_V4, lab.PRIVATE_V6)


def test_redirects_what_it_should_and_leaves_the_rest_alone(rules: Rules, stack: ExitStack) -> None:
    there = trial(rules, stack, 80, 443, 8080, 53, 853)
    assert [there.connect(a, 80) for a in (*BEYOND, *PRIVATE)] == ["direct"] * 4
    rules.header("load")
    for address in BEYOND:
        for port in (80, 443, 8080):
            assert there.connect(address, port) == "redirected", (address, port)
        for port in (53, 853):  # the resolver's
            assert there.connect(address, port) == "direct", (address, port)
    for address in PRIVATE:
        assert there.connect(address, 80) == "direct", address
    # The host's own public addresses, and on the host loopback.
    for address in (lab.PROXY_V4[0], lab.PROXY_V6[1], *(("127.0.0.1", "::1") if rules.place == "host" else ())):
        assert there.connect(address, 9999) == "direct", address
    rules.header("remove")
    assert [there.connect(a, 80) for a in (*BEYOND, *PRIVATE)] == ["direct"] * 4


def test_the_mark_exempts(rules: Rules, stack: ExitStack) -> None:
    there = trial(rules, stack, 80)
    rules.header("load")
    if rules.place == "host":
        assert [there.connect(a, 80, mark=MARK) for a in BEYOND] == ["direct"] * 2
        assert [there.connect(a, 80, mark=MARK + 1) for a in BEYOND] == ["redirected"] * 2
        return
    # A mark does not cross the wire: it is set on the gateway, before our rules.
    if rules.backend == "nft":
        chain = "type filter hook prerouting priority -150; tcp dport 80 meta mark set 0x7473;"
        rules.sh(f"nft 'table inet marks {{ chain c {{ {chain} }}; }}'")
    else:
        for tool in ("iptables", "ip6tables"):
            rules.sh(f"{tool} -t mangle -A PREROUTING -p tcp --dport 80 -j MARK --set-mark {MARK}")
    assert [there.connect(a, 80) for a in BEYOND] == ["direct"] * 2


def test_a_user_exempts_when_its_line_is_enabled(rules: Rules, stack: ExitStack) -> None:
    if rules.place == "gateway":
        return  # nothing of the daemons passes PREROUTING: the files have no such line
    if rules.net.lab.rootless:
        pytest.skip("without root there is one user id, so rules for another don't load")
    for file in rules.files:
        text = re.sub(r"^(\s*)#((-A TRANSOCKS.*--uid-owner|meta skuid) )", r"\1\2", file.read_text(), flags=re.M)
        for ours, theirs in (("transocks", "nobody"), ("usocksd", "daemon")):  # users that exist everywhere
            text, count = re.subn(rf'(--uid-owner |meta skuid "){ours}', rf"\1{theirs}", text)
            assert count == (1 if rules.backend == "nft" else 2)  # and in what is off there, for "closed"
        file.write_text(text)
    there = trial(rules, stack, 80)
    rules.header("load")
    for address in BEYOND:
        for user, expected in (("nobody", "direct"), ("daemon", "direct"), ("bin", "redirected")):
            connect = f"exec 3<>/dev/tcp/{address}/80"
            rules.net.client.run("setpriv", f"--reuid={user}", "--clear-groups", "bash", "-c", connect)
            assert there.arrived(address, 80) == expected, (address, user)


def test_loaded_twice_equals_once_and_removal_leaves_nothing(rules: Rules, stack: ExitStack) -> None:
    before = rules.dump()
    rules.header("load")
    loaded = rules.dump()
    assert loaded != before
    rules.header("load", check=False)  # refused by iptables-restore, the same again by nft
    assert rules.dump() == loaded
    rules.header("reload")
    assert rules.dump() == loaded
    rules.header("remove")
    assert rules.dump() == before


def test_the_port_has_one_place_and_reload_changes_it(rules: Rules, stack: ExitStack) -> None:
    rules.header("load")
    for file in rules.files:
        code = re.sub(r"#.*", "", file.read_text())
        assert code.count("1081") == 1
        assert code.count("7473") == (1 if rules.backend == "nft" else 2)  # and the mark (in a table each)
    rules.edit("1081\n", "2081\n")
    rules.header("reload")
    there = trial(rules, stack, 80, transocks_port=2081)
    assert [there.connect(a, 80) for a in BEYOND] == ["redirected"] * 2


def test_udp_443_is_refused_at_once_and_other_udp_is_not(rules: Rules, stack: ExitStack) -> None:
    rules.header("load")
    net = rules.net
    for family, beyond, private in (
        (socket.AF_INET, lab.WEB_V4, lab.PRIVATE_V4),
        (socket.AF_INET6, lab.WEB_V6, lab.PRIVATE_V6),
    ):
        for address, port in ((beyond, 443), (beyond, 4433), (private, 443)):
            with (
                net.outside.socket(family, socket.SOCK_DGRAM) as server,
                net.client.socket(family, socket.SOCK_DGRAM) as client,
            ):
                server.settimeout(5)
                server.bind((address, port))
                client.settimeout(5)
                client.connect((address, port))
                if (address, port) == (beyond, 443):
                    # On the host itself send() may say so already: the rule is in its way there.
                    with contextlib.suppress(PermissionError):
                        client.send(b"quic?")
                    with pytest.raises(ConnectionRefusedError):
                        client.recv(1)
                else:
                    client.send(b"hello")
                    assert server.recv(10) == b"hello"


def test_host_and_gateway_files_live_side_by_side(backend: str, rules: Rules) -> None:
    if rules.place == "gateway":
        return  # once is enough
    other = Rules("gateway", backend, rules.net, rules.folder, rules.bin)
    before = rules.dump()
    rules.header("load")
    other.header("load")
    rules.header("reload")
    rules.header("remove")
    other.header("remove")
    assert rules.dump() == before

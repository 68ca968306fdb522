"""The files in iptables/, loaded by the commands in their headers with the real tools, judged by connections."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import lab
import pytest
from scene import BEYOND, DIRECT, PRIVATE, REDIRECTED, Scene, backends, one_mode

RULES = Path(__file__).parents[2] / "iptables"
MARK = 0x7473


class Files:
    """A copy of iptables/ on a scene, to be edited."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene, self.folder = scene, folder
        shutil.copytree(RULES, folder)

    def of(self, mode: str) -> list[Path]:
        return [self.folder / f"{mode}.{kind}" for kind in (["nft"] if self.scene.backend == "nft" else ["v4", "v6"])]

    def header(self, verb: str, mode: str | None = None, *, check: bool = True) -> None:
        """Run what the headers of the files of this mode say for load, reload or remove."""
        for file in self.of(mode or self.scene.mode):
            found = re.search(rf"^# {verb} +(.*(?:\n#  +.*)*)", file.read_text(), re.MULTILINE)
            assert found is not None
            script = re.sub(r"\n#  +", "\n", found[1]).replace("sed ", "/bin/sed ")
            self.scene.sh(f"cd {self.folder}; {script}", check=check)

    def edit(self, pattern: str, new: str, times: int) -> None:
        """Replace a pattern that occurs this often in each file."""
        for file in self.of(self.scene.mode):
            text, count = re.subn(pattern, new, file.read_text(), flags=re.MULTILINE)
            assert count == times, file
            file.write_text(text)


@pytest.fixture
def files(scene: Scene, tmp_path: Path) -> Files:
    """With servers beyond, and rules of somebody else, which also make iptables's tables exist before the first dump."""
    scene.web += [scene.net.outside.listen("", port) for port in (443, 8080, 53, 853)]
    scene.web.append(scene.net.proxy.listen("", 9999))
    if scene.backend == "nft":
        scene.sh("nft add table inet foreign; nft add chain inet foreign c")
    else:
        for tool in ("iptables", "ip6tables"):
            scene.sh(f"{tool} -t nat -A OUTPUT -p tcp --dport 9 -j RETURN; {tool} -A INPUT -p tcp --dport 9 -j DROP")
    return Files(scene, tmp_path / "iptables")


def became(scene: Scene, addresses: Sequence[str], port: int = 80, *, mark: int = 0) -> set[str]:
    found = set()
    for address in addresses:
        with scene.connected(address, port, mark=mark) as (_, what):
            found.add(what)
    return found


def test_from_loading_to_removal(files: Files) -> None:
    scene = files.scene
    before = scene.dump()
    scene.start()
    files.header("load")
    assert "as they should be" in scene.rules("verify")
    for port in (80, 443, 8080):
        assert became(scene, BEYOND, port) == {REDIRECTED}, port
    for port in (53, 853):  # the resolver's
        assert became(scene, BEYOND, port) == {DIRECT}, port
    assert became(scene, PRIVATE) == {DIRECT}
    # Services of the host itself, on its public addresses and on loopback.
    own = (lab.PROXY_V4[0], lab.PROXY_V6[1], *(("127.0.0.1", "::1") if scene.mode == "host" else ()))
    assert became(scene, own, 9999) == {DIRECT}
    loaded = scene.dump()
    files.header("load", check=False)  # refused by iptables-restore and ip, then by nft
    assert scene.dump() == loaded
    files.header("reload")
    assert scene.dump() == loaded

    # The port has one place, and the mark one in each table.
    for file in files.of(scene.mode):
        assert re.sub(r"#.*", "", file.read_text()).count("0x7473") == (1 if scene.backend == "nft" else 2)
    files.edit(r"^([^#\n]*)\b108[14]\b", r"\g<1>2081", 1)
    files.header("reload")
    scene.stop()
    scene.start(port=2081)
    assert became(scene, BEYOND) == {REDIRECTED}
    files.header("remove")
    assert scene.dump() == before
    assert became(scene, BEYOND) == {DIRECT}
    files.header("load")
    scene.rules("remove")
    assert scene.dump() == before


@pytest.mark.parametrize("mode", ["host", "gateway"], indirect=True)
def test_the_mark_exempts(files: Files) -> None:
    scene = files.scene
    scene.start()
    files.header("load")
    if scene.mode == "host":
        assert became(scene, BEYOND, mark=MARK) == {DIRECT}
        assert became(scene, BEYOND, mark=MARK + 1) == {REDIRECTED}
        return
    # A mark does not cross the wire: it is set on the gateway, before our rules.
    if scene.backend == "nft":
        chain = "type filter hook prerouting priority -150; tcp dport 80 meta mark set 0x7473;"
        scene.sh(f"nft 'table inet marks {{ chain c {{ {chain} }}; }}'")
    else:
        for tool in ("iptables", "ip6tables"):
            scene.sh(f"{tool} -t mangle -A PREROUTING -p tcp --dport 80 -j MARK --set-mark {MARK}")
    assert became(scene, BEYOND) == {DIRECT}


@one_mode("host")
def test_a_user_exempts_when_its_line_is_enabled(files: Files) -> None:
    scene = files.scene
    if scene.net.lab.rootless:
        pytest.skip("without root there is one user id, so rules for another don't load")
    files.edit(r"^(\s*)#((-A TRANSOCKS .*--uid-owner|meta skuid) )", r"\1\2", 2)
    for ours, theirs in (("transocks", "nobody"), ("usocksd", "daemon")):  # users that exist everywhere
        files.edit(rf'^([^#\n]*)(--uid-owner |meta skuid "){ours}', rf"\1\2{theirs}", 1)
    scene.start()
    files.header("load")
    for address in BEYOND:
        # Only the stand-in says something.
        connect = f"exec 3<>/dev/tcp/{address}/80; read -r -t 0.3 line <&3; echo ${{line%% *}}"
        for user, expected in (("nobody", ""), ("daemon", ""), ("bin", REDIRECTED)):
            words = ("setpriv", f"--reuid={user}", "--clear-groups", "bash", "-c", connect)
            assert scene.net.client.run(*words, check=False).stdout.strip() == expected, (address, user)


@pytest.mark.parametrize("mode", ["host", "gateway"], indirect=True)
@backends(0, 2)
def test_udp_443_is_refused_at_once_and_other_udp_is_not(files: Files) -> None:
    files.header("load")
    net = files.scene.net
    for beyond, private in zip(BEYOND, PRIVATE, strict=True):
        family = socket.AF_INET6 if ":" in beyond else socket.AF_INET
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


@one_mode("host")
def test_host_and_gateway_files_live_side_by_side(files: Files) -> None:
    before = files.scene.dump()
    files.header("load")
    files.header("load", "gateway")
    files.header("reload")
    files.header("remove")
    files.header("remove", "gateway")
    assert files.scene.dump() == before

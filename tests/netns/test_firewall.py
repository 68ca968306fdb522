"""`transocks rules` with the real tools, in namespaces: what it does to connections, and what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lab
import pytest
from daemons import Daemon, lives
from scene import (
    BACKENDS,
    BEYOND,
    DIRECT,
    DOCKER_KUBE,
    FIREWALLD_KUBE,
    NOTHING,
    PRIVATE,
    REDIRECTED,
    REFUSED,
    Scene,
    backends,
    clients_packets,
    one_mode,
)

from transocks.rules.routing import Routing
from transocks.tools import LOCK

RULES = Path(__file__).parents[2] / "iptables"


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


NFT, IPTABLES, LEGACY = BACKENDS


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        pytest.param(mode, backend.values[0], marks=backend.marks)
        for mode, tools in (("host", BACKENDS), ("gateway", (NFT, LEGACY)), ("tproxy", (NFT, IPTABLES)))
        for backend in tools
    ],
    indirect=True,
)
def test_from_before_to_after(scene: Scene) -> None:
    """Applied, applied again, looked at, disturbed, looked at, removed: traffic and rules at each step."""
    with contextlib.ExitStack() as stack:
        # Nothing tracks connections yet: the next segment of each of these will be the first that is tracked.
        pairs = [stack.enter_context(scene.pair(a)) for a in BEYOND * 2]
        early = [*pairs[:2], *(pair[::-1] for pair in pairs[2:])]  # each side speaks first once a family
        load_foreign(scene)
        _from_before_to_after(scene, early)


def _from_before_to_after(scene: Scene, early: Sequence[tuple[socket.socket, socket.socket]]) -> None:
    before = scene.dump()
    assert "nobody listens on" in scene.rules("apply", status=1)
    assert scene.dump() == before
    scene.start()
    assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
    scene.rules("apply")
    applied = scene.dump()
    assert applied != before
    _still_work(early)
    assert [scene.connect(a) for a in (*BEYOND, *PRIVATE)] == [REDIRECTED] * 2 + [DIRECT] * 2
    # A service of kube-proxy is still that.
    assert scene.connect("10.96.0.1") == DIRECT
    scene.rules("apply")
    assert scene.dump() == applied
    assert "as they should be" in scene.rules("verify")
    _still_work(early)

    family = scene.backend.partition("-")[0]
    command, said = INTRUDERS[family][scene.mode]
    scene.sh(command)
    if scene.mode == "host" or family == "nft" or clients_packets():
        assert said in scene.rules("verify", status=1)
    if family == "nft":
        assert "chain" in scene.rules("verify", status=1)
        scene.rules("apply")  # puts it right
    else:
        scene.sh(command.replace(" -I ", " -D "))
    assert scene.dump() == applied
    scene.rules("remove")
    assert scene.dump() == before
    _still_work(early)
    assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
    scene.rules("remove")  # there is nothing to complain of
    assert "missing" in scene.rules("verify", status=1)


def _still_work(pairs: Iterable[tuple[socket.socket, socket.socket]]) -> None:
    """Bytes get through, of the first of each first."""
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            one.sendall(b"hello")
            assert other.recv(10) == b"hello"


@one_mode("host")
@backends(1, 2)
def test_a_change_that_fails_half_way_is_undone(scene: Scene) -> None:
    """With iptables; a transaction of nft has no half way."""
    before = scene.dump()
    scene.start()
    # They fail to load when those of IPv4 are loaded.
    script = 'input=$(/bin/cat)\ncase $input in *"-A OUTPUT"*) {};; esac\necho "$input" | $tool "$@"'
    broken = functools.partial(scene.instead_of, "ip6tables-restore", script.format("echo broken >&2; exit 1"))
    with broken():
        assert "broken" in scene.rules("apply", status=1)
    assert scene.dump() == before
    scene.rules("apply")
    applied = scene.dump()
    # Others in the place of these.
    scene.sh("ip6tables -t nat -D OUTPUT -p tcp -j TRANSOCKS")
    unhooked = scene.dump()
    scene.configure(ports=[80])
    with broken():
        assert "broken" in scene.rules("apply", status=1)
    assert scene.dump() == unhooked
    scene.configure()
    scene.rules("apply")
    assert scene.dump() == applied
    # Ctrl-C at the same point waits until all is done.
    scene.rules("remove")
    words = ["env", "--default-signal=INT", *scene.argv("apply")]
    with scene.instead_of("ip6tables-restore", script.format("kill -INT $PPID")):
        interrupted = scene.net.proxy.run(*words, check=False)
    assert (interrupted.returncode, interrupted.stderr) == (130, "transocks rules apply: interrupted\n")
    assert scene.dump() == applied


@one_mode("tproxy")
@backends(0, 1)
def test_routing_goes_again_when_the_rules_do_not_load(scene: Scene) -> None:
    before = scene.dump()
    script = 'case $1 in -f|--noflush) echo broken >&2; exit 1;; esac\nexec $tool "$@"'
    with scene.instead_of("nft" if scene.backend == "nft" else "iptables-restore", script):
        assert "broken" in scene.rules("apply", "--force", status=1)
    assert scene.dump() == before


ALONE = """
import subprocess
import sys
from transocks import tools
from transocks.cli import main
tools.SBIN = ()
tools.LOCK_WITHIN = 0.1
sys.exit(10 * main(["rules", "apply", "-f", sys.argv[1]]) + main(["rules", "remove", "-f", sys.argv[1]]))
"""


@one_mode("host")
@backends(0)
def test_one_change_at_a_time(scene: Scene) -> None:
    scene.start()
    before = scene.dump()
    with scene.net.proxy.popen("flock", LOCK, "sh", "-c", "echo locked; cat", stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        words = ["env", f"PATH={scene.bin}", sys.executable, "-c", ALONE, str(scene.config)]
        done = scene.net.proxy.run(*words, check=False)
        assert done.returncode == 11
        assert "apply: another `transocks rules` has been at work" in done.stderr
        assert scene.dump() == before
        other.communicate()
    scene.rules("apply")
    scene.rules("remove")
    assert scene.dump() == before


@one_mode("tproxy")
@backends(0, 1)
def test_where_ipv6_is_switched_off(scene: Scene) -> None:
    scene.net.proxy.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    before = scene.dump()
    scene.start("127.0.0.1")
    assert "IPv6: switched off here" in scene.rules("apply")
    assert scene.connect(lab.WEB_V4) == REDIRECTED
    assert "as they should be" in scene.rules("verify")
    scene.rules("remove")
    assert scene.dump() == before
    # REDIRECT has no use for ip(8).
    scene.mode = "host"
    scene.configure()
    (scene.bin / "ip").unlink()
    scene.rules("apply", "--force")
    assert "ip:" not in scene.rules("verify", status=1)
    scene.rules("remove")


@one_mode("host")
def test_another_mode_or_tool_takes_the_place(scene: Scene) -> None:
    before = scene.dump()
    scene.rules("apply", "--force")
    scene.mode = "gateway" if scene.mode == "tproxy" else "tproxy"
    scene.configure()
    assert "not wanted" in scene.rules("verify", status=1)
    scene.rules("apply", "--force")
    assert "not wanted" not in scene.rules("verify", status=1)  # nobody listens
    if scene.backend != "nft" and (nft := shutil.which("nft")):
        (scene.bin / "nft").symlink_to(nft)
        scene.rules("apply", "--force")
        assert "TRANSOCKS" not in scene.dump()
        scene.configure(tool='"iptables"')
        scene.rules("apply", "--force")
        assert "transocks" not in scene.sh("nft list tables")
    # The other variant of iptables, which the one that goes by this name does not show.
    other = {"iptables-nft": "iptables-legacy", "iptables-legacy": "iptables-nft"}.get(scene.backend, "none")
    if shutil.which(f"{other}-save"):
        for verb in ("save", "restore"):
            (scene.bin / f"{other}-{verb}").symlink_to(shutil.which(f"{other}-{verb}") or "")
        scene.configure(tool='"iptables"')
        for verb in ("apply --force", "remove"):
            scene.sh(f"{other}-restore --noflush < {RULES / 'tproxy.v4'}")
            assert f"IPv4 table mangle of {other} has TRANSOCKS-TPROXY" in scene.rules("verify", status=1)
            scene.rules(*verb.split())
            assert "TRANSOCKS" not in scene.sh(f"{other}-save")
    scene.rules("remove")
    assert scene.dump() == before


@one_mode("tproxy")
@backends(0)
def test_verify_gives_commands_for_missing_routing(scene: Scene) -> None:
    scene.start()
    scene.rules("apply")
    for version in (4, 6):
        for kind in ("rule", "route"):
            scene.sh(" ".join(Routing(0x7474, version).command(kind, "del")))
    lines = scene.rules("verify", status=1).splitlines()
    missing = [line for line in lines if line.startswith("missing: ")]
    assert len(missing) == 4
    for line in missing:
        scene.sh(line.rpartition(": ")[2])
    assert "as they should be" in scene.rules("verify")


@one_mode("tproxy")
@backends(0, 1)
def test_tproxy_without_transocks(scene: Scene) -> None:
    scene.start()
    scene.configure(when_down='"closed"')
    scene.rules("apply", "--confirm", "2")
    with scene.connected(lab.WEB_V4) as (early, became):
        assert became == REDIRECTED
        scene.until(DIRECT)
        # Connections through transocks go on when a trial is over.
        assert lives(early)
    scene.rules("apply")
    scene.stop()
    nft = scene.backend == "nft"
    assert [scene.connect(a, timeout=0.2) for a in BEYOND] == [REFUSED if nft else NOTHING] * 2
    scene.configure(when_down='"open"')
    scene.rules("apply", "--force")
    assert [scene.connect(a, timeout=0.2) for a in BEYOND] == [DIRECT if nft else NOTHING] * 2
    scene.rules("remove")
    assert scene.connect(lab.WEB_V4) == DIRECT


@pytest.mark.parametrize("mode", ["host", "tproxy"], indirect=True)
@backends(0)
def test_a_removal_that_keeps_connections(scene: Scene) -> None:
    before = scene.dump()
    scene.start()
    scene.rules("apply")
    with scene.connected(lab.WEB_V4) as (early, became):
        assert became == REDIRECTED
        for _ in range(2):
            scene.rules("remove", "--keep-connections")
            assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
            assert lives(early)
        assert scene.dump() != before
    scene.rules("remove")
    assert scene.dump() == before


@one_mode("tproxy")
def test_the_listener_on_all_addresses_is_not_met_by_its_port(scene: Scene) -> None:
    """A connection that was there before, to a port of another host that is the listener's: not taken, nor reset."""
    with scene.net.outside.listen("", 1084) as server, scene.pair(lab.WEB_V4, server) as early:
        scene.start("0.0.0.0", "::")
        scene.rules("apply")
        assert scene.connect(lab.WEB_V6) == REDIRECTED
        _still_work([early])


@pytest.mark.parametrize("mode", ["host", "gateway"], indirect=True)
@backends(0)
def test_the_units_take_what_it_renders(scene: Scene) -> None:
    before = scene.dump()
    scene.configure(ports=[80, "8000-8100"], to=["203.0.113.0/24", "2001:db8::/32"])
    rendered = scene.folder / "rules.nft"
    rendered.write_text(scene.rules("render"))
    script = RULES.parent / "deploy" / "systemd" / "transocks-rules.sh"

    def do(verb: str) -> None:
        scene.net.proxy.run("env", f"RULES={rendered}", "POLICY=closed", str(script), verb)

    do("early")
    assert [scene.connect(a) for a in BEYOND] == [REFUSED] * 2
    scene.start()
    do("redirect")
    assert [scene.connect(a) for a in BEYOND] == [REDIRECTED] * 2
    assert "as they should be" in scene.rules("verify")
    # A change that is under way is waited for.
    with _changing(scene, f"nft flush ruleset; sleep 0.3; nft -f {rendered}"):
        assert "as they should be" in scene.rules("verify")
    with _changing(scene, "sleep 0.3; nft flush ruleset"):
        do("redirect")
    assert [scene.connect(a) for a in BEYOND] == [REDIRECTED] * 2
    do("stop")
    assert [scene.connect(a) for a in BEYOND] == [REFUSED] * 2
    do("remove")
    assert scene.dump() == before


@contextlib.contextmanager
def _changing(scene: Scene, script: str) -> Iterator[None]:
    """Somebody has the lock, and runs this."""
    locked = ("flock", "/run/transocks-rules.lock", "sh", "-ec", f"echo; {script}")
    process = scene.net.proxy.popen(*locked, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield
    assert process.wait(10) == 0


USOCKSD = """
[incoming]
addresses = ["127.0.0.1"]
[outgoing]
mark = 0x7473
"""
CLIENT = """
{mark}
control = "{control}"
listen = "localhost:1081"
proxy_url = {upstreams}
[rules]
mode = "host"
"""


@one_mode("host")
@backends(0)
def test_apply_refuses_loops_and_upstreams_that_are_down(scene: Scene, tmp_path: Path) -> None:
    """With real daemons on one host. A change that would be refused is not begun."""
    before, popen = scene.dump(), scene.net.proxy.popen

    @contextlib.contextmanager
    def client(*upstreams: str, mark: str = "mark = 0x7473") -> Iterator[Daemon]:
        urls = [f"socks5://{upstream}" for upstream in upstreams]
        config = CLIENT.format(control=tmp_path / "control.sock", upstreams=urls, mark=mark)
        scene.config = Path(tempfile.mkdtemp(dir=tmp_path), "transocks.toml")
        with Daemon("transocks", config, scene.config.parent, popen=popen) as daemon:
            yield daemon

    def said(status: int, *words: str) -> str:
        out = scene.rules("apply", *words, status=status)
        if status:
            assert "nothing was changed; with --force" in out
            assert scene.dump() == before
        else:
            scene.rules("remove")
        return out

    (tmp_path / "unmarked").mkdir()
    with Daemon("usocksd", USOCKSD.replace("mark = 0x7473", ""), tmp_path / "unmarked", popen=popen):
        with client("127.0.0.1:1080"):
            out = said(1)
            assert "a loop: the rules would send to transocks what the upstream 127.0.0.1:1080 on this host" in out
            assert "It is a usocksd without the mark 0x7473: set mark = 0x7473 in both" in out
            assert "warning: a loop: " in said(0, "--force")
            config = scene.config.read_text()
            for rules in ('exempt_users = ["root"]', 'users = ["nobody"]'):
                scene.config.write_text(f"{config}{rules}\n")
                said(0)
    with Daemon("usocksd", USOCKSD, tmp_path, popen=popen):
        with client("127.0.0.1:1080", "127.0.0.1:9") as daemon:
            daemon.record("upstream is down")
            out = said(0)
            assert "warning: 1 of 2 upstreams of default do not answer: socks5://127.0.0.1:9" in out
            assert "a loop" not in out
            scene.rules("apply")
            _goes_through_the_proxy(scene)
            assert "as they should be" in scene.rules("verify")
            scene.rules("remove")
            os.kill(daemon.pid, signal.SIGSTOP)  # it listens, as far as the kernel knows
            try:
                assert "transocks does not answer" in said(1)
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
    with client("203.0.113.99:1080", mark="") as daemon:
        daemon.record("upstream is down")
        out = said(1)
        assert "no upstream of default answers, so every connection would be reset" in out
        assert "the rules would send transocks's own connections to its upstream 203.0.113.99:1080" in out
        assert "warning: no upstream of default answers" in said(0, "--force")


def _goes_through_the_proxy(scene: Scene) -> None:
    with scene.net.client.socket(socket.AF_INET) as sock:
        sock.settimeout(5)
        sock.connect((lab.WEB_V4, 80))
        accepted, peer = scene.web[0].accept()
        with accepted:
            assert peer[0].endswith(lab.PROXY_V4[0]), "it has come by way of the proxy"
            assert peer[1] != sock.getsockname()[1]
            accepted.sendall(b"hello")
            assert sock.recv(10) == b"hello"

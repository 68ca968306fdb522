"""`apply --confirm` and `hold`: rules that end by themselves, whatever is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import lab
import pytest
from daemons import lives
from scene import BEYOND, DIRECT, PRIVATE, REDIRECTED, REFUSED, Scene, backends, one_mode


@one_mode("host")
@backends(0, 2)
def test_killed_in_the_middle_of_a_trial_the_network_works_again(scene: Scene) -> None:
    scene.start()
    # With iptables when the rules of one family are loaded; with nft, which has no middle, when all is done.
    script = '$tool "$@"; s=$?\ncase $1 in -f|--noflush) kill -9 $PPID;; esac\nexit $s'
    with scene.instead_of("nft" if scene.backend == "nft" else "iptables-restore", script):
        process = scene.net.proxy.popen(*scene.argv("apply", "--confirm", "1"), stdout=subprocess.DEVNULL)
        assert process.wait(20) == -signal.SIGKILL
    assert re.search(r"@active|-A OUTPUT -p tcp -j TRANSOCKS", scene.dump())
    scene.stop()
    scene.until(DIRECT)
    curl = scene.net.proxy.run("curl", "-s", "-m", "0.2", "-w", "%{time_connect}", f"http://{lab.WEB_V4}/", check=False)
    assert float(curl.stdout) > 0, "it has connected; the web server says nothing"


@one_mode("host")
@backends(0, 1)
def test_a_trial_is_confirmed_or_over(scene: Scene) -> None:
    before = scene.dump()
    scene.start()
    scene.rules("apply")
    applied = scene.dump()
    scene.rules("apply", "--confirm", "60")
    assert scene.dump() != applied
    assert re.search(r"in force for \d+ s more", scene.rules("verify"))
    assert scene.connect(lab.WEB_V6) == REDIRECTED
    assert "confirmed" in scene.rules("confirm")
    assert scene.dump() == applied
    assert "nothing to confirm" in scene.rules("confirm")

    scene.rules("apply", "--confirm", "1")
    scene.until(DIRECT)
    assert "rolled back" in scene.rules("verify", status=1)
    assert "too late" in scene.rules("confirm", status=1)
    scene.rules("apply")
    assert scene.dump() == applied
    assert scene.connect(lab.WEB_V4) == REDIRECTED
    scene.rules("remove")
    assert scene.dump() == before
    assert "no rules" in scene.rules("confirm", status=1)


@one_mode("host")
@backends(0)
def test_on_a_terminal_it_asks(scene: Scene) -> None:
    before = scene.dump()
    scene.start()
    scene.rules("apply")
    applied = scene.dump()
    scene.rules("remove")
    brief = "from transocks.commands.rules import question; question.SECONDS = 1;"
    for keys, words, more, status, last, then in [
        (b"y", [], "", 0, "kept", applied),
        (b"", ["--yes"], "", 0, "whether its upstreams answer", applied),
        (b"xn", [], "", 1, "removed: connections go directly again", before),
        (b"\x03", [], "", 1, "removed: connections go directly again", before),
        (b"", [], brief, 1, "no answer: ", None),
    ]:
        terminal, end = os.openpty()
        argv = ["setsid", "--ctty", "--wait", *scene.argv("apply", *words, more=more)]
        process = scene.net.proxy.popen(*argv, stdin=end, stdout=end, stderr=end)
        os.close(end)
        said, left = b"", keys
        with contextlib.suppress(OSError):  # EIO: the process has ended
            while chunk := os.read(terminal, 1000):
                said += chunk
                if left and b"keep these rules? [y/N] " in said:
                    os.write(terminal, left)
                    left = b""
        os.close(terminal)
        assert process.wait(10) == status, said
        assert last in said.decode().splitlines()[-1], said
        assert then in (None, scene.dump())


HOLD = """
import sys
import transocks.commands.rules.hold as rules
from transocks import tools
from transocks.cli import main
tools.SBIN = ()
rules.LOOK_EVERY, rules.IN_FORCE = 0.1, 1
main(["rules", "hold", "-f", sys.argv[1]])
"""


@contextlib.contextmanager
def _hold(scene: Scene) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str], Callable[[], str]]]:
    """`hold`, its next line of output, and its next message to the service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{scene.folder}/notify{time.monotonic_ns()}")
        manager.settimeout(10)
        command = ["env", f"PATH={scene.bin}", f"NOTIFY_SOCKET={manager.getsockname()}"]
        command += [sys.executable, "-c", HOLD, str(scene.config)]
        holder = scene.net.proxy.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert holder.stdout is not None
        yield holder, holder.stdout.readline, lambda: manager.recv(1000).decode()
        holder.kill()
        holder.wait()


@backends(0)
@one_mode("host")
def test_held_rules_are_in_force_while_transocks_accepts(scene: Scene) -> None:
    before = scene.dump()
    scene.rules("apply", "--force")  # of an operator, in force for good
    with _hold(scene) as (holder, says, tells):
        assert says().startswith("open: transocks does not accept connections")
        assert re.match(r"READY=1\nSTATUS=open: .*\n?$", tells())
        assert tells().startswith("STATUS=open: ")
        assert scene.connect(lab.WEB_V4) == DIRECT
        scene.start()
        assert says() == "in force\n"
        assert tells() == "STATUS=in force"
        assert [scene.connect(a) for a in BEYOND] == [REDIRECTED] * 2
        assert "as they should be" in scene.rules("verify")
        scene.stop()
        assert says().startswith("open: ")
        assert [scene.connect(a) for a in BEYOND] == [DIRECT] * 2
        scene.start()
        assert says() == "in force\n"
        for _ in range(2):  # as a restart of nftables.service does
            scene.net.proxy.run("nft", "flush", "ruleset")
        scene.until(REDIRECTED)
        # Killed both: the kernel ends it.
        holder.kill()
        scene.stop()
        scene.until(DIRECT)
        assert "rolled back" in scene.rules("verify", status=1)

    scene.start()
    with _hold(scene) as (holder, says, tells):
        assert says() == "in force\n"
        with scene.connected(lab.WEB_V4) as (early, became):
            assert became == REDIRECTED
            holder.terminate()
            assert holder.wait(10) == 0
            assert tells().startswith("READY=1\nSTATUS=in force")
            assert scene.connect(lab.WEB_V4) == DIRECT
            assert lives(early)
    scene.rules("remove")
    assert scene.dump() == before


@backends(0)
@pytest.mark.parametrize("mode", ["host", "gateway", "tproxy"], indirect=True)
def test_held_closed_no_connection_goes_directly(scene: Scene) -> None:
    before = scene.dump()
    scene.configure('when_down = "closed"\n')
    if scene.mode == "gateway":  # and both at once
        scene.config.write_text(scene.config.read_text().replace('"gateway"', '["gateway", "host"]'))
    with _hold(scene) as (holder, says, tells):
        assert says().startswith("closed: transocks does not accept connections")
        assert tells().startswith("READY=1\nSTATUS=closed: ")
        assert [scene.connect(a) for a in BEYOND] == [REFUSED] * 2
        assert [scene.connect(a) for a in PRIVATE] == [DIRECT] * 2
        scene.start()
        assert says() == "in force\n"
        assert [scene.connect(a) for a in (*BEYOND, *PRIVATE)] == [REDIRECTED, REDIRECTED, DIRECT, DIRECT]
        assert "as they should be" in scene.rules("verify")
        chain = {"host": "output_tcp", "gateway": "prerouting", "tproxy": "prerouting"}[scene.mode]
        table = "transocks" if scene.mode == "host" else f"transocks_{scene.mode}"
        scene.sh(f"nft flush chain inet {table} {chain}")
        assert [scene.connect(a) for a in BEYOND] == [REFUSED] * 2
        said = scene.rules("verify", status=1)
        assert "missing: " in said
        assert "shadowed: " not in said
        scene.rules("apply")
        assert [scene.connect(a) for a in BEYOND] == [REDIRECTED] * 2
        with scene.connected(lab.WEB_V4) as (early, became):
            assert became == REDIRECTED
            # Nobody loads the rules again now, and still no connection goes out after a flush.
            os.kill(holder.pid, signal.SIGSTOP)
            scene.net.proxy.run("nft", "flush", "ruleset")
            assert [scene.connect(a) for a in (*BEYOND, *PRIVATE)] == [REFUSED, REFUSED, DIRECT, DIRECT]
            os.kill(holder.pid, signal.SIGCONT)
            scene.until(REDIRECTED)
            assert "`transocks rules hold` runs" in scene.rules("remove", "--keep-connections", status=1)
            scene.until(REDIRECTED)
            assert lives(early)
        holder.kill()
        holder.wait()
    assert scene.connect(lab.WEB_V4) == REDIRECTED, "the rules stay"
    scene.stop()
    assert [scene.connect(a) for a in BEYOND] == [REFUSED] * 2
    scene.rules("remove")
    assert scene.dump() == before


WATCH = """
import subprocess
from transocks.rules.guard import TableWatch
watch = TableWatch()
subprocess.run(["nft", "add table inet foreign; add chain inet foreign c"], check=True)
assert not watch.wait(0.01)
subprocess.run(["nft", "flush", "ruleset"], check=True)
assert watch.wait(10)
assert not watch.forget()
"""


@one_mode("host")
@backends(0)
def test_hold_notices_flushes_and_reports_faults(scene: Scene) -> None:
    scene.configure(users=["nobody-of-this-name"])
    assert "there is none of that name" in scene.rules("hold", status=os.EX_CONFIG)
    scene.configure(ports=[0])
    assert "rules.ports" in scene.rules("hold", status=os.EX_CONFIG)
    scene.net.proxy.run(sys.executable, "-c", WATCH)

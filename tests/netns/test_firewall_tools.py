"""`transocks rules` where the tools hang, where others' rules are not UTF-8, and without root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from daemons import running, wait_until
from scene import Scene, backends, one_mode

from transocks.tools import LOCK


@contextmanager
def _hanging(scene: Scene, more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`apply` when its last step hangs, and the process that does."""
    says = scene.folder / "says"
    os.mkfifo(says)
    script = f"""case $1 in -f|--noflush) ;; *) exec $tool "$@";; esac
/bin/grep SigBlk /proc/self/status > {scene.folder}/mask
echo $$ > {says}
exec /bin/sleep 1000"""
    # Under nohup, these tests inherit an ignored SIGHUP.
    argv = scene.argv("apply", "--force", more=f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {more}")
    with (
        scene.instead_of("nft" if scene.backend == "nft" else "ip6tables-restore", script),
        scene.net.proxy.popen(*argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        pid = int(says.read_text())
        assert int((scene.folder / "mask").read_text().split()[1], 16) == 0
        try:
            yield process, pid
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@one_mode("tproxy")
@backends(0, 1)
def test_a_signal_ends_a_change_that_hangs_and_nothing_is_left_of_it(scene: Scene, number: signal.Signals) -> None:
    before = scene.dump()
    with _hanging(scene, "tools.GRACE = 0.2;") as (process, pid):
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert "interrupted: " in said
        assert "did not end within 0.2 s of the signal, and was killed" in said
        wait_until(lambda: not running(pid), f"process {pid} ends")
        scene.net.proxy.run("flock", "--nonblock", LOCK, "true")
    assert scene.dump() == before


@one_mode("tproxy")
@backends(0, 1)
def test_a_tool_has_a_limit(scene: Scene) -> None:
    before = scene.dump()
    with _hanging(scene, "tools.WITHIN = 0.5;") as (process, pid):
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "did not end within 0.5 s, and was killed" in said
        assert "Traceback" not in said
        wait_until(lambda: not running(pid), f"process {pid} ends")
    assert scene.dump() == before


@one_mode("host")
@backends(0)
def test_a_tool_dies_with_its_caller(scene: Scene) -> None:
    with _hanging(scene, "") as (process, pid):
        process.kill()
        process.wait()
        wait_until(lambda: not running(pid), f"process {pid} ends")
        scene.net.proxy.run("flock", "--nonblock", LOCK, "true")


@one_mode("host")
@backends(0, 1, 2)
def test_comments_of_others_need_not_be_utf_8(scene: Scene) -> None:
    scene.start()
    if scene.backend == "nft":
        theirs = 'table ip x { chain c { type filter hook output priority 0; tcp dport 1 accept comment "\\377\\376" ; }; }\\n'
        scene.sh(f"printf '{theirs}' | nft -f -")
        show = "nft list ruleset | /usr/bin/od -c"
    else:
        theirs = '*nat\\n-A OUTPUT -p tcp --dport 1 -m comment --comment "\\377 x" -j ACCEPT\\nCOMMIT\\n'
        scene.sh(f"printf '{theirs}' | iptables-restore --noflush")
        show = "iptables-save -t nat | /bin/grep -a ^-A | /usr/bin/od -c"
    before = scene.sh(show)
    assert "377" in before
    assert "applied" in scene.rules("apply")
    assert "as they should be" in scene.rules("verify")
    scene.rules("apply")
    if scene.backend != "nft":  # a jump to our chain is removed, whatever its comment
        jump = '*nat\\n-A OUTPUT -p tcp -m comment --comment "\\377\\376" -j TRANSOCKS\\nCOMMIT\\n'
        scene.sh(f"printf '{jump}' | iptables-restore --noflush")
    scene.rules("remove")
    assert scene.sh(show) == before


@one_mode("host")
@backends(0)
def test_without_root_it_reports_that(scene: Scene) -> None:
    command = [
        "setpriv",
        "--bounding-set=-all",
        "env",
        "PATH=/usr/bin:/bin",
        sys.executable,
        "-m",
        "transocks",
        "rules",
    ]
    for verb in ("apply", "confirm", "verify", "remove", "hold"):
        done = scene.net.proxy.run(*command, verb, "-f", str(scene.config), check=False)
        assert done.returncode == (78 if verb == "hold" else 1)
        assert done.stderr.startswith(f"transocks rules {verb}: needs CAP_NET_ADMIN")
        assert done.stderr.endswith(": run it as root, with sudo for example\n")
        assert done.stderr.count("\n") == 1
    done = scene.net.proxy.run(*command, "render", "-f", str(scene.config))
    assert "table inet transocks" in done.stdout

"""Where the control socket is, for daemons and verbs of root and of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import usocksd
from usocksd.settings.control_path import control_path

DEFAULT = "/run/usocksd/control.sock"
NOBODY = 65534
IN_TMP = f"/tmp/usocksd-{NOBODY}/control.sock"

# In a mount namespace with a /run and a /tmp of its own, as root and then as nobody, it opens the default socket and
# has a verb ask there. `before` is what root has prepared.
_PROGRAM = """
import argparse, attrs, json, os, subprocess, sys, trio
from usocksd.cli import USOCKSD
from usocksd.config import UsocksdConfig
from usocksd.errors import Error
from usocksd.settings.control_path import control_path
from usocksd.serve.control import Control
from usocksd.serve.verbs.client import ControlClient, find_control
from usocksd.settings.warnings import HostFacts, lint_common

default, uid, before = sys.argv[1], int(sys.argv[2]), sys.argv[3]
subprocess.run("mount -t tmpfs -o mode=755 tmpfs /run; mount -t tmpfs -o mode=1777 tmpfs /tmp; " + before,
               shell=True, check=True)
facts = HostFacts.here(())
os.setgroups([])
os.setgid(uid)
os.setuid(uid)

async def name(request):
    return {"name": "this one"}

def ask():
    options = argparse.Namespace(control=None, f=None)
    try:
        return ControlClient("usocksd", find_control(attrs.evolve(USOCKSD, file="/none", control=default), options, "")).ask("name")
    except Error as error:
        return {"verb": str(error)}

async def main():
    path = control_path(default, default)
    warned = [fault.expected for fault in lint_common(UsocksdConfig(), facts) if fault.path == "control"]
    said = {"path": path, "check": warned}
    try:
        sock = Control.open(path, "usocksd", {"name": name})
    except Error as error:
        return said | {"daemon": str(error)} | ask()
    folder = os.stat(os.path.dirname(path))
    said |= {"mode": oct(folder.st_mode & 0o777), "owner": folder.st_uid}
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: sock.serve(task_status=task_status))
        said |= await trio.to_thread.run_sync(ask)
        sock.close()
        return said

print(json.dumps(trio.run(main)))
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")


def asked(uid: int, before: str = "", **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", textwrap.dedent(_PROGRAM), DEFAULT, str(uid), before],
        env={
            **{key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"},
            "PYTHONPATH": str(Path(usocksd.__file__).parents[1]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@as_root
@pytest.mark.parametrize(
    ("uid", "before", "runtime", "path", "mode"),
    [
        (0, "", None, DEFAULT, "0o755"),
        # A service, for which systemd has made the folder.
        (NOBODY, f"mkdir /run/usocksd; chown {NOBODY} /run/usocksd", "/run", DEFAULT, "0o755"),
        (NOBODY, f"mkdir -m 700 /run/u; chown {NOBODY} /run/u", "/run/u", "/run/u/usocksd/control.sock", "0o755"),
        (NOBODY, "", "", IN_TMP, "0o700"),
        (NOBODY, "mkdir -m 700 /run/root", "/run/root", IN_TMP, "0o700"),  # another user's, as after `su`
        (NOBODY, "", "relative", IN_TMP, "0o700"),
        (NOBODY, "", "/missing", IN_TMP, "0o700"),
    ],
)
def test_the_default_of_each_user(uid: int, before: str, runtime: str | None, path: str, mode: str) -> None:
    environment = {} if runtime is None else {"XDG_RUNTIME_DIR": runtime}
    found = asked(uid, before, **environment)
    assert found == {"path": path, "check": [], "mode": mode, "owner": uid, "ok": True, "name": "this one"}


@as_root
@pytest.mark.parametrize(
    "before",
    [
        "mkdir -m 700 /tmp/usocksd-65534",
        "mkdir -m 777 /tmp/usocksd-65534; chown 65534 /tmp/usocksd-65534",
        "mkdir /tmp/mine; chown 65534 /tmp/mine; ln -s mine /tmp/usocksd-65534",
    ],
    ids=["another user's", "open to others", "a link"],
)
def test_a_folder_that_others_may_have_made_is_refused(before: str) -> None:
    found = asked(NOBODY, before)
    told = f"{Path(IN_TMP).parent} is not a folder of this user alone: remove it, or have `control` lead elsewhere"
    assert found["daemon"] == f"can't open the control socket {IN_TMP}: {told}"
    assert found["verb"] == told
    assert found["check"] == [told]


@as_root
def test_a_user_without_a_daemon_asks_the_system_s() -> None:
    """And hears that it may not, rather than that there is none."""
    found = asked(NOBODY, "mkdir /run/usocksd; touch /run/usocksd/control.sock; mkdir /tmp/usocksd-65534")
    assert "is not a folder" in found["daemon"]  # so there is none of its own
    assert found["verb"] == f"no permission to use {DEFAULT}: only its owner and root may"


def test_a_configured_path_is_used_unchanged() -> None:
    assert control_path("/srv/control.sock", DEFAULT) == "/srv/control.sock"

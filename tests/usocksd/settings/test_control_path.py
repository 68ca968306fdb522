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

# In a mount namespace with a /run and a /tmp of its own, as root and then as nobody, it opens the default socket and
# has a verb ask there. `before` is what root has prepared.
_PROGRAM = """
import argparse, json, os, subprocess, sys, threading, trio
from usocksd.errors import Error
from usocksd.settings.control_path import control_path
from usocksd.serve.control import Control
import attrs
from usocksd.cli import USOCKSD
from usocksd.serve.verbs.client import Client, find_control

default, uid, before = sys.argv[1], int(sys.argv[2]), sys.argv[3]
subprocess.run("mount -t tmpfs -o mode=755 tmpfs /run; mount -t tmpfs -o mode=1777 tmpfs /tmp; " + before,
               shell=True, check=True)
os.setgroups([])
os.setgid(uid)
os.setuid(uid)

async def name(request):
    return {"name": "this one"}

def ask():
    options = argparse.Namespace(control=None, f=None)
    try:
        return Client("usocksd", find_control(attrs.evolve(USOCKSD, file="/none", control=default), options, "")).ask("name")
    except Error as error:
        return {"verb": str(error)}

async def main():
    path = control_path(default, default)
    said = {"path": path}
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
def test_root_makes_the_folder_in_run() -> None:
    assert asked(0) == {"path": DEFAULT, "mode": "0o755", "owner": 0, "ok": True, "name": "this one"}


@as_root
def test_a_service_has_it_where_systemd_has_made_the_folder() -> None:
    found = asked(NOBODY, f"mkdir /run/usocksd; chown {NOBODY} /run/usocksd", XDG_RUNTIME_DIR="/run")
    assert found == {"path": DEFAULT, "mode": "0o755", "owner": NOBODY, "ok": True, "name": "this one"}


@as_root
def test_a_user_has_it_in_the_runtime_directory() -> None:
    found = asked(NOBODY, f"mkdir -m 700 /run/u; chown {NOBODY} /run/u", XDG_RUNTIME_DIR="/run/u")
    assert found["path"] == "/run/u/usocksd/control.sock"
    assert (found["owner"], found["name"]) == (NOBODY, "this one")


@as_root
@pytest.mark.parametrize("runtime", ["", "/run/root", "relative", "/missing"])
def test_a_user_without_a_runtime_directory(runtime: str) -> None:
    """It is not set, or another user's, as after `su`."""
    found = asked(NOBODY, "mkdir -m 700 /run/root", XDG_RUNTIME_DIR=runtime)
    path = f"/tmp/usocksd-{NOBODY}/control.sock"
    assert found == {"path": path, "mode": "0o700", "owner": NOBODY, "ok": True, "name": "this one"}


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
def test_what_others_could_have_made_is_used_by_neither(before: str) -> None:
    found = asked(NOBODY, before)
    folder = f"/tmp/usocksd-{NOBODY}"
    told = f"{folder} is not a folder of this user alone: remove it, or have `control` lead elsewhere"
    assert found["daemon"] == f"can't open the control socket {folder}/control.sock: {told}"
    assert found["verb"] == told


@as_root
def test_a_user_without_a_daemon_asks_the_system_s() -> None:
    """And hears that it may not, rather than that there is none."""
    found = asked(NOBODY, "mkdir /run/usocksd; touch /run/usocksd/control.sock; mkdir /tmp/usocksd-65534")
    assert "is not a folder" in found["daemon"]  # so there is none of its own
    assert found["verb"] == f"no permission to use {DEFAULT}: only its owner and root may"


def test_a_path_of_one_s_own_is_taken_as_it_is() -> None:
    assert control_path("/srv/control.sock", DEFAULT) == "/srv/control.sock"

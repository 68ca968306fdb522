"""The container image, as far as that shows without an engine: what goes in suffices, and what runs is no root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "container"


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, continued lines joined."""
    lines = (line for line in (FOLDER / "Containerfile").read_text().splitlines() if not line.startswith("#"))
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(words[0], words[1]) for words in (line.split(None, 1) for line in text.splitlines()) if words]


def test_the_image_copies_everything_that_a_wheel_needs(tmp_path: Path) -> None:
    for name, words in instructions():
        if name == "COPY" and not words.startswith("--from="):
            *sources, target = words.split()
            inside = tmp_path / "context" / target.lstrip("/")
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, inside)
                else:
                    inside.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, inside)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(tmp_path / "context" / "src")]
    pure = {**os.environ, "TRANSOCKS_PURE": "1"}  # compiling takes long
    done = subprocess.run(build, env=pure, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{tmp_path}/to", str(wheel)]
    subprocess.run(install, check=True)
    for program in ("usocksd", "transocks"):
        version = [sys.executable, "-P", "-m", program, "--version"]
        environment = {"PYTHONPATH": str(tmp_path / "to")}
        done = subprocess.run(version, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"{program} ")


def test_the_daemons_run_as_users_of_their_own_without_a_shell_around_them() -> None:
    last = dict(instructions())
    assert json.loads(last["CMD"]) == ["usocksd"], "not in exec form: a shell would be process 1"
    assert "ENTRYPOINT" not in last
    assert last["USER"] == "usocksd"
    users = dict(re.findall(r"useradd --uid (\d+) .*?(\w+)(?=\s+(?:&&|$))", last_run()))
    assert users == {"51080": "usocksd", "51081": "transocks"}
    # Other files that contain these numbers have the same ones.
    compose, running = (FOLDER / "compose.yaml").read_text(), (ROOT / "docs" / "running.md").read_text()
    for number, name in users.items():
        assert f"/run/{name}:uid={number},gid={number}," in compose
        assert f"`{name}` ({number})" in running


def test_compose_has_what_it_mounts_in_a_fresh_clone() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    for service in services.values():
        (mount,) = service["volumes"]
        source, target, _ = mount.split(":")
        assert service["command"][-1] == target
        assert (FOLDER / source).resolve() == ROOT / "deploy" / Path(target).name
        assert (FOLDER / source).is_file(), "the engine would make a folder there"


def last_run() -> str:
    """The RUN instruction that makes the users."""
    (found,) = [words for name, words in instructions() if name == "RUN" and "useradd" in words]
    return found

"""`./run`: the demo does what it tells, on one screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lab
import pytest

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "demo.py"


@pytest.mark.skipif(lab.unavailable() is not None, reason=f"no network namespaces here: {lab.unavailable()}")
def test_the_demo_does_what_it_tells_on_one_screen(tmp_path: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"
    }  # its modules are beside it
    done = subprocess.run(
        [sys.executable, DEMO], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 45
    assert [line for line in lines if line.startswith((" ok ", " NO "))][-2].split()[1:] == [
        "curl", "-4", "https://ads.beyond.example/", "reset", "(35)", "203.0.113.80:443",
        "denied:", "deny_sites", '"ads.beyond.example"', "none",
    ]  # fmt: skip
    assert any(line.startswith(" ok getent ahostsv4 www.beyond.example: 203.0.113.80, by UDP") for line in lines)

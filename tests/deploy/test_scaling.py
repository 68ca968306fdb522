"""The simulation of deploy/scaling agrees with its formulas, and docs/scaling.md says what it found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_simulation_agrees_with_its_formulas(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "deploy/scaling/simulate.py", "--plot", tmp_path / "plot.svg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plot.svg").read_text() == (ROOT / "docs/scaling.svg").read_text()
    page = (ROOT / "docs/scaling.md").read_text()
    for line in done.stdout.splitlines():
        what, _, rest = line.partition(": share of clients that move")
        if rest:
            assert f"| {what.replace(' proxies', '')}" in page or what.startswith("one comes back"), line
            share = f"{float(rest.split()[0]):.1%}"
            assert share in page or what.startswith("one comes back"), line

"""50 rules and a million entries: what start, memory and decisions may cost. CPU time, so that neighbours don't count."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_million_entries() -> None:
    command = [sys.executable, "-m", "bench.decisions", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["start_cpu_s"] < 15
    assert len(figures["workers_mb"]) == 2
    assert max(figures["workers_mb"]) < 200
    assert len(figures["decision_us"]) == 3
    assert max(figures["decision_us"].values()) < 20

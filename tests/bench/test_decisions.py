"""50 rules and many entries: what start, memory and decisions may cost. CPU time, so that neighbours don't count.

The long form (TRANSOCKS_HEAVY_SECONDS, as in tests/netns/test_service.py) has a million entries, the short one a tenth.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARE = 1 if "TRANSOCKS_HEAVY_SECONDS" in os.environ else 0.1


def test_many_entries() -> None:
    command = [sys.executable, "-m", "bench.decisions", "--entries", str(int(1_000_000 * SHARE)), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["start_cpu_s"] < 3 + 12 * SHARE
    assert len(figures["workers_mb"]) == 2
    assert max(figures["workers_mb"]) < 60 + 140 * SHARE
    assert len(figures["decision_us"]) == 3
    assert max(figures["decision_us"].values()) < 20

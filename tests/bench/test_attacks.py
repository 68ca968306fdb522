"""The attacks run, and the budget of descriptors holds; latencies need a quiet machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_names_with_dead_addresses_take_few_descriptors() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urn", "true"], check=False).returncode:
        pytest.skip("may not make namespaces here")
    command = [sys.executable, "-m", "bench.attacks.dead_addresses", "--seconds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    before, during, after = json.loads(done.stdout)
    assert [phase["name"] for phase in (before, during, after)] == ["before", "during", "after"]
    # 40 clients have two each, and borrow no more than a sixteenth of 512.
    assert before["descriptors"] + 40 < during["descriptors"] <= before["descriptors"] + 2 * 40 + 512 // 16
    assert all(phase["failed"] == 0 for phase in (before, during, after))

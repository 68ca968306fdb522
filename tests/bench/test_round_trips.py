"""The measuring of round trips works; what they are is tested in tests/netns/test_round_trips.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_both_daemons_are_measured() -> None:
    way = "transocks+usocksd"
    command = [sys.executable, "-m", "bench.round_trips", "--ms", "50", "--tries", "1", "--only", way, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if "no link with delay here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    for first, later in json.loads(done.stdout)[way].values():
        assert first >= 2
        assert later >= 2

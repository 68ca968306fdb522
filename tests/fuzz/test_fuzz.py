"""A short run of each fuzz target; README.md has the long ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.mutate import mutated
from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS


def test_every_target_has_seeds() -> None:
    assert SEEDS.keys() == TARGETS.keys()
    assert all(SEEDS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_raises(name: str) -> None:
    """Seeds mutated at random, in the same way in each run."""
    target = TARGETS[name]
    for data in mutated(SEEDS[name], 1500):
        target(data)


@pytest.mark.parametrize("name", TARGETS)
def test_long_inputs_take_time_by_their_length(name: str) -> None:
    """16 times the bytes may take some more than 16 times as long, but not 256 times. Very short times are not
    compared.
    """
    target = TARGETS[name]
    for seed in SEEDS[name][:6]:
        for stretched in (
            lambda size, seed=seed: (seed * (size // max(len(seed), 1) + 1))[:size],
            lambda size, seed=seed: seed + seed[-1:] * size,
            lambda size, seed=seed: seed[: len(seed) // 2] + bytes(size) + seed[len(seed) // 2 :],
        ):
            short, long = _cost(target, stretched(1 << 12)), _cost(target, stretched(1 << 16))
            assert long < 0.2 or long < 80 * short, (seed[:40], short, long)


def _cost(target: Callable[[bytes], None], data: bytes) -> float:
    """CPU time in seconds: the least of a few attempts."""
    costs = []
    for _ in range(3):
        began = time.process_time()
        target(data)
        costs.append(time.process_time() - began)
    return min(costs)


@pytest.mark.parametrize("name", ["sniff", "dns_answer"])
def test_guided_by_coverage(name: str, tmp_path: Path) -> None:
    """Only tests that the real fuzzer runs; findings take longer."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has no wheel for this Python or machine")
    command = [sys.executable, str(Path(__file__).parent), name, "--runs", "1000", "--corpus", str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stat::number_of_executed_units: 1" in done.stderr

"""The benchmark runs to its end and reports every figure. Its times are never judged here."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = {
    "connect": {"rate", "cpu"},
    "echo-1": {"rate", "p50", "p99", "cpu"},
    "echo-50": {"rate", "p50", "p99", "cpu"},
    "bulk-1": {"rate", "cpu"},
    "bulk-8": {"rate", "cpu"},
    "idle": {"memory"},
}


def bench(*arguments: str, timeout: float = 60, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(("place", "name"), [("loopback", "usocksd"), ("namespace", "transocks+usocksd")])
def test_quick_run_has_every_figure(place: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = bench("--quick", "--only", name, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith(f"left out: {name}")]
    if left_out and place == "namespace":
        pytest.skip(left_out[0])  # no iptables, or no right to a namespace
    results = json.loads(path.read_text())["results"][place]
    assert results.keys() == FIGURES.keys()
    for measure, figures in FIGURES.items():
        (result,) = results[measure][name]
        assert figures <= result.keys(), measure
        assert result["errors"] == 0, measure
        assert name in done.stdout


def test_straight_connections_need_no_proxy(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = bench("--quick", "--only", "straight", "--measure", "echo", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(path.read_text())["results"]["loopback"]["echo-50"]["straight"]
    assert result["count"] > 0
    assert "cpu" not in result


def test_instructions_and_system_calls_of_a_connection(tmp_path: Path) -> None:
    for program in ("valgrind", "strace"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    path = tmp_path / "result.json"
    arguments = ("--quick", "--instructions", "--only", "usocksd", "--measure", "connect", "--json", str(path))
    done = bench(*arguments, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(path.read_text())["results"]["loopback"]["connect"]["usocksd"]
    # No fewer than a connection needs; far below what a start takes.
    assert 100_000 < result["instructions"] < 2_000_000
    assert 15 < result["calls"] < 60
    assert "cpu" in result
    assert "system calls" in done.stdout


def test_work_by_the_clock_is_what_a_process_without_connections_did(room: Callable[[str], ModuleType]) -> None:
    without_clock = room("counting").without_clock
    # Three times as long as idle, but the master had time for twice its work only.
    assert without_clock({"master": 20, "worker": 1000}, {"master": 10, "worker": 30}, 3.0) == 1020 - 2 * 40
    assert without_clock({"only": 1000}, {"only": 10}, 3.0) == 970
    assert without_clock({"only": 1000}, {"only": 0}, 3.0) == 1000


def test_missing_tools_for_counting_are_named() -> None:
    done = bench("--instructions", PATH="/nonexistent")
    assert done.returncode == 2
    assert "--instructions: not installed: valgrind, strace (Debian packages of these names)" in done.stderr


def test_a_server_that_does_not_work_is_told_and_fails_the_run() -> None:
    done = bench("--quick", "--only", "broken", "--measure", "idle", "--server", "broken=false {port}")
    assert done.returncode == 1
    assert "! loopback: round 1 of 1, idle, broken: it ended" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nobody"], "--only nobody: expected one of straight, usocksd"),
        (["--measure", "speed"], "--measure speed: expected one of connect, echo, bulk, idle"),
        (["--server", "name"], "--server 'name': expected NAME=COMMAND"),
        (["--rounds", "0"], "must be above zero"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of bench/, which is no part of the installed packages."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


BURN = """
import os, sys, threading, time
def burn():
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
thread = threading.Thread(target=burn)
thread.start()
thread.join()
for _ in range(2):
    if os.fork() == 0:
        burn()
        os._exit(0)
os.wait()  # one is counted from its parent, the other stays a zombie
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
print(time.process_time(), flush=True)
sys.stdin.read()
"""


def test_cpu_of_ended_threads_children_and_zombies_counts(room: Callable[[str], ModuleType]) -> None:
    command = [sys.executable, "-c", BURN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        own = float(process.stdout.readline())
        counted = room("accounting").cpu_seconds([process.pid])
        assert len(room("accounting").processes([process.pid])) == 2
        assert room("accounting").processes([process.pid], zombies=False) == [process.pid]
        assert room("accounting").memory_bytes([process.pid]) > 1_000_000
    ticks = 2 / os.sysconf("SC_CLK_TCK")  # user and system time of the child, each cut to whole ticks
    assert own + 0.1 - ticks <= counted < own + 0.1 + 0.1


def test_ratios_are_taken_within_a_round(room: Callable[[str], ModuleType]) -> None:
    report = room("report")
    results = {
        "mine": [{"cpu": 2.0}, None, {"cpu": 30.0}, {"cpu": 4.0}],
        "other": [{"cpu": 1.0}, {"cpu": 1.0}, {"cpu": 10.0}, {"cpu": 4.0}],
        "none": [None, None, None, None],
    }
    figure = report.Figure("cpu", "CPU us", 10, 1, ratio=True)
    text = report.render(report.Table("Title", [figure], results, "other"))
    assert text.splitlines() == [
        "Title",
        "         CPU us  ratio    (range)",
        "  mine     40.0   2.00  1.00-3.00",
        "  other    25.0      1",
        "  none        -      -",
    ]

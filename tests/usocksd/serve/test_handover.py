"""A running daemon becomes a new version of the program: in the same process, and connections go on."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from daemons import free_port, is_over, lives, running, wait_until
from tiny import ROOT, Tiny

from usocksd import __version__
from usocksd.errors import Error
from usocksd.serve.handover import received
from usocksd.serve.plan import PROTOCOL

SILENT = shutil.ignore_patterns("__pycache__")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the packages, to be changed."""
    folder = tmp_path / "installed"
    shutil.copytree(ROOT / "usocksd", folder / "usocksd", ignore=SILENT)
    return folder


def install(folder: Path, version: str) -> None:
    """Put another version there."""
    file = folder / "usocksd" / "__init__.py"
    text = file.read_text(encoding="utf-8")
    head, _, _ = text.partition("__version__")
    fresh = file.with_suffix(".new")
    fresh.write_text(f'{head}__version__ = "{version}"\n', encoding="utf-8")
    fresh.replace(file)


def is_now(tiny: Tiny, version: str) -> None:
    """Wait until the master is of this version."""
    wait_until(lambda: tiny.records("the master is upgraded", version=version), lambda: tiny.lines()[-10:])


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files change within a second here, and bytecode goes by seconds."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


def test_a_new_version(tmp_path: Path, installed: Path) -> None:
    metrics_port, named = free_port(), tmp_path / "named"
    named.write_text("as it was")
    settings = {"workers": 2, "addresses": ["127.0.0.1", "::1"], "metrics_port": metrics_port, "file": str(named)}
    with Tiny(tmp_path, root=installed, **settings).ready() as tiny:
        tiny.expected.add("a worker ended")
        held = tiny.one_each()
        client, upstream = tiny.relayed()
        tiny.ask("log-level", level="debug")
        wait_until(lambda: tiny.metrics(metrics_port)["tiny_connections_accepted_total"] >= 3, "counted")
        before, listening = tiny.metrics(metrics_port), tiny.ask("status")["listening"]
        uptime = tiny.ask("status")["uptime"]
        opened = len(tiny.descriptors())
        control = (tmp_path / "control").stat().st_ino
        install(installed, "99.1")
        assert tiny.ask("reload")["generation"] == 2
        is_now(tiny, "99.1")
        status = tiny.ask("status")
        assert (status["version"], status["pid"]) == ("99.1", tiny.pid)
        assert status["listening"] == listening
        assert status["uptime"] > uptime
        assert status["config"]["generation"] == 2
        assert status["config"]["last_reload"]["ok"]
        assert {row["version"] for row in status["generations"][0]["workers"]} == {"99.1"}
        assert (tmp_path / "control").stat().st_ino == control
        after = tiny.metrics(metrics_port)
        fallen = [name for name in before if name.split("{")[0].endswith("_total") and after[name] < before[name]]
        assert fallen == []
        assert after['tiny_reloads_total{result="ok"}'] == 1
        # Those that drain are well, and end in good order.
        assert all(map(lives, held.values()))
        client.sendall(b"on and on")
        assert upstream.recv(9) == b"on and on"
        for sock in (client, upstream, *held.values()):
            sock.close()
        wait_until(lambda: not any(map(running, held)), "the old ones are gone")
        wait_until(lambda: len(tiny.records("a worker has drained", generation=1)) == 2, "and known to be")
        # No more descriptors than before, and the new version can do what the old one could.
        wait_until(lambda: len(tiny.descriptors()) <= opened, lambda: (opened, sorted(tiny.descriptors())))
        victim = tiny.who()[0]
        named.unlink()
        os.kill(victim, signal.SIGKILL)
        new = tiny.record("a worker was replaced")["pid"]
        assert tiny.record("tiny", pid=new, file="as it was")
        named.touch()
        pid, version, sock = tiny.who()
        assert version == "99.1"
        tiny.reload(workers=1)
        assert tiny.ask("status")["config"]["generation"] == 3
        assert lives(sock)
        assert tiny.who()[0] != pid
        assert len(tiny.records("listening")) == 2


def test_a_shared_value_is_handed_on(tmp_path: Path, installed: Path) -> None:
    """To the new version and the workers that it starts, one of which is the next keeper."""
    (tmp_path / "keep").touch()
    with Tiny(tmp_path, root=installed, workers=2).ready() as tiny:
        tiny.expected.add("a worker ended")
        wait_until(lambda: len(tiny.records("tiny", keeps=True)) == 1, "one keeps")
        (keeper,) = {record["pid"] for record in tiny.records("tiny", keeps=True)}
        wait_until(lambda: len(tiny.records("tiny", known=keeper)) == 2, "both know")
        install(installed, "99.1")
        tiny.signal(signal.SIGHUP)
        is_now(tiny, "99.1")
        wait_until(lambda: len(tiny.records("tiny", keeps=True)) == 2, "a new one keeps")
        second = tiny.records("tiny", keeps=True)[-1]["pid"]
        assert second in {worker["pid"] for worker in tiny.rows()}
        os.kill(second, signal.SIGKILL)
        tiny.record("a worker was replaced")
        wait_until(lambda: len(tiny.records("tiny", keeps=True)) == 3, "its replacement keeps")
        # Two of the old version, two of the new one and the replacement: they know what the first has found out.
        known = [record["known"] for record in tiny.records("tiny") if "known" in record]
        assert known == [keeper] * 5


def test_listens_all_the_time(tmp_path: Path, installed: Path) -> None:
    """Through two new versions, with clients that come and go; and a signal to stop in the middle of a third."""
    with Tiny(tmp_path, root=installed, workers=2).ready() as tiny:
        for version in ("99.1", "99.2"):
            install(installed, version)
            tiny.signal(signal.SIGHUP)
            seen = set()
            while not tiny.records("the master is upgraded", version=version):
                _, by, sock = tiny.who()
                seen.add(by)
                assert lives(sock)
                sock.close()
            assert version in seen
        for number in (signal.SIGHUP, signal.SIGUSR1):
            tiny.signal(number)
        install(installed, "99.3")
        tiny.signal(signal.SIGHUP)
        tiny.record("upgrading the master", to="99.3")
        tiny.signal(signal.SIGTERM)
        assert tiny.ended() == 0
        assert tiny.records("stopped")


def test_told_to_stop_right_after_a_reload_into_a_new_version(tmp_path: Path, installed: Path) -> None:
    """The process does not become the new version; connections get the time that `stop` allows."""
    # The signal comes while the master waits to become the new version, however slow this machine is.
    with Tiny(tmp_path, root=installed, timeouts={"stop": 3}, timing={"answered_after": 60}).ready() as tiny:
        client = tiny.client(b"echo")
        install(installed, "99.1")
        tiny.signal(signal.SIGHUP)
        wait_until(lambda: tiny.generation() == 2, "reloaded")
        tiny.signal(signal.SIGTERM)
        tiny.wait_until_closed()
        assert lives(client)
        assert tiny.ended() == 0
        assert is_over(client)
        assert tiny.records("ending the remaining connections")
        assert tiny.records("becoming the version of the workers") == []


def test_a_version_with_another_protocol(tmp_path: Path, installed: Path) -> None:
    """A reload into it is refused, and everything is as before."""
    with Tiny(tmp_path, root=installed).ready() as tiny:
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays"}
        (worker,) = tiny.workers()
        plan = installed / "usocksd" / "serve" / "plan.py"
        plan.write_text(plan.read_text(encoding="utf-8") + "\nPROTOCOL += 1\n", encoding="utf-8")
        install(installed, "99.1")
        error = f"version 99.1 can't be reloaded into from {__version__}: restart the daemon"
        assert tiny.ask("reload") == {"ok": False, "error": error}
        wait_until(lambda: tiny.workers() == [worker], "only the old one is left")
        assert tiny.who()[0] == worker


def test_a_handover_of_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Still another version was installed between the reload and the exec."""
    memory = os.memfd_create("handover")
    os.write(memory, json.dumps({"protocol": PROTOCOL + 1, "version": "99.1"}).encode())
    monkeypatch.setenv("TRANSOCKS_HANDOVER", str(memory))
    with pytest.raises(Error, match=r"can't take over from 99\.1"):
        received()


def test_a_new_version_that_does_not_work(tmp_path: Path, installed: Path) -> None:
    with Tiny(tmp_path, root=installed).ready() as tiny:
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays"}
        tiny.expected.add("stderr of a worker that failed to start")
        good = (installed / "usocksd" / "__init__.py").read_text()
        (installed / "usocksd" / "__init__.py").write_text("raise ImportError('half of it is missing')\n")
        assert "ImportError: half of it is missing" in tiny.ask("reload")["error"]
        assert lives(tiny.client(b"echo"))
        (installed / "usocksd" / "__init__.py").write_text(good)
        install(installed, "99.1")
        assert tiny.ask("reload")["ok"]
        is_now(tiny, "99.1")


def make_interpreter(folder: Path) -> Path:
    """Another virtual environment with the packages of this one. Returns its interpreter, a link that a test may cut."""
    (folder / "bin").mkdir(parents=True)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", folder)
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    python = folder / "bin" / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    return python


def test_an_interpreter_that_is_gone(tmp_path: Path) -> None:
    """No worker can be started, and the old ones go on."""
    python = make_interpreter(tmp_path / "environment")
    with Tiny(tmp_path, python=str(python)).ready() as tiny:
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays"}
        client = tiny.client(b"echo")
        python.unlink()
        assert f"can't start a worker: {python}: No such file" in tiny.ask("reload")["error"]
        assert lives(client)
        assert lives(tiny.client(b"echo"))
        python.symlink_to(os.path.realpath(sys.executable))
        assert tiny.ask("reload")["ok"]


def test_an_interpreter_that_is_gone_when_the_master_follows(tmp_path: Path, installed: Path) -> None:
    """The workers run the new version; the master stays what it is."""
    python = make_interpreter(tmp_path / "environment")
    with Tiny(tmp_path, python=str(python), root=installed, metrics_port=free_port()).ready() as tiny:
        tiny.expected.add("can't upgrade the master")
        install(installed, "99.1")
        tiny.flag("hold-build").touch()
        tiny.signal(signal.SIGHUP)
        tiny.held("build")
        python.unlink()
        tiny.flag("hold-build").unlink()
        tiny.record("can't upgrade the master")
        assert lives(tiny.client(b"echo"))
        assert tiny.ask("status")["version"] != "99.1"
        assert tiny.metrics(tiny.settings["metrics_port"])["tiny_config_generation"] == 2
        python.symlink_to(os.path.realpath(sys.executable))
        tiny.reload()
        is_now(tiny, "99.1")


def test_a_slot_without_a_worker_is_filled_by_the_new_version(tmp_path: Path, installed: Path) -> None:
    """The worker died while the old master waited to replace it."""
    timing = {"backoff": [1.5], "answered_after": 0.1}
    with Tiny(tmp_path, root=installed, workers=2, timing=timing).ready() as tiny:
        tiny.expected.add("a worker ended")
        install(installed, "99.1")
        tiny.signal(signal.SIGHUP)
        wait_until(lambda: tiny.generation() == 2, "reloaded")
        os.kill(tiny.who()[0], signal.SIGKILL)
        tiny.record("a worker was replaced")
        assert tiny.records("the master is upgraded")
        messages = [record["message"] for record in tiny.records()]
        assert messages.index("a worker ended") < messages.index("the master is upgraded")
        assert messages.index("the master is upgraded") < messages.index("a worker was replaced")
        wait_until(lambda: len({tiny.who()[0] for _ in range(10)}) == 2, "both serve")

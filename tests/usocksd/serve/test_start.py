"""From the start of a daemon to its end; a failed start says why, and has exit status 1."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import free_port, lives, running, wait_until
from tiny import PROGRAM, ROOT, Tiny

from usocksd import __version__

JSON = ("-logformat", "json")


def faults(tiny: Tiny) -> list[str]:
    return [record["error"] for record in tiny.refused() if record["severity"] == "critical"]


def test_a_bad_configuration(tmp_path: Path) -> None:
    """Every fault goes to stderr, since the place of the log is not known yet."""
    text = 'workers = 0\nports = [70000, true]\nnonsense = 1\n[log]\nlevel = "loud"\n'
    tiny = Tiny(tmp_path, *JSON, text=text)
    told = tiny.refused()
    assert {record["message"] for record in told} == {"bad configuration"}
    assert {record["file"] for record in told} == {str(tiny.config)}
    said = " ".join(record["error"] for record in told)
    assert len(told) == 5
    for key in ("workers", "ports[0]", "ports[1]", "nonsense", "log.level"):
        assert key in said


@pytest.mark.parametrize("text", [None, "workers = ["], ids=["missing", "no TOML"])
def test_a_file_that_can_t_be_read(tmp_path: Path, text: str | None) -> None:
    tiny = Tiny(tmp_path, *JSON, "-f", str(tmp_path / "other"))
    if text is not None:
        tiny.ended()
        (tmp_path / "other").write_text(text)
        tiny = Tiny(tmp_path, *JSON, "-f", str(tmp_path / "other"))
    (fault,) = tiny.refused()
    assert str(tmp_path / "other") in json.dumps(fault)


@pytest.mark.parametrize(("what", "fault"), [("build", "can't build"), ("task", "can't start a task")])
def test_a_daemon_that_can_t_be_put_together(tmp_path: Path, what: str, fault: str) -> None:
    (tmp_path / f"fail-{what}").touch()
    assert faults(Tiny(tmp_path, workers=2)) == [f"{fault}: the test says so"]


@pytest.mark.parametrize("where", ["import", "build"])
def test_a_worker_that_dies(tmp_path: Path, where: str) -> None:
    (tmp_path / f"die-{where}").touch()
    (fault,) = faults(Tiny(tmp_path, *JSON))
    assert fault.endswith("ended before it was ready: exit status 3")


@pytest.mark.parametrize("where", ["import", "plan", "build"])
def test_a_worker_with_a_fault_of_ours(tmp_path: Path, where: str) -> None:
    """The record has the cause, however early the fault; stderr or the log has the traceback."""
    (tmp_path / f"bug-{where}").touch()
    tiny = Tiny(tmp_path, *JSON)
    told = tiny.refused()
    (fault,) = [record["error"] for record in told if record["message"] == "can't start"]
    assert fault.endswith(f"ZeroDivisionError: on purpose, in {where}")
    assert "Traceback" in tiny.stderr() + "".join(tiny.lines())
    if where == "import":
        assert "ended before it was ready: exit status 1: " in fault


def test_the_early_stderr_of_a_worker(tmp_path: Path) -> None:
    """Warnings of the interpreter, for example, go to the daemon's stderr."""
    with Tiny(tmp_path, environment={"PYTHONPROFILEIMPORTTIME": "1"}).ready() as tiny:
        workers = tiny.stderr().count("| site\n")
        assert workers == 2  # master and worker


def test_a_worker_that_never_gets_ready(tmp_path: Path) -> None:
    (tmp_path / "hold-build").touch()
    tiny = Tiny(tmp_path, *JSON, timing={"ready_within": 0.7})
    assert faults(tiny) == ["the workers were not ready within 1 s"]


@pytest.mark.parametrize("ours", [False, True], ids=["somebody", "another instance"])
def test_a_port_that_is_taken(tmp_path: Path, ours: bool) -> None:
    (tmp_path / "first").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if ours:
            taken.close()
            with Tiny(tmp_path / "first", ports=[port], workers=2).ready() as first:
                fault = faults(Tiny(tmp_path, ports=[port]))
                first.client(b"echo").close()
        else:
            fault = faults(Tiny(tmp_path, ports=[0, port], workers=2))
    assert fault == [f"can't listen on 127.0.0.1:{port}: Address already in use"]


def test_a_log_file_that_can_t_be_opened(tmp_path: Path) -> None:
    log = tmp_path / "missing" / "log"
    (fault,) = faults(Tiny(tmp_path, *JSON, log={"filename": str(log)}))
    assert fault == f"can't open the log file {log}: No such file or directory"


SOON = {"open_again": 0.05}


def test_a_metrics_port_that_is_taken(tmp_path: Path) -> None:
    """A port that is set is an error; the default port only a warning."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert faults(Tiny(tmp_path, metrics_port=port)) == [
            f"can't listen on 127.0.0.1:{port}: Address already in use"
        ]
        (tmp_path / "second").mkdir()
        with Tiny(
            tmp_path / "second", metrics_port=None, metrics_default=port, warning="odd", timing=SOON
        ).ready() as tiny:
            assert tiny.record("no metrics endpoint")["severity"] == "warning"
            assert tiny.record(f"{tiny.config}: odd")["severity"] == "warning"
            assert tiny.ask("status")["metrics"] is None
            taken.close()
            assert tiny.record("metrics endpoint is open now")["address"] == f"127.0.0.1:{port}"
            assert tiny.ask("status")["metrics"] == f"127.0.0.1:{port}"


def test_too_many_addresses(tmp_path: Path) -> None:
    """One clear error, at the start and at a reload."""
    many = [f"127.0.1.{number}" for number in range(1, 202)]
    told = "too many listening addresses: 201, expected at most 200"
    assert faults(Tiny(tmp_path, *JSON, addresses=many)) == [told]
    (tmp_path / "second").mkdir()
    with Tiny(tmp_path / "second").ready() as tiny:
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays"}
        tiny.write(addresses=many)
        assert tiny.ask("reload")["error"] == told
        assert lives(tiny.client(b"echo"))


def test_a_control_socket_that_is_taken(tmp_path: Path) -> None:
    """Once the other daemon is gone, this one takes the socket over."""
    (tmp_path / "second").mkdir()
    control = str(tmp_path / "control")
    with Tiny(tmp_path).ready() as first, Tiny(tmp_path / "second", control=control, timing=SOON).ready() as second:
        assert "another tiny runs" in second.record("no control socket")["error"]
        second.client(b"echo")
        assert first.ask("status")["pid"] == first.pid
        first.signal(signal.SIGTERM)
        assert first.ended() == 0
        second.record("control socket is open now")
        assert second.ask("status")["pid"] == second.pid


def test_health_is_told_without_measuring(tmp_path: Path) -> None:
    with Tiny(tmp_path, timing={"rates_over": 3600.0}).ready() as tiny:
        answer = {"ok": True, "state": "ready", "version": __version__, "daemon": {}}
        assert tiny.ask("health") == answer
        client = tiny.client(b"echo")
        tiny.ask("drain")
        tiny.wait_until_closed()
        assert tiny.ask("health")["state"] == "draining"
        client.close()
        assert tiny.ended() == 0


def test_an_environment_that_makes_no_sense(tmp_path: Path) -> None:
    (fault,) = faults(Tiny(tmp_path, *JSON, environment={"CANCELLATION_DELAY_SECONDS": "soon"}))
    assert "CANCELLATION_DELAY_SECONDS" in fault


@pytest.mark.parametrize("where", ["import", "build"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_before_it_has_begun(tmp_path: Path, where: str, number: signal.Signals) -> None:
    tiny = Tiny(tmp_path)
    (tmp_path / f"hold-{where}").touch()
    with tiny:
        workers = tiny.held(where)
        tiny.signal(number)
        assert tiny.ended() == 0
        wait_until(lambda: not any(map(running, workers)), "its worker is gone")
        assert not tiny.records("listening")


@pytest.mark.parametrize("where", ["import", "build"])
def test_signals_that_come_during_the_start(tmp_path: Path, where: str) -> None:
    """The master obeys them afterwards, and workers ignore them."""
    with Tiny(tmp_path) as tiny:
        tiny.flag(f"hold-{where}").touch()
        (worker,) = tiny.held(where)
        for number in (signal.SIGUSR1, signal.SIGHUP):
            tiny.signal(number)
            os.kill(worker, number)
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        tiny.flag(f"hold-{where}").unlink()
        tiny.ready()
        wait_until(lambda: tiny.generation() == 2, "reloaded")
        lives(tiny.client(b"echo"))


def test_workers_ignore_the_signals_of_a_terminal(tmp_path: Path) -> None:
    with Tiny(tmp_path, workers=2).ready() as tiny:
        held = tiny.one_each()
        for worker in held:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(worker, number)
        assert all(map(lives, held.values()))
        assert sorted(tiny.workers()) == sorted(held)


def test_workers_inherit_only_what_they_need(tmp_path: Path) -> None:
    """The listeners, but no other worker's channel, no epoll of the master, nothing of the service manager."""
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"}
    with Tiny(tmp_path, workers=2, addresses=["127.0.0.1", "::1"], environment=environment).ready() as tiny:
        master = set(tiny.descriptors())
        workers = {pid: tiny.descriptors(pid) for pid in tiny.workers()}
        listening = []
        for pid, opened in workers.items():
            shared = {name for name in opened if name in master and not name.startswith(("anon_inode:", "pipe:"))}
            listening.append({name for name in shared if name.startswith("socket:")})
            assert len(listening[-1]) == 2  # one for each address
            rest = {name for name in shared if name.startswith("/") and "memfd" not in name and name != "/dev/null"}
            rest = {name for name in rest if ".so" not in name}  # newer libffi opens itself, in every process
            assert rest <= {str(tmp_path / "stderr"), str(tiny.log), os.readlink("/proc/self/fd/1")}
            assert opened.count("anon_inode:[eventpoll]") == 2  # trio's and the reactor's, both its own
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in environ
            assert b"WATCHDOG" not in environ
            assert b"LISTEN_FDS" not in environ
        assert listening[0] == listening[1]


def test_workers_end_when_the_master_is_killed(tmp_path: Path) -> None:
    """They drain, and meanwhile another instance can start."""
    port = free_port()
    (tmp_path / "second").mkdir()
    with Tiny(tmp_path, workers=2, ports=[port], metrics_port=free_port()).ready() as tiny:
        held = tiny.one_each()
        workers = tiny.workers()
        tiny.signal(signal.SIGKILL)
        assert tiny.ended() == -signal.SIGKILL
        tiny.wait_until_closed()
        second = tmp_path / "second"
        settings = {"ports": [port], "control": tiny.settings["control"], "workers": 2}
        with Tiny(second, **settings, metrics_port=tiny.settings["metrics_port"]).ready() as heir:
            assert all(map(lives, held.values()))
            assert set(heir.one_each()).isdisjoint(workers)
            for sock in held.values():
                sock.close()
            wait_until(lambda: not any(map(running, workers)), "the workers are gone")


def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    """It reaps orphans too, and obeys SIGTERM."""
    orphan = f'{sys.executable} -c \'import subprocess; print(subprocess.Popen(["sleep", "0.3"]).pid)\''
    script = f'sh -c "({orphan}) >/dev/null &" ; exec "$@"'
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix[:5], "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespace here")
    with Tiny(tmp_path, prefix=prefix, workers=2).ready() as tiny:
        (init,) = tiny.workers()  # of unshare, that is
        assert Path(f"/proc/{init}/status").read_text(encoding="utf-8").split("NSpid:")[1].split()[1] == "1"
        tiny.client(b"echo")

        def children() -> list[str]:
            pids = Path(f"/proc/{init}/task/{init}/children").read_text(encoding="ascii").split()
            return [Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() for pid in pids]

        wait_until(lambda: len(children()) == 2, children)  # its workers, and no orphan or zombie
        pid = tiny.rows()[0]["pid"]
        inside = {
            int(Path(f"/proc/{each}/status").read_text(encoding="utf-8").split("NSpid:")[1].split()[1]): int(each)
            for each in Path(f"/proc/{init}/task/{init}/children").read_text(encoding="ascii").split()
        }
        tiny.expected.add("a worker ended")
        os.kill(inside[pid], signal.SIGKILL)
        tiny.record("a worker was replaced")
        os.kill(init, signal.SIGTERM)
        tiny.record("stopping")
        os.kill(init, signal.SIGTERM)
        assert tiny.ended() == 0


def test_sockets_of_the_service_manager(tmp_path: Path) -> None:
    """All workers share them; they outlive the daemon, with the connections that wait."""
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        prefix = [sys.executable, "-c", _INHERITED, str(owner.fileno())]
        with Tiny(tmp_path, workers=2, ports=[1], prefix=prefix, pass_fds=[owner.fileno()]).ready() as tiny:
            assert tiny.port == port
            held = tiny.one_each()
            assert len(held) == 2
            tiny.reload(workers=1)
            for sock in held.values():
                assert lives(sock)
                sock.close()
            client = tiny.client(b"echo")
            tiny.signal(signal.SIGTERM)
            tiny.record("stopping")
            client.close()
            assert tiny.ended() == 0
        with socket.create_connection(("127.0.0.1", port), 5) as waits:
            owner.accept()[0].close()
            assert waits.recv(1) == b""


_INHERITED = """
import os, sys
fd, *words = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "tiny"}
os.execv(words[0], words)
"""


def test_under_a_real_socket_activator(tmp_path: Path) -> None:
    port = free_port()
    prefix = ["systemd-socket-activate", "--listen", f"127.0.0.1:{port}"]
    if subprocess.run(["sh", "-c", "command -v systemd-socket-activate"], capture_output=True, check=False).returncode:
        pytest.skip("no systemd-socket-activate here")
    names = [f"--setenv={name}" for name in ("PYTHONPATH", "TINY_FOLDER", "TINY_TIMING")]
    with Tiny(tmp_path, workers=2, ports=[1], prefix=[*prefix, *names]) as tiny:

        def connected() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0

        wait_until(connected, "it listens")
        tiny.ready()
        assert tiny.port == port
        assert len(tiny.one_each()) == 2


def test_the_version(tmp_path: Path) -> None:
    """The command line prints it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TINY_FOLDER": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tiny ")

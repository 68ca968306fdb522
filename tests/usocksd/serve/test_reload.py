"""A new configuration under live connections: all of it comes into force, or nothing."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import free_port, is_over, is_reset, lives, running, wait_until
from tiny import Tiny

# How long a reload waits for older generations, in seconds.
QUICKER = {"patience": 0.3}


class Load:
    """Threads that connect and ask again and again; failures are kept."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.served: set[int] = set()
        self.count = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
                    sock.sendall(b"who")
                    line = sock.recv(100)
                    sock.sendall(b"echo")
                    if sock.recv(4, socket.MSG_WAITALL) != b"echo":
                        raise OSError("cut off")
                self.served.add(int(line.split()[0]))
                self.count += 1
            except (OSError, IndexError) as error:
                self.failures.append(repr(error))

    def more(self, count: int = 50) -> None:
        """Wait until `count` more were served."""
        goal = self.count + count
        wait_until(lambda: self.count >= goal, "served")

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def load(port: int) -> Iterator[Load]:
    """Clients that come and go as long as the block runs; none may fail."""
    made = Load(port)
    for thread in made._threads:
        thread.start()
    try:
        yield made
        made.more()
    finally:
        made.stop()
    assert not made.failures, made.failures[:10]
    assert made.count


def numbers(tiny: Tiny) -> list[tuple[int, str]]:
    return [(row["generation"], row["state"]) for row in tiny.ask("status")["generations"]]


def test_connections_live_on(tmp_path: Path) -> None:
    with Tiny(tmp_path, workers=2).ready() as tiny:
        held = tiny.one_each()
        client, upstream = tiny.relayed()
        with load(tiny.port) as clients:
            clients.more()
            answer = tiny.ask("reload")
            assert answer == {"ok": True, "generation": 2, "confirm_within": None, "warnings": []}
            status = tiny.ask("status")
            assert [(row["generation"], row["state"]) for row in status["generations"]][:2] == [
                (2, "serving"),
                (1, "draining"),
            ]
            assert status["config"]["generation"] == 2
            assert status["config"]["last_reload"]["ok"]
            clients.served.clear()
            clients.more()
            assert clients.served.isdisjoint(held)
        assert all(map(lives, held.values()))
        client.sendall(b"on and on")
        assert upstream.recv(9, socket.MSG_WAITALL) == b"on and on"
        for sock in (client, upstream, *held.values()):
            sock.close()
        wait_until(lambda: not any(map(running, held)), "the old ones are gone")
        wait_until(lambda: len(tiny.records("a worker has drained")) == 2, "that is told")
        assert tiny.records(ended="relay", reason="closed", up=9)


FLAGS = ("fail-build", "fail-task", "die-import")


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, Tiny(tmp_path, workers=2).ready() as tiny:
        port = taken.getsockname()[1]
        missing = tmp_path / "missing" / "log"
        spoiled: dict[str, Callable[[], object]] = {
            "ports[0]": lambda: tiny.write(workers=0, ports=[99999]),
            "config": lambda: tiny.config.write_text("workers = ["),
            "No such file": tiny.config.unlink,
            "can't build: the test says so": tiny.flag("fail-build").touch,
            "can't start a task: the test says so": tiny.flag("fail-task").touch,
            "ended before it was ready": tiny.flag("die-import").touch,
            "can't listen on 192.0.2.1:0": lambda: tiny.write(addresses=["127.0.0.1", "192.0.2.1"], workers=4),
            f"can't open the log file {missing}": lambda: tiny.write(log={"filename": str(missing)}),
            f"can't listen on 127.0.0.1:{port}": lambda: tiny.write(metrics_port=port, workers=3),
        }
        still = "nothing has changed: the configuration in force stays"
        tiny.expected |= {"bad configuration", "reload failed", still}
        held = tiny.one_each()
        good, settings = tiny.config.read_text(), dict(tiny.settings)
        with load(tiny.port) as clients:
            for number, (told, spoil) in enumerate(spoiled.items(), 1):
                spoil()
                answer = tiny.ask("reload")
                assert not answer["ok"]
                assert told in json.dumps(answer)
                wait_until(lambda: len(tiny.records(still)) == number, "it says so")
                wait_until(lambda: sorted(tiny.workers()) == sorted(held), "only the old ones are left")
                clients.served.clear()
                clients.more(20)
                assert clients.served <= set(held)
                status = tiny.ask("status")
                assert not status["config"]["last_reload"]["ok"]
                assert [(row["generation"], row["state"]) for row in status["generations"]] == [(1, "serving")]
                tiny.settings = dict(settings)
                tiny.config.write_text(good)
                for flag in FLAGS:
                    tiny.flag(flag).unlink(missing_ok=True)
            # Mended and tried again, it takes effect.
            assert tiny.ask("reload")["ok"]
            assert tiny.who()[0] not in held
        assert all(map(lives, held.values()))
        bad = tiny.records("bad configuration")
        assert {record["severity"] for record in bad} == {"error"}
        assert {record["error"].split(" ")[0].rstrip(":") for record in bad} >= {"workers", "ports[0]"}


def test_reloads_coalesce(tmp_path: Path) -> None:
    """Reloads that are requested while one is under way are one, and everybody is answered."""
    with Tiny(tmp_path).ready() as tiny:
        tiny.flag("hold-build").touch()
        tiny.signal(signal.SIGHUP)
        tiny.held("build")
        answers: list[object] = []
        threads = [threading.Thread(target=lambda: answers.append(tiny.ask("reload"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(tiny.records("control request", verb="reload")) == 5, "all have asked")
        tiny.flag("hold-build").unlink()
        for thread in threads:
            thread.join()
        assert answers == [{"ok": True, "generation": 3, "confirm_within": None, "warnings": []}] * 5
        assert len(tiny.records("reloading")) == 2


def test_addresses_come_and_go(tmp_path: Path) -> None:
    """A dropped port is closed after the connections that wait there were served."""
    first, second = free_port(), free_port()
    with Tiny(tmp_path, workers=2, ports=[first], timing=QUICKER).ready() as tiny:
        held = tiny.one_each()
        tiny.reload(ports=[first, second])
        with load(first), load(second) as clients:
            clients.more(20)
        # Nobody accepts just then; the connections wait in the queues of the address to be dropped.
        workers = [row["pid"] for row in tiny.rows() if row["state"] == "serving"]
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        waiting = [tiny.client(port=first) for _ in range(150)]
        tiny.write(ports=[second])
        tiny.signal(signal.SIGHUP)
        wait_until(lambda: tiny.generation() == 3, "reloaded")
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        with load(second):
            for client in waiting:
                client.sendall(b"echo")
            assert [client.recv(4, socket.MSG_WAITALL) for client in waiting] == [b"echo"] * 150
        for client in waiting:
            client.close()
        tiny.wait_until_closed(first)
        assert tiny.ask("status")["listening"] == [f"127.0.0.1:{second}"]
        assert all(map(lives, held.values()))
        # And it can be had again.
        tiny.reload(ports=[second, first])
        assert lives(tiny.client(b"echo", port=first))
        # Workers know the ports of their own configuration, and no others.
        built = [record["ports"] for record in tiny.records("tiny", built=True)]
        assert built == [[first]] * 2 + [sorted((first, second))] * 2 + [[second]] * 2 + [sorted((first, second))] * 2


def test_workers_come_and_go(tmp_path: Path) -> None:
    """No connection is lost or waits in vain while reloads change the number of workers."""
    with Tiny(tmp_path, timing=QUICKER).ready() as tiny:
        with load(tiny.port) as clients:
            for count in (3, 1, 1, 2, 1, 3):
                tiny.reload(workers=count)
                clients.more(60)
            wait_until(lambda: len(tiny.rows()) == 3, tiny.rows)
            clients.served.clear()
            wait_until(lambda: len(clients.served) == 3, "all of them serve")


def test_log_metrics_and_control_move(tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    log, control = tmp_path / "log2", tmp_path / "control2"
    with Tiny(tmp_path, workers=2, metrics_port=first, timeouts={"drain": 0.0}).ready() as tiny:
        port = tiny.port
        sock = tiny.client(b"echo")
        count = tiny.metrics(first)['tiny_workers{state="serving"}']
        assert count == 2
        tiny.write(log={"filename": str(log), "level": "info"}, metrics_port=second, control=str(control))
        tiny.signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and '"reloaded"' in log.read_text(), "reloaded")
        old = len(tiny.lines())
        assert tiny.ask("status")["log"]["level"] in ("information", "info")
        assert not (tmp_path / "control").exists()
        with pytest.raises(OSError, match="refused"):
            tiny.metrics(first)
        metrics = tiny.metrics(second)
        assert metrics["tiny_config_generation"] == 2
        assert metrics['tiny_reloads_total{result="ok"}'] == 1
        assert is_over(sock)
        client = socket.create_connection(("127.0.0.1", port), 5)
        client.sendall(b"echo")
        assert client.recv(4) == b"echo"
        client.close()
        wait_until(lambda: '"ended":"echo"' in log.read_text(), "the new log has it")
        workers = [row for row in tiny.rows() if row["state"] == "draining"]
        wait_until(lambda: not any(running(row["pid"]) for row in workers), "the old ones are gone")
        assert old
        assert '"severity":"debug"' not in log.read_text()
        # Neither port nor socket moves if nothing has changed, or only the origin of the setting.
        tiny.write(metrics_default=second, metrics_port=None)
        assert tiny.ask("reload")["ok"]
        assert tiny.metrics(second)["tiny_config_generation"] == 3
        tiny.write(metrics_port=second)
        assert tiny.ask("reload")["ok"]
        tiny.write(metrics_port=0, control="")
        tiny.signal(signal.SIGHUP)
        wait_until(lambda: not control.exists(), "no control socket")
        with pytest.raises(OSError, match="refused"):
            tiny.metrics(second)
        tiny.log = log


def test_metrics_at_another_address(tmp_path: Path) -> None:
    """The old endpoint on the same port is no obstacle, in either direction."""
    port = free_port()
    with Tiny(tmp_path, metrics_port=port).ready() as tiny:
        for number, address in enumerate(("0.0.0.0", "127.0.0.1"), 2):
            tiny.write(metrics_address=address)
            assert tiny.ask("reload")["generation"] == number
            assert tiny.ask("status")["metrics"] == f"{address}:{port}"
            assert tiny.metrics(port)["tiny_config_generation"] == number


def test_metrics_at_several_addresses(tmp_path: Path) -> None:
    port = free_port()
    with Tiny(tmp_path, metrics_port=port, metrics_address=["127.0.0.1", "127.0.0.2"]).ready() as tiny:
        assert tiny.ask("status")["metrics"] == f"127.0.0.1:{port}, 127.0.0.2:{port}"
        for host in ("127.0.0.1", "127.0.0.2"):
            assert tiny.metrics(port, host)["tiny_config_generation"] == 1
        tiny.write(metrics_address="127.0.0.2")
        assert tiny.ask("reload")["ok"]
        assert tiny.metrics(port, "127.0.0.2")["tiny_config_generation"] == 2
        with pytest.raises(OSError, match="refused"):
            tiny.metrics(port)
        # One that can't be had is a reason to stay.
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays"}
        tiny.write(metrics_address=["127.0.0.2", "192.0.2.1"])
        assert "192.0.2.1" in tiny.ask("reload")["error"]
        assert tiny.metrics(port, "127.0.0.2")["tiny_config_generation"] == 2


def test_the_level_that_an_operator_sets(tmp_path: Path) -> None:
    """It applies in every process, later ones included, until the next reload."""
    with Tiny(tmp_path, workers=2, log={"level": "error"}) as tiny:
        wait_until((tmp_path / "control").exists, "it runs")
        assert tiny.ask("log-level") == {"ok": True, "level": "error"}
        assert tiny.ask("log-level", level="debug") == {"ok": True, "level": "debug"}
        assert not tiny.ask("log-level", level="loud")["ok"]
        port = int(tiny.ask("status")["listening"][0].rpartition(":")[2])
        tiny.expected.add("a worker ended")
        (first, *_) = tiny.workers()
        os.kill(first, signal.SIGKILL)
        tiny.record("a worker was replaced")
        said = set()

        def both() -> bool:
            with tiny.client(port=port) as client:
                tiny.who(client)
            said.update(record["pid"] for record in tiny.records("tiny") if "session" in record)
            return said >= set(tiny.workers())

        wait_until(both, "both say what they do")
        tiny.expected.add("session failed")
        old = tiny.workers()
        assert tiny.ask("reload")["ok"]
        assert tiny.ask("log-level")["level"] == "error"
        # The old workers may accept until they have read that they are to drain.
        wait_until(lambda: not any(map(running, old)), "the old workers have ended")
        client = tiny.client(b"crash", port=port)
        tiny.record("session failed")
        assert not tiny.records("tiny", session=client.getsockname()[1])


def test_reopening_the_log(tmp_path: Path) -> None:
    """Every process reopens it, draining ones included."""
    with Tiny(tmp_path, workers=1).ready() as tiny:
        port = tiny.port
        old = tiny.client(b"echo")
        tiny.reload()
        new = tiny.client(b"echo")
        tiny.log.rename(tmp_path / "log.1")
        before = (tmp_path / "log.1").stat().st_ino
        tiny.signal(signal.SIGUSR1)

        def names(pid: int) -> list[str]:
            return [name for name in tiny.descriptors(pid) if name.startswith(str(tmp_path / "log"))]

        pids = [tiny.pid, *tiny.workers()]
        assert len(pids) == 3
        wait_until(lambda: all(names(pid) == [str(tiny.log)] for pid in pids), lambda: list(map(names, pids)))
        assert tiny.log.stat().st_ino != before
        for sock in (old, new):
            sock.close()
        wait_until(lambda: len(tiny.records(ended="echo")) == 2, "both write to the new one")
        assert port


def test_at_most_two_generations_drain(tmp_path: Path) -> None:
    """A third reload waits for the oldest for a while, then ends it; meanwhile the daemon serves."""
    timing = QUICKER | {"patience": 2.0, "suspect_after": 0.5, "hung_after": 1.0}
    with Tiny(tmp_path, timing=timing).ready() as tiny:
        generations = []
        for number in (1, 2, 3):
            generations.append((tiny.who(), tiny.relayed()))
            if number < 3:
                tiny.reload()
        assert numbers(tiny) == [(3, "serving"), (2, "draining"), (1, "draining")]
        tiny.signal(signal.SIGHUP)
        tiny.record("the reload waits for an older generation to drain")
        with load(tiny.port):
            wait_until(lambda: tiny.generation() == 4, "reloaded")
        (first, _, oldest), relayed = generations[0]
        assert is_over(oldest)
        assert is_reset(relayed[0])
        tiny.record("ending the oldest generation", generation=1, live=2)
        wait_until(lambda: not running(first), "it is gone")
        for (_, _, sock), (client, upstream) in generations[1:]:
            assert lives(sock)
            client.sendall(b"x")
            assert upstream.recv(1) == b"x"
        assert numbers(tiny) == [(4, "serving"), (3, "draining"), (2, "draining")]
        assert not tiny.records("a worker is silent")


def test_connections_that_drain_too_long_are_ended(tmp_path: Path) -> None:
    with Tiny(tmp_path, timeouts={"drain": 0.3}).ready() as tiny:
        relayed, upstream = tiny.relayed()
        tiny.reload()
        assert is_reset(relayed)
        assert is_reset(upstream)
        tiny.record("ending the remaining connections", live=1)
        assert tiny.record("tiny", ended="relay")["reason"] == "stopped"
        tiny.record("a worker has drained", generation=1)


@pytest.mark.parametrize("where", ["import", "build"])
def test_told_to_stop_during_a_reload(tmp_path: Path, where: str) -> None:
    with Tiny(tmp_path, workers=2).ready() as tiny:
        tiny.expected |= {"reload failed", "nothing has changed: the configuration in force stays", "a worker ended"}
        client = tiny.client(b"echo")
        tiny.flag(f"hold-{where}").touch()
        tiny.signal(signal.SIGHUP)
        workers = tiny.held(where)
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping")
        assert lives(client)
        client.close()
        assert tiny.ended() == 0
        wait_until(lambda: not any(map(running, workers)), "nobody is left")


def test_told_to_stop_while_a_reload_waits(tmp_path: Path) -> None:
    """The reload stops waiting for an older generation, and none of its workers is left."""
    with Tiny(tmp_path, timing=QUICKER | {"patience": 60.0}).ready() as tiny:
        clients = [tiny.client(b"echo")]
        for _ in range(2):
            tiny.reload()
            clients.append(tiny.client(b"echo"))
        workers = tiny.workers()
        # Into another log, which is not in force yet: nothing is told twice.
        tiny.write(log={"level": "info"})
        tiny.signal(signal.SIGHUP)
        tiny.record("the reload waits for an older generation to drain")
        coming = set(tiny.workers()) - set(workers)
        assert len(coming) == 1
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping")
        tiny.wait_until_closed()
        wait_until(lambda: not any(map(running, coming)), "the one to come is gone")
        assert all(map(lives, clients))
        for client in clients:
            client.close()
        assert tiny.ended() == 0
        assert tiny.generation() == 3
        assert len(tiny.records("the reload waits for an older generation to drain")) == 1
        assert len(tiny.records("reloading")) == 3


def test_told_to_stop_while_reading_a_fifo(tmp_path: Path) -> None:
    """The configuration is a FIFO, and nobody writes to it."""
    with Tiny(tmp_path).ready() as tiny:
        client = tiny.client(b"echo")
        tiny.config.unlink()
        os.mkfifo(tiny.config)
        tiny.signal(signal.SIGHUP)
        tiny.record("reloading")
        assert tiny.ask("status")["state"] == "reloading"
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping")
        assert lives(client)
        client.close()
        assert tiny.ended() == 0


def test_a_worker_that_dies_during_a_reload(tmp_path: Path) -> None:
    """An old worker dies; the new ones still come into force."""
    with Tiny(tmp_path, workers=2).ready() as tiny:
        tiny.expected |= {"a worker ended", "a worker can't be replaced"}
        old = tiny.workers()
        tiny.flag("hold-build").touch()
        tiny.signal(signal.SIGHUP)
        tiny.held("build")
        os.kill(old[0], signal.SIGKILL)
        tiny.held("build", 3)
        tiny.flag("hold-build").unlink()
        wait_until(lambda: tiny.generation() == 2, "reloaded")
        wait_until(lambda: len(tiny.rows()) == 2, tiny.rows)
        assert {row["state"] for row in tiny.rows()} == {"serving"}
        with load(tiny.port):
            pass


def test_records_that_a_drained_worker_could_not_write_are_counted(tmp_path: Path) -> None:
    """With a full disk the last records are lost, and `status` counts them."""
    with Tiny(tmp_path, log={"filename": "/dev/full"}) as tiny:
        wait_until((tmp_path / "control").exists, "it runs")
        wait_until(lambda: tiny.ask("status")["log"]["failing"] == "No space left on device", "it says why")
        assert tiny.ask("status")["log"]["dropped"] == 0
        assert tiny.ask("reload")["ok"]
        wait_until(lambda: tiny.ask("status")["log"]["dropped"], "what was lost is counted")

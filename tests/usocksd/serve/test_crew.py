"""Workers that die or hang are replaced, and only their own connections notice."""

import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from daemons import free_port, is_over, lives, running, wait_until
from tiny import Tiny

from usocksd.log.metrics import Metrics
from usocksd.serve.channel import Channel
from usocksd.serve.crew import Crew
from usocksd.serve.listening import ListeningSockets
from usocksd.serve.timing import Timing
from usocksd.serve.worker_process import WorkerProcess, WorkerState
from usocksd.settings.files import NamedFiles

# A worker's silence, in seconds, that is suspicious, and that is its end.
QUICKER = {"suspect_after": 0.8, "hung_after": 2.0, "look_every": 0.1}


def states(tiny: Tiny) -> dict[int, str]:
    return {row["pid"]: row["state"] for row in tiny.rows()}


def settled(tiny: Tiny, count: int) -> None:
    """Wait until `count` workers serve, and there are no others."""
    wait_until(lambda: sorted(states(tiny).values()) == ["serving"] * count, lambda: states(tiny))


def connect_many(tiny: Tiny, count: int = 60) -> set[int]:
    """The workers that answer `count` new connections, one after the other."""
    found = set()
    for _ in range(count):
        pid, _, sock = tiny.who()
        found.add(pid)
        sock.close()
    return found


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """The other serves until the next one is ready; what it counted still counts."""
    port = free_port()
    with Tiny(tmp_path, workers=2, metrics_port=port).ready() as tiny:
        tiny.expected.add("a worker ended")
        held = tiny.one_each()
        (dead, lost), (other, kept) = held.items()
        accepted = "tiny_connections_accepted_total"
        wait_until(lambda: tiny.metrics(port)[accepted] >= 2, "counted")
        count = tiny.metrics(port)[accepted]
        tiny.flag("hold-build").touch()
        os.kill(dead, signal.SIGKILL)
        assert is_over(lost)
        (new,) = tiny.held("build")
        assert connect_many(tiny) == {other}
        assert lives(kept)
        tiny.flag("hold-build").unlink()
        settled(tiny, 2)
        wait_until(lambda: connect_many(tiny, 10) == {other, new}, "both serve")
        record = tiny.record("a worker ended")
        assert (record["pid"], record["exit_status"]) == (dead, -signal.SIGKILL)
        assert record["cause"].startswith("killed by signal 9")
        wait_until(lambda: tiny.metrics(port)[accepted] >= count + 60, "counted too")
        assert tiny.metrics(port)['tiny_worker_restarts_total{cause="signal"}'] == 1


def test_files_keep_the_content_of_when_the_configuration_was_read(tmp_path: Path) -> None:
    """Also for a worker that replaces a dead one, and after a reload that failed because of them."""
    named = tmp_path / "named"
    named.write_text("first")
    with Tiny(tmp_path, workers=2, file=str(named)).ready() as tiny:
        tiny.expected |= {"a worker ended", "bad configuration", "reload failed"}
        tiny.expected.add("nothing has changed: the configuration in force stays")

        def replaced(content: str) -> None:
            count = len(tiny.records("a worker was replaced"))
            os.kill(tiny.workers()[0], signal.SIGKILL)
            wait_until(lambda: len(tiny.records("a worker was replaced")) > count, "replaced")
            new = tiny.records("a worker was replaced")[-1]["pid"]
            tiny.record("tiny", pid=new, file=content)

        opened = len(tiny.descriptors())
        named.write_text("second")
        replaced("first")
        named.unlink()
        for _ in range(3):
            assert not tiny.ask("reload")["ok"]
        replaced("first")
        named.write_text("third")
        assert tiny.ask("reload")["ok"]
        wait_until(lambda: len(tiny.records("tiny", file="third")) == 2, "both have the third")
        named.unlink()
        settled(tiny, 2)
        replaced("third")
        settled(tiny, 2)
        wait_until(lambda: len(tiny.descriptors()) == opened, "nothing is left open")


def test_the_only_worker_is_killed(tmp_path: Path) -> None:
    """Clients that connect meanwhile wait, and are served."""
    with Tiny(tmp_path).ready() as tiny:
        tiny.expected.add("a worker ended")
        (dead,) = tiny.workers()
        tiny.flag("hold-build").touch()
        os.kill(dead, signal.SIGKILL)
        (new,) = tiny.held("build")
        clients = [tiny.client() for _ in range(100)]
        tiny.flag("hold-build").unlink()
        assert {tiny.who(client)[0] for client in clients} == {new}


def test_a_worker_that_ends_by_itself(tmp_path: Path) -> None:
    """It is replaced more and more slowly, while the other one serves."""
    timing = {"backoff": [0.0, 0.05, 0.1]}
    with Tiny(tmp_path, workers=2, timing=timing).ready() as tiny:
        tiny.expected |= {"a worker ended", "a worker can't be replaced"}
        first, second = tiny.one_each()
        tiny.flag("die-build").touch()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(tiny.records("a worker can't be replaced")) >= 2, "it dies and dies")
        assert connect_many(tiny, 20) == {second}
        tiny.flag("die-build").unlink()
        tiny.record("a worker was replaced")
        settled(tiny, 2)
        wait_until(lambda: len(connect_many(tiny, 10)) == 2, "both serve")


def test_a_worker_that_hangs(tmp_path: Path) -> None:
    """The other worker serves alone, and later it is replaced."""
    port = free_port()
    with Tiny(tmp_path, workers=2, timing=QUICKER, metrics_port=port).ready() as tiny:
        tiny.expected |= {"a worker hangs, ending it", "a worker ended"}
        hung, other = tiny.one_each()
        os.kill(hung, signal.SIGSTOP)
        clients = [tiny.client() for _ in range(20)]
        assert {tiny.who(client)[0] for client in clients} == {other}
        tiny.record("a worker is silent", pid=hung)
        tiny.record("a worker was replaced")
        assert not running(hung)
        settled(tiny, 2)
        assert tiny.metrics(port)['tiny_worker_restarts_total{cause="hung"}'] == 1


def test_a_worker_that_only_seemed_to_hang(tmp_path: Path) -> None:
    """It goes on, and gets connections again."""
    timing = QUICKER | {"hung_after": 60.0}
    with Tiny(tmp_path, workers=2, timing=timing).ready() as tiny:
        held = tiny.one_each()
        slow, other = held
        os.kill(slow, signal.SIGSTOP)
        try:
            tiny.record("a worker is silent", pid=slow)
            assert connect_many(tiny, 10) == {other}
        finally:
            os.kill(slow, signal.SIGCONT)
        settled(tiny, 2)
        assert set(states(tiny)) == {slow, other}
        assert all(map(lives, held.values()))
        wait_until(lambda: len(connect_many(tiny, 10)) == 2, "both serve")


def test_a_worker_that_does_not_read(tmp_path: Path) -> None:
    """It is stopped, and messages to it pile up; the others still get theirs."""
    timing = {"hung_after": 60.0, "send_within": 0.2, "answer_within": 0.2}
    with Tiny(tmp_path, workers=2, timing=timing).ready() as tiny:
        stopped, other = tiny.one_each()
        os.kill(stopped, signal.SIGSTOP)
        try:
            wait_until(lambda: takes_long(tiny), "its channel is full")
            tiny.log.rename(tmp_path / "log.1")
            tiny.signal(signal.SIGUSR1)
            wait_until(lambda: str(tiny.log) in tiny.descriptors(other), "the other has opened its log again", 3.0)
            tiny.signal(signal.SIGTERM)
            tiny.record("stopping")
            wait_until(lambda: listeners(tiny, other) == 0, "the other accepts no more", 3.0)
        finally:
            os.kill(stopped, signal.SIGCONT)


def takes_long(tiny: Tiny) -> bool:
    """Whether telling the workers something takes as long as the wait for one that does not read."""
    before = time.monotonic()
    assert tiny.ask("log-level", level="info")["ok"]
    return time.monotonic() - before > 0.2


@pytest.fixture
def ended() -> Iterator[int]:
    """A child of this process that has ended and was not waited for."""
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield child.pid


async def test_a_crew_with_an_ended_worker_is_not_settled(nothing_leaks: None, ended: int) -> None:
    """The next version of the master could not learn how that worker ended."""
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        crew = Crew(nursery, ListeningSockets(), Metrics("tiny"), Timing())
        worker = WorkerProcess(1, 0, 0, ended, Channel(trio.socket.from_stdlib_socket(ours)), timing=Timing())
        worker.state = WorkerState.DRAINING
        crew.workers.append(worker)
        assert crew.settled
        crew.reap()
        assert worker.exit_status == 0
        assert not crew.settled
        worker.channel.close()
        theirs.close()
        os.close(crew.table)


async def test_a_worker_that_takes_long_to_start(nothing_leaks: None, mock_clock: trio.testing.MockClock) -> None:
    """The master waits without a limit until it reads its configuration, which does not fit into the channel."""
    ours, theirs = (Channel(trio.socket.from_stdlib_socket(sock)) for sock in socket.socketpair())
    text = "# more\n" * 300_000
    worker = WorkerProcess(1, 0, 0, os.getpid(), ours, timing=Timing())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.configure, text, "file", NamedFiles())
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(50)
        await trio.testing.wait_all_tasks_blocked()
        received = await theirs.receive()
        assert received is not None
        assert received[0]["text"] == text
        await theirs.send({"type": "plan"})
    ours.close()
    theirs.close()


def test_two_workers_that_are_killed(tmp_path: Path) -> None:
    """Then the third serves alone, until they are replaced."""
    with Tiny(tmp_path, workers=3).ready() as tiny:
        tiny.expected.add("a worker ended")
        held = tiny.one_each()
        first, second, last = held
        tiny.flag("hold-build").touch()
        os.kill(first, signal.SIGKILL)
        os.kill(second, signal.SIGKILL)
        tiny.held("build", 2)
        assert connect_many(tiny, 20) == {last}
        tiny.flag("hold-build").unlink()
        settled(tiny, 3)
        wait_until(lambda: len(connect_many(tiny, 10)) == 3, "all serve")
        assert lives(held[last])


def test_a_master_that_hangs(tmp_path: Path) -> None:
    """Afterwards it does not mistake its own silence for that of its workers."""
    with Tiny(tmp_path, workers=2, timing=QUICKER).ready() as tiny:
        held = tiny.one_each()
        tiny.signal(signal.SIGSTOP)
        try:
            # Longer than a worker may be silent, by a clock of the workers'.
            before = uptime()
            wait_until(lambda: uptime() - before > 3.0, "three seconds are over")
        finally:
            tiny.signal(signal.SIGCONT)
        settled(tiny, 2)
        assert set(states(tiny)) == set(held)
        assert all(map(lives, held.values()))


def test_nothing_is_left_open(tmp_path: Path) -> None:
    """After reloads and kills the master has the descriptors that it had before, and no zombies."""
    with Tiny(tmp_path, workers=2, timing={"backoff": [0.0]}).ready() as tiny:
        tiny.expected.add("a worker ended")
        settled(tiny, 2)
        # The thread that looks names up and the like come with the first reload.
        tiny.reload()
        settled(tiny, 2)
        before = kinds(tiny.descriptors())
        for _ in range(4):
            tiny.reload()
            settled(tiny, 2)
            victim = tiny.workers()[0]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in tiny.workers(), "it is gone")
            settled(tiny, 2)
        # (When it was counted before, the connection of the last verb may not have been closed yet.)
        wait_until(lambda: kinds(tiny.descriptors()) <= before, lambda: (before, kinds(tiny.descriptors())))
        assert all(map(running, tiny.workers()))
        assert len(tiny.workers()) == 2


def listeners(tiny: Tiny, pid: int) -> int:
    """How many listening TCP sockets a process has."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    inodes = {f"socket:[{line.split()[9]}]" for line in lines if line.split()[3] == "0A"}
    return len(inodes & set(tiny.descriptors(pid)))


def kinds(names: list[str]) -> Counter[str]:
    """How many descriptors of each kind."""
    return Counter(name.partition(":")[0] for name in names)


def uptime() -> float:
    """The time since the machine was started, in seconds."""
    return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])


def test_answers_say_that_a_worker_did_not_answer(tmp_path: Path) -> None:
    """And rates leave that worker out."""
    hasty = {"answer_within": 0.3, "list_within": 0.3}
    with Tiny(tmp_path, workers=2, timing=hasty).ready() as tiny:
        held = tiny.one_each()
        assert tiny.ask("connections")["partial"] == tiny.ask("status")["partial"] == []
        busy, other = held
        os.kill(busy, signal.SIGSTOP)
        try:
            answers = [tiny.ask("connections"), tiny.ask("status")]
        finally:
            os.kill(busy, signal.SIGCONT)
        assert [answer["partial"] for answer in answers] == [[busy], [busy]]
        assert {row["worker"] for row in answers[0]["connections"]} <= {other}
        wait_until(lambda: tiny.ask("status")["partial"] == [], "all answer again")


def test_a_shared_value_that_workers_can_t_take(tmp_path: Path) -> None:
    """They say so and serve without it, those that come later too."""
    (tmp_path / "keep").touch()
    (tmp_path / "choosy").touch()
    message = "can't use the shared value"
    with Tiny(tmp_path, workers=2).ready() as tiny:
        tiny.expected |= {message, "a worker ended"}
        wait_until(lambda: len(tiny.records(message)) == 2, "both were told")
        (keeper,) = {record["pid"] for record in tiny.records("tiny", keeps=True)}
        before = tiny.one_each()
        (other,) = set(before) - {keeper}
        os.kill(other, signal.SIGKILL)
        tiny.record("a worker was replaced")
        assert lives(before[keeper])
        assert {lives(sock) for sock in tiny.one_each().values()} == {True}
        assert len(tiny.records(message)) == 3
        assert len(tiny.records("a worker ended")) == 1

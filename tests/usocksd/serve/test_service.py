"""The connections of a worker in a real daemon: sessions that fail, and how they end when the daemon does."""

import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
from daemons import free_port, is_over, is_reset, lives, reset, wait_until
from tiny import Tiny

from usocksd.errors import Error
from usocksd.serve.master import stop_delay

# Seconds for a worker that is busy to report before it ends.
HASTE = {"session_ends": 0.3}
LINGER_ZERO = b"\x01\0\0\0\0\0\0\0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drains(tmp_path: Path, number: signal.Signals) -> None:
    with Tiny(tmp_path, workers=2).ready() as tiny:
        client = tiny.client(b"echo")
        tiny.signal(number)
        tiny.record("stopping", cause=number.name, live=1)
        tiny.wait_until_closed()
        with pytest.raises(ConnectionRefusedError):
            tiny.client()
        assert lives(client)
        client.close()
        assert tiny.ended() == 0
        assert tiny.records(ended="echo")
        assert len(tiny.records(background="ends")) == 2
        assert len(tiny.records(closed=True)) == 2
        assert tiny.records("stopped")
        assert not (tmp_path / "control").exists()
        assert not tiny.records("ending the remaining connections")


def test_a_reload_during_a_stop(tmp_path: Path) -> None:
    """It is refused, and the daemon ends in time."""
    with Tiny(tmp_path, timeouts={"stop": 1.0}, timing=HASTE).ready() as tiny:
        client, workers = tiny.client(b"echo"), tiny.workers()
        tiny.signal(signal.SIGTERM)
        tiny.wait_until_closed()
        tiny.signal(signal.SIGHUP)
        answer = tiny.ask("reload")
        assert (answer["ok"], answer["error"]) == (False, "the daemon is stopping")
        assert tiny.workers() == workers
        assert lives(client)
        assert tiny.ended() == 0
        assert is_over(client)
        assert not tiny.records("reloading")


def test_told_to_stop_until_it_has_ended(tmp_path: Path) -> None:
    """Even at its last moment, a signal does not end it."""
    with Tiny(tmp_path).ready() as tiny:

        def ended() -> bool:
            tiny.signal(signal.SIGTERM)
            return tiny.process.poll() is not None

        tiny.reload()  # which leaves threads
        wait_until(ended, "it ends")
        assert tiny.ended() == 0
        assert tiny.records("stopped")


def test_a_second_drain(tmp_path: Path) -> None:
    """Unlike a signal, a second one does not mean "at once"."""
    with Tiny(tmp_path).ready() as tiny:
        client = tiny.client(b"echo")
        assert tiny.ask("drain")["ok"]
        tiny.record("stopping", cause="drain", live=1)
        assert tiny.ask("drain")["ok"]
        tiny.wait_until_closed()
        assert lives(client)
        client.close()
        assert tiny.ended() == 0
        assert not tiny.records("told to stop again: ending at once")


def test_a_relay_finishes_while_it_drains(tmp_path: Path) -> None:
    with Tiny(tmp_path).ready() as tiny:
        client, upstream = tiny.relayed()
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping")
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        assert upstream.recv(10, socket.MSG_WAITALL) == b"late"
        upstream.close()
        assert tiny.ended() == 0
        assert tiny.records(ended="relay", reason="closed", up=4)


def test_ends_and_records_what_does_not_finish_in_time(tmp_path: Path) -> None:
    with Tiny(tmp_path, timeouts={"stop": 0.2}, timing=HASTE).ready() as tiny:
        relayed, upstream = tiny.relayed()
        silent = tiny.client()
        tiny.record("tiny", session=silent.getsockname()[1])
        echo = tiny.client(b"echo")
        tiny.client(b"busy")
        tiny.record("tiny", word="busy")
        tiny.signal(signal.SIGTERM)
        assert tiny.ended() == 0
        assert tiny.record("ending the remaining connections")["live"] == 4
        assert tiny.records(ended="relay", reason="stopped", up=0)
        assert tiny.records(ended="busy")
        assert is_reset(relayed)
        assert is_reset(upstream)
        assert silent.recv(1) == b""
        assert echo.recv(1) == b""
        # Ordered to stop is no fault of a session.
        assert not tiny.records("session failed")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_still_records(tmp_path: Path, second: signal.Signals) -> None:
    with Tiny(tmp_path, timing=HASTE).ready() as tiny:
        relayed, _ = tiny.relayed()
        tiny.client(b"echo")
        tiny.client(b"busy")
        tiny.record("tiny", word="busy")
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping", live=3)
        tiny.signal(second)
        assert tiny.ended() == 0
        assert tiny.records(ended="relay", reason="stopped", up=0)
        assert tiny.records("told to stop again: ending at once")
        assert tiny.record("ending the remaining connections")["live"] == 3
        assert is_reset(relayed)
        assert not tiny.records("session failed")


def test_goes_on_accepting_for_the_delay(tmp_path: Path) -> None:
    with Tiny(tmp_path, environment={"CANCELLATION_DELAY_SECONDS": "3600"}).ready() as tiny:
        tiny.signal(signal.SIGTERM)
        tiny.record("stopping")
        tiny.client(b"echo").close()
        tiny.record("tiny", ended="echo")
        # And a second signal ends that as well.
        client = tiny.client(b"echo")
        tiny.signal(signal.SIGTERM)
        assert tiny.ended() == 0
        assert is_over(client)


def test_closes_after_the_delay(tmp_path: Path) -> None:
    with Tiny(tmp_path, environment={"CANCELLATION_DELAY_SECONDS": "0.2"}).ready() as tiny:
        client = tiny.client(b"echo")
        began = time.monotonic()
        tiny.signal(signal.SIGTERM)
        tiny.wait_until_closed()
        assert time.monotonic() - began >= 0.2
        client.close()
        assert tiny.ended() == 0


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan", ""])
def test_a_delay_that_is_no_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CANCELLATION_DELAY_SECONDS", text)
    with pytest.raises(Error, match="CANCELLATION_DELAY_SECONDS"):
        stop_delay()


def test_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANCELLATION_DELAY_SECONDS", "2.5")
    assert stop_delay() == 2.5
    monkeypatch.delenv("CANCELLATION_DELAY_SECONDS")
    assert stop_delay() == 0


def test_a_session_that_fails_ends_no_other(tmp_path: Path) -> None:
    """A fault of ours is logged as an error; a reset and a deadline are not."""
    with Tiny(tmp_path).ready() as tiny:
        tiny.expected.add("session failed")
        client = tiny.client(b"echo")
        for _ in range(3):
            crashing = tiny.client(b"crash")
            host, port = crashing.getsockname()
            said = tiny.record("session failed", client_addr=f"{host}:{port}")
            assert "on purpose" in said["error"]
            assert "ZeroDivisionError" in said["traceback"]
            assert said["severity"] == "error"
            assert crashing.recv(1) == b""
        reset(tiny.client(b"echo"))
        assert tiny.record("session ends")["severity"] == "debug"
        late = tiny.client(b"late")
        assert is_over(late)
        assert tiny.record("session ends", error="DeadlineExpired")["severity"] == "debug"
        assert lives(client)
        client.close()
        wait_until(lambda: len(tiny.records(ended="echo")) == 1, "the echo has ended")
        tiny.signal(signal.SIGTERM)
        # All of them are counted out.
        assert tiny.record("stopping")["live"] == 0
        assert tiny.ended() == 0


def test_at_the_descriptor_limit_new_connections_wait(tmp_path: Path) -> None:
    """The worker logs that once, and accepts again when a connection ends."""
    with Tiny(tmp_path, environment={"TINY_DESCRIPTORS": "90"}).ready() as tiny:
        tiny.expected.add("accepting is paused")
        most = tiny.rows()[0]["most"]
        assert 3 <= most <= 20
        served = [tiny.client(b"echo") for _ in range(most)]
        waiting = tiny.client()
        waiting.sendall(b"echo")
        assert tiny.record("accepting is paused")["error"] == "too few file descriptors left"
        wait_until(lambda: tiny.rows()[0]["paused"], "status says that it is paused")
        assert all(map(lives, served))
        assert tiny.ask("status")["waiting"] == 1
        served[0].close()
        assert waiting.recv(4) == b"echo"
        assert len(tiny.records("accepting is paused")) == 1


def test_a_worker_without_descriptors_lives_on(tmp_path: Path) -> None:
    """It can't count its descriptors, and does so when it can again."""
    with Tiny(tmp_path, timing={"heartbeat": 0.02}).ready() as tiny:
        (worker,) = tiny.workers()
        client = tiny.client(b"echo")
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (1, limits[1]))

        def opened() -> tuple[int, int]:
            row = tiny.rows()[0]
            return row["descriptors"]["open"], row["descriptors"]["limit"]

        wait_until(lambda: len(set(opened())) == 1, "none is left")
        assert lives(client)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: len(set(opened())) == 2, "there are some again")
        assert lives(client)
        assert tiny.workers() == [worker]


def test_at_the_descriptor_limit_the_longest_idle_make_room(tmp_path: Path) -> None:
    timing = {"shed_after": 0.3, "shed_at_once": 1}
    with Tiny(tmp_path, environment={"TINY_DESCRIPTORS": "90"}, timing=timing).ready() as tiny:
        tiny.expected.add("accepting is paused")
        most = tiny.rows()[0]["most"]
        relays = [tiny.relayed() for _ in range(most)]
        first_quiet = time.monotonic()
        for number, (client, upstream) in enumerate(relays):  # the second has been silent longest
            if number != 1:
                client.sendall(b"x")
                assert upstream.recv(1) == b"x"
        newcomer = tiny.client(b"echo")
        assert time.monotonic() - first_quiet >= 0.2
        assert is_over(relays[1][0])
        assert is_over(relays[1][1])
        record = tiny.record("tiny", ended="relay")
        assert record["reason"] == "shed"
        assert lives(newcomer)
        for client, upstream in (*relays[:1], *relays[2:]):
            client.sendall(b"y")
            assert upstream.recv(1) == b"y"
        wait_until(lambda: tiny.ask("status")["connections"]["shed"] == 1, "it is counted")


def test_signals_while_thousands_come_and_go(tmp_path: Path) -> None:
    with Tiny(tmp_path, workers=2, timeouts={"stop": 0.1}).ready() as tiny:
        address = ("127.0.0.1", tiny.port)
        for number in range(2000):
            client = socket.create_connection(address)
            if number % 3:
                client.sendall(b"echo")
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
            client.close()
            if number % 100 == 50:
                tiny.signal(signal.SIGUSR1)
        tiny.signal(signal.SIGTERM)
        assert tiny.ended() == 0


def test_limits_hold_over_all_workers_and_survive_a_worker(tmp_path: Path) -> None:
    """The connections of a dead worker no longer count."""
    with Tiny(tmp_path, workers=2, limits={"connections": 8, "per_client": 6}).ready() as tiny:
        tiny.expected |= {"a worker ended"}
        held = tiny.one_each()
        others = [tiny.client(b"echo") for _ in range(4)]
        for _ in range(3):
            assert turned_away(tiny, "127.0.0.1")
        assert tiny.record("too many connections")["limit"] == "per_client"
        # Another address of this host is another client, until all together are too many.
        for _ in range(2):
            other = socket.socket()
            tiny._stack.enter_context(other)
            other.bind(("127.0.0.2", 0))
            other.connect(("127.0.0.1", tiny.port))
            tiny.who(other)
        assert turned_away(tiny, "127.0.0.3")
        wait_until(lambda: tiny.ask("status")["connections"]["turned_away"] == 4, "four were turned away")
        dead, sock = next(iter(held.items()))
        os.kill(dead, signal.SIGKILL)
        assert is_over(sock)
        tiny.record("a worker was replaced")
        assert sum(map(alive, [*held.values(), *others])) < 6
        tiny.client(b"echo")


def turned_away(tiny: Tiny, host: str) -> bool:
    """Whether a client from this address is reset at once."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        try:
            sock.connect(("127.0.0.1", tiny.port))
        except ConnectionResetError:
            return True
        return is_reset(sock)


def alive(sock: socket.socket) -> bool:
    return lives(sock, b"?")


def test_a_port_is_free_again_at_once(tmp_path: Path) -> None:
    port = free_port()
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        with Tiny(tmp_path / run, ports=[port], timing={"status_every": 60.0}).ready() as tiny:
            tiny.client(b"echo")

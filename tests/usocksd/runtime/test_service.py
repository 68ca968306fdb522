"""A service in a process of its own, and real signals."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import usocksd
from usocksd.errors import Error
from usocksd.runtime.service import stop_delay

ROOT = Path(usocksd.__file__).parents[1]
PATIENCE = 20.0

# Says on stdout what happens to it, a JSON object a line. What a client sends first is what becomes of it: "echo",
# "crash", "late" (a deadline passes), "busy" (waits for something that is no socket of ours), or "relay" to the
# upstream whose port follows.
PROGRAM = """
    import json, logging, os, resource, sys, trio
    from usocksd.runtime.dial import Target, dial
    from usocksd.runtime.limits import most_connections, raise_descriptor_limit
    from usocksd.runtime.listeners import listen
    from usocksd.runtime.pipes import PipePool
    from usocksd.runtime.reactor import Reactor
    from usocksd.runtime.ending import Limits
    from usocksd.runtime.relay import close_pair, relay
    from usocksd.runtime.service import Service

    options = json.loads(sys.argv[1])
    if "descriptors" in options:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"], options["descriptors"]))

    def say(**what):
        os.write(1, json.dumps(what).encode() + b"\\n")

    class Handler(logging.Handler):
        def emit(self, record):
            fields = dict(getattr(record, "fields", {}))
            if record.exc_info:
                fields["error"] = repr(record.exc_info[1])
            say(log=record.getMessage(), level=record.levelname, **fields)

    logging.getLogger("usocksd").addHandler(Handler())
    logging.getLogger("usocksd").setLevel(logging.DEBUG)
    pipes = PipePool(1024)

    async def session(client, host, port):
        say(session=port)
        word, *rest = (await client.receive()).split()
        say(word=word.decode())
        if word == b"crash":
            raise ZeroDivisionError("on purpose")
        if word == b"late":
            client.deadline = client.reactor.clock()
            await client.receive()
        if word == b"busy":
            try:
                await trio.sleep_forever()
            finally:
                say(ended="busy")
        if word == b"echo":
            await client.send_all(word)
            while data := await client.receive():
                await client.send_all(data)
            say(ended="echo")
            return
        upstream, _ = await dial(
            client.reactor, [Target("127.0.0.1", int(rest[0]))], deadline=client.reactor.clock() + 10
        )
        try:
            await client.send_all(word)
            result = await relay(client, upstream, pipes=pipes, limits=Limits())
            say(ended="relay", reason=result.reason.value, up=result.to_upstream)
            await close_pair(client, upstream, result)
        finally:
            upstream.close()

    async def background(*, task_status):
        say(background=True)
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            say(background=False)

    async def main():
        service = Service(
            Reactor(sweep_every=0.05),
            most=most_connections(raise_descriptor_limit()),
            stop_within=options.get("stop_within", 30.0),
            reopen_log=lambda: say(reopened=True),
        )
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        await service.run([sock], session, background, started=lambda: say(port=port))
        say(returned=True)

    trio.run(main)
"""


class Program:
    """The service, its clients, and what it said."""

    def __init__(self, stack: ExitStack, environment: dict[str, str], **options: object) -> None:
        self._stack = stack
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), json.dumps(options)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | environment,
            )
        )
        stack.callback(self._process.kill)
        self._buffer = b""
        self.said: list[dict[str, Any]] = []
        self.port = self.wait_for(port=Any)["port"]

    def wait_for(self, **what: object) -> dict[str, Any]:
        """The next thing it says that has all of these fields (with the value Any, whatever it is)."""
        deadline = time.monotonic() + PATIENCE
        assert self._process.stdout is not None
        while True:
            while b"\n" not in self._buffer:
                ready = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]
                data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
                assert data, f"it never said {what}, but {self.said}; {self._stderr() if ready else 'it hangs'}"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\n")
            thing = json.loads(line)
            self.said.append(thing)
            if all(key in thing and value in (Any, thing[key]) for key, value in what.items()):
                return thing

    def client(self, words: bytes = b"") -> socket.socket:
        """A client; after "echo" and "relay" it has been answered."""
        sock = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        sock.settimeout(PATIENCE)
        if words:
            sock.sendall(words)
            word = words.split()[0]
            if word in (b"echo", b"relay"):
                assert sock.recv(10) == word
            else:
                self.wait_for(word=word.decode())
        return sock

    def upstream(self) -> socket.socket:
        """Something to relay to."""
        sock = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sock.settimeout(PATIENCE)
        return sock

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ended(self) -> int:
        """Its exit status; it must have ended in good order."""
        status = self._process.wait(PATIENCE)
        self.wait_for(returned=True)
        assert self._stderr() == ""
        return status

    def wait_until_closed(self) -> None:
        """Return when its port listens no more."""
        deadline = time.monotonic() + PATIENCE
        place, state = f"0100007F:{self.port:04X}", "0A"
        while any(line.split()[1:4:2] == [place, state] for line in Path("/proc/net/tcp").read_text().splitlines()):
            assert time.monotonic() < deadline
        with pytest.raises(ConnectionRefusedError):
            self.client()

    def _stderr(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read().decode()

    def logged(self, message: str) -> list[dict[str, Any]]:
        return [each for each in self.said if each.get("log") == message]


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def make(*, environment: dict[str, str] | None = None, **options: object) -> Program:
            return Program(stack, environment or {}, **options)

        yield make


def is_reset(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) != b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drains(start: Start, number: signal.Signals) -> None:
    program = start()
    client = program.client(b"echo")
    program.signal(number)
    program.wait_for(log="stopping", signal=number.name, live=1)
    program.wait_until_closed()
    client.sendall(b"still served")
    assert client.recv(100) == b"still served"
    client.close()
    assert program.ended() == 0
    assert {"ended": "echo"} in program.said
    assert {"background": False} in program.said
    assert program.logged("stopped")
    assert not program.logged("ending what is still connected")


def test_stops_at_once_when_nobody_is_connected(start: Start) -> None:
    program = start()
    program.client(b"echo").close()
    program.wait_for(ended="echo")
    program.signal(signal.SIGTERM)
    assert program.ended() == 0


def test_a_relay_finishes_while_it_drains(start: Start) -> None:
    program = start()
    listener = program.upstream()
    client = program.client(b"relay %d" % listener.getsockname()[1])
    with listener.accept()[0] as upstream:
        program.signal(signal.SIGTERM)
        program.wait_for(log="stopping")
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        assert upstream.recv(10, socket.MSG_WAITALL) == b"late"
    assert program.ended() == 0
    assert {"ended": "relay", "reason": "closed", "up": 4} in program.said


def test_ends_and_records_what_does_not_finish_in_time(start: Start) -> None:
    program = start(stop_within=0.2)
    listener = program.upstream()
    relayed = program.client(b"relay %d" % listener.getsockname()[1])
    with listener.accept()[0] as upstream:
        silent = program.client()
        program.wait_for(session=silent.getsockname()[1])
        echo = program.client(b"echo")
        program.signal(signal.SIGTERM)
        assert program.ended() == 0
        assert program.logged("ending what is still connected")[0]["live"] == 3
        assert {"ended": "relay", "reason": "stopped", "up": 0} in program.said
        assert is_reset(relayed)
        assert is_reset(upstream)
    assert silent.recv(1) == b""
    assert echo.recv(1) == b""
    # Ordered to stop is no fault of a session.
    assert not program.logged("session failed")


def test_ends_what_waits_for_something_else(start: Start) -> None:
    program = start(stop_within=0.1)
    program.client(b"busy")
    program.signal(signal.SIGTERM)
    assert program.ended() == 0
    assert {"ended": "busy"} in program.said


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_still_records(start: Start, second: signal.Signals) -> None:
    program = start()
    listener = program.upstream()
    relayed = program.client(b"relay %d" % listener.getsockname()[1])
    with listener.accept()[0]:
        program.client(b"echo")
        program.client(b"busy")
        program.signal(signal.SIGTERM)
        program.wait_for(log="stopping")
        program.signal(second)
        assert program.ended() == 0
    assert {"ended": "relay", "reason": "stopped", "up": 0} in program.said
    assert program.logged("told to stop again: ending at once")[0]["live"] == 3
    assert is_reset(relayed)
    assert not program.logged("session failed")


def test_goes_on_accepting_for_the_delay(start: Start) -> None:
    program = start(environment={"CANCELLATION_DELAY_SECONDS": "3600"})
    program.signal(signal.SIGTERM)
    program.wait_for(log="stopping")
    program.client(b"echo").close()
    program.wait_for(ended="echo")
    # And a second signal ends that as well.
    client = program.client(b"echo")
    program.signal(signal.SIGTERM)
    assert program.ended() == 0
    assert client.recv(1) == b""


def test_closes_after_the_delay(start: Start) -> None:
    program = start(environment={"CANCELLATION_DELAY_SECONDS": "0.2"})
    client = program.client(b"echo")
    began = time.monotonic()
    program.signal(signal.SIGTERM)
    program.wait_until_closed()
    assert time.monotonic() - began >= 0.2
    client.close()
    assert program.ended() == 0


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan", ""])
def test_a_delay_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CANCELLATION_DELAY_SECONDS", text)
    with pytest.raises(Error, match="CANCELLATION_DELAY_SECONDS"):
        stop_delay()


def test_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANCELLATION_DELAY_SECONDS", "2.5")
    assert stop_delay() == 2.5
    monkeypatch.delenv("CANCELLATION_DELAY_SECONDS")
    assert stop_delay() == 0


def test_reopens_its_log_also_while_it_drains(start: Start) -> None:
    program = start()
    client = program.client(b"echo")
    program.signal(signal.SIGUSR1)
    program.wait_for(reopened=True)
    program.signal(signal.SIGHUP)
    program.wait_for(level="WARNING")
    program.signal(signal.SIGTERM)
    program.wait_for(log="stopping")
    program.signal(signal.SIGUSR1)
    program.wait_for(reopened=True)
    client.close()
    assert program.ended() == 0


def test_a_crash_in_a_session_is_logged_and_ends_no_other(start: Start) -> None:
    program = start()
    client = program.client(b"echo")
    for _ in range(3):
        crashing = program.client(b"crash")
        said = program.wait_for(log="session failed")
        host, port = crashing.getsockname()
        assert said["error"] == "ZeroDivisionError('on purpose')"
        assert said["client_addr"] == f"{host}:{port}"
        assert said["level"] == "ERROR"
        assert crashing.recv(1) == b""
    client.sendall(b"well")
    assert client.recv(10) == b"well"
    client.close()
    program.wait_for(ended="echo")
    program.signal(signal.SIGTERM)
    # All of them are counted out.
    assert program.wait_for(log="stopping")["live"] == 0
    assert program.ended() == 0


def test_a_reset_in_a_session_is_no_news(start: Start) -> None:
    program = start()
    client = program.client(b"echo")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    assert program.wait_for(log="session ends")["level"] == "DEBUG"
    program.signal(signal.SIGTERM)
    assert program.ended() == 0


def test_a_deadline_in_a_session_is_no_fault_of_ours(start: Start) -> None:
    program = start()
    program.client(b"late")
    said = program.wait_for(log="session ends")
    assert (said["level"], said["error"]) == ("DEBUG", "DeadlineExpired")
    program.signal(signal.SIGTERM)
    assert program.ended() == 0


def test_at_the_descriptor_limit_others_wait_in_the_queue(start: Start) -> None:
    """It serves what it has, says so once, and goes on when one ends."""
    program = start(descriptors=80)
    clients = []
    while not program.logged("accepting is paused"):
        clients.append(program.client())
        clients[-1].sendall(b"echo")
        while not any(each.get("session") == clients[-1].getsockname()[1] for each in program.said):
            program.wait_for()
            if program.logged("accepting is paused"):
                break
    assert 5 <= len(clients) <= 17
    *served, waiting = clients
    assert program.logged("accepting is paused")[0]["error"] == "too few file descriptors left"
    for client in served:
        assert client.recv(4) == b"echo"
        client.sendall(b"!")
        assert client.recv(1) == b"!"
    served[0].close()
    assert waiting.recv(4) == b"echo"
    assert len(program.logged("accepting is paused")) == 1
    for client in clients:
        client.close()
    program.signal(signal.SIGTERM)
    assert program.ended() == 0


def test_signals_while_thousands_come_and_go(start: Start) -> None:
    program = start(stop_within=0.1)
    for number in range(300):
        client = socket.create_connection(("127.0.0.1", program.port))
        if number % 3:
            client.sendall(b"echo")
        if number % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()
        if number == 200:
            program.signal(signal.SIGUSR1)
    program.signal(signal.SIGTERM)
    assert program.ended() == 0
    assert {"reopened": True} in program.said

import errno
import json
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

import usocksd
from usocksd.errors import DialError
from usocksd.net.bridge import in_session
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import Endpoint, PeerReset
from usocksd.net.race import PACE, Pace, RaceAttempt

ROOT = Path(usocksd.__file__).parents[1]
IP_BIND_ADDRESS_NO_PORT = 24
HASTE = Pace(0.005, 0.005)

Dial = Callable[..., Awaitable[tuple[Endpoint, Target]]]


@pytest.fixture
def open_sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def dial(lab: Any) -> Dial:
    """Dial these targets, with a deadline in 10 s on the lab's clock."""

    def start(*targets: Target, pace: Pace = PACE, within: float = 10, **more: Any) -> Awaitable[Any]:
        dialer = Dialer(lab.reactor, pace=pace)
        return in_session(lab.reactor, dialer.dial(targets, deadline=lab.clock.now + within, **more))

    return start


@pytest.fixture
def answering(open_sockets: ExitStack) -> Callable[..., Target]:
    """Makes a target that answers."""

    def make(family: int = socket.AF_INET) -> Target:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        listener = open_sockets.enter_context(socket.create_server((host, 0), family=family))
        return Target(host, listener.getsockname()[1])

    return make


@pytest.fixture
def refusing(open_sockets: ExitStack) -> Target:
    """Nothing listens there, and nothing will."""
    sock = open_sockets.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    return Target("127.0.0.1", sock.getsockname()[1])


@pytest.fixture
def black_hole(open_sockets: ExitStack) -> Target:
    """A destination that never answers: its accept queue is full."""
    listener = open_sockets.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(3):
        sock = open_sockets.enter_context(socket.socket())
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
    return Target("127.0.0.1", listener.getsockname()[1])


async def failure(attempt: Awaitable[Any]) -> DialError:
    """The error of a dial."""
    with pytest.raises(DialError) as caught:
        await attempt
    return caught.value


async def test_connects(lab: Any, dial: Dial, open_sockets: ExitStack) -> None:
    listener = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
    target = Target("127.0.0.1", listener.getsockname()[1])
    endpoint, chosen = await dial(target)
    peer = lab.peer(listener.accept()[0])
    assert chosen is target
    await in_session(lab.reactor, endpoint.send_all(b"hello"))
    assert await peer.receive(5) == b"hello"
    await peer.send(b"you")
    assert await in_session(lab.reactor, endpoint.receive()) == b"you"
    for level, option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_OOBINLINE)):
        assert endpoint.sock.getsockopt(level, option)
    endpoint.close()


async def test_refused(dial: Dial, refusing: Target) -> None:
    for targets in ([refusing], [refusing, refusing]):
        error = await failure(dial(*targets))
        assert (error.errno, error.step) == (errno.ECONNREFUSED, "connect")
        assert error.address == f"127.0.0.1:{refusing.port}"


async def test_no_network(dial: Dial) -> None:
    assert (await failure(dial(Target("255.255.255.255", 80)))).errno == errno.ENETUNREACH


@pytest.mark.parametrize("number", [1, 100])
async def test_the_deadline_holds_for_any_number_of_addresses(
    lab: Any, dial: Dial, black_hole: Target, number: int
) -> None:
    errors: list[DialError] = []

    async def run() -> None:
        errors.append(await failure(dial(*[black_hole] * number)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while not lab.reactor.handlers:
            await trio.lowlevel.checkpoint()
        lab.clock.now += 9
        lab.reactor.sweep()
        await lab.settle()
        assert errors == []
        await lab.pass_time(1.0)
    assert [error.errno for error in errors] == [errno.ETIMEDOUT]
    assert lab.reactor.handlers == {}


# Where from


@pytest.mark.parametrize(("family", "source"), [(socket.AF_INET, "127.9.8.7"), (socket.AF_INET6, "::1")])
async def test_source_address(dial: Dial, answering: Callable[..., Target], family: int, source: str) -> None:
    endpoint, _ = await dial(answering(family)._replace(source=source))
    assert endpoint.sock.getsockname()[0] == source
    assert endpoint.sock.getsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT)
    endpoint.close()


@pytest.mark.parametrize(
    ("gone", "step", "numbers"),
    [
        ({"source": "192.0.2.1"}, "bind 192.0.2.1 for", {errno.EADDRNOTAVAIL}),
        ({"iface": "nosuch0"}, "interface nosuch0 for", {errno.ENODEV, errno.EPERM}),
    ],
)
async def test_a_source_that_is_gone(
    dial: Dial, answering: Callable[..., Target], gone: Any, step: str, numbers: set[int]
) -> None:
    target = answering()._replace(**gone)
    error = await failure(dial(target))
    assert error.errno in numbers
    assert str(error).startswith(f"{step} {target}: ")


IN_A_NAMESPACE = """
    import json, socket, subprocess, sys
    from pathlib import Path
    from usocksd.errors import DialError
    from usocksd.net.bridge import in_session, run
    from usocksd.net.dial import Dialer, Target
    from usocksd.net.reactor import Reactor

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    ip("link", "set", "lo", "up")
    ip("addr", "add", "10.1.1.1/24", "dev", "lo")
    ip("route", "add", "unreachable", "10.9.9.9")
    ip("route", "add", "prohibit", "10.9.9.8")
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
    Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("0")
    listeners = [socket.create_server(("10.1.1.1", port)) for port in (1001, 1002)]

    now = [1000.0]
    reactor = Reactor(clock=lambda: now[0])

    async def main():
        dialer = Dialer(reactor)
        said, opened = {}, {}

        async def attempt(name, host, port, **more):
            try:
                dial = dialer.dial([Target(host, port, **more)], deadline=now[0] + 5)
                endpoint, _ = await in_session(reactor, dial)
            except DialError as error:
                said[name] = [error.errno, error.step, type(error).__name__, str(error)]
            else:
                said[name] = endpoint.sock.getsockname()
                opened[name] = endpoint

        await attempt("one", "10.1.1.1", 1001, source="10.1.1.1")
        await attempt("two", "10.1.1.1", 1002, source="10.1.1.1")
        await attempt("out of ports", "10.1.1.1", 1001, source="10.1.1.1")
        await attempt("no network", "192.0.2.1", 1)
        await attempt("no host", "10.9.9.9", 1)
        await attempt("forbidden", "10.9.9.8", 1)
        await attempt("marked", "10.1.1.1", 1001, source="127.0.0.1", mark=7)
        await attempt("device", "10.1.1.1", 1002, source="127.0.0.1", iface="lo")
        # Several sources, with a port each.
        three = {"source": "127.0.0.11", "spare": ("127.0.0.12", "127.0.0.13")}
        for name in ("first", "second", "third", "fourth"):
            await attempt(name, "10.1.1.1", 1001, **three)
        await attempt("elsewhere", "10.1.1.1", 1002, **three)
        opened["first"].reset()
        await attempt("preferred is free", "10.1.1.1", 1001, **three)
        opened["third"].reset()
        await attempt("third is free, and not asked yet", "10.1.1.1", 1001, **three)
        now[0] += 1.5
        await attempt("third is free", "10.1.1.1", 1001, **three)
        await attempt("gone", "10.1.1.1", 1002, source="192.0.2.7", spare=("192.0.2.8", "127.0.0.14"))
        await attempt("all gone", "10.1.1.1", 1002, source="192.0.2.7", spare=("192.0.2.8",))
        # The one who closes first has TIME_WAIT.
        await attempt("short", "10.1.1.1", 1001, source="127.0.0.15")
        listeners[0].setblocking(False)
        accepted = {}
        while "127.0.0.15" not in accepted:
            sock, (peer, _) = listeners[0].accept()
            accepted[peer] = sock
        opened["short"].sock.shutdown(socket.SHUT_WR)
        accepted["127.0.0.15"].close()
        assert await in_session(reactor, opened["short"].receive()) == b""
        opened["short"].close()
        await attempt("time wait", "10.1.1.1", 1001, source="127.0.0.15")
        print(json.dumps(said))

    run(reactor, main)
"""


def test_ports_and_routes_in_a_namespace_of_its_own() -> None:
    unshare = shutil.which("unshare")
    if not unshare or not shutil.which("ip"):
        pytest.skip("needs unshare(1) and ip(8)")
    if subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make namespaces here")
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-c", textwrap.dedent(IN_A_NAMESPACE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    # One port for both: the kernel chose it when it knew both ends.
    assert said["one"] == said["two"] == ["10.1.1.1", 40000]
    out_of_ports = [errno.EADDRNOTAVAIL, "connect", "OutOfPorts"]
    where = "out of ports towards 10.1.1.1:1001 on"
    rest = "(EADDRNOTAVAIL); 0 connections of this host are in TIME_WAIT"
    assert said["out of ports"] == [*out_of_ports, f"{where} 10.1.1.1 {rest}"]
    assert said["no network"][:3] == [errno.ENETUNREACH, "connect", "DialError"]
    assert said["no host"][:3] == [errno.EHOSTUNREACH, "connect", "DialError"]
    assert said["forbidden"][:3] == [errno.EACCES, "connect", "DialError"]
    assert said["marked"] == said["device"] == ["127.0.0.1", 40000]
    assert [said[name][0] for name in ("first", "second", "third")] == ["127.0.0.11", "127.0.0.12", "127.0.0.13"]
    assert said["fourth"] == [*out_of_ports, f"{where} 127.0.0.11, 127.0.0.12, 127.0.0.13 {rest}"]
    assert said["elsewhere"] == ["127.0.0.11", 40000]
    # While none is known to have a port only the preferred one is asked: each costs the kernel a look at every port.
    assert said["preferred is free"] == ["127.0.0.11", 40000]
    assert said["third is free, and not asked yet"][2] == "OutOfPorts"
    assert said["third is free"] == ["127.0.0.13", 40000]
    assert said["gone"] == ["127.0.0.14", 40000]
    assert said["all gone"][:3] == [errno.EADDRNOTAVAIL, "bind 192.0.2.8 for", "DialError"]
    # (Without net.ipv4.tcp_tw_reuse; 2, the default, means loopback.)
    assert said["time wait"][2:] == ["OutOfPorts", f"{where} 127.0.0.15 {rest.replace('0 conn', '1 conn')}"]


# Several addresses


async def test_a_refusal_leads_to_the_next_at_once(
    dial: Dial, refusing: Target, answering: Callable[..., Target]
) -> None:
    with trio.fail_after(5):
        endpoint, chosen = await dial(refusing, refusing, target := answering(), pace=Pace(60, 60))
    assert chosen is target
    endpoint.close()


async def test_a_black_hole_delays_little(
    lab: Any, dial: Dial, black_hole: Target, answering: Callable[..., Target]
) -> None:
    target = answering()

    async def run() -> None:
        endpoint, chosen = await dial(black_hole, target)
        assert chosen is target
        endpoint.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await lab.pass_time(PACE.delay - 0.01)
        assert len(lab.reactor.handlers) == 1
        await lab.pass_time(0.01)
    assert lab.reactor.handlers == {}


async def test_of_several_failures_the_first_is_raised(
    lab: Any, dial: Dial, black_hole: Target, refusing: Target
) -> None:
    errors = []

    async def run() -> None:
        errors.append(await failure(dial(black_hole, refusing, black_hole, pace=HASTE)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while len(lab.reactor.handlers) < 2:
            await lab.pass_time(0.01)
        assert errors == []
        await lab.pass_time(10.0)
    assert [error.errno for error in errors] == [errno.ECONNREFUSED]
    assert lab.reactor.handlers == {}


async def test_many_black_holes_do_not_hide_the_last_address(
    lab: Any, dial: Dial, black_hole: Target, answering: Callable[..., Target]
) -> None:
    """Nor do they take many descriptors at a time."""
    lab.clock.run()
    most = 0
    targets = [black_hole] * 20 + [target := answering()]
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, len(lab.reactor.handlers))
                await trio.sleep(0.001)

        nursery.start_soon(look)
        with trio.fail_after(5):
            endpoint, chosen = await dial(*targets, within=0.8, pace=Pace(shortest=0.01))
        nursery.cancel_scope.cancel()
    assert chosen is target
    # (One more for a moment: it ends when the next one begins.)
    assert most <= PACE.at_once + 1
    endpoint.close()
    assert lab.reactor.handlers == {}


class Accepting:
    """A listener that tells how many have connected to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._listener.setblocking(False)
        self.target = Target(*self._listener.getsockname())

    def accepted(self) -> int:
        count = 0
        with suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                count += 1
        return count


@pytest.mark.parametrize(
    "before",
    [[], ["refuses"], ["refuses", "refuses"], ["silent"], ["silent", "refuses"], ["refuses", "silent"]],
    ids=" ".join,
)
async def test_nothing_is_connected_to_behind_the_winner(
    lab: Any, dial: Dial, before: list[str], open_sockets: ExitStack, refusing: Target, black_hole: Target
) -> None:
    """However short the delay: loopback answers at once."""
    lab.clock.run()
    winner, behind = Accepting(open_sockets), Accepting(open_sockets)
    kinds = {"refuses": refusing, "silent": black_hole}
    for last in ([], [refusing], [black_hole]):
        targets = [*(kinds[each] for each in before), winner.target, *last, behind.target]
        endpoint, chosen = await dial(*targets, pace=HASTE)
        await lab.settle()
        assert chosen is winner.target
        assert (winner.accepted(), behind.accepted()) == (1, 0)
        endpoint.close()
    assert lab.reactor.handlers == {}


async def test_an_answer_in_time_wins_in_a_busy_process(lab: Any, dial: Dial, open_sockets: ExitStack) -> None:
    """The answer and the time for the next attempt are found in one turn."""
    first, second = Accepting(open_sockets), Accepting(open_sockets)

    async def run() -> None:
        endpoint, _ = await dial(first.target, second.target, pace=Pace(0.001, 0.001))
        endpoint.close()

    for _ in range(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not lab.reactor.handlers:
                await trio.lowlevel.checkpoint()
            time.sleep(0.002)  # noqa: ASYNC251
            lab.clock.now += 0.002
    await lab.settle()
    assert second.accepted() == 0


@pytest.mark.parametrize("spare", [0, 1, 3])
async def test_races_borrow_what_they_open(
    lab: Any, black_hole: Target, answering: Callable[..., Target], spare: int
) -> None:
    """With no descriptor to borrow, attempts take turns, and still reach the last address."""
    lab.clock.run()
    dialer = Dialer(lab.reactor, spare=spare)
    most = 0
    target = answering()

    async def run() -> None:
        dial = dialer.dial([black_hole] * 3 + [target], deadline=lab.clock() + 0.4)
        endpoint, chosen = await in_session(lab.reactor, dial)
        assert chosen is target
        endpoint.close()

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, len(lab.reactor.handlers))
            assert dialer.spare >= 0
            await trio.sleep(0.001)

    async with trio.open_nursery() as watching:
        watching.start_soon(look)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(run)
        watching.cancel_scope.cancel()
    assert most <= 3 + spare
    assert dialer.spare == spare
    assert lab.reactor.handlers == {}


# Nobody waits any more


@pytest.mark.parametrize("number", [1, 2])
async def test_a_reset_of_the_client_ends_the_dial(lab: Any, dial: Dial, black_hole: Target, number: int) -> None:
    client, peer = lab.endpoint()
    ended = trio.Event()

    async def run() -> None:
        with pytest.raises(PeerReset):
            await dial(*[black_hole] * number, client=client)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await lab.settle()
        # After the end of its stream it still waits for the answer.
        peer.end()
        await lab.settle()
        assert not ended.is_set()
        peer.reset()
    assert client.on_interrupt is None
    assert set(lab.reactor.handlers) == {client.fd}


@pytest.mark.parametrize("fin", [False, True])
async def test_a_client_that_was_reset_before_the_dial(lab: Any, dial: Dial, black_hole: Target, fin: bool) -> None:
    client, peer = lab.endpoint()
    await peer.send(b"request")
    if fin:
        peer.end()
    peer.reset()
    await lab.settle()
    assert await client.receive() == b"request"
    with pytest.raises(PeerReset):
        await dial(black_hole, client=client)
    assert set(lab.reactor.handlers) == {client.fd}


@pytest.mark.parametrize("number", [1, 2])
async def test_an_interrupt_is_raised_in_the_session(lab: Any, dial: Dial, black_hole: Target, number: int) -> None:
    class Stop(Exception):
        pass

    async def run() -> None:
        with pytest.raises(Stop):
            await dial(*[black_hole] * number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while len(lab.reactor.handlers) < number:
            await lab.pass_time(PACE.delay)
        lab.reactor.interrupt_all(Stop)
    assert lab.reactor.handlers == {}


async def test_cancelling_at_any_moment_leaves_nothing_open(
    lab: Any, dial: Dial, answering: Callable[..., Target], refusing: Target, black_hole: Target
) -> None:
    random = Random(5)
    good = answering()
    won = 0
    for _ in range(500):
        targets = random.choice([[good], [refusing, good], [black_hole, good], [good, good], [refusing, black_hole]])
        with trio.CancelScope() as scope:

            async def cancel(scope: trio.CancelScope = scope) -> None:
                for _ in range(random.randrange(9)):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            lab.nursery.start_soon(cancel)
            try:
                endpoint, _ = await dial(*targets, pace=Pace(0, 0))
            except DialError:
                continue
            endpoint.close()
            won += 1
        assert lab.reactor.handlers == {}
    assert won


async def test_cancelled_in_the_moment_of_success(
    lab: Any, dial: Dial, answering: Callable[..., Target], black_hole: Target
) -> None:
    """The answer and the cancel come in one turn."""
    with trio.CancelScope() as scope, pytest.MonkeyPatch.context() as patch:
        real = RaceAttempt.on_event

        def on_event(attempt: RaceAttempt, flags: int) -> None:
            real(attempt, flags)
            scope.cancel()

        patch.setattr(RaceAttempt, "on_event", on_event)
        endpoint, _ = await dial(answering(), black_hole)
        endpoint.close()
    assert lab.reactor.handlers == {}


async def test_no_descriptors(dial: Dial, refusing: Target, no_more_descriptors: Any) -> None:
    with no_more_descriptors():
        for targets in ([refusing], [refusing, refusing]):
            error = await failure(dial(*targets))
            assert (error.errno, error.step) == (errno.EMFILE, "socket")

import errno
import os
import socket
import threading
import time
from itertools import permutations
from typing import Any

import pytest
import trio
from turning import TaskEndpoint, start, turning

from usocksd.net.endpoint import DeadlineExpired, PeerReset
from usocksd.net.reactor import Reactor


async def test_receive_returns_bytes_and_then_the_end(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    await peer.send(b"one")
    assert await endpoint.receive() == b"one"
    await peer.send(b"two")
    peer.end()
    assert await endpoint.receive() == b"two"
    assert await endpoint.receive() == b""
    assert await endpoint.receive() == b""


async def test_receive_waits(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    got = []

    async def receive() -> None:
        got.append(await endpoint.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await lab.settle()
        assert got == []
        await peer.send(b"late")
    assert got == [b"late"]


async def test_more_than_one_piece_waits_in_the_socket(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    await peer.send(bytes(40_000))
    await lab.settle()
    sizes = []
    while sum(sizes) < 40_000:
        sizes.append(len(await endpoint.receive()))
    assert sizes == [16_384, 16_384, 7_232]


async def test_bytes_before_a_reset_are_received_and_then_the_reset(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    await peer.send(b"bytes")
    peer.reset()
    await lab.settle()
    assert await endpoint.receive() == b"bytes"
    with pytest.raises(ConnectionResetError):
        await endpoint.receive()


async def test_data_and_fin_in_one_event(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    await peer.send(b"x" * 16_384)
    peer.end()
    await lab.settle()
    assert await endpoint.receive() == b"x" * 16_384
    with trio.fail_after(1):
        assert await endpoint.receive() == b""


async def test_send_all_waits_for_a_slow_reader(lab: Any) -> None:
    endpoint, peer = lab.endpoint(buffers=4096)
    data = os.urandom(500_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.send_all, data)
        await lab.settle()
        assert await peer.receive(len(data)) == data


async def test_send_to_a_peer_that_is_gone_raises(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    peer.reset()
    await lab.settle()
    with pytest.raises(ConnectionError):
        await endpoint.send_all(b"x")


async def test_a_reset_ends_a_blocked_send(lab: Any) -> None:
    endpoint, peer = lab.endpoint(buffers=4096)
    errors = []

    async def send() -> None:
        try:
            await endpoint.send_all(bytes(1_000_000))
        except OSError as error:
            errors.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await lab.settle()
        peer.reset()
    assert errors == [errno.ECONNRESET]


# Deadlines


async def test_deadline_of_receive(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    endpoint.deadline = lab.clock.now + 10
    caught = trio.Event()

    async def receive() -> None:
        assert await endpoint.receive() == b"a"
        with pytest.raises(DeadlineExpired):
            await endpoint.receive()
        caught.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await lab.pass_time(9.0)
        # A client that trickles does not get more time.
        await peer.send(b"a")
        await lab.settle()
        assert not caught.is_set()
        await lab.pass_time(1.0)
        assert caught.is_set()


async def test_deadline_of_send(lab: Any) -> None:
    endpoint, _ = lab.endpoint(buffers=4096)
    endpoint.deadline = lab.clock.now + 10

    async def send() -> None:
        with pytest.raises(DeadlineExpired):
            await endpoint.send_all(bytes(1_000_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await lab.pass_time(10.0)


async def test_the_sweeper_runs_by_itself() -> None:
    reactor = Reactor(sweep_every=0.001)
    swept = trio.Event()

    class Late:
        deadline = 0.0

        def on_event(self, flags: int) -> None: ...
        def interrupt(self, reason: BaseException) -> None: ...
        def on_deadline(self, now: float) -> None:
            assert now >= self.deadline
            swept.set()

    reactor.handlers[-1] = Late()
    async with turning(reactor):
        with trio.fail_after(5):
            await swept.wait()


# Last words


async def test_finish_lets_the_peer_read_though_it_still_sends(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    await peer.send(b"never read by anybody")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.finish, b"no", 5.0)
        assert await peer.rest() == (b"no", True)
        assert endpoint.fd >= 0
        peer.end()
    assert endpoint.fd == -1


async def test_finish_waits_for_a_bounded_time(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.finish, b"no", 5.0)
        await lab.pass_time(4.0)
        assert endpoint.fd >= 0
        await lab.pass_time(1.0)
    assert endpoint.fd == -1
    assert await peer.rest() == (b"no", True)


async def test_finish_of_a_connection_that_is_gone(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    peer.reset()
    await lab.settle()
    await endpoint.finish(b"no", 5.0)
    assert endpoint.fd == -1


async def test_finish_is_not_kept_up_by_a_peer_that_never_stops_sending(lab: Any) -> None:
    """Nor is the rest of the process."""
    endpoint, _ = lab.endpoint()
    real = endpoint.sock
    received = 0

    class Flood:
        """Always has more, as a fast peer would."""

        def recv(self, size: int) -> bytes:
            nonlocal received
            received += 1
            assert received < 10_000, "nobody else gets a turn"
            return b"x" * size

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    endpoint.sock = Flood()
    endpoint.readable = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.finish, b"no", 5.0)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert endpoint.fd >= 0
        lab.clock.now += 5.0
        lab.reactor.sweep()
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        assert endpoint.fd == -1
    endpoint.sock = real


# Interrupts, stopped sessions


async def test_interrupt_raises_where_a_session_waits_and_only_there(lab: Any) -> None:
    waiting, _ = lab.endpoint()
    busy, peer = lab.endpoint()

    class Stop(Exception):
        pass

    async def receive() -> None:
        with pytest.raises(Stop):
            await waiting.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await lab.settle()
        lab.reactor.interrupt_all(Stop)
        lab.reactor.interrupt_all(Stop)
    await peer.send(b"still here")
    assert await busy.receive() == b"still here"


@pytest.mark.parametrize("order", list(permutations(["event", "deadline", "interrupt", "stop"])), ids="-".join)
async def test_everything_in_the_same_turn(lab: Any, order: tuple[str, ...]) -> None:
    """The first of them wakes the session, and the others find nothing to wake."""
    endpoint, peer = lab.endpoint()
    endpoint.deadline = lab.clock.now

    def event() -> None:
        peer.push(b"x")
        lab.reactor.turn(0)

    actions = {
        "event": event,
        "deadline": lab.reactor.sweep,
        "interrupt": lambda: lab.reactor.interrupt_all(PeerReset),
        "stop": lab.reactor.stop_all,
    }

    async def receive() -> None:
        try:
            outcome.append(await endpoint.receive())
        except (DeadlineExpired, PeerReset) as error:
            outcome.append(type(error))

    outcome: list[object] = []
    over = start(lab.reactor, receive)
    await lab.settle()
    for name in order:
        actions[name]()
    await over.wait()
    expected = {"event": [b"x"], "deadline": [DeadlineExpired], "interrupt": [PeerReset], "stop": []}
    assert outcome == expected[order[0]]


async def test_a_stop_in_receive_leaves_the_endpoint_usable(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    with trio.move_on_after(0):
        await endpoint.receive()
    await peer.send(b"x")
    assert await endpoint.receive() == b"x"


async def test_on_interrupt_is_called_while_no_session_waits(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    called: list[BaseException] = []
    endpoint.on_interrupt = called.append
    await peer.send(b"x")
    await lab.settle()
    peer.end()
    await lab.settle()
    assert called == []
    peer.reset()
    await lab.settle()
    assert [type(reason) for reason in called] == [PeerReset]


async def test_a_reset_in_the_turn_of_another_event_is_not_missed(lab: Any) -> None:
    """The session has just been woken by an event that brings no bytes, so it does not wait when the client is reset."""
    client, peer = lab.endpoint()
    upstream, _ = lab.endpoint()
    client.on_interrupt = upstream.interrupt
    errors: list[BaseException] = []

    async def ask() -> None:
        try:
            await upstream.receive()
        except PeerReset as error:
            errors.append(error)

    over = start(lab.reactor, ask)
    await lab.settle()
    lab.reactor.watch_writable(upstream.fd)
    peer.reset()
    lab.reactor.turn(0)
    with trio.fail_after(1):
        await over.wait()
    assert len(errors) == 1


# Closing


async def test_close_is_a_fin_and_reset_a_reset(lab: Any) -> None:
    for close, clean in (("close", True), ("reset", False)):
        endpoint, peer = lab.endpoint()
        getattr(endpoint, close)()
        getattr(endpoint, close)()
        assert await peer.rest() == (b"", clean)
    assert lab.reactor.handlers == {}


async def test_a_descriptor_number_that_is_used_again(lab: Any) -> None:
    """An event of the closed socket does not reach the one that got its number."""
    for _ in range(50):
        endpoint, peer = lab.endpoint()
        near, far = lab.connection()
        await peer.send(b"for the old one")
        peer.end()
        fd = endpoint.fd
        endpoint.close()
        again = TaskEndpoint(lab.reactor, socket.socket(fileno=os.dup2(near.fileno(), fd)))
        again.sock.setblocking(False)
        near.close()
        assert again.fd == fd
        lab.reactor.turn(0)
        assert not again.readable
        far.sendall(b"for the new one")
        assert await again.receive() == b"for the new one"
        again.close()
        far.close()
        peer.close()


# The loop


async def test_nothing_is_missed_between_turns(lab: Any) -> None:
    """A thread sends at any moment of the loop."""
    endpoint, peer = lab.endpoint()
    peer.sock.setblocking(True)
    rounds = 3_000

    def ping() -> None:
        for number in range(rounds):
            peer.sock.sendall(b"%08d" % number)
            assert peer.sock.recv(8, socket.MSG_WAITALL) == b"%08d" % number

    peer.sock.settimeout(20)
    thread = threading.Thread(target=ping)
    thread.start()
    with trio.fail_after(20):
        for _ in range(rounds):
            data = b""
            while len(data) < 8:
                data += await endpoint.receive()
            await endpoint.send_all(data)
    thread.join()


async def test_resumed_work_gets_one_turn_at_a_time_and_others_get_theirs(lab: Any) -> None:
    class Work:
        turns = 0

        def resume(self) -> None:
            self.turns += 1
            if self.turns < 1_000:
                lab.reactor.resume_later(self)

    work = Work()
    endpoint, peer = lab.endpoint()
    lab.reactor.resume_later(work)
    await peer.send(b"x")
    await endpoint.receive()
    assert work.turns < 5
    await lab.settle()
    assert work.turns == 1_000


async def test_many_more_sockets_than_a_batch(lab: Any) -> None:
    ends = [lab.endpoint() for _ in range(300)]
    for _, peer in ends:
        peer.push(b"x")
    for endpoint, _ in ends:
        assert await endpoint.receive() == b"x"


async def test_an_idle_reactor_does_not_turn(lab: Any) -> None:
    endpoint, peer = lab.endpoint()
    rig = lab.relay()
    await rig.client.send(b"x")
    await rig.upstream.receive(1)
    await peer.send(b"nobody reads this")
    peer.end()
    await lab.settle()
    turns = lab.count_turns()
    began = time.monotonic()
    while time.monotonic() - began < 0.02:
        await trio.lowlevel.checkpoint()
    assert turns() == 0
    endpoint.close()

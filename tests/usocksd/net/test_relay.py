import errno
import gc
import os
import select
import socket
import tracemalloc
from contextlib import suppress
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from usocksd.net import flow as flow_module
from usocksd.net import relay as relay_module
from usocksd.net.ending import Limits, Reason, Side
from usocksd.net.flow import Flow
from usocksd.net.pipes import PipePool

_NOISE = Random(2).randbytes(1_000_003) * 2


def noise(size: int, at: int = 0) -> bytes:
    """Bytes `at` to `at + size` of an endless stream that repeats only after a million bytes and some."""
    at %= 1_000_003
    start = _NOISE[at : at + min(size, 1_000_003)]
    return start if len(start) == size else start + noise(size - len(start), at + len(start))


async def pump(sender: Any, receiver: Any, size: int) -> None:
    """Send `size` bytes through a relay, and check what arrives."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, noise(size))
        assert await receiver.receive(size) == noise(size)


async def fill(lab: Any, peer: Any) -> int:
    """Send until nothing more is accepted; returns the number of bytes."""
    total = 0
    while sent := peer.push(noise(1 << 20, total)):
        total += sent
        await lab.settle()
    return total


# Bytes


async def test_carries_both_ways_and_counts(lab: Any) -> None:
    rig = lab.relay()
    await rig.client.send(b"question")
    assert await rig.upstream.receive(8) == b"question"
    await rig.upstream.send(b"the answer")
    assert await rig.client.receive(10) == b"the answer"
    rig.client.end()
    assert await rig.upstream.rest() == (b"", True)
    rig.upstream.end()
    assert await rig.client.rest() == (b"", True)
    assert (await rig.result())[:5] == (8, 10, Reason.CLOSED, Side.CLIENT, 0)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "read", "drain", "settle", "end", "urgent"]),
        st.sampled_from([0, 1]),
        st.one_of(st.integers(1, 100), st.integers(1, 70_000), st.integers(65_536, 600_000)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(ACTIONS, st.one_of(st.none(), st.sampled_from([(0, "reset"), (1, "reset")])), st.sampled_from([None, 4096]))
@example([("write", 0, 600_000), ("urgent", 0, 1), ("write", 0, 600_000), ("end", 0, 1)], None, None)
@example([("end", 0, 1), ("write", 1, 300_000), ("settle", 0, 1)], (0, "reset"), None)
def test_any_schedule_of_both_ends_agrees_with_the_model(
    new_lab: Any, actions: list[tuple[str, int, int]], last: tuple[int, str] | None, buffers: int | None
) -> None:
    async def conversation() -> None:
        async with new_lab() as lab:
            lab.clock.run()
            rig = lab.relay(buffers=buffers)
            peers = (rig.client, rig.upstream)
            sent, received, ended = [0, 0], [0, 0], [False, False]

            def write(peer: Any, side: int, data: bytes) -> None:
                if not ended[side]:
                    sent[side] += peer.push(data)

            async def read(side: int, size: int) -> None:
                """Whatever the other side has sent must come, whole and in order."""
                size = min(size, sent[1 - side] - received[side])
                assert await peers[side].receive(size) == noise(size, received[side])
                received[side] += size

            for action, side, size in actions:
                match action:
                    case "write":
                        write(peers[side], side, noise(size, sent[side]))
                    case "urgent" if not ended[side]:
                        with suppress(BlockingIOError):
                            sent[side] += peers[side].sock.send(noise(1, sent[side]), socket.MSG_OOB)
                    case "read":
                        await read(side, size)
                    case "drain":
                        await read(side, 1 << 30)
                    case "settle":
                        await lab.settle()
                    case "end" if not ended[side]:
                        peers[side].end()
                        ended[side] = True
            if last is not None and not all(ended):
                side = last[0]
                peers[side].reset()
                data, clean = await peers[1 - side].rest()
                assert noise(len(data), received[1 - side]) == data
                assert len(data) <= sent[side] - received[1 - side]
                result = await rig.result()
                # Where a FIN came first, the reset shows as an error behind it.
                assert not clean or (ended[side] and await peers[1 - side].broken())
                assert (result.reason, result.by) == (Reason.RESET, (Side.CLIENT, Side.UPSTREAM)[side])
                return
            for side in (0, 1):
                if not ended[side]:
                    peers[side].end()
            for side in (0, 1):
                left = sent[1 - side] - received[side]
                data, clean = await peers[side].rest()
                assert data == noise(left, received[side])
                assert clean
            result = await rig.result()
            assert result[:3] == (sent[0], sent[1], Reason.CLOSED)

    trio.run(conversation)


async def test_many_pairs_at_once(lab: Any) -> None:
    random = Random(1)

    async def one(rig: Any, up: int, down: int) -> None:
        async def say(peer: Any, size: int, at: int) -> None:
            sent = 0
            while sent < size:
                piece = min(random.choice([1, 100, 5_000, 70_000, 400_000]), size - sent)
                await peer.send(noise(piece, at + sent))
                sent += piece
                if random.random() < 0.2:
                    await trio.testing.wait_all_tasks_blocked()
            peer.end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say, rig.client, up, 7)
            nursery.start_soon(say, rig.upstream, down, 11)
            got_up, got_down = trio.Event(), trio.Event()

            async def hear(peer: Any, size: int, at: int, got: trio.Event) -> None:
                assert await peer.rest() == (noise(size, at), True)
                got.set()

            nursery.start_soon(hear, rig.upstream, up, 7, got_up)
            nursery.start_soon(hear, rig.client, down, 11, got_down)
        assert (await rig.result())[:3] == (up, down, Reason.CLOSED)

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            sizes = [random.choice([0, 1, 1_000, 65_536, 131_072, 1_500_000]) + random.randrange(9) for _ in "ud"]
            nursery.start_soon(one, lab.relay(), *sizes)


async def test_leftovers_go_first(lab: Any) -> None:
    rig = lab.rig()
    await rig.client.send(b"third")
    await rig.upstream.send(b"3")
    await lab.settle()
    lab.start(rig, to_upstream=b"first second ", to_client=b"1 2 ")
    assert await rig.upstream.receive(18) == b"first second third"
    assert await rig.client.receive(5) == b"1 2 3"
    rig.client.end()
    rig.upstream.end()
    assert (await rig.result())[:2] == (18, 5)


async def test_leftovers_go_first_when_the_sink_takes_no_more(lab: Any) -> None:
    rig = lab.rig(buffers=4096)
    clogged_up, clogged_down = rig.far.sock.send(noise(1 << 20)), rig.near.sock.send(noise(1 << 20))
    await rig.client.send(b"C")
    await rig.upstream.send(b"U")
    lab.start(rig, to_upstream=noise(100_000, 5), to_client=noise(100_000, 6))
    await lab.settle()
    rig.client.end()
    rig.upstream.end()
    await lab.settle()
    assert await rig.upstream.receive(clogged_up) == noise(clogged_up)
    assert await rig.upstream.rest() == (noise(100_000, 5) + b"C", True)
    assert await rig.client.receive(clogged_down) == noise(clogged_down)
    assert await rig.client.rest() == (noise(100_000, 6) + b"U", True)
    assert (await rig.result())[:3] == (100_001, 100_001, Reason.CLOSED)


async def test_the_rest_of_partial_sends_arrives(lab: Any) -> None:
    rig = lab.relay(buffers=2304)
    await pump(rig.client, rig.upstream, 300_000)
    await pump(rig.upstream, rig.client, 300_000)


@pytest.mark.parametrize("bulk", [True, False])
async def test_a_stopped_reader_stops_the_reading(lab: Any, bulk: bool) -> None:
    if not bulk:
        lab.pipes = PipePool(0)
    rig = lab.relay(buffers=64_000)
    total = await fill(lab, rig.client)
    flow = rig.pair.up
    assert flow.blocked
    assert len(flow.tail) <= 64 * 1024
    assert bulk or flow.pipe is None
    # Four socket buffers (which the kernel doubles), and one buffer or pipe of ours.
    assert total < 4 * 2 * 64_000 + 256 * 1024 + 64 * 1024
    # However long the sender tries, no more is taken.
    assert rig.client.push(b"x") == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.client.send, noise(1_000_000, total))
        assert await rig.upstream.receive(total + 1_000_000) == noise(total + 1_000_000)
    await lab.settle()
    assert not flow.blocked
    assert lab.pipes.lent == 0


async def test_a_stopped_reader_does_not_stop_the_other_direction(lab: Any) -> None:
    rig = lab.relay(buffers=64_000)
    await fill(lab, rig.client)
    await pump(rig.upstream, rig.client, 500_000)


# Bulk


async def test_bulk_goes_through_a_pipe_and_a_trickle_does_not(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spliced = 0
    real = os.splice

    def splice(*args: Any, **kwargs: Any) -> int:
        nonlocal spliced
        spliced += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "splice", splice)
    rig = lab.relay()
    for _ in range(20):
        await pump(rig.client, rig.upstream, 10_000)
    assert spliced == 0
    await pump(rig.client, rig.upstream, 8_000_000)
    assert spliced > 0
    await lab.settle()
    assert lab.pipes.lent == 0
    for _ in range(5):
        await pump(rig.client, rig.upstream, 10)
        await lab.settle()
    spliced = 0
    for _ in range(5):
        await pump(rig.client, rig.upstream, 10)
        await lab.settle()
    assert spliced == 0
    assert lab.pipes.lent == 0


async def test_one_pipe_serves_many_streams_one_after_the_other(lab: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rigs = [lab.relay() for _ in range(10)]
    opened = len(os.listdir("/proc/self/fd"))
    assert opened == before + 40
    for rig in rigs:
        await pump(rig.client, rig.upstream, 2_000_000)
        await lab.settle()
        assert lab.pipes.lent == 0
    assert len(os.listdir("/proc/self/fd")) == opened + 2


@pytest.mark.parametrize("how", ["stop", "reset by client", "reset by upstream", "bug", "idle"])
async def test_a_pipe_with_bytes_in_it_never_returns_to_the_pool(lab: Any, how: str) -> None:
    rig = lab.relay(limits=Limits(idle=60.0))
    await fill(lab, rig.client)
    flow = rig.pair.up
    assert flow.pipe.filled
    assert lab.pipes.lent == 1
    match how:
        case "stop":
            rig.stop()
        case "reset by client":
            rig.client.reset()
            await lab.pass_time(6.0)
        case "reset by upstream":
            rig.upstream.reset()
        case "bug":
            flow.sink = None
            await rig.upstream.receive(4_000_000)
        case "idle":
            await lab.pass_time(61.0)
    await lab.settle()
    assert lab.pipes.lent == 0
    assert lab.pipes._free == []


async def test_without_pipes_bulk_flows_by_recv_and_send(lab: Any, no_more_descriptors: Any) -> None:
    rig = lab.relay()
    with no_more_descriptors():
        await pump(rig.client, rig.upstream, 5_000_000)
    assert lab.pipes.lent == 0
    assert lab.pipes._free == []


def make_endless(flow: Any) -> None:
    """Let the source of `flow` never run dry, and its sink take everything."""
    flow.source.sock = SimpleNamespace(recv_into=len, close=flow.source.sock.close)
    flow.sink.sock = SimpleNamespace(send=len, close=flow.sink.sock.close)


async def test_without_pipes_a_fast_stream_keeps_to_its_share_of_a_turn(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def borrow() -> None:
        nonlocal asked
        asked += 1

    rig = lab.relay()
    await lab.settle()
    monkeypatch.setattr(lab.pipes, "borrow", borrow)
    flow = rig.pair.up
    make_endless(flow)
    flow.readable = True
    flow.step()
    assert flow.count <= 2 * flow_module._QUANTUM
    flow.count = asked = 0
    for _ in range(20):
        (again,) = lab.reactor._resume
        lab.reactor._resume.clear()
        again.resume()
    assert flow.count <= 21 * flow_module._QUANTUM
    # Nor does it ask for a pipe all the time.
    assert asked <= 20
    rig.stop()


# Half-close


@pytest.mark.parametrize("first", ["client", "upstream"])
async def test_half_close_is_real(lab: Any, first: str) -> None:
    rig = lab.relay()
    ending, other = (rig.client, rig.upstream) if first == "client" else (rig.upstream, rig.client)
    await ending.send(b"all")
    ending.end()
    assert await other.rest() == (b"all", True)
    for size in (1, 5_000, 3_000_000, 1):
        await pump(other, ending, size)
    other.end()
    assert await ending.rest() == (b"", True)
    result = await rig.result()
    assert (result.reason, result.by) == (Reason.CLOSED, first)


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 131_073])
async def test_data_and_fin_in_one_segment(lab: Any, size: int) -> None:
    rig = lab.relay()
    await lab.settle()
    rig.client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    await rig.client.send(noise(size))
    rig.client.end()
    assert await rig.upstream.rest() == (noise(size), True)
    rig.upstream.end()
    assert (await rig.result())[:3] == (size, 0, Reason.CLOSED)


async def test_an_end_before_the_relay_started_is_not_missed(lab: Any) -> None:
    rig = lab.rig()
    await rig.client.send(b"all")
    rig.client.end()
    await lab.settle()
    assert await rig.near.receive() == b"all"
    lab.start(rig, to_upstream=b"all")
    assert await rig.upstream.rest() == (b"all", True)


async def test_the_end_of_a_blocked_direction_comes_after_its_bytes(lab: Any) -> None:
    rig = lab.relay()
    total = await fill(lab, rig.client)
    rig.client.end()
    await lab.settle()
    assert await rig.upstream.rest() == (noise(total), True)


# Resets


@pytest.fixture(params=["client", "upstream"])
def sides(request: pytest.FixtureRequest) -> Any:
    """Which side breaks: (name, its peer, the other peer) of a rig."""

    def of(rig: Any) -> tuple[str, Any, Any]:
        peers = (rig.client, rig.upstream)
        return (request.param, *(peers if request.param == "client" else peers[::-1]))

    return of


@pytest.mark.parametrize(
    ("actions", "heard"),
    [
        ("start reset", b""),
        ("start settle say end reset", b"last words"),
        ("say settle end reset settle start", b"last words"),
        ("say reset settle start", b"last words"),
        ("start other-ends say reset", b"last words"),
        # The receiver of bulk breaks; for example a server that answers 413 while the upload goes on.
        ("start fill reset", b""),
        ("start fill say reset", b"last words"),
        # In one batch of events. (Epoll chooses which it reports first, so both sides are tried.)
        ("start settle push reset", b""),
    ],
)
async def test_a_reset_is_passed_on_as_a_reset(lab: Any, sides: Any, actions: str, heard: bytes) -> None:
    lab.clock.run()
    rig = lab.rig()
    name, breaking, other = sides(rig)
    for action in actions.split():
        match action:
            case "start":
                lab.start(rig)
            case "settle":
                await lab.settle()
            case "say":
                await breaking.send(b"last words")
            case "end":
                breaking.end()
            case "reset":
                breaking.reset()
            case "other-ends":
                other.end()
                assert await breaking.receive(1) == b""
            case "fill":
                await fill(lab, other)
            case "push":
                other.push(b"lost")
    assert await other.rest() == (heard, False)
    assert (await rig.result())[2:4] == (Reason.RESET, name)


@pytest.mark.parametrize("size", [10, 50_000, 65_536, 131_072])
async def test_bytes_before_a_reset_are_delivered_first(lab: Any, sides: Any, size: int) -> None:
    lab.clock.run()
    rig = lab.relay()
    _, breaking, other = sides(rig)
    await lab.settle()
    await breaking.send(noise(size))
    breaking.reset()
    await lab.settle()
    data, clean = await other.rest()
    assert not clean
    # The kernel throws away what the sender had not sent yet, but nothing that has arrived here.
    assert data == noise(len(data))
    assert len(data) >= min(size, 60_000)
    assert (await rig.result()).reason is Reason.RESET


async def test_reset_in_the_middle_of_bulk(lab: Any, sides: Any) -> None:
    lab.clock.run()
    rig = lab.relay()
    name, breaking, other = sides(rig)
    total = await fill(lab, breaking)
    flow = rig.pair.up if name == "client" else rig.pair.down
    assert flow.pipe.filled
    breaking.reset()
    await lab.settle()
    data, clean = await other.rest()
    assert not clean
    assert data == noise(len(data))
    assert flow.count == len(data) <= total
    assert (await rig.result())[2:4] == (Reason.RESET, name)


@pytest.mark.parametrize("ending", ["breaking", "other"])
async def test_a_reset_beside_an_end_shows_as_an_error_behind_it(lab: Any, sides: Any, ending: str) -> None:
    lab.clock.run()
    rig = lab.relay()
    name, breaking, other = sides(rig)
    await lab.settle()
    if ending == "breaking":
        breaking.end()
        assert await other.receive(1) == b""
        await lab.settle()
    else:
        other.end()  # not seen yet when the reset comes
    breaking.reset()
    assert (await rig.result())[2:4] == (Reason.RESET, name)
    assert await other.broken()


async def test_a_survivor_that_does_not_read_delays_the_end_only_for_a_while(lab: Any, sides: Any) -> None:
    rig = lab.relay(limits=Limits(deliver=0.05))
    name, breaking, _ = sides(rig)
    await fill(lab, breaking)
    breaking.reset()
    await lab.settle()
    assert rig.outcome is None
    await lab.pass_time(0.06)  # until the pair ends
    assert rig.outcome is None
    await lab.pass_time(0.06)  # until it is closed
    assert (await rig.result())[2:4] == (Reason.RESET, name)


async def test_a_survivor_that_goes_away_too_is_not_waited_for(lab: Any, sides: Any) -> None:
    lab.clock.run()
    rig = lab.relay()
    name, breaking, other = sides(rig)
    await lab.settle()
    # The kernel has accepted all of it, and the reader has read nothing.
    far = rig.far if name == "client" else rig.near
    other.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await breaking.send(noise(60_000))
    await lab.settle()
    assert relay_module._unacknowledged(far.sock)
    breaking.reset()
    await lab.settle()
    assert rig.outcome is None
    other.reset()
    with trio.fail_after(1.0):
        await rig.done.wait()


class Stubborn:
    """A socket whose send raises this errno, except for as many bytes as it `takes`."""

    def __init__(self, sock: socket.socket, error: int = errno.EAGAIN) -> None:
        self.sock = sock
        self.error = error
        self.takes = 0

    def send(self, data: bytes) -> int:
        size, self.takes = min(len(data), self.takes), 0
        if not size:
            raise OSError(self.error, os.strerror(self.error))
        return self.sock.send(data[:size])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


async def test_a_sink_that_breaks_without_an_event_ends_the_pair_in_time(lab: Any) -> None:
    """Its own side may still send, but not for ever."""
    rig = lab.rig()
    rig.far.sock = Stubborn(rig.far.sock, errno.ENOBUFS)
    lab.start(rig)
    await rig.client.send(b"x")
    await lab.settle()
    await pump(rig.upstream, rig.client, 10)
    await lab.pass_time(Limits().deliver - 0.1)
    assert rig.outcome is None
    await lab.pass_time(0.1)
    assert (await rig.result())[:5] == (0, 10, Reason.ERROR, Side.UPSTREAM, errno.ENOBUFS)
    assert await rig.client.rest() == (b"", False)


async def test_the_first_reason_counts(lab: Any) -> None:
    rig = lab.relay()
    await lab.settle()
    rig.client.reset()
    lab.reactor.turn(0)
    lab.reactor.interrupt_all(RuntimeError)
    assert (await rig.result())[2:4] == (Reason.RESET, Side.CLIENT)


async def test_both_sides_reset_at_once(lab: Any) -> None:
    lab.clock.run()
    for _ in range(20):
        rig = lab.relay()
        await pump(rig.client, rig.upstream, 10)
        rig.client.push(b"a")
        rig.upstream.push(b"b")
        rig.client.reset()
        rig.upstream.reset()
        assert (await rig.result()).reason is Reason.RESET


# Urgent data


@pytest.mark.parametrize("before", [0, 1, 65_536, 131_072, 400_000])
@pytest.mark.parametrize("after", [0, 1, 100_000])
async def test_urgent_data_neither_stalls_nor_is_lost(lab: Any, before: int, after: int) -> None:
    rig = lab.relay()
    await lab.settle()

    async def talk() -> None:
        await rig.client.send(noise(before))
        rig.client.sock.send(noise(1, before), socket.MSG_OOB)
        await rig.client.send(noise(after, before + 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk)
        assert await rig.upstream.receive(before + 1 + after) == noise(before + 1 + after)
    await pump(rig.client, rig.upstream, 10)


@pytest.mark.parametrize("end", [True, False])
async def test_urgent_data_behind_bulk_that_waits(lab: Any, end: bool) -> None:
    """splice(2) stops at the urgent mark, as if there were nothing, or the end."""
    rig = lab.relay(buffers=200_000)
    total = await fill(lab, rig.client)
    assert rig.pair.up.bulk
    await rig.upstream.receive(400_000)
    await lab.settle()
    rest = total - 400_000
    total += rig.client.push(noise(50_000, total))
    rig.client.sock.send(noise(1, total), socket.MSG_OOB)
    total += 1
    total += rig.client.push(noise(50_000, total))
    if end:
        rig.client.end()
        assert await rig.upstream.rest() == (noise(total - 400_000, 400_000), True)
    else:
        assert await rig.upstream.receive(total - 400_000) == noise(total - 400_000, 400_000)
    assert rest > 0


# Time


async def test_idle_timeout(lab: Any) -> None:
    rig = lab.relay(limits=Limits(idle=60.0, half_closed=10.0))
    await lab.pass_time(59.0)
    await pump(rig.upstream, rig.client, 1)
    await lab.pass_time(59.0)
    await pump(rig.client, rig.upstream, 1)
    await lab.pass_time(59.0)
    assert rig.outcome is None
    await lab.pass_time(1.0)
    assert (await rig.result())[:5] == (1, 1, Reason.IDLE, Side.PROXY, 0)
    assert await rig.client.rest() == (b"", False)
    assert await rig.upstream.rest() == (b"", False)


@pytest.mark.parametrize("idle", [60.0, 5.0])
async def test_half_closed_timeout(lab: Any, idle: float) -> None:
    rig = lab.relay(limits=Limits(idle=idle, half_closed=10.0))
    await lab.pass_time(idle - 1)
    rig.client.end()
    assert await rig.upstream.rest() == (b"", True)
    await lab.pass_time(9.0)
    await pump(rig.upstream, rig.client, 1)
    await lab.pass_time(9.0)
    assert rig.outcome is None
    await lab.pass_time(1.0)
    result = await rig.result()
    assert result[:5] == (0, 1, Reason.HALF_CLOSED, Side.PROXY, 0)
    assert (result.first, result.alone) == (Side.CLIENT, 19.0)


async def test_half_closed_timeout_does_not_wait_for_the_idle_one(lab: Any) -> None:
    rig = lab.relay(limits=Limits(idle=1e6, half_closed=10.0))
    rig.client.end()
    await lab.pass_time(10.0)
    assert (await rig.result()).reason is Reason.HALF_CLOSED


async def test_a_slow_reader_of_the_leftovers_is_not_idle(lab: Any) -> None:
    rig = lab.rig()
    rig.far.sock = sink = Stubborn(rig.far.sock)
    lab.start(rig, limits=Limits(idle=60.0), to_upstream=b"leftovers")
    for size in range(1, 5):
        await lab.pass_time(40.0)
        sink.takes = 1
        rig.pair.down.on_event(select.EPOLLOUT)
        assert rig.pair.up.count == size
    assert rig.outcome is None


async def test_a_slow_reader_of_a_full_pipe_is_not_idle(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.splice
    credit = 0

    def splice(source: int, sink: int, size: int, **more: Any) -> int:
        nonlocal credit
        if sink == rig.far.fd:
            if not credit:
                raise BlockingIOError
            size, credit = min(size, credit), 0
        return real(source, sink, size, **more)

    monkeypatch.setattr(os, "splice", splice)
    rig = lab.relay(limits=Limits(idle=60.0))
    await fill(lab, rig.client)
    filled = rig.pair.up.pipe.filled
    assert filled > 5
    for taken in range(1, 5):
        await lab.pass_time(40.0)
        credit = 1
        rig.pair.down.on_event(select.EPOLLOUT)
        lab.reactor.turn(0)
        assert rig.pair.up.pipe.filled == filled - taken
    assert rig.outcome is None


# Faults of our own


@pytest.mark.parametrize("when", ["event", "start", "resume"])
async def test_a_bug_in_one_pair_is_raised_in_its_own_session(
    lab: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Bug(Exception):
        pass

    healthy = lab.relay()
    rig = lab.rig()
    if when == "start":
        await rig.client.send(b"x")
    await lab.settle()
    victim = rig.near.fd
    real = Flow.step

    def step(self: Flow) -> None:
        if self.source.fd == victim:
            if when == "resume" and self not in resumed:
                resumed.append(self)
                self.pair.reactor.resume_later(self)
                return
            raise Bug
        real(self)

    resumed: list[Flow] = []
    monkeypatch.setattr(Flow, "step", step)
    lab.start(rig)
    await lab.settle()
    if when != "start":
        assert rig.outcome is None
        await rig.client.send(b"x")
    with pytest.raises(Bug):
        await rig.result()
    await pump(healthy.client, healthy.upstream, 1_000_000)


async def test_a_bug_at_the_start_gives_everything_back(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    await fill(lab, rig.client)

    def bug(self: Flow) -> None:
        if self.pair.result is not None:  # as the real one
            return
        self.pipe = self.pair.pipes.borrow()
        self.pair.reactor.resume_later(self)
        raise KeyError

    monkeypatch.setattr(Flow, "step", bug)
    lab.start(rig)
    with pytest.raises(KeyError):
        await rig.result()
    assert lab.pipes.lent == 0
    await lab.settle()


# Stopped sessions


async def test_stopping_gives_the_endpoints_back(lab: Any) -> None:
    rig = lab.relay()
    await lab.settle()
    rig.stop()
    with trio.fail_after(5):
        await rig.done.wait()
    assert (rig.near.fd, rig.far.fd) == (-1, -1)
    assert await rig.client.rest() == (b"", True)
    assert rig.near.reactor.handlers == {}


async def test_stopping_under_load_at_random_moments(lab: Any) -> None:
    """Stop, reset, end, deadline and events of one pair in the same turn, thousands of times."""
    lab.clock.run()
    random = Random(3)

    async def one() -> None:
        rig = lab.rig()
        limits = Limits(idle=random.choice([0.0, 1.0, 1e9]), half_closed=random.choice([0.0, 1e9]))
        lab.start(rig, limits=limits, to_upstream=noise(random.choice([0, 10])), to_client=b"")
        for _ in range(random.randrange(4)):
            await trio.lowlevel.checkpoint()
        actions = [
            lambda: rig.client.push(noise(random.choice([1, 70_000, 300_000]))),
            lambda: rig.upstream.push(noise(random.choice([1, 70_000, 300_000]))),
            rig.client.pull,
            rig.client.end,
            rig.upstream.end,
            lab.reactor.sweep,
            rig.client.reset,
            rig.upstream.reset,
            rig.stop,
        ]
        random.shuffle(actions)
        for action in actions:
            with suppress(OSError):
                action()
            if random.random() < 0.4:
                await trio.lowlevel.checkpoint()
        with trio.fail_after(10):
            await rig.done.wait()
        assert not isinstance(rig.outcome, BaseException)
        rig.client.close()
        rig.upstream.close()
        lab.rigs.remove(rig)

    async def worker() -> None:
        for _ in range(100):
            await one()

    survivor = lab.relay()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(worker)
    assert lab.pipes.lent == 0
    assert len(lab.reactor.handlers) == 2
    await pump(survivor.client, survivor.upstream, 1_000_000)


# Fairness


async def test_an_echo_beside_fast_streams_waits_for_few_turns(lab: Any) -> None:
    turns = 0
    real = lab.reactor.turn

    def turn(patience: float) -> None:
        nonlocal turns
        turns += 1
        real(patience)
        waiting = lab.reactor._resume
        assert len(waiting) == len(set(map(id, waiting))), "a stream has more than one share of the next turn"

    lab.reactor.turn = turn
    echo = lab.relay()
    stop = False

    data = bytes(4_000_000)

    async def rush(rig: Any) -> None:
        async def send() -> None:
            while not stop:
                await rig.client.send(data)
            rig.client.end()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while rig.upstream.pull() or not stop:
                await trio.lowlevel.checkpoint()
            await rig.upstream.rest()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(rush, lab.relay())
        for _ in range(50):
            before = turns
            await echo.client.send(b"?")
            assert await echo.upstream.receive(1) == b"?"
            await echo.upstream.send(b"!")
            assert await echo.client.receive(1) == b"!"
            assert turns - before <= 12
        stop = True


@pytest.mark.parametrize("bulk", [False, True])
async def test_a_stream_has_one_share_of_a_turn(lab: Any, monkeypatch: pytest.MonkeyPatch, bulk: bool) -> None:
    rig = lab.relay()
    await lab.settle()
    flow = rig.pair.up
    flow.bulk = bulk
    if bulk:
        monkeypatch.setattr(os, "splice", lambda source, sink, size, **_: size)
    else:
        make_endless(flow)
        lab.pipes.borrow = lambda: None
    for _ in range(5):
        rig.client.push(b"x")
        before = flow.count
        lab.reactor.turn(0)
        assert 0 < flow.count - before <= flow_module._QUANTUM + 256 * 1024
        assert len(lab.reactor._resume) == 1
    assert lab.pipes.lent == 0  # none is kept between turns
    rig.stop()


async def test_bulk_comes_after_all_events_and_only_until_the_time_is_up(lab: Any) -> None:
    class Bulk:
        def __init__(self, name: str) -> None:
            self.name = name

        def resume(self) -> None:
            done.append(self.name)
            lab.clock.now += 0.003
            lab.reactor.resume_later(self)

    done: list[str] = []
    endpoint, peer = lab.endpoint()
    lab.reactor.handlers[endpoint.fd] = SimpleNamespace(on_event=lambda _: done.append("event"), deadline=inf)
    lab.reactor._resume = [Bulk("a"), Bulk("b"), Bulk("c")]
    for expected in ("event a b", "event c a", "event b c"):
        done.clear()
        peer.push(b"x")
        lab.reactor.turn(0)
        assert done == expected.split()
    lab.reactor._resume.clear()


async def test_bulk_that_waited_for_the_relay_flows_at_once(lab: Any) -> None:
    """The reactor sleeps when the relay starts, and all its events are old: only the relay itself can wake it."""
    rig = lab.rig(buffers=200_000)
    size = rig.client.push(noise(200_000))
    assert size > 3 * 65_536
    await lab.settle()
    lab.start(rig)
    await lab.settle()
    assert len(rig.upstream.pull()) == size


# Closing


@pytest.mark.parametrize("size", [0, 10, 200_000])
async def test_after_a_clean_end_both_sides_see_all_data_and_a_fin(lab: Any, size: int) -> None:
    rig = lab.relay()
    await rig.client.send(noise(size))
    await rig.upstream.send(noise(size, 1))
    rig.client.end()
    rig.upstream.end()
    await rig.result()
    assert (rig.near.fd, rig.far.fd) == (-1, -1)
    assert await rig.upstream.rest() == (noise(size), True)
    assert await rig.client.rest() == (noise(size, 1), True)


async def test_interrupt_ends_as_stopped_and_resets_both(lab: Any) -> None:
    rig = lab.relay()
    await pump(rig.client, rig.upstream, 3)
    lab.reactor.interrupt_all(RuntimeError)
    assert (await rig.result())[:5] == (3, 0, Reason.STOPPED, Side.PROXY, 0)
    assert await rig.client.rest() == (b"", False)
    assert await rig.upstream.rest() == (b"", False)


# Memory


async def test_an_idle_pair_is_small(lab: Any) -> None:
    pairs = 200  # of four sockets, where 1024 are all that a user may have
    rigs = [lab.rig() for _ in range(pairs)]
    await lab.settle()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for rig in rigs:
        lab.start(rig)
    await lab.settle()
    size = (tracemalloc.get_traced_memory()[0] - before) / pairs
    tracemalloc.stop()
    print(f"{size:.0f} bytes per relay")
    assert size < 5_000

"""Messages over a real socket pair: each whole, in order, with its descriptors."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from usocksd.serve.channel import Channel


@pytest.fixture
async def pair(nothing_leaks: None) -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    ours, theirs = (Channel(trio.socket.from_stdlib_socket(sock)) for sock in (left, right))
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_messages_in_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    sent = [{"number": number, "text": "x" * number} for number in range(100)]
    for message in sent:
        await ours.send(message)
    with trio.fail_after(5):
        assert [await theirs.receive() for _ in sent] == [(message, []) for message in sent]


async def test_large_messages_from_several_tasks(pair: tuple[Channel, Channel]) -> None:
    """Much more than fits into the socket: each stays whole."""
    ours, theirs = pair
    got = set()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ours.send, {"number": number, "text": "ä" * 1_000_000})
            await trio.testing.wait_all_tasks_blocked()
            assert ours.sending
            for _ in range(5):
                received = await theirs.receive()
                assert received is not None
                message, _ = received
                assert message["text"] == "ä" * 1_000_000
                got.add(message["number"])
    assert got == set(range(5))
    assert not ours.sending


async def test_descriptors_go_along(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    ours, theirs = pair
    files = [(tmp_path / str(number)).open("w+") for number in range(250)]
    await ours.send({"with": 3}, [file.fileno() for file in files[:3]])
    await ours.send({"with": 0})
    await ours.send({"with": 247}, [file.fileno() for file in files[3:]])
    names = []
    with trio.fail_after(5):
        for count in (3, 0, 247):
            received = await theirs.receive()
            assert received is not None
            message, fds = received
            assert message == {"with": count}
            assert len(fds) == count
            for fd in fds:
                names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
                os.close(fd)
    assert names == [str(number) for number in range(250)]
    for file in files:
        file.close()


async def test_the_end(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    """Messages sent before the end arrive. Partial messages, and descriptors that were not taken, are dropped."""
    ours, theirs = pair
    await ours.send({"last": True})
    with (tmp_path / "file").open("w") as file:
        await ours.send({"never": "taken"}, [file.fileno()])
    ours.close()
    with trio.fail_after(5):
        assert await theirs.receive() == ({"last": True}, [])
    with pytest.raises(BrokenPipeError):
        await theirs.send({"too": "late"})
    await trio.lowlevel.checkpoint()


async def test_half_a_message(nothing_leaks: None) -> None:
    left, right = socket.socketpair()
    channel = Channel(trio.socket.from_stdlib_socket(right))
    left.sendall(b"\0\0\0\x20\0\0{")
    left.close()
    assert await channel.receive() is None
    assert channel.unread() == b"\0\0\0\x20\0\0{"
    channel.close()


async def test_a_torn_message(nothing_leaks: None) -> None:
    """The other side ended in the middle of a message, and other bytes follow: that counts as the end."""
    left, right = socket.socketpair()
    with left:
        channel = Channel(trio.socket.from_stdlib_socket(right))
        left.sendall(b"\0\0\0\x10\0\0" + b'{"half":' + b"\0\0\0\x02\0\0{}")
        with trio.fail_after(5):
            assert await channel.receive() is None
        channel.close()


async def test_a_sender_that_is_cancelled(pair: tuple[Channel, Channel]) -> None:
    """The message that it has begun arrives whole, and so does the next one."""
    ours, theirs = pair
    large = {"text": "x" * 1_000_000}
    scope = trio.CancelScope()

    async def begin() -> None:
        with scope:
            await ours.send(large)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            nursery.start_soon(ours.send, {"next": True})
            assert await theirs.receive() == (large, [])
            assert await theirs.receive() == ({"next": True}, [])
    assert scope.cancelled_caught


async def test_a_reader_that_takes_long(pair: tuple[Channel, Channel], mock_clock: trio.testing.MockClock) -> None:
    """A sender without a time limit waits; one with a limit closes the channel."""
    ours, theirs = pair
    large = {"text": "x" * 1_000_000}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send, large)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3600)
        assert await theirs.receive() == (large, [])
    mock_clock.autojump_threshold = 0
    with trio.fail_after(60):
        with trio.move_on_after(1):
            await ours.send(large)
        assert await ours.receive() is None
        assert await theirs.receive() is None


async def test_a_channel_is_handed_on(nothing_leaks: None) -> None:
    """The part of a message that has arrived is passed on; the rest is still in the socket."""
    left, right = socket.socketpair()
    ours = Channel(trio.socket.from_stdlib_socket(left))
    await ours.send({"number": 1})
    data = right.recv(7)
    heir = Channel(trio.socket.from_stdlib_socket(right), data)
    with trio.fail_after(5):
        assert await heir.receive() == ({"number": 1}, [])
    for channel in (ours, heir):
        channel.close()

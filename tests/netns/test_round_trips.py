"""Counts the round trips of connections through usocksd, from connect to the answer, for a client that speaks first,
over a link with a delay; and TCP Fast Open.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import daemons
import lab
import pytest
from daemons import Daemon, Served
from delay import ROUND_TRIP, DelayLine, opens_fast
from turning import turning

from usocksd.errors import DialError
from usocksd.net import dial as dial_module
from usocksd.net.bridge import in_session
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import DeadlineExpired
from usocksd.net.reactor import Reactor
from usocksd.socks import Established, SocksConnect

USOCKSD = f"""
workers = 1
[incoming]
port = 1080
addresses = ["{lab.NEXT_V4}", "{lab.NEXT_V6}"]
allow_from = ["198.51.100.0/24", "2001:db8:100::/64"]
[outgoing]
allow_sites = ["203.0.113.0/24", "2001:db8:80::/64"]  # they are its own host's
"""
PROXY = {4: lab.NEXT_V4, 6: lab.NEXT_V6}
WEB = {4: lab.WEB_V4, 6: lab.WEB_V6}
HELLO = b"\x16\x03\x01" + bytes(500)
LONG = b"\x16\x03\x01" + bytes(range(256)) * 12
MARK = 16


class Answer(NamedTuple):
    round_trips: float
    unproven: bool
    """whether connect(2) returned without an answer"""


Ask = Callable[..., Awaitable[Answer]]


@pytest.fixture(autouse=True)
def net(delayed_net: tuple[lab.Net, DelayLine], monkeypatch: pytest.MonkeyPatch) -> lab.Net:
    """The reactor of this process dials from the client's host, which has no cookies yet."""
    net, _ = delayed_net

    def socket_there(family: int, kind: int) -> socket.socket:
        sock = net.client.socket(family, kind)
        sock.setblocking(False)
        return sock

    monkeypatch.setattr(dial_module, "SocketType", socket_there)
    return net


@pytest.fixture
def link(delayed_net: tuple[lab.Net, DelayLine]) -> DelayLine:
    return delayed_net[1]


@pytest.fixture(autouse=True)
def server(delayed_net: tuple[lab.Net, DelayLine], tmp_path: Path) -> Iterator[Daemon]:
    net, _ = delayed_net
    with Daemon("usocksd", USOCKSD, tmp_path, popen=net.outside.popen) as daemon:
        yield daemon


class Clock:
    """The time, and some seconds more."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def reactor(clock: Clock) -> AsyncIterator[Reactor]:
    async with turning(Reactor(clock=clock, sweep_every=0.05)) as reactor:
        yield reactor


@pytest.fixture
def dialer(reactor: Reactor) -> Dialer:
    return Dialer(reactor)


@pytest.fixture
def web(net: lab.Net) -> Iterator[dict[int, Served]]:
    with (
        Served(net.outside.listen(WEB[4]), daemons.echo) as v4,
        Served(net.outside.listen(WEB[6]), daemons.echo) as v6,
    ):
        yield {4: v4, 6: v6}


@pytest.fixture
def ask(dialer: Dialer, reactor: Reactor, web: dict[int, Served], link: DelayLine) -> Ask:
    async def session(first: bytes, fast: bool, repeatable: bool, version: int) -> Answer:
        """`first`, with a mark at its end, goes to the web server, pipelined through usocksd; the same comes back."""
        first += os.urandom(MARK)
        target = Target(PROXY[version], 1080, fast_open=fast)
        handshake = SocksConnect(WEB[version], web[version].port, pipelined=True)
        endpoint, _ = await dialer.dial([target], deadline=reactor.clock() + daemons.PATIENCE)
        unproven = endpoint.unproven
        endpoint.deadline = reactor.clock() + daemons.PATIENCE
        if repeatable:
            await endpoint.send_all(handshake.data_to_send() + first)
        else:
            await endpoint.send_all(handshake.data_to_send())
            await endpoint.proven()
            await endpoint.send_all(first)
        while not isinstance(handshake.next_event(), Established):
            handshake.receive_data(await endpoint.receive())
        data = handshake.trailing_data
        while len(data) < len(first):
            data += await endpoint.receive()
        endpoint.close()
        assert data == first
        return Answer(link.round_trips(first[-MARK:]), unproven)

    async def ask(first: bytes, *, fast: bool, repeatable: bool = True, version: int = 4) -> Answer:
        return await in_session(reactor, session(first, fast, repeatable, version))

    return ask


async def fewest(round_trips: int, ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """An answer after this many round trips, never fewer. A busy machine may split what belongs together, so the best
    of several counts.
    """
    for _ in range(5):
        answer = await ask()
        assert answer.round_trips >= round_trips
        if answer.round_trips == round_trips:
            return answer
    pytest.fail(f"{round_trips} round trips, but it took {answer.round_trips}")


@pytest.mark.parametrize("version", [4, 6])
async def test_a_pipelined_handshake_takes_as_many_as_a_straight_connection(ask: Ask, version: int) -> None:
    await fewest(2, lambda: ask(HELLO, fast=False, version=version))


@pytest.mark.parametrize("version", [4, 6])
async def test_fast_open_saves_one_from_the_second_connection_on(
    ask: Ask, web: dict[int, Served], version: int
) -> None:
    first = await ask(HELLO, fast=True, version=version)
    assert not first.unproven
    assert first.round_trips >= 2
    answer = await fewest(1, lambda: ask(HELLO, fast=True, version=version))
    assert answer.unproven


async def test_fast_open_with_more_than_fits_into_a_syn(ask: Ask) -> None:
    await ask(HELLO, fast=True)
    answer = await fewest(2, lambda: ask(LONG, fast=True))
    assert answer.unproven


async def test_bytes_that_must_not_be_repeated_wait_for_a_proven_connection(ask: Ask, link: DelayLine) -> None:
    await ask(HELLO, fast=True)
    carried = []
    link.loses = lambda packet: carried.append(packet) is not None
    answer = await fewest(2, lambda: ask(b"DELETE / HTTP/1.0\r\n\r\n", fast=True, repeatable=False))
    assert answer.unproven
    syns = [packet for packet in carried if opens_fast(packet)]
    assert any(b"\x05\x01\x00\x05" in packet for packet in syns)
    assert not any(b"DELETE" in packet for packet in syns)


@pytest.mark.parametrize("cause", [errno.ECONNREFUSED, errno.ETIMEDOUT])
@pytest.mark.parametrize("wait", ["receive", "proven"])
async def test_the_verdict_on_a_connect_comes_with_the_first_wait(
    dialer: Dialer, reactor: Reactor, ask: Ask, link: DelayLine, cause: int, wait: str
) -> None:
    await ask(HELLO, fast=True)
    if cause == errno.ETIMEDOUT:
        link.loses = lambda packet: True
    target = Target(lab.NEXT_V4, 1 if cause == errno.ECONNREFUSED else 1080, fast_open=True)

    async def session() -> None:
        endpoint, _ = await dialer.dial([target], deadline=reactor.clock() + 1)
        assert endpoint.unproven
        await endpoint.send_all(b"\x05\x01\x00")
        endpoint.deadline = reactor.clock() + (3 * ROUND_TRIP if cause == errno.ETIMEDOUT else daemons.PATIENCE)
        with pytest.raises(DialError) as caught:
            await (endpoint.receive() if wait == "receive" else endpoint.proven())
        assert (caught.value.errno, caught.value.address, caught.value.step) == (cause, str(target), "connect")
        endpoint.close()

    await in_session(reactor, session())


async def test_a_peer_that_is_silent_after_the_syn_is_late_and_not_unreachable(
    dialer: Dialer, reactor: Reactor, ask: Ask, net: lab.Net
) -> None:
    await ask(HELLO, fast=True)
    with net.outside.listen(lab.NEXT_V4) as silent:

        async def session() -> None:
            target = Target(*silent.getsockname(), fast_open=True)
            endpoint, _ = await dialer.dial([target], deadline=reactor.clock() + 1)
            assert endpoint.unproven
            await endpoint.send_all(b"\x05\x01\x00")
            endpoint.deadline = reactor.clock() + 3 * ROUND_TRIP
            with pytest.raises(DeadlineExpired):
                await endpoint.receive()
            assert not endpoint.unproven
            endpoint.close()

        await in_session(reactor, session())


async def test_with_several_addresses_none_is_used_unproven(dialer: Dialer, reactor: Reactor, ask: Ask) -> None:
    await ask(HELLO, fast=True)
    targets = [Target(lab.NEXT_V4, port, fast_open=True) for port in (1, 1080)]
    endpoint, target = await in_session(reactor, dialer.dial(targets, deadline=reactor.clock() + daemons.PATIENCE))
    assert (endpoint.unproven, target) == (False, targets[1])
    endpoint.close()


@pytest.mark.parametrize("known", [False, True], ids=["asking for a cookie", "with data"])
async def test_where_such_syns_get_lost_it_costs_a_second_once(ask: Ask, link: DelayLine, known: bool) -> None:
    if known:
        await ask(HELLO, fast=True)
    link.loses = opens_fast
    since = time.monotonic()
    answer = await ask(HELLO, fast=True)
    assert answer.unproven == known
    assert time.monotonic() - since > 1
    answer = await fewest(2, lambda: ask(HELLO, fast=True))
    assert not answer.unproven


async def test_a_lost_syn_is_remembered_for_longer_each_time(ask: Ask, link: DelayLine, clock: Clock) -> None:
    """Any SYN may be lost by chance: a minute the first time, then two; one that arrives ends the blame."""
    await ask(HELLO, fast=True)
    link.loses = opens_fast
    for seconds in (60, 120):
        assert (await ask(HELLO, fast=True)).unproven
        clock.ahead += seconds - 10
        assert not (await ask(HELLO, fast=True)).unproven
        clock.ahead += 10
    link.loses = lambda packet: False
    assert (await ask(HELLO, fast=True)).unproven
    link.loses = opens_fast
    await ask(HELLO, fast=True)
    link.loses = lambda packet: False
    clock.ahead += 60
    assert (await ask(HELLO, fast=True)).unproven

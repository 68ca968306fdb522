"""Groups of upstreams: which is asked, in which order, and what happens when one fails.

Over real sockets. Where time matters, the clock moves only when a test says so: it has `mock_clock` among its arguments.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import daemons
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from turning import start, turning

from transocks.config import TransocksConfig
from transocks.direct import Direct
from transocks.upstreams.group import NoUdp
from transocks.upstreams.proxy_url import ProxyScheme
from transocks.upstreams.request import Tunnel, TunnelRequest
from transocks.upstreams.state import Answer
from transocks.upstreams.upstream import UpstreamDown
from transocks.upstreams.upstreams import Upstreams
from usocksd.errors import Denied, DialError, Error, ResolveError, UpstreamError
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort
from usocksd.net.dial import Dialer, Target
from usocksd.net.endpoint import Endpoint, Interruptible, PeerReset
from usocksd.net.reactor import IN, Reactor
from usocksd.settings.loader import parse
from usocksd.settings.types import Timeouts
from usocksd.socks import RequestRefused, UpstreamFault

WEB = HostPort("203.0.113.80", 443)
WEB_V6 = HostPort("2001:db8::80", 443)
CLIENT = HostPort("192.0.2.7", 40000)
HELLO = b"\x16\x03\x01 hello"
ASK_WEB = daemons.request(*WEB)
GRANTED = b"\x05\x00\x00" + daemons.address_bytes("0.0.0.0", 0)
PROBE = b"\x05\x02\xf5\x00"
SUSPECT = 0.3
USOCKSD = Answer(0.001, ours=True, pipelines=True)


class Peer:
    """A proxy that answers each connection as `script` says."""

    def __init__(self, script: Callable[[bytes], bytes | None], host: str = "127.0.0.1") -> None:
        self.host = host
        self.script = script
        """Makes the whole answer from all that a connection has sent; None closes it."""
        self.heard: list[bytes] = []
        """The bytes that each connection has sent."""
        self.pieces: list[list[bytes]] = []
        """As it was received."""
        self.streams: list[trio.SocketStream] = []
        self._sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._sock:
            await self._sock.bind((self.host, self.port))
            self._sock.listen(100)
            self.port = self._sock.getsockname()[1]
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    sock, _ = await self._sock.accept()
                    nursery.start_soon(self._serve, trio.SocketStream(sock))

    async def _serve(self, stream: trio.SocketStream) -> None:
        number = len(self.heard)
        self.heard.append(b"")
        self.pieces.append([])
        self.streams.append(stream)
        said = 0
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await stream.receive_some():
                    self.heard[number] += data
                    self.pieces[number].append(data)
                    answer = self.script(self.heard[number])
                    if answer is None:
                        return
                    await stream.send_all(answer[said:])
                    said = max(said, len(answer))

    @property
    def asked(self) -> int:
        """How often it was asked for a destination."""
        return sum(ASK_WEB in heard for heard in self.heard)

    @property
    def probed(self) -> int:
        return sum(heard.startswith((b"\x05\x02\xf5", b"\x05\x01\xf5")) for heard in self.heard)


def socks(
    reply: int = 0, *, greeting: bytes = daemons.GREETING, method: bytes = b"\x05\x00", ours: bool = False
) -> Any:
    """A SOCKS5 server, as far as these tests go. `ours`: answers probes as usocksd does."""

    def script(heard: bytes) -> bytes | None:
        if heard.startswith(PROBE[: len(heard)]):
            return b"" if len(heard) < len(PROBE) else b"\x05\xf5" if ours else b"\x05\x00"
        if len(heard) < len(greeting):
            return b""
        if len(heard) < len(greeting) + 10:
            return method
        return method + b"\x05" + bytes((reply,)) + GRANTED[2:]

    return script


def silent(_: bytes) -> bytes:
    return b""


def closing(_: bytes) -> None:
    return None


def slow(heard: bytes) -> bytes:
    """Answers all but requests."""
    answer: bytes = socks()(heard)
    return answer[:2]


class FakeProgress:
    """Records what a session would be told."""

    def __init__(self) -> None:
        self.tries: list[tuple[str, str]] = []
        self.schemes: list[ProxyScheme | None] = []

    def trying(self, group: str, upstream: str, scheme: ProxyScheme | None) -> None:
        self.tries.append((group, upstream))
        self.schemes.append(scheme)

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        pass


class Session:
    """One that asks for a tunnel."""

    def __init__(self) -> None:
        self.access = FakeProgress()
        self.outcome: Tunnel | BaseException | None = None
        self.client: socket.socket | None = None
        self.done: trio.Event

    async def over(self) -> None:
        """Wait for its end, by the clock on the wall: trio's may stand still."""
        deadline = time.monotonic() + daemons.PATIENCE
        while not self.done.is_set():
            assert time.monotonic() < deadline, f"tried {self.access.tries}"
            await trio.lowlevel.checkpoint()

    async def tunnel(self) -> Tunnel:
        await self.over()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    @property
    def through(self) -> list[str]:
        """The ports of the proxies that were tried."""
        return [upstream.rpartition(":")[2] for _, upstream in self.access.tries]


class World:
    """Upstreams in one worker, and their peers."""

    def __init__(self, nursery: trio.Nursery, reactor: Reactor, clock: MockClock) -> None:
        self.nursery = nursery
        self.reactor = reactor
        self.clock = clock
        self.shared: list[Any] = []
        self.metrics = Metrics("transocks")
        self.upstreams: Upstreams
        self.dns = "127.0.0.1:1"
        self._open: list[socket.socket | Endpoint] = []

    async def peers(self, *scripts: Callable[[bytes], bytes | None]) -> list[Peer]:
        found = [Peer(script) for script in scripts]
        for peer in found:
            await self.nursery.start(peer.run)
        return found

    async def configured(self, *urls: str | Peer, more: str = "") -> Upstreams:
        listed = [url if isinstance(url, str) else f"socks5://127.0.0.1:{url.port}" for url in urls]
        config = parse(TransocksConfig, f"proxy_url = {listed}\n{more}", "transocks.toml")
        host, _, port = self.dns.rpartition(":")
        resolver = Resolver((HostPort(host, int(port)),), Metrics("dns"), clock=trio.current_time)
        await self.nursery.start(resolver.run)
        dialer = Dialer(self.reactor)
        self.upstreams = Upstreams(
            config.groups(),
            config.health,
            dialer=dialer,
            resolver=resolver,
            mark=None,
            fast_open=config.fast_open,
            direct=Direct(dialer=dialer, resolver=resolver, mark=None, is_local=lambda ip: ip.is_loopback),
            share=self.shared.append,
            metrics=self.metrics,
        )
        await self.nursery.start(self.upstreams.health.run)
        return self.upstreams

    async def upstreams_of(self, *scripts: Callable[[bytes], bytes | None], more: str = "") -> list[Peer]:
        """Peers with these scripts, configured as upstreams in this order."""
        found = await self.peers(*scripts)
        await self.configured(*found, more=more)
        return found

    def ask(self, request: TunnelRequest = TunnelRequest(CLIENT, WEB), group: str = "default") -> Session:  # noqa: B008
        session = Session()
        near, session.client = socket.socketpair()
        near.setblocking(False)
        endpoint = Endpoint(self.reactor, near)
        self._open += [endpoint, session.client]

        async def run() -> None:
            try:
                session.outcome = await self.upstreams.groups[group].connect(
                    request, endpoint, Timeouts(), session.access
                )
                self._open.append(session.outcome.endpoint)
            except (Error, PeerReset) as error:
                session.outcome = error

        session.done = start(self.reactor, run)
        return session

    async def associated(self, group: str = "default") -> Session:
        """One that has asked for a UDP association; its outcome is a RuntimeError if it has to go directly."""
        session = Session()
        request = TunnelRequest(CLIENT, WEB, udp=True)

        async def run() -> None:
            try:
                found = await self.upstreams.groups[group].associate(
                    request, Interruptible(self.reactor), Timeouts(), session.access
                )
                if found is None:
                    session.outcome = RuntimeError("directly")
                else:
                    session.outcome = found[0]
                    self._open.append(found[0].endpoint)
            except Error as error:
                session.outcome = error

        session.done = start(self.reactor, run)
        await session.over()
        return session

    async def asked(self, request: TunnelRequest = TunnelRequest(CLIENT, WEB), group: str = "default") -> Session:  # noqa: B008
        """One that has come to an end."""
        session = self.ask(request, group)
        await session.over()
        return session

    async def pass_time(self, seconds: float) -> None:
        assert trio.lowlevel.current_clock() is self.clock, "the test has mock_clock among its arguments"
        await wait_all_tasks_blocked(0.005)
        self.clock.jump(seconds)
        await wait_all_tasks_blocked(0.005)

    async def suspect(self) -> None:
        """The time until the first probe, and the time for its answer."""
        for _ in range(2):
            await self.pass_time(SUSPECT)

    def answered(self, peer: Peer, answer: Answer) -> None:
        """As if that had been the answer to a probe."""
        self.state(peer).answered(answer, trio.current_time())

    def state(self, peer: Peer) -> Any:
        return next(
            each.state
            for group in self.upstreams.groups.values()
            for each in group.upstreams
            if each.name.endswith(f":{peer.port}")
        )

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        values = self.metrics.snapshot()[f"transocks_{name}"]["values"]
        return {tuple(labels): numbers[0] for labels, numbers in values if numbers[0]}

    def close(self) -> None:
        for each in self._open:
            each.close()


@pytest.fixture
async def world(mock_clock: MockClock) -> AsyncIterator[World]:
    reactor = Reactor(clock=trio.current_time, sweep_every=0.5)
    async with turning(reactor), trio.open_nursery() as nursery:
        world = World(nursery, reactor, mock_clock)
        yield world
        nursery.cancel_scope.cancel()
    world.close()


def port(peer: Peer) -> str:
    return str(peer.port)


# ---- failover


async def test_after_a_refused_connection_the_next_is_tried_at_once(world: World) -> None:
    (well,) = await world.peers(socks())
    dead = daemons.free_port()
    await world.configured(f"socks5://127.0.0.1:{dead}", well)
    session = await world.asked()
    await session.tunnel()
    assert session.through == [str(dead), port(well)]
    # From now on it is left out.
    assert (await world.asked()).through == [port(well)]
    assert world.counted("upstream_failovers_total") == {("default", f"socks5://127.0.0.1:{dead}"): 1}
    assert world.counted("upstream_up") == {("default", f"socks5://127.0.0.1:{well.port}"): 1}


def http(status: int) -> Any:
    return lambda _: f"HTTP/1.1 {status} No\r\n\r\n".encode()


def socks4(code: int) -> Any:
    return lambda _: bytes((0, code)) + bytes(6)


@pytest.mark.parametrize(
    ("scheme", "script", "final", "goes_on"),
    [
        ("socks5", socks, [2, 4, 5, 6], [1, 3, 7, 8, 9, 255]),
        ("socks4a", socks4, [91], [92, 93]),
        ("http", http, [403, 502], [405, 407, 429, 500, 501, 503, 505]),
    ],
)
async def test_which_refusals_are_final(
    world: World, scheme: str, script: Callable[[int], Any], final: list[int], goes_on: list[int]
) -> None:
    """A refusal is final if the destination or the proxy's policy is its cause, and not the proxy's own trouble."""
    first, second = await world.peers(silent, socks())
    for reply in (*final, *goes_on):
        world.metrics = Metrics("transocks")
        await world.configured(f"{scheme}://127.0.0.1:{first.port}", second)
        first.script = script(reply)
        session = await world.asked(TunnelRequest(CLIENT, WEB, first=b"GET"))
        assert session.through == [port(first), port(second)][: 1 + (reply in goes_on)], reply
        assert world.state(first).up == (reply != 407)
        if reply in goes_on:
            assert (await session.tunnel()).unsent == b"GET"
        else:
            with pytest.raises(RequestRefused):
                await session.tunnel()


async def test_a_proxy_that_wants_other_credentials_is_down(world: World) -> None:
    first, second = await world.upstreams_of(socks(method=b"\x05\xff"), socks())
    assert (await world.asked()).through == [port(first), port(second)]
    assert (await world.asked()).through == [port(second)]
    assert "other than no credentials" in world.state(first).status()["why"]


async def test_socks4_is_not_asked_for_ipv6_addresses(world: World) -> None:
    first, second = await world.peers(silent, socks())
    await world.configured(f"socks4a://127.0.0.1:{first.port}", second)
    assert (await world.asked(TunnelRequest(CLIENT, WEB_V6))).through == [port(first), port(second)]
    assert first.heard == []
    named = world.ask(TunnelRequest(CLIENT, WEB_V6, "www.example"))
    await wait_all_tasks_blocked(0.005)
    assert first.heard == [b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00www.example\x00"]
    assert not named.done.is_set()


async def test_the_error_of_the_last_try_is_raised(world: World) -> None:
    first, second = await world.upstreams_of(closing, socks(1))
    session = await world.asked()
    assert session.through == [port(first), port(second)]
    with pytest.raises(RequestRefused, match="general failure"):
        await session.tunnel()


async def test_when_all_are_down_they_are_still_tried(world: World) -> None:
    first, second = await world.upstreams_of(socks(), socks())
    for peer in (first, second):
        world.state(peer).failed("a test says so")
    assert (await world.asked()).through == [port(first)]


@pytest.mark.parametrize("name", [None, "www.example"])
async def test_when_all_are_down_it_may_go_directly(world: World, name: str | None) -> None:
    (web,) = await world.peers(lambda heard: heard)
    with daemons.NameServer({"www.example": ["127.0.0.1"]}) as dns:
        world.dns = dns.address
        dead = daemons.free_port()
        await world.configured(f"socks5://127.0.0.1:{dead}", more='when_all_down = "direct"')
        for tries in (2, 1):
            session = await world.asked(TunnelRequest(CLIENT, HostPort("127.0.0.1", web.port), name, b"hello"))
            assert (await session.tunnel()).unsent == b"hello"
            assert session.access.tries[-1] == ("direct", "direct")
            assert (len(session.access.tries), session.access.schemes[-1]) == (tries, None)


async def test_the_direct_way_by_name_never_leads_to_this_host(world: World) -> None:
    with daemons.NameServer({"www.example": ["127.0.0.1", "::1", "169.254.169.254", "100.100.100.200"]}) as dns:
        world.dns = dns.address
        await world.configured(f"socks5://127.0.0.1:{daemons.free_port()}", more='when_all_down = "direct"')
        for name in ("www.example", "localhost"):
            with pytest.raises(Denied):
                await (await world.asked(TunnelRequest(CLIENT, WEB, name))).tunnel()
        with pytest.raises(ResolveError):
            await (await world.asked(TunnelRequest(CLIENT, WEB, "nowhere.example"))).tunnel()


async def test_no_other_upstream_is_tried_for_a_client_that_is_gone(world: World) -> None:
    _first, second = await world.upstreams_of(silent, socks())
    session = world.ask()
    await wait_all_tasks_blocked(0.005)
    assert session.client is not None
    session.client.close()
    with pytest.raises(PeerReset):
        await session.tunnel()
    assert second.heard == []


# ---- what was sent to the first


async def test_bytes_that_may_not_be_repeated_go_to_one_upstream(world: World) -> None:
    first, _second = await world.upstreams_of(socks(ours=True), socks())
    world.answered(first, USOCKSD)
    first.script = closing
    session = await world.asked(TunnelRequest(CLIENT, WEB, first=b"POST"))
    assert session.through == [port(first)]
    with pytest.raises(UpstreamFault):
        await session.tunnel()


async def test_a_tls_hello_may_be_repeated(world: World) -> None:
    first, second = await world.upstreams_of(closing, socks())
    world.answered(first, USOCKSD)
    session = await world.asked(TunnelRequest(CLIENT, WEB, first=HELLO, repeatable=True))
    assert (await session.tunnel()).unsent == HELLO
    # The first is asked step by step too, since it is not what it was.
    assert session.through == [port(first), port(first), port(second)]
    assert first.heard[0] == daemons.GREETING + ASK_WEB + HELLO


async def test_after_a_refusal_any_bytes_may_go_to_the_next(world: World) -> None:
    first, second = await world.upstreams_of(socks(1, ours=True), socks())
    world.answered(first, USOCKSD)
    session = await world.asked(TunnelRequest(CLIENT, WEB, first=b"POST"))
    assert session.through == [port(first), port(second)]
    assert (await session.tunnel()).unsent == b"POST"


# ---- how much is sent at once


@pytest.mark.parametrize(
    ("answer", "pieces", "unsent"),
    [
        (USOCKSD, [daemons.GREETING + ASK_WEB + b"POST"], b""),
        (Answer(0.001, ours=False, pipelines=True), [daemons.GREETING + ASK_WEB], b"POST"),
        (None, [daemons.GREETING, ASK_WEB], b"POST"),
    ],
    ids=["usocksd", "takes pipelining", "unknown"],
)
async def test_how_much_is_sent_at_once(
    world: World, answer: Answer | None, pieces: list[bytes], unsent: bytes
) -> None:
    (peer,) = await world.upstreams_of(socks())
    if answer is not None:
        world.answered(peer, answer)
    tunnel = await (await world.asked(TunnelRequest(CLIENT, WEB, first=b"POST"))).tunnel()
    assert (tunnel.unsent, tunnel.early) == (unsent, b"")
    assert peer.pieces == [pieces]


async def test_an_upstream_that_takes_pipelining_no_longer_is_asked_again(world: World) -> None:
    """The proxy was replaced by one that wants to be asked step by step."""
    (peer,) = await world.peers(closing)
    steps = socks()
    peer.script = lambda heard: None if peer.pieces[-1] == [daemons.GREETING + ASK_WEB] else steps(heard)
    await world.configured(peer)
    world.answered(peer, USOCKSD)
    session = await world.asked()
    await session.tunnel()
    assert session.through == [port(peer)] * 2
    assert peer.pieces == [[daemons.GREETING + ASK_WEB], [daemons.GREETING, ASK_WEB]]
    assert (await world.asked()).through == [port(peer)]


@pytest.mark.parametrize(
    ("scheme", "asks_for"),
    [
        ("socks5", daemons.request(*WEB)),
        ("socks5h", daemons.request("www.example", 443, as_name=True)),
        ("socks4a", b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00www.example\x00"),
        ("http", b"CONNECT www.example:443 HTTP/1.1\r\n"),
    ],
)
async def test_which_schemes_are_asked_for_names(world: World, scheme: str, asks_for: bytes) -> None:
    (peer,) = await world.peers(lambda heard: b"\x05\x00" if heard[:1] == b"\x05" else b"")
    await world.configured(f"{scheme}://127.0.0.1:{peer.port}")
    world.ask(TunnelRequest(CLIENT, WEB, "www.example"))
    await wait_all_tasks_blocked(0.005)
    assert asks_for in peer.heard[0]


# ---- silence


async def test_a_proxy_that_hangs_is_marked_down(mock_clock: MockClock, world: World) -> None:
    first, second = await world.upstreams_of(silent, socks())
    sessions = [world.ask() for _ in range(5)]
    await world.pass_time(SUSPECT)
    assert first.probed == 1
    assert not any(session.done.is_set() for session in sessions)
    await world.pass_time(SUSPECT)
    for session in sessions:
        await session.tunnel()
        assert session.through == [port(first), port(second)]
    assert "waiting for the answer" in world.state(first).status()["why"]
    assert world.counted("upstream_probes_total") == {(f"socks5://127.0.0.1:{first.port}", "failed"): 1}


async def test_a_proxy_that_does_not_accept_is_marked_down(mock_clock: MockClock, world: World) -> None:
    (second,) = await world.peers(socks())
    with daemons.blackhole() as full:
        await world.configured(f"socks5://127.0.0.1:{full}", second)
        session = world.ask()
        await world.suspect()
        await session.tunnel()
        assert session.through == [str(full), port(second)]


async def test_a_slow_destination_is_not_the_fault_of_its_proxy(mock_clock: MockClock, world: World) -> None:
    first, second = await world.upstreams_of(slow, socks())
    session = world.ask()
    for _ in range(30):
        await world.pass_time(SUSPECT)
    assert 3 < first.probed < 12  # ever less often
    assert second.heard == []
    assert world.state(first).up
    first.script = socks()
    await first.streams[0].send_all(GRANTED)
    await session.tunnel()
    assert session.through == [port(first)]


async def test_a_request_that_may_not_be_repeated_ends_with_its_proxy(mock_clock: MockClock, world: World) -> None:
    """As soon as it is found to be down: its client can retry, and gets another upstream."""
    first, _second = await world.upstreams_of(silent, socks())
    world.answered(first, USOCKSD)
    moves = world.ask(TunnelRequest(CLIENT, WEB, first=HELLO, repeatable=True))
    ends = world.ask(TunnelRequest(CLIENT, WEB, first=b"POST"))
    await world.suspect()
    await moves.tunnel()
    with pytest.raises(UpstreamDown):
        await ends.tunnel()
    assert ends.through == [port(first)]


async def test_the_only_upstream_has_all_the_time(mock_clock: MockClock, world: World) -> None:
    (first,) = await world.peers(silent)
    await world.configured(first)
    session = world.ask()
    await world.suspect()
    await world.pass_time(5)
    assert not session.done.is_set()
    first.script = socks()
    await first.streams[0].send_all(b"\x05\x00" + GRANTED)
    await session.tunnel()


async def test_an_attempt_given_up_while_an_answer_comes_ends(world: World) -> None:
    """The event of that answer has woken its session, which another event of the same moment can't do again."""
    first, second = await world.upstreams_of(silent, socks())
    session = world.ask()
    await wait_all_tasks_blocked(0.005)
    (asking,) = (each for each in world.reactor.handlers.values() if isinstance(each, Endpoint) and each.about is None
                 and each.sock.family == socket.AF_INET)  # fmt: skip
    os.write(first.streams[0].socket.fileno(), b"\x05")  # no task waits: the reactor does not turn
    asking.on_event(IN)
    world.state(first).failed("a test says so")
    await session.tunnel()
    assert session.through == [port(first), port(second)]


async def test_a_deadline_of_the_client_marks_no_proxy_down(mock_clock: MockClock, world: World) -> None:
    """Another upstream may have used up the time, or this process, which did not run."""
    with daemons.blackhole() as full:
        await world.configured(f"socks5://127.0.0.1:{full}")
        session = world.ask()
        await world.pass_time(31)
        with pytest.raises(DialError):
            await session.tunnel()
        assert next(iter(world.upstreams.groups["default"].upstreams)).state.up


async def test_after_silence_an_upstream_is_asked_step_by_step(mock_clock: MockClock, world: World) -> None:
    """The next time, since it may have been replaced unnoticed."""
    (peer,) = await world.peers(socks())
    steps, at_once = socks(), daemons.GREETING + ASK_WEB
    peer.script = lambda heard: b"" if peer.pieces[-1] == [at_once] else steps(heard)
    await world.configured(peer)
    world.answered(peer, Answer(0.001, ours=False, pipelines=True))
    session = world.ask()
    await world.pass_time(41)
    with pytest.raises(DialError):
        await session.tunnel()
    await (await world.asked()).tunnel()
    assert peer.pieces == [[at_once], [daemons.GREETING, ASK_WEB]]


@pytest.mark.parametrize("script", [closing, lambda _: b"HTTP/1.1 400 Bad TunnelRequest\r\n\r\n"])
async def test_closing_or_another_protocol_is_no_sign_of_life(
    world: World, script: Callable[[bytes], bytes | None]
) -> None:
    """Otherwise steady traffic would keep an upstream up that fails all probes."""
    first, second = await world.upstreams_of(script, socks())
    began = trio.current_time()
    world.clock.jump(0.1)
    assert (await world.asked()).through == [port(first), port(second)]
    world.state(first).failed("as a probe found that began meanwhile", began)
    assert not world.state(first).up


async def test_a_far_proxy_has_more_time(mock_clock: MockClock, world: World) -> None:
    (second,) = await world.peers(socks())
    with daemons.blackhole() as full:
        await world.configured(f"socks5://127.0.0.1:{full}", second)
        state = next(iter(world.upstreams.groups["default"].upstreams)).state
        state.answered(Answer(1.0, round_trip=0.5), trio.current_time())
        session = world.ask()
        await world.suspect()
        assert not session.done.is_set()
        await world.pass_time(1.51 - SUSPECT)
        await session.tunnel()


async def test_a_slow_destination_hides_no_hung_proxy(mock_clock: MockClock, world: World) -> None:
    """An attempt that has waited for long is looked after ever less often; one that comes then is not."""
    first, second = await world.upstreams_of(slow, socks())
    patient = world.ask()
    for _ in range(40):
        await world.pass_time(SUSPECT)
    first.script = silent
    session = world.ask()
    await world.suspect()
    await session.tunnel()
    assert session.through == [port(first), port(second)]
    await patient.tunnel()


async def test_slow_upstreams_come_after_those_that_are_well(world: World) -> None:
    first, second, third = await world.peers(socks(), socks(), socks())
    await world.configured(first, second, third, more='when_all_down = "direct"')
    world.answered(first, Answer(2.0, slow=True))
    assert (await world.asked()).through == [port(second)]
    world.state(second).failed("a test says so")
    assert (await world.asked()).through == [port(third)]
    world.state(third).failed("a test says so")
    assert (await world.asked()).through == [port(first)]


@pytest.mark.parametrize("better", [False, True])
async def test_attempts_leave_an_upstream_that_becomes_slow_for_one_that_is_well(world: World, better: bool) -> None:
    """It moves to an upstream that is well, or else waits: upstreams that are down, or a direct connection, are no
    better.
    """
    first, second = await world.upstreams_of(silent, socks(), more='when_all_down = "direct"')
    if not better:
        world.state(second).failed("a test says so")
    session = world.ask()
    await wait_all_tasks_blocked(0.005)
    world.answered(first, Answer(2.0, slow=True))
    if better:
        await session.tunnel()
        assert session.through == [port(first), port(second)]
    else:
        await wait_all_tasks_blocked(0.005)
        assert not session.done.is_set()


@pytest.mark.parametrize("policy", ["failover", "round-robin", "sticky"])
async def test_an_upstream_on_trial_gets_one_client(world: World, policy: str) -> None:
    first, second = await world.upstreams_of(closing, socks(), more=f'policy = "{policy}"')
    state = world.state(first)
    state.failed("a test says so")
    state.trial = True
    used = [(await world.asked()).through for _ in range(4)]
    assert sum(port(first) in each for each in used) <= 1
    assert (policy == "sticky") or [port(first), port(second)] in used
    assert not state.up


async def test_a_tunnel_marks_its_proxy_up(world: World) -> None:
    """All are down, so they are tried, and the one that serves is up again at once."""
    first, second = await world.upstreams_of(closing, socks())
    for peer in (first, second):
        world.state(peer).failed("a test says so")
    await (await world.asked()).tunnel()
    assert (world.state(first).up, world.state(second).up) == (False, True)
    assert (await world.asked()).through == [port(second)]


# ---- probes


def upstream_of(world: World) -> Any:
    (found,) = world.upstreams.groups["default"].upstreams
    return found


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 403 Forbidden\r\n\r\n", None])
async def test_a_probe_of_an_http_proxy_is_a_connect_to_nowhere(world: World, answer: bytes | None) -> None:
    """Any answer will do, and so will the end."""
    (peer,) = await world.peers(lambda heard: answer if heard.endswith(b"\r\n\r\n") else b"")
    await world.configured(f"http://me:secret@127.0.0.1:{peer.port}")
    assert not (await upstream_of(world).prober.probe(connect=1, answer=1, learn=True)).ours
    assert peer.heard == [
        b"CONNECT 255.255.255.255:1 HTTP/1.1\r\nHost: 255.255.255.255:1\r\n"
        b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n\r\n"
    ]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 407 No\r\n\r\n", b"\x05\xff"])
async def test_answers_that_fail_a_probe_of_an_http_proxy(world: World, answer: bytes) -> None:
    (peer,) = await world.peers(lambda _: answer)
    await world.configured(f"http://127.0.0.1:{peer.port}")
    with pytest.raises(UpstreamError):
        await upstream_of(world).prober.probe(connect=1, answer=1, learn=True)


async def test_an_http_proxy_that_does_not_answer_probes(mock_clock: MockClock, world: World) -> None:
    """A tunnel through it marks it up, and silence does not mark it down."""

    def script(heard: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\n\r\n" if b"CONNECT 203.0.113.80:" in heard else b""

    peer, second = await world.peers(script, socks())
    await world.configured(f"http://127.0.0.1:{peer.port}", second)
    await (await world.asked()).tunnel()
    session = world.ask(TunnelRequest(CLIENT, HostPort("203.0.113.81", 443)))
    for _ in range(10):
        await world.pass_time(SUSPECT)
    assert world.state(peer).up
    assert not session.done.is_set()
    assert (await world.asked()).through == [port(peer).rpartition(":")[2]]


async def test_whether_it_takes_pipelining_is_asked_again_after_silence(mock_clock: MockClock, world: World) -> None:
    (peer,) = await world.peers(socks())
    pipelined = b"\x05\x02\xf5\x00" + daemons.request("0.0.0.0", 0)
    steps = socks()
    peer.script = lambda heard: b"" if heard.startswith(pipelined) else steps(heard)
    await world.configured(peer)
    upstream = upstream_of(world)

    async def learn() -> bool | None:
        answers: list[Answer] = []

        async def probe() -> None:
            answers.append(await upstream.prober.probe(connect=5, answer=5, learn=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe)
            await world.pass_time(1)
        upstream.state.answered(answers[0], trio.current_time())
        known: bool | None = upstream.state.pipelines
        return known

    assert await learn() is False
    peer.script = lambda heard: GRANTED[:1] + b"\x00" + GRANTED if heard.startswith(pipelined) else steps(heard)
    assert await learn() is False
    world.clock.jump(600)
    assert await learn() is True


async def test_a_probe_is_repeated_if_this_process_did_not_run(mock_clock: MockClock, world: World) -> None:
    """Its answer arrived in time, but this process did not run."""
    first, second = await world.upstreams_of(silent, socks())
    session = world.ask()
    await world.pass_time(SUSPECT)
    await world.pass_time(SUSPECT + 5)  # as after SIGSTOP and SIGCONT
    assert first.probed == 2
    assert world.state(first).up
    await world.pass_time(SUSPECT)
    await session.tunnel()
    assert session.through == [port(first), port(second)]


# ---- policies


async def test_round_robin(world: World) -> None:
    peers = await world.peers(socks(), socks(), socks())
    await world.configured(*peers, more='policy = "round-robin"')
    used = [(await world.asked()).through[0] for _ in range(6)]
    assert used == [port(peer) for peer in peers] * 2
    world.state(peers[1]).failed("a test says so")
    used = [(await world.asked()).through[0] for _ in range(6)]
    assert Counter(used) == {port(peers[0]): 3, port(peers[2]): 3}


async def test_sticky(world: World) -> None:
    """One client and destination go to one proxy; when one is down, only its own move."""
    peers = await world.peers(socks(), socks(), socks())
    await world.configured(*peers, more='policy = "sticky"')

    async def places() -> dict[tuple[str, str | None], str]:
        return {
            (client, name): (await world.asked(TunnelRequest(HostPort(client, 1), WEB, name))).through[-1]
            for client in (f"192.0.2.{number}" for number in range(8))
            for name in (None, "a.example", "b.example")
        }

    before = await places()
    assert len(set(before.values())) == 3
    assert await places() == before
    world.state(peers[0]).failed("a test says so")
    after = await places()
    assert {key for key in before if before[key] != after[key]} == {k for k in before if before[k] == port(peers[0])}


async def test_an_upstream_in_two_groups(world: World) -> None:
    one, two = await world.peers(socks(), socks())
    more = f'[upstream.far]\nproxy_url = ["socks5://127.0.0.1:{two.port}", "socks5://127.0.0.1:{one.port}"]'
    upstreams = await world.configured(one, more=more)
    assert (await world.asked(group="far")).access.tries == [("far", f"socks5://127.0.0.1:{two.port}")]
    # One state of each, whatever group it is in.
    world.state(two).failed("a test says so")
    assert (await world.asked(group="far")).access.tries == [("far", f"socks5://127.0.0.1:{one.port}")]
    assert upstreams.addresses == {HostPort("127.0.0.1", peer.port) for peer in (one, two)}
    status: Any = upstreams.status()["far"]
    assert [(each["up"], each["why"]) for each in status["upstreams"]] == [(False, "a test says so"), (True, None)]


async def test_one_proxy_with_two_users_is_two_upstreams(world: World) -> None:
    (peer,) = await world.peers(closing)
    url = f"127.0.0.1:{peer.port}"
    urls = [f"socks5://{user}@{url}" for user in ("al:ice", "bob:b", "bob:c")]
    upstreams = await world.configured(*urls)
    await world.asked()
    names = [f"socks5://{url}", f"socks5://{url} (2)", f"socks5://{url} (3)"]
    status: Any = upstreams.status()["default"]
    assert [each["upstream"] for each in status["upstreams"]] == names
    assert world.counted("upstream_up") == {("default", name): 1 for name in names}
    assert len({each.key for each in upstreams.groups["default"].upstreams}) == 3


# ---- names of upstreams


async def test_an_upstream_whose_name_servers_are_silent_is_not_waited_for(mock_clock: MockClock, world: World) -> None:
    (second,) = await world.peers(socks())
    with daemons.NameServer({"proxy.test": None}) as dns:
        world.dns = dns.address
        await world.configured("socks5://proxy.test:1080", second)
        session = world.ask()
        await world.suspect()
        await session.tunnel()
        assert session.through == ["1080", port(second)]


async def test_an_upstream_whose_name_has_no_address_is_down(world: World) -> None:
    (second,) = await world.peers(socks())
    with daemons.NameServer({}) as dns:
        world.dns = dns.address
        await world.configured("socks5://proxy.test:1080", second)
        assert (await world.asked()).through == ["1080", port(second)]
        assert (await world.asked()).through == [port(second)]


async def test_an_upstream_by_ipv6(world: World) -> None:
    peer = Peer(socks(), "::1")
    await world.nursery.start(peer.run)
    for host in ("[::1]", "localhost"):
        world.metrics = Metrics("transocks")
        upstreams = await world.configured(f"socks5://{host}:{peer.port}")
        await (await world.asked()).tunnel()
        assert HostPort("::1", peer.port) in upstreams.addresses


async def test_the_name_of_an_upstream_is_resolved_again(mock_clock: MockClock, world: World) -> None:
    (peer,) = await world.peers(socks())
    with daemons.NameServer({"proxy.test": ["127.0.0.2"]}) as dns:
        world.dns = dns.address
        upstreams = await world.configured(f"socks5://proxy.test:{peer.port}")
        with pytest.raises(DialError):
            await (await world.asked()).tunnel()
        dns.names = {name: ["127.0.0.1", "::1"] for name in dns.names}
        with pytest.raises(DialError):
            await (await world.asked()).tunnel()
        world.clock.jump(61)  # its TTL is a minute
        await (await world.asked()).tunnel()
        assert upstreams.addresses == {HostPort("127.0.0.1", peer.port), HostPort("::1", peer.port)}
        # No server answers any more: the known addresses stay in use.
        dns.names = dict.fromkeys(dns.names)
        world.clock.jump(61)
        session = world.ask()
        await wait_all_tasks_blocked(0.02)
        world.clock.jump(1)
        await session.tunnel()
        await (await world.asked()).tunnel()


# ---- UDP associations

ASSOCIATE = b"\x05\x03\x00" + daemons.address_bytes("0.0.0.0", 0)
NO_UDP = 7


def relays(bound: tuple[str, int]) -> Any:
    """A SOCKS5 server that answers with this relay address."""
    return lambda heard: socks()(heard)[:5] + daemons.address_bytes(*bound) if len(heard) > 3 else socks()(heard)


async def test_an_association_of_the_first_that_has_udp(world: World, mock_clock: MockClock) -> None:
    first, second = await world.upstreams_of(socks(NO_UDP), relays(("192.0.2.9", 5353)))
    session = await world.associated()
    assert (await session.tunnel()).relay == HostPort("192.0.2.9", 5353)
    assert session.through == [port(first), port(second)]
    assert [peer.heard[-1][-10:] for peer in (first, second)] == [ASSOCIATE] * 2
    assert (world.state(first).has_udp, world.state(second).has_udp) == (False, True)
    # The other is asked again after ten minutes only; for connections it is still the first.
    assert (await world.associated()).through == [port(second)]
    await world.pass_time(601)
    assert (await world.associated()).through == [port(first), port(second)]
    rows = world.upstreams.groups["default"].status()["upstreams"]
    assert [row["udp"] for row in rows] == [False, True]  # type: ignore[attr-defined]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_a_proxy_that_does_not_say_where_means_its_own_address(world: World, host: str) -> None:
    await world.upstreams_of(relays((host, 5353)))
    assert (await (await world.associated()).tunnel()).relay == HostPort("127.0.0.1", 5353)


@pytest.mark.parametrize("bound", [("192.0.2.9", 0), ("239.0.0.1", 5353)])
async def test_a_proxy_that_wants_datagrams_nowhere(world: World, bound: tuple[str, int]) -> None:
    await world.upstreams_of(relays(bound))
    with pytest.raises(UpstreamFault, match="wants datagrams at"):
        await (await world.associated()).tunnel()


@pytest.mark.parametrize("when", ["refuse", "direct"])
async def test_a_group_without_udp(world: World, when: str) -> None:
    (peer,) = await world.peers(socks(NO_UDP))
    await world.configured(f"http://127.0.0.1:{peer.port}", peer, more=f'when_no_udp = "{when}"')
    group = world.upstreams.groups["default"]
    assert group.carries_udp
    for tries in ([port(peer)], []):
        session = await world.associated()
        assert session.through == tries
        assert isinstance(session.outcome, NoUdp if when == "refuse" else RuntimeError)
    assert group.carries_udp == (when == "direct")


async def test_a_refused_association_is_not_asked_for_elsewhere(world: World) -> None:
    await world.upstreams_of(socks(2), socks())
    session = await world.associated()
    assert isinstance(session.outcome, RequestRefused)
    assert len(session.access.tries) == 1


async def test_an_association_past_upstreams_that_are_down(world: World) -> None:
    await world.configured(f"socks5://127.0.0.1:{daemons.free_port()}", more='when_all_down = "direct"')
    assert isinstance((await world.associated()).outcome, RuntimeError)


async def test_sticky_associations_go_by_the_client(world: World) -> None:
    await world.upstreams_of(relays(("192.0.2.9", 1)), relays(("192.0.2.9", 2)), more='policy = "sticky"')
    assert len({tuple((await world.associated()).through) for _ in range(4)}) == 1

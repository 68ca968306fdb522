"""The upstreams: connected to as the daemon would, and greeted. No destination is asked for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
import termios
import time

import attrs
import trio

from transocks.config import DIRECT, Config
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.http_connect import HttpConnect
from transocks.rules.routing import policy_against
from transocks.tools import FirewallError
from transocks.tracing.samples import TCP
from transocks.tracing.sockets import socket_of
from transocks.tracing.way import way_of
from transocks.upstreams.probes import ping
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from usocksd.errors import Error, ResolveError, UpstreamError
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver, make_resolver
from usocksd.net.address import IPAddress, join_port, socket_address
from usocksd.net.proxy_protocol import LOCAL_HEADER
from usocksd.socks import NEED_DATA, Probe, Probed, RequestRefused

PATIENCE = 3.0
"""Seconds for its name, and again for its answer."""

_NOT_HTTP = re.compile(r"\bnot (an )?HTTP", re.IGNORECASE)
"""How a usocksd says so, and Tor."""
_SOCKS5 = (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)
_LARGE_WITHIN = 2.5  # seconds
_HEADERS = {4: 40, 6: 60}
_MTUS = (1492, 1460, 1440, 1420, 1400, 1360, 1320, 1280, 1200, 1000)
"""Of PPPoE, and of tunnels one in another."""


@attrs.frozen(kw_only=True)
class Greeted:
    """What came of greeting one address of an upstream."""

    proxy: ProxyURL
    address: IPAddress | None
    """None: its name has none"""
    problem: str | None
    seconds: float
    doubt: str | None = None
    """why its answer says little"""
    redirected: bool = False
    """It was not greeted, since the rules would have brought that to transocks."""
    cause: str | None = None
    """what on this host keeps packets from it, or its answers from here"""
    fits: int | None = None
    """Large segments don't get there: the largest MTU that does; 0: none that was tried."""


def proxies(config: Config) -> tuple[ProxyURL, ...]:
    """All upstreams of a configuration, each once."""
    return tuple(dict.fromkeys(url for group in config.groups().values() for url in group.proxy_url))


def begins_with_header(proxy: ProxyURL, config: Config) -> bool:
    """Whether a connection to it begins with a header of the PROXY protocol."""
    return any(group.proxy_protocol and proxy in group.proxy_url for group in config.groups().values())


def goes_direct(config: Config) -> bool:
    """Whether transocks may connect to destinations by itself."""
    ways = (*(route.via for route in config.route), *(group.when_all_down for group in config.groups().values()))
    return DIRECT in ways


def greet_all(seen: Seen, trials: Trials) -> list[Greeted]:
    """Does each upstream answer? They are greeted all at once, traced where that can be done."""
    return trio.run(_greet_all, seen, trials)


async def _greet_all(seen: Seen, trials: Trials) -> list[Greeted]:
    found: list[Greeted] = []
    resolver = make_resolver(seen.config.dns, Metrics("doctor"), sockets=16)

    async def greet_one(proxy: ProxyURL) -> None:
        found.extend(await _greet(proxy, resolver, seen, trials))

    async with trio.open_nursery() as background:
        await background.start(resolver.run)
        async with trio.open_nursery() as nursery:
            for proxy in proxies(seen.config):
                nursery.start_soon(greet_one, proxy)
        background.cancel_scope.cancel()
    return found


async def _greet(proxy: ProxyURL, resolver: Resolver, seen: Seen, trials: Trials) -> list[Greeted]:
    since = time.monotonic()
    addresses: tuple[IPAddress, ...] = ()
    problem = "its name was not resolved in time"
    if not isinstance(proxy.host, str):
        addresses = (proxy.host,)
    else:
        with trio.move_on_after(PATIENCE):
            try:
                addresses = await resolver.search(proxy.host)
            except ResolveError as error:
                problem = str(error)
    if not addresses:
        return [Greeted(proxy=proxy, address=None, problem=problem, seconds=time.monotonic() - since)]
    found: list[Greeted] = []

    async def one(address: IPAddress) -> None:
        found.append(await _greet_address(proxy, address, seen, trials))

    async with trio.open_nursery() as nursery:
        for address in addresses[:8]:
            nursery.start_soon(one, address)
    return found


async def _greet_address(proxy: ProxyURL, address: IPAddress, seen: Seen, trials: Trials) -> Greeted:
    # First a sample that leads nowhere: if the rules redirected a real connection, transocks would connect to itself.
    if trials.comes_back(trials.sent(seen.daemon, address, proxy.port)) is not None:
        return Greeted(proxy=proxy, address=address, problem=None, seconds=0.0, redirected=True)
    since = time.monotonic()
    problem: str | None = f"no answer within {PATIENCE:g} s"
    doubt = cause = None
    with _socket_of(seen, address) as sock, contextlib.ExitStack() as stack:
        port = sock.getsockname()[1]
        if trials.tracer is not None:
            stack.enter_context(trials.tracer.watching(TCP, port, keep=False))
        with trio.move_on_after(PATIENCE):
            try:
                await sock.connect(socket_address(str(address), proxy.port))
                ask = _handshake if proxy.scheme in _SOCKS5 else _ping
                doubt = await ask(trio.SocketStream(sock), proxy, _header(proxy, seen.config))
                problem = None
            except (UpstreamError, Error) as error:
                problem = str(error)
            except (trio.BrokenResourceError, OSError) as error:
                inner = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
                problem = os.strerror(inner.errno) if isinstance(inner, OSError) and inner.errno else str(error)
        seconds = time.monotonic() - since
        if problem is not None:
            cause = _cause(port, address, seen, trials)
    fits = None
    if problem is None and not seen.is_local(address) and not await _takes_large(proxy, address, seen):
        fits = await _fitting(proxy, address, seen)
    return Greeted(proxy=proxy, address=address, problem=problem, seconds=seconds, doubt=doubt, cause=cause, fits=fits)


def _cause(port: int, address: IPAddress, seen: Seen, trials: Trials) -> str | None:
    """What of this host is in the way of a connection from this port: a rule, or the routing policy."""
    if trials.tracer is not None:
        events = trials.tracer.events(TCP, port)
        forth, back = way_of(events, port), way_of(events, port, back=True)
        if (why := trials.why_not(forth)) is not None:
            return why
        if (why := trials.why_not(back)) is not None:
            return f"its answer: {why}"
    if (rules := policy_against(address, seen.daemon.mark, seen.daemon.uid)) is not None:
        return f"routing rule {rules}"
    return None


async def _takes_large(proxy: ProxyURL, address: IPAddress, seen: Seen, mtu: int | None = None) -> bool:
    """Whether a segment of full size reaches it if small ones do; on a connection of its own.

    What is asked leads to no connection (a SOCKS server may say so in its log), and zeros behind it fill the segment.
    """
    with trio.move_on_after(_LARGE_WITHIN), contextlib.suppress(OSError):
        with _socket_of(seen, address) as sock:
            if mtu is not None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - _HEADERS[address.version])
            await sock.connect(socket_address(str(address), proxy.port))
            size = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            await sock.send(_padded(proxy, _header(proxy, seen.config), size))
            while struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:  # noqa: ASYNC110
                await trio.sleep(0.02)
            return True
    return False


def _padded(proxy: ProxyURL, before: bytes, size: int) -> bytes:
    if proxy.scheme is ProxyScheme.HTTP:
        question = ping(proxy).removesuffix(b"\r\n") + b"X-Padding: "
        return before + question + b"0" * (size - len(before) - len(question) - 4) + b"\r\n\r\n"
    question = Probe(pipelined=True).data_to_send() if proxy.scheme in _SOCKS5 else ping(proxy)
    return (before + question).ljust(size, b"\0")


async def _fitting(proxy: ProxyURL, address: IPAddress, seen: Seen) -> int:
    """The largest MTU of these with which a large segment gets there; 0: none."""
    found = [0]

    async def one(mtu: int) -> None:
        if await _takes_large(proxy, address, seen, mtu):
            found.append(mtu)

    async with trio.open_nursery() as nursery:
        for mtu in _MTUS:
            nursery.start_soon(one, mtu)
    return max(found)


def _socket_of(seen: Seen, address: IPAddress) -> trio.socket.SocketType:
    """One as the daemon's, with a port of its own."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        sock = socket_of(seen.daemon, family)
    except FirewallError:  # its cgroup takes no other process
        sock = socket_of(attrs.evolve(seen.daemon, cgroup=None), family)
    sock.bind(("0.0.0.0" if address.version == 4 else "::", 0))
    return trio.socket.from_stdlib_socket(sock)


def _header(proxy: ProxyURL, config: Config) -> bytes:
    """What has to be in front of all else: "this connection is about nobody", of the PROXY protocol."""
    return LOCAL_HEADER if begins_with_header(proxy, config) else b""


async def _ping(stream: trio.SocketStream, proxy: ProxyURL, before: bytes) -> str | None:
    """HTTP or SOCKS4: any answer of that protocol will do. Returns why there is doubt, if there is. Raises
    UpstreamError, BrokenResourceError.
    """
    await stream.send_all(before + ping(proxy))
    answer = HttpConnect(str(proxy.host), proxy.port)  # reads what a CONNECT would be answered with, too
    while data := await stream.receive_some(1024):
        if proxy.scheme is not ProxyScheme.HTTP:
            if data[:1] != b"\0":
                raise UpstreamError(f"the server answers with {data[:8]!r}, which is not SOCKS4")
            return None
        answer.receive_data(data)
        try:
            if answer.next_event() is not NEED_DATA:
                return None
        except RequestRefused as error:
            if _NOT_HTTP.search(str(error)):
                raise
            return None
    return "it closes without an answer to what asks for no connection; is it a proxy of this kind?"


async def _handshake(stream: trio.SocketStream, proxy: ProxyURL, before: bytes) -> None:
    """Greeting and credentials; no request. Raises UpstreamError, BrokenResourceError."""
    probe = Probe(proxy.username, proxy.secret)
    while not isinstance(probe.next_event(), Probed):
        if data := probe.data_to_send():
            await stream.send_all(before + data)
            before = b""
        probe.receive_data(await stream.receive_some(1024))


def describe(greeted: Greeted) -> str:
    """Which upstream, and at which address."""
    if greeted.address is None or greeted.address == greeted.proxy.host:
        return str(greeted.proxy)
    return f"{greeted.proxy} at {join_port(greeted.address, greeted.proxy.port)}"

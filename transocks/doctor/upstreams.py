"""The upstreams: connected to as the daemon would, and greeted. No destination is asked for."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator

import attrs
import trio

from transocks.config import DIRECT, Config
from transocks.doctor.flows import comes_back, sent
from transocks.doctor.seen import Identity, Seen
from transocks.http_connect import HttpConnect
from transocks.netfilter.ruleset import Unknown
from transocks.proxy_url import ProxyScheme, ProxyURL
from transocks.upstream_probes import ping
from usocksd.errors import Error, ResolveError, UpstreamError
from usocksd.match import IPAddress
from usocksd.proxy_protocol import LOCAL_HEADER
from usocksd.resolver import Resolver
from usocksd.runtime.hostport import join_port
from usocksd.runtime.metrics import Metrics
from usocksd.socks import NEED_DATA, Probe, Probed, RequestRefused

PATIENCE = 3.0
"""Seconds for all of them together."""

_NOT_HTTP = re.compile(r"\bnot (an )?HTTP", re.IGNORECASE)
"""How a usocksd says so, and Tor."""
_SOCKS5 = (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)


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


def greet_all(seen: Seen) -> list[Greeted]:
    """Greet each upstream, all at once."""
    return trio.run(_greet_all, seen)


async def _greet_all(seen: Seen) -> list[Greeted]:
    found: list[Greeted] = []
    dns = seen.config.dns
    resolver = Resolver(dns.servers, Metrics("doctor"), system=dns.resolver == "system", sockets=16)

    async def greet_one(proxy: ProxyURL) -> None:
        found.extend(await _greet(proxy, resolver, seen))

    with trio.move_on_after(PATIENCE + 1):
        async with trio.open_nursery() as background:
            await background.start(resolver.run)
            async with trio.open_nursery() as nursery:
                for proxy in proxies(seen.config):
                    nursery.start_soon(greet_one, proxy)
            background.cancel_scope.cancel()
    return found


async def _greet(proxy: ProxyURL, resolver: Resolver, seen: Seen) -> list[Greeted]:
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
        found.append(await _greet_address(proxy, address, seen))

    async with trio.open_nursery() as nursery:
        for address in addresses[:8]:
            nursery.start_soon(one, address)
    return found


async def _greet_address(proxy: ProxyURL, address: IPAddress, seen: Seen) -> Greeted:
    since = time.monotonic()
    if seen.ruleset is not None and comes_back(sent(seen, seen.daemon, address, proxy.port), seen):
        return Greeted(proxy=proxy, address=address, problem=None, seconds=0.0, redirected=True)
    problem: str | None = f"no answer within {PATIENCE:g} s"
    doubt: str | None = None
    with trio.move_on_after(PATIENCE):
        try:
            with trio.socket.from_stdlib_socket(_socket_of(seen.daemon, address)) as sock:
                await sock.connect((str(address), proxy.port))
                ask = _handshake if proxy.scheme in _SOCKS5 else _ping
                doubt = await ask(trio.SocketStream(sock), proxy, _header(proxy, seen.config))
            problem = None
        except (UpstreamError, Error) as error:
            problem = str(error)
        except (trio.BrokenResourceError, OSError) as error:
            cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
            problem = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
    return Greeted(proxy=proxy, address=address, problem=problem, seconds=time.monotonic() - since, doubt=doubt)


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
    probe = Probe(proxy.username, None if proxy.password is None else proxy.password.reveal())
    while not isinstance(probe.next_event(), Probed):
        if data := probe.data_to_send():
            await stream.send_all(before + data)
            before = b""
        probe.receive_data(await stream.receive_some(1024))


def _socket_of(who: Identity, address: IPAddress) -> socket.socket:
    """A socket that the rules see as one of the daemon's, as far as this user may make it so."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with _as_user(who):
        sock = socket.socket(family, socket.SOCK_STREAM)
    if who.mark and not isinstance(who.mark, Unknown):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, who.mark)
    return sock


@contextlib.contextmanager
def _as_user(who: Identity) -> Iterator[None]:
    """A socket belongs to whoever made it: to this user, if we are root."""
    if os.geteuid() != 0 or isinstance(who.uid, Unknown) or who.uid == 0:
        yield
        return
    group = os.getegid()
    try:
        with contextlib.suppress(OSError):  # in a user namespace there may be no other
            if not isinstance(who.gid, Unknown):
                os.setegid(who.gid)
            os.seteuid(who.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def describe(greeted: Greeted) -> str:
    """Which upstream, and at which address."""
    if greeted.address is None or greeted.address == greeted.proxy.host:
        return str(greeted.proxy)
    return f"{greeted.proxy} at {join_port(greeted.address, greeted.proxy.port)}"

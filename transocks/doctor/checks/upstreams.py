"""Do the upstreams answer, do they speak what the configuration says, and do large packets reach them?

Each is connected and greeted as by the daemon, and traced if possible. No destination is requested.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import attrs
import trio

from transocks.doctor.finding import Finding, State, fault, fine, unchecked
from transocks.doctor.host import AS_ROOT, Host
from transocks.http_connect import HttpConnect
from transocks.tools import FirewallError
from transocks.tracing.links import lookup, policy_against
from transocks.tracing.reports import TCP
from transocks.tracing.sockets import socket_of
from transocks.upstreams.discovery import members_of
from transocks.upstreams.probes import ping
from transocks.upstreams.proxy_url import ProxyScheme, ProxyURL
from usocksd.errors import Error, ResolveError, UpstreamError
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver, make_resolver
from usocksd.net.address import IPAddress, join_port, socket_address
from usocksd.net.proxy_protocol import LOCAL_HEADER
from usocksd.socks import NEED_DATA, Probe, Probed, RequestRefused

PATIENCE = 3.0
"""Seconds to resolve its name, and again to get its answer."""

T = TypeVar("T")
R = TypeVar("R")
_CHECK = "upstream"
_NOT_HTTP = re.compile(r"\bnot (an )?HTTP", re.IGNORECASE)  # the replies of a usocksd and of Tor that say so
_MOST = 8  # addresses of a name
_LARGE_WITHIN = 2.5  # seconds
_HEADERS = {4: 40, 6: 60}
_MTUS = (1492, 1460, 1440, 1420, 1400, 1360, 1320, 1280, 1200, 1000)
"""The MTU of PPPoE, and of nested tunnels."""


def upstreams(host: Host) -> Iterator[Finding]:
    """Greet all upstreams at the same time. No answer is a fault, or a warning if another address of the same upstream
    answers.
    """
    yield from trio.run(_greet_all, host)


async def _greet_all(host: Host) -> list[Finding]:
    resolver = make_resolver(host.config.dns, Metrics("doctor"), sockets=16)
    async with trio.open_nursery() as background:
        await background.start(resolver.run)
        found = await _at_once(lambda proxy: _Greeting(proxy, host).run(resolver), host.proxies)
        background.cancel_scope.cancel()
    return [finding for findings in found for finding in findings]


async def _at_once(act: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
    """The results of all, in this order."""
    results: dict[int, R] = {}

    async def one(number: int) -> None:
        results[number] = await act(items[number])

    async with trio.open_nursery() as nursery:
        for number in range(len(items)):
            nursery.start_soon(one, number)
    return [results[number] for number in range(len(items))]


class _Greeting:
    """Greets one upstream at all its addresses."""

    def __init__(self, proxy: ProxyURL, host: Host, listed: ProxyURL | None = None) -> None:
        """`listed`: how the configuration names it, if DNS tells of it."""
        self._proxy, self._host = proxy, host
        groups = [group for group in host.config.groups().values() if (listed or proxy) in group.proxy_url]
        self._header = LOCAL_HEADER if any(group.proxy_protocol for group in groups) else b""

    async def run(self, resolver: Resolver) -> list[Finding]:
        """What is wrong with it, if anything."""
        if self._proxy.discovery is not None:
            return await self._members(resolver)
        addresses: tuple[IPAddress, ...] = ()
        problem = "its name was not resolved in time"
        if not isinstance(self._proxy.host, str):
            addresses = (self._proxy.host,)
        else:
            with trio.move_on_after(PATIENCE):
                try:
                    addresses = await resolver.search(self._proxy.host)
                except ResolveError as error:
                    problem = str(error)
        if not addresses:
            do = "see that its name resolves on this host, or put its address into proxy_url"
            return [fault(_CHECK, f"{self._proxy}: {problem}", do)]
        found = await _at_once(self._at, addresses[:_MOST])
        elsewhere = any(answers for _, answers in found)
        return [
            attrs.evolve(finding, state=State.WARNING)
            if finding.state is State.FAULT and elsewhere and not answers
            else finding
            for finding, answers in found
        ]

    async def _members(self, resolver: Resolver) -> list[Finding]:
        """The same of all proxies that the name stands for."""
        problem = "its name was not looked up in time"
        with trio.move_on_after(PATIENCE):
            try:
                members, _ = await members_of(self._proxy, resolver)
            except ResolveError as error:
                problem = str(error)
            else:
                urls = [member.url for member in members[:_MOST]]
                found = await _at_once(lambda url: _Greeting(url, self._host, self._proxy).run(resolver), urls)
                return [finding for findings in found for finding in findings]
        return [fault(_CHECK, f"{self._proxy}: {problem}", "see what the name servers say about it")]

    async def _at(self, address: IPAddress) -> tuple[Finding, bool]:
        """What is wrong with it at this address, and whether it answers there."""
        host, proxy = self._host, self._proxy
        shown = str(proxy) if address == proxy.host else f"{proxy} at {join_port(address, proxy.port)}"
        # A sample first: if the rules redirect it, a real connection would make transocks connect to itself.
        if host.comes_back(host.open(host.daemon, address, proxy.port)) is not None:
            return unchecked(_CHECK, f"{shown}: connections to it are redirected to transocks"), False
        since, problem, doubt = time.monotonic(), "", ""
        with self._socket(address) as sock, contextlib.ExitStack() as stack:
            port = sock.getsockname()[1]
            if host.tracer is not None:
                stack.enter_context(host.tracer.watching(TCP, port, keep=False))
            try:
                with trio.fail_after(PATIENCE):
                    await sock.connect(socket_address(str(address), proxy.port))
                    doubt = await self._greet(trio.SocketStream(sock))
            except trio.TooSlowError:
                problem = f"no answer within {PATIENCE:g} s"
            except Error as error:
                problem = str(error)
            except (trio.BrokenResourceError, OSError) as error:
                inner = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
                problem = os.strerror(inner.errno) if isinstance(inner, OSError) and inner.errno else str(error)
            seconds = time.monotonic() - since
            if problem:
                return self._broken(f"{shown}: {problem}", self._obstacle(port, address), problem), False
        if not host.is_local(address) and not await self._takes_large(address):
            return await self._blackhole(address, shown), True
        if doubt:
            return unchecked(_CHECK, f"{shown}: {doubt}"), True
        return fine(_CHECK, f"{shown} answers, in {seconds * 1000:.0f} ms"), True

    def _socket(self, address: IPAddress) -> trio.socket.SocketType:
        """A socket like the daemon's, bound to a port."""
        daemon = self._host.daemon
        try:
            sock = socket_of(daemon, address.version)
        except FirewallError:  # its cgroup takes no other process
            sock = socket_of(attrs.evolve(daemon, cgroup=None), address.version)
        sock.bind(("", 0))
        return trio.socket.from_stdlib_socket(sock)

    # ---- does it answer?

    async def _greet(self, stream: trio.SocketStream) -> str:
        """Returns why its answer proves little, if that is so. Raises UpstreamError, BrokenResourceError."""
        proxy = self._proxy
        if proxy.scheme.is_socks5:
            before = self._header
            probe = Probe(proxy.username, proxy.secret)
            while not isinstance(probe.next_event(), Probed):
                if data := probe.data_to_send():
                    await stream.send_all(before + data)
                    before = b""
                probe.receive_data(await stream.receive_some(1024))
            return ""
        await stream.send_all(self._header + ping(proxy))
        answer = HttpConnect(str(proxy.host), proxy.port)  # also reads an answer to CONNECT
        while data := await stream.receive_some(1024):
            if proxy.scheme is not ProxyScheme.HTTP:
                if data[:1] != b"\0":
                    raise UpstreamError(f"the server answers with {data[:8]!r}, which is not SOCKS4")
                return ""
            answer.receive_data(data)
            try:
                if answer.next_event() is not NEED_DATA:
                    return ""
            except RequestRefused as error:
                if _NOT_HTTP.search(str(error)):
                    raise
                return ""
        return "it closes without an answer to what asks for no connection; is it a proxy of this kind?"

    def _obstacle(self, port: int, address: IPAddress) -> str | None:
        """What on this host stops the connection from this port: a rule, or the routing policy."""
        host = self._host
        if host.tracer is not None:
            if (why := host.stop(host.tracer.trace(TCP, port))) is not None:
                return why
            if (why := host.stop(host.tracer.trace(TCP, port, back=True))) is not None:
                return f"its answer: {why}"
        policy = policy_against(address, host.config.mark or 0, host.daemon.uid)
        return f"routing rule {policy}" if policy is not None else None

    def _broken(self, text: str, obstacle: str | None, problem: str) -> Finding:
        if self._host.tracer is None:
            return unchecked(_CHECK, f"{text}; or this user's connections are redirected", AS_ROOT)
        if obstacle is not None:
            who = f"mark {mark:#x}" if (mark := self._host.config.mark) else f"user {self._host.daemon.uid or 0}"
            return fault(
                _CHECK, f"{text}: {obstacle}", f"take that out, or exempt what transocks sends ({who}) before it"
            )
        return fault(_CHECK, text, self._remedy(problem))

    def _remedy(self, problem: str) -> str:
        if "no credentials" in problem or (" 407" in problem and self._proxy.username is None):
            return "put user and password into proxy_url (percent-encoded)"
        if "other than a user name" in problem:
            return "take user and password out of proxy_url, if it wants none"
        if "user name" in problem or " 407" in problem:
            return "put user and password in proxy_url right (percent-encoded)"
        if "SOCKS" in problem or "HTTP" in problem:
            return f"look what listens there: {self._proxy} is to be a proxy of this kind"
        if "closed within" in problem or "reset by peer" in problem:
            # It answers, and refuses us.
            doubt = "whether it admits this host's address (its `allow_from`), or expects a PROXY header on this port"
            if self._header:
                doubt = "whether it expects a PROXY header on this port, and trusts this host's address (its `trusted`)"
            return f"look into its log; {doubt}"
        return "start it, or put proxy_url right; look for a firewall on the way"

    # ---- does a large packet reach it?

    async def _takes_large(self, address: IPAddress, mtu: int | None = None) -> bool:
        """Whether a segment of full size reaches it if small ones do; on a connection of its own. The request leads to
        no connection (a SOCKS server may log that); zeros fill the segment.
        """
        with trio.move_on_after(_LARGE_WITHIN), contextlib.suppress(OSError):
            with self._socket(address) as sock:
                if mtu is not None:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - _HEADERS[address.version])
                await sock.connect(socket_address(str(address), self._proxy.port))
                await sock.send(self._large(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)))
                while struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                return True
        return False

    def _large(self, size: int) -> bytes:
        proxy = self._proxy
        if proxy.scheme is ProxyScheme.HTTP:
            start = self._header + ping(proxy).removesuffix(b"\r\n") + b"X-Padding: "
            return start + b"0" * (size - len(start) - 4) + b"\r\n\r\n"
        question = Probe(pipelined=True).data_to_send() if proxy.scheme.is_socks5 else ping(proxy)
        return (self._header + question).ljust(size, b"\0")

    async def _blackhole(self, address: IPAddress, shown: str) -> Finding:
        """A link on the way has a smaller MTU than ours, and the ICMP message about it is lost."""
        fits = await _at_once(lambda mtu: self._takes_large(address, mtu), _MTUS)
        text = f"{shown}: small packets get there, large ones don't (an MTU blackhole)"
        mtu = next((mtu for mtu, does in zip(_MTUS, fits, strict=True) if does), None)
        if mtu is None:
            do = "sysctl net.ipv4.tcp_mtu_probing=1; and look for what drops ICMP on the way"
            return fault(_CHECK, text, do)
        try:
            device, gateway = lookup(address, mark=self._host.config.mark or 0)
        except FirewallError:
            return fault(_CHECK, text, f"lower the MTU towards it to {mtu}")
        via = f"via {gateway} " if gateway else ""
        do = f"ip route replace {address} {via}dev {device} mtu {mtu}"
        return fault(_CHECK, f"{text}; {mtu} bytes do", do)

"""Outgoing TCP connections: from which address, within which time, and with the errno of what went wrong."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import IPv6Address
from math import inf
from socket import SocketType
from typing import NamedTuple, TypeVar

import trio

from usocksd.errors import DialError, Error, NeedsInterface, OutOfPorts
from usocksd.net.address import join_port, socket_address
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.net.fast_open import Unproven, answered, ask_for_fast_open
from usocksd.net.options import set_options
from usocksd.net.reactor import Reactor

E = TypeVar("E", bound=Endpoint)

# ip(7), since Linux 4.2: choose the port at connect, not at bind. With it ports run out per destination address and
# port; without it some 28,000 of them limit a source address over all destinations. Python 3.11 has no name for it.
_IP_BIND_ADDRESS_NO_PORT = 24
# linux/in6.h, since Linux 4.15: bind to what no interface has. (For IPv4 a local route is enough.)
_IPV6_FREEBIND = 78
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
# RFC 8305, section 5: how long one attempt is given before the next address is tried beside it, in seconds. Down to
# the shortest that is recommended there, for all of many addresses to be tried in the first half of the time.
_ATTEMPT_DELAY, _SHORTEST_DELAY = 0.25, 0.1
# How many attempts of a race may be under way.
_MOST_ATTEMPTS = 16
# Seconds that an attempt has at most where the next may not begin beside it: a lost SYN is sent again after one.
_LONGEST_ALONE = 3.0
# So long, in seconds, a source that was out of ports for a destination is not the first to be asked again: the kernel
# looks at each of the 28,000 ports before it says so, which takes 2 ms of this process.
_SPENT_FOR = 1.0
_MOST_SPENT = 4096


class Target(NamedTuple):
    """One address to connect to, and what to leave from. None leaves the choice to the kernel."""

    host: str
    """A numeric address, with its zone (fe80::1%eth0) if it is link-local and `iface` does not say it."""
    port: int
    source: str | None = None
    iface: str | None = None
    mark: int | None = None
    spare: tuple[str, ...] = ()
    """What to leave from when `source` has no port left for this destination, or is not on this host any more."""
    routed: bool = False
    """`source` may be an address that no interface has, of a network that is routed to this host (AnyIP)."""
    fast_open: bool = False
    """Use TCP Fast Open, if this is the only target: the endpoint may then be `unproven`."""

    def __str__(self) -> str:
        return join_port(self.host, self.port)


def check_mark(mark: int | None) -> None:
    """Raise Error if this process may not set that mark: better at the start than with every connection."""
    if mark is None:
        return
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        except OSError as error:
            raise Error(f"mark = {mark:#x}: {error.strerror}; it takes CAP_NET_ADMIN") from None


async def dial(
    reactor: Reactor, targets: Sequence[Target], *, deadline: float, client: Endpoint | None = None
) -> tuple[Endpoint, Target]:
    """Connect to the first of `targets` that answers: happy eyeballs (RFC 8305) when there is more than one.

    With `fast_open`, and if the kernel has a cookie for it, a single target is not waited for: the endpoint is
    `unproven` (see fast_open.py), what is sent first may arrive twice, and whether it can be reached at all shows
    afterwards. Of several targets that would choose one which may not answer. So who knows which one has answered last
    dials that alone, and the others if it fails.

    `deadline` is on the reactor's clock. If `client` is reset meanwhile, nobody waits for this connection any more:
    PeerReset. Raises DialError with the errno of the attempt that failed first (ETIMEDOUT for the deadline); OutOfPorts
    if that was for want of ports on every address to leave from.
    """
    if client is not None:
        client.check_peer()
    if len(targets) == 1:
        return await _connect(reactor, targets[0], deadline, client), targets[0]
    return await _Race(reactor, targets, deadline).run(client)


async def _connect(reactor: Reactor, target: Target, deadline: float, client: Endpoint | None) -> Endpoint:
    since = reactor.clock()
    endpoint = _start(
        reactor,
        target,
        lambda sock, unproven: (
            Unproven(reactor, sock, target.host, str(target)) if unproven else Endpoint(reactor, sock, connecting=True)
        ),
        fast_open=target.fast_open,
    )
    endpoint.deadline = deadline
    if endpoint.unproven:
        return endpoint
    if client is not None:
        client.on_reset = endpoint.give_up
    try:
        error = await endpoint.connected()
    except DeadlineExpired:
        endpoint.close()
        raise DialError(errno.ETIMEDOUT, str(target)) from None
    except BaseException:
        endpoint.close()
        raise
    finally:
        if client is not None:
            client.on_reset = None
    if error:
        endpoint.close()
        raise DialError(error, str(target))
    if target.fast_open:
        now = reactor.clock()
        answered(endpoint.sock, target.host, now - since, now)
    return endpoint


# When a source that had no port left for a destination is to be asked again, on the reactor's clock.
_spent: dict[tuple[str | None, str, int], float] = {}


def _start(reactor: Reactor, target: Target, make: Callable[[SocketType, bool], E], *, fast_open: bool = False) -> E:
    """Everything up to a connect(2) in progress, from the first source that can be used.

    `make` gets the socket, and whether connect(2) has returned without an answer, which only `fast_open` allows.
    """
    failure: DialError | None = None
    for source in _promising(target, reactor.clock()):
        try:
            return _start_from(reactor, target, source, make, fast_open=fast_open)
        except DialError as error:
            # Out of ports, or not on this host any more. With whatever else it is another source would not help.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            failure = error
            if isinstance(error, OutOfPorts) and target.spare:
                if len(_spent) >= _MOST_SPENT:
                    _spent.clear()
                _spent[source, target.host, target.port] = reactor.clock() + _SPENT_FOR
    assert failure is not None
    if isinstance(failure, OutOfPorts):
        sources = () if target.source is None else (target.source, *target.spare)
        raise OutOfPorts(str(target), sources, _in_time_wait())
    raise failure


def _promising(target: Target, now: float) -> Sequence[str | None]:
    """The sources worth trying, in order: the preferred one if no other is, since it may have a port again by now."""
    if not target.spare:
        return (target.source,)
    sources = (target.source, *target.spare)
    if not _spent:
        return sources
    return [each for each in sources if _spent.get((each, target.host, target.port), now) <= now] or sources[:1]


def _start_from(
    reactor: Reactor,
    target: Target,
    source: str | None,
    make: Callable[[SocketType, bool], E],
    *,
    fast_open: bool,
) -> E:
    v6 = ":" in target.host
    step = "socket"
    try:
        sock = SocketType(socket.AF_INET6 if v6 else socket.AF_INET, _STREAM)
    except OSError as error:
        raise DialError(error.errno or errno.EIO, str(target), step) from None
    try:
        set_options(sock)
        if target.mark is not None:
            step = f"mark {target.mark:#x} for"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, target.mark)
        if target.iface is not None:
            step = f"interface {target.iface} for"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, target.iface.encode() + b"\0")
        if source is not None:
            step = f"bind {source} for"
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            if target.routed and v6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            sock.bind((source, 0))
        step = "connect"
        fast_open = fast_open and ask_for_fast_open(sock, target.host, reactor.clock())
        code = sock.connect_ex(socket_address(target.host, target.port))
        if code == errno.EADDRNOTAVAIL and (source is not None or not v6):
            # (For IPv6 without a source it may be that this host has no address to leave from.)
            raise OutOfPorts(str(target))
        if code == errno.EINVAL and v6 and IPv6Address(target.host).is_link_local:
            raise NeedsInterface(str(target))
        if code not in (0, errno.EINPROGRESS):
            raise DialError(code, str(target), step)
        return make(sock, fast_open and code == 0)
    except OSError as error:
        sock.close()
        raise DialError(error.errno or errno.EIO, str(target), step) from None
    except BaseException:
        sock.close()
        raise


def _in_time_wait() -> int | None:
    """How many connections of this host are in TIME_WAIT, and keep their ports; None where nobody tells."""
    try:
        with open("/proc/net/sockstat", encoding="ascii") as file:
            words = file.read().partition("TCP:")[2].split()
        return int(words[words.index("tw") + 1])
    except (OSError, ValueError, IndexError):
        return None


class _Attempt(Endpoint):
    """One attempt of a race, which is told of everything that happens to it."""

    __slots__ = ("race", "target")

    def __init__(self, race: _Race, target: Target, reactor: Reactor, sock: SocketType) -> None:
        self.race: _Race | None = race
        self.target = target
        super().__init__(reactor, sock, connecting=True)

    def on_event(self, flags: int) -> None:
        super().on_event(flags)
        if self.race is not None:
            self.race.news.set()

    def interrupt(self, reason: BaseException) -> None:
        if self.race is not None:
            self.race.stop(reason)
        else:
            super().interrupt(reason)


class _Race:
    """Attempts begin a moment apart, or as soon as one has failed; the first to connect wins.

    The race is one task, which looks at every attempt before it begins another: once one has connected, none begins.

    A session counts as two descriptors. A race borrows further ones from `reactor.spare`, and never more than it leaves
    there for others. If it can borrow none, each attempt has its share of the time, and then gives way to the next.
    """

    def __init__(self, reactor: Reactor, targets: Sequence[Target], deadline: float) -> None:
        self.news = trio.Event()
        """Set when something has happened to an attempt."""
        self._reactor = reactor
        self._untried = deque(targets)
        self._deadline = deadline
        spread = (deadline - reactor.clock()) / (2 * len(targets))
        self._delay = max(min(_ATTEMPT_DELAY, spread), _SHORTEST_DELAY)
        self._running: dict[_Attempt, None] = {}
        """In the order in which they began. All but one are borrowed."""
        self._failed: list[DialError] = []
        self._stopped: BaseException | None = None
        # In trio's time: when the next attempt may begin beside those that run, and when in place of one of them.
        self._beside_at = self._instead_at = -inf

    async def run(self, client: Endpoint | None) -> tuple[Endpoint, Target]:
        """As `dial`."""
        if client is not None:
            client.on_reset = partial(self.stop, PeerReset())
        winner = None
        try:
            while (winner := self._connected()) is None:
                if self._stopped is not None:
                    raise self._stopped
                if self._untried and self._may_begin():
                    self._begin(self._untried.popleft())
                elif self._running:
                    await self._wait()
                else:
                    raise self._failed[0]
            winner.race = None
            return winner, winner.target
        except DeadlineExpired:
            if self._failed:
                raise self._failed[0] from None
            oldest = next(iter(self._running))
            raise DialError(errno.ETIMEDOUT, str(oldest.target)) from None
        finally:
            if client is not None:
                client.on_reset = None
            self._reactor.spare += max(len(self._running) - 1, 0)
            for attempt in self._running:
                if attempt is not winner:
                    attempt.close()

    def stop(self, reason: BaseException) -> None:
        """End it with `reason`."""
        self._stopped = self._stopped or reason
        self.news.set()

    def _connected(self) -> _Attempt | None:
        """The one that has, if one has. Those that have failed are out."""
        for attempt in list(self._running):
            if attempt.writable:
                error = attempt.connect_error()
                if not error:
                    return attempt
                self._failed.append(DialError(error, str(attempt.target)))
                self._drop(attempt)
                self._beside_at = -inf
        return None

    def _may_begin(self) -> bool:
        """Whether it is time for another attempt, and room: the one that has waited longest gives way if it has to."""
        running = self._running
        if not running:
            # Past the deadline each would begin only to end: with many targets, for a long time.
            return not self._failed or self._reactor.clock() < self._deadline
        now = trio.current_time()
        if now < self._beside_at:
            return False
        if len(running) < _MOST_ATTEMPTS:
            if len(running) <= self._reactor.spare:
                return True
            if now < self._instead_at:
                return False
        self._drop(next(iter(running)))
        return True

    def _begin(self, target: Target) -> None:
        # With Fast Open one would be chosen that has not answered: see `dial`.
        try:
            attempt = _start(self._reactor, target, lambda sock, _: _Attempt(self, target, self._reactor, sock))
        except DialError as error:
            self._failed.append(error)
            return
        attempt.deadline = self._deadline
        if self._running:
            self._reactor.spare -= 1
        self._running[attempt] = None
        now = trio.current_time()
        self._beside_at = now + self._delay
        share = (self._deadline - self._reactor.clock()) / (len(self._untried) + 1)
        self._instead_at = now + min(max(share, self._delay), _LONGEST_ALONE)

    def _drop(self, attempt: _Attempt) -> None:
        if len(self._running) > 1:
            self._reactor.spare += 1
        del self._running[attempt]
        attempt.close()

    async def _wait(self) -> None:
        """For news, or for the time at which another attempt may begin."""
        self.news = trio.Event()
        at, now = inf, trio.current_time()
        if self._untried:
            # (Another race may give something back meanwhile.)
            at = self._beside_at if now < self._beside_at else min(self._instead_at, now + self._delay)
        with trio.move_on_at(at):
            await self.news.wait()
            return
        # A process that was busy finds its timers and its events due in one turn: the events are looked at first.
        await trio.lowlevel.checkpoint()

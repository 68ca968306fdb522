"""Outgoing TCP connections: from which address, within which time, and with the errno of what went wrong."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from socket import SocketType
from typing import NamedTuple

import trio

from usocksd.errors import DialError, Error, OutOfPorts
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.runtime.fast_open import Unproven, answered, ask_for_fast_open
from usocksd.runtime.hostport import join_port
from usocksd.runtime.options import set_options
from usocksd.runtime.reactor import Reactor

# ip(7), since Linux 4.2: choose the port at connect, not at bind. With it ports run out per destination address and
# port; without it some 28,000 of them limit a source address over all destinations. Python 3.11 has no name for it.
_IP_BIND_ADDRESS_NO_PORT = 24
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
# RFC 8305, section 5: how long one attempt is given before the next address is tried beside it, in seconds. Down to
# the shortest that is recommended there, for all of many addresses to be tried in the first half of the time.
_ATTEMPT_DELAY, _SHORTEST_DELAY = 0.25, 0.1
# Who owns a name decides how many addresses it has: not how many descriptors a client takes at a time.
_MOST_ATTEMPTS = 16
# So long, in seconds, a source that was out of ports for a destination is not the first to be asked again: the kernel
# looks at each of the 28,000 ports before it says so, which takes 2 ms of this process.
_SPENT_FOR = 1.0
_MOST_SPENT = 4096


class Target(NamedTuple):
    """One address to connect to, and what to leave from. None leaves the choice to the kernel."""

    host: str
    """A numeric address."""
    port: int
    source: str | None = None
    iface: str | None = None
    mark: int | None = None
    spare: tuple[str, ...] = ()
    """What to leave from when `source` has no port left for this destination, or is not on this host any more."""
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
    endpoint = _start(reactor, target)
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
        answered(target.host, now - since, now)
    return endpoint


# When a source that had no port left for a destination is to be asked again, on the reactor's clock.
_spent: dict[tuple[str | None, str, int], float] = {}


def _start(reactor: Reactor, target: Target) -> Endpoint:
    """Everything up to a connect(2) in progress, from the first source that can be used."""
    failure: DialError | None = None
    for source in _promising(target, reactor.clock()):
        try:
            return _start_from(reactor, target, source)
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


def _start_from(reactor: Reactor, target: Target, source: str | None) -> Endpoint:
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
            sock.bind((source, 0))
        step = "connect"
        fast_open = target.fast_open and ask_for_fast_open(sock, target.host, reactor.clock())
        code = sock.connect_ex((target.host, target.port))
        if code == errno.EADDRNOTAVAIL and (source is not None or not v6):
            # (For IPv6 without a source it may be that this host has no address to leave from.)
            raise OutOfPorts(str(target))
        if code not in (0, errno.EINPROGRESS):
            raise DialError(code, str(target), step)
        if fast_open and code == 0:
            return Unproven(reactor, sock, target.host, str(target))
        return Endpoint(reactor, sock, connecting=True)
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


class _Race:
    """Attempts begin a moment apart, or as soon as the one before has failed; the first to connect wins.

    When there are too many at a time the one that has waited longest is given up.
    """

    def __init__(self, reactor: Reactor, targets: Sequence[Target], deadline: float) -> None:
        self._reactor = reactor
        self._targets = targets
        self._deadline = deadline
        spread = (deadline - reactor.clock()) / (2 * len(targets))
        self._delay = max(min(_ATTEMPT_DELAY, spread), _SHORTEST_DELAY)
        self._waiting: dict[trio.Event, trio.CancelScope] = {}  # in the order in which they began
        self._won: list[tuple[Endpoint, Target]] = []
        self._failed: list[DialError] = []
        self._stopped: list[Exception] = []
        self._gone = False
        self._scope = trio.CancelScope()

    async def run(self, client: Endpoint | None) -> tuple[Endpoint, Target]:
        """As `dial`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if client is not None:
                        client.on_reset = self._give_up
                    for target in self._targets:
                        # Past it, each attempt would begin only to end: with many targets, for a long time.
                        if self._failed and self._reactor.clock() >= self._deadline:
                            break
                        await self._begin(nursery, target)
        except BaseException:
            # Cancelled, perhaps in the moment in which an attempt had won.
            for endpoint, _ in self._won:
                endpoint.close()
            raise
        finally:
            if client is not None:
                client.on_reset = None
        if self._won:
            return self._won[0]
        if self._stopped:
            raise self._stopped[0]
        if self._gone:
            raise PeerReset
        raise self._failed[0]

    async def _begin(self, nursery: trio.Nursery, target: Target) -> None:
        """Returns when the next attempt may begin."""
        if len(self._waiting) == _MOST_ATTEMPTS:
            next(iter(self._waiting.values())).cancel()
        settled = trio.Event()
        self._waiting[settled] = trio.CancelScope()
        nursery.start_soon(self._attempt, target, settled)
        with trio.move_on_after(self._delay):
            await settled.wait()

    async def _attempt(self, target: Target, settled: trio.Event) -> None:
        endpoint = None
        try:
            with self._waiting[settled]:
                # Of several one would be chosen that has not answered: see `dial`.
                waited_for = target._replace(fast_open=False)
                endpoint = await _connect(self._reactor, waited_for, self._deadline, None)
        except DialError as error:
            self._failed.append(error)
        except Exception as error:
            # The process stops, say. Not through the nursery, which would wrap it.
            self._stopped.append(error)
            self._scope.cancel()
        finally:
            del self._waiting[settled]
            settled.set()
        if endpoint is None:
            return
        if self._won:
            endpoint.close()
        else:
            self._won.append((endpoint, target))
            self._scope.cancel()

    def _give_up(self) -> None:
        self._gone = True
        self._scope.cancel()

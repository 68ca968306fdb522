"""Makes outgoing TCP connections: with a source address, within a deadline, and with the errno of a failure."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address
from socket import SocketType
from typing import NamedTuple, TypeVar

from usocksd.errors import DialError, Error, NeedsInterface, OutOfPorts
from usocksd.net.address import join_port, socket_address
from usocksd.net.endpoint import DeadlineExpired, Endpoint, Interruptible, set_options
from usocksd.net.fast_open import LostSyns, UnprovenEndpoint
from usocksd.net.race import PACE, Pace, Race
from usocksd.net.reactor import Reactor

E = TypeVar("E", bound=Endpoint)

# ip(7), since Linux 4.2: choose the port at connect, not at bind. With it ports run out per destination address and
# port; without it some 28,000 of them limit a source address over all destinations. Python 3.11 has no name for it.
_IP_BIND_ADDRESS_NO_PORT = 24
# linux/in6.h, since Linux 4.15: bind to an address that no interface has. (For IPv4 a local route is enough.)
_IPV6_FREEBIND = 78
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
# For this many seconds, a source without a free port for a destination is not tried first again: the kernel examines
# all 28,000 ports before it fails, which takes this process 2 ms.
_SPENT_FOR = 1.0
_MOST_SPENT = 4096


class Target(NamedTuple):
    """An address to connect to, and the source. None leaves the choice to the kernel."""

    host: str
    """A numeric address, with its zone (fe80::1%eth0) if it is link-local and `iface` does not say it."""
    port: int
    source: str | None = None
    iface: str | None = None
    mark: int | None = None
    spare: tuple[str, ...] = ()
    """Other sources, if `source` has no port left for this destination, or is no longer on this host."""
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
            raise Error(f"mark = {mark:#x}: {error.strerror}; it needs CAP_NET_ADMIN") from None


class Dialer:
    """Makes the connections of one process. It remembers which sources are out of ports, and where Fast Open fails."""

    def __init__(self, reactor: Reactor, *, spare: int = 1000, pace: Pace = PACE) -> None:
        self.reactor = reactor
        self.pace = pace
        self.spare = spare
        """How many sockets may be open beside the two of each session: races borrow them."""
        self._lost_syns = LostSyns()
        self._spent: dict[tuple[str | None, str, int], float] = {}
        """When a source that had no port left for a destination may be tried again, on the reactor's clock."""

    async def dial(
        self, targets: Sequence[Target], *, deadline: float, client: Interruptible | None = None
    ) -> tuple[Endpoint, Target]:
        """Connect to the first of `targets` that answers: happy eyeballs (RFC 8305) when there is more than one.

        With `fast_open`, and if the kernel has a cookie for it, a single target is not waited for: the endpoint is
        `unproven` (see fast_open.py), what is sent first may arrive twice, and a failed connect shows afterwards.
        With several targets, Fast Open would pick one that has not answered yet, so it is not used.

        `deadline` is on the reactor's clock. If `client` is reset meanwhile, nobody waits for this connection any
        more: PeerReset. Raises DialError with the errno of the attempt that failed first (ETIMEDOUT for the deadline);
        OutOfPorts if that was for want of ports on every source address.
        """
        if client is not None:
            client.check_peer()
        if len(targets) == 1:
            return await self._connect(targets[0], deadline, client), targets[0]
        return await Race(self, targets, deadline).run(client)

    def start(self, target: Target, make: Callable[[SocketType, bool], E], *, fast_open: bool = False) -> E:
        """Begin a connect(2), from the first usable source. `make` gets the socket, and whether connect(2) has returned
        without an answer, which only `fast_open` allows. Raises DialError.
        """
        failure: DialError | None = None
        for source in self._sources(target):
            try:
                return self._start_from(target, source, make, fast_open=fast_open)
            except DialError as error:
                # Out of ports, or no longer on this host. Other errors would occur with other sources too.
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                failure = error
                if isinstance(error, OutOfPorts) and target.spare:
                    if len(self._spent) >= _MOST_SPENT:
                        self._spent.clear()
                    self._spent[source, target.host, target.port] = self.reactor.clock() + _SPENT_FOR
        assert failure is not None
        if isinstance(failure, OutOfPorts):
            sources = () if target.source is None else (target.source, *target.spare)
            raise OutOfPorts(str(target), sources, _in_time_wait())
        raise failure

    async def _connect(self, target: Target, deadline: float, client: Interruptible | None) -> Endpoint:
        reactor = self.reactor
        since = reactor.clock()
        endpoint = self.start(
            target,
            lambda sock, unproven: (
                UnprovenEndpoint(reactor, sock, target.host, str(target), self._lost_syns)
                if unproven
                else Endpoint(reactor, sock, connecting=True)
            ),
            fast_open=target.fast_open,
        )
        endpoint.deadline = deadline
        if endpoint.unproven:
            return endpoint
        if client is not None:
            client.on_interrupt = endpoint.interrupt
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
                client.on_interrupt = None
        if error:
            endpoint.close()
            raise DialError(error, str(target))
        if target.fast_open:
            now = reactor.clock()
            self._lost_syns.answered(endpoint.sock, target.host, now - since, now)
        return endpoint

    def _sources(self, target: Target) -> Sequence[str | None]:
        """The sources to try, in order: those not known to be out of ports, or else the preferred one."""
        if not target.spare:
            return (target.source,)
        sources = (target.source, *target.spare)
        if not self._spent:
            return sources
        now = self.reactor.clock()
        found = [each for each in sources if self._spent.get((each, target.host, target.port), now) <= now]
        return found or sources[:1]

    def _start_from(
        self, target: Target, source: str | None, make: Callable[[SocketType, bool], E], *, fast_open: bool
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
            fast_open = fast_open and self._lost_syns.ask(sock, target.host, self.reactor.clock())
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
    """How many connections of this host are in TIME_WAIT, and keep their ports; None if that is not known."""
    try:
        with open("/proc/net/sockstat", encoding="ascii") as file:
            words = file.read().partition("TCP:")[2].split()
        return int(words[words.index("tw") + 1])
    except (OSError, ValueError, IndexError):
        return None

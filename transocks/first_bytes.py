"""The first bytes of a client: read before anything is dialled, within a bounded time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import trio

from transocks.route_settings import NamesConfig
from transocks.sniff import OTHER, Opening, Sniffer
from usocksd.names.conditions import Ports
from usocksd.names.match import NetworkMap
from usocksd.net.address import HostPort, numeric_address
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset


class First(NamedTuple):
    """The bytes that a client has sent so far, and what they are."""

    data: bytes
    opening: Opening


NOTHING = First(b"", OTHER)


class _Wait:
    """The wait of one client (None: over), and its end on trio's clock."""

    __slots__ = ("client", "until")

    def __init__(self, client: Endpoint, until: float) -> None:
        self.client: Endpoint | None = client
        self.until = until


class _Waits:
    """Waits that all take `seconds`, so that they end in the order in which they began.

    Deadlines of the reactor may be half a second late, and a cancel scope costs 7 µs. A queue and one task, `run`, cost
    a tenth of that.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waits: deque[_Wait] = deque()
        self._some = trio.Event()

    async def run(self) -> NoReturn:
        """End waits when it is time, until cancelled."""
        waits = self._waits
        while True:
            while waits and (waits[0].client is None or waits[0].until <= trio.current_time()):
                wait = waits.popleft()
                client, wait.client = wait.client, None
                if client is not None:
                    client.interrupt(DeadlineExpired())
            if waits:
                await trio.sleep_until(waits[0].until)
            else:
                self._some = trio.Event()
                await self._some.wait()

    def begin(self, client: Endpoint) -> _Wait:
        """Begin a wait. Its `client` is None when it is over; set it to None to end it earlier."""
        wait = _Wait(client, trio.current_time() + self._seconds)
        self._waits.append(wait)
        self._some.set()
        return wait


class FirstBytes:
    """Reads the first bytes until the name is known, at most `size` or little more.

    A silent client may speak a protocol in which the server begins, so it has `wait` seconds to begin. Once it has
    begun, the rest is on its way, or is being sent again: it has `long_wait` seconds for that, and also to begin on
    ports where clients speak first. For `skip_ports` and `skip_networks` (of destinations) there is no wait.
    """

    def __init__(self, names: NamesConfig) -> None:
        self._sniff = names.sniff
        self._size = names.size
        self._skip_ports = _ports(names.skip_ports)
        self._client_first_ports = _ports(names.client_first_ports)
        self._skip_networks = NetworkMap(dict.fromkeys(names.skip_networks, True))
        self._waits = names.wait > 0
        self._short, self._long = _Waits(names.wait), _Waits(names.long_wait)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """End waits when it is time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._short.run)
            nursery.start_soon(self._long.run)
            task_status.started()

    async def read(self, client: Endpoint, destination: HostPort) -> First:
        """The first bytes of the client, on its way to `destination`. Raises PeerReset when it is gone.

        If the client ends its side meanwhile, the relay sees that again.
        """
        port = destination.port
        if (
            not self._sniff
            or port in self._skip_ports
            or (len(self._skip_networks) and self._skip_networks.match(numeric_address(destination.host)))
        ):
            client.watch()  # for its reset
            return NOTHING
        sniffer = Sniffer(port)
        data = b""
        opening = None
        wait = None
        is_long = False
        try:
            # Usually the bytes have arrived by now, and this is all.
            piece = client.receive_now()
            while piece != b"":
                if piece is not None:
                    data += piece
                    opening = sniffer.feed(piece)
                    if opening is not None or len(data) >= self._size:
                        break
                if not self._waits:
                    break
                if wait is None or (data and not is_long):
                    if wait is not None:
                        wait.client = None
                    is_long = bool(data) or port in self._client_first_ports
                    wait = (self._long if is_long else self._short).begin(client)
                if wait.client is None:  # also if the wait ended between two pieces
                    break
                piece = await client.receive()
        except DeadlineExpired:
            pass
        except OSError:
            raise PeerReset from None
        finally:
            if wait is not None:
                wait.client = None  # the queue keeps the wait until its time is over; it need not keep the socket
        return First(data, opening or sniffer.finish())


def _ports(ranges: Iterable[Ports]) -> frozenset[int]:
    return frozenset(port for first, last in ranges for port in range(first, last + 1))

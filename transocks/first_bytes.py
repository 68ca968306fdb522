"""What a client says first: read before anything is dialled, within a bounded time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, NoReturn

import trio

from transocks.original_dst import Destination
from transocks.route_settings import NamesConfig
from transocks.sniff import OTHER, Opening, Sniffer
from usocksd.match import NetworkMap, numeric_address
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint, PeerReset


class First(NamedTuple):
    """What a client has said so far, and what that is."""

    data: bytes
    opening: Opening


NOTHING = First(b"", OTHER)


class _Wait:
    """For one client (None: no more), and until when on trio's clock."""

    __slots__ = ("client", "until")

    def __init__(self, client: Endpoint | None, until: float) -> None:
        self.client = client
        self.until = until


class FirstBytes:
    """Reads them: as many as it takes to know the name, `size` or little more at most, for up to `wait` seconds.

    A client that says nothing speaks a protocol in which the server is first, and has waited in vain: `skip_ports` and
    `skip_networks` (of destinations) are where nobody is asked to.

    Deadlines of the reactor may be half a second late, and a scope of trio costs 7 us. But all these waits take the
    same time, so they end in the order in which they began: a queue and one task, `run`, do it for a tenth of that.
    """

    def __init__(self, names: NamesConfig) -> None:
        self._sniff = names.sniff
        self._wait = names.wait
        self._size = names.size
        self._skip_ports = frozenset(port for first, last in names.skip_ports for port in range(first, last + 1))
        self._skip_networks = NetworkMap(dict.fromkeys(names.skip_networks, True))
        self._waits: deque[_Wait] = deque()
        self._some = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """End waits when it is time, until cancelled."""
        task_status.started()
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

    async def read(self, client: Endpoint, destination: Destination) -> First:
        """What the client says first, on its way to `destination`. Raises PeerReset when it is gone.

        If the client ends its side meanwhile, that is left for the relay to see again.
        """
        if (
            not self._sniff
            or destination.port in self._skip_ports
            or (len(self._skip_networks) and self._skip_networks.match(numeric_address(destination.host)))
        ):
            client.watch()  # for its reset
            return NOTHING
        sniffer = Sniffer(destination.port)
        data = b""
        opening = None
        wait = None
        try:
            # Mostly it has spoken by now, at the latest while those before it were served: then this is all.
            piece = client.receive_now()
            while piece != b"":
                if piece is not None:
                    data += piece
                    opening = sniffer.feed(piece)
                    if opening is not None or len(data) >= self._size:
                        break
                if wait is None:
                    wait = self._begin(client)
                if wait.client is None:  # also where it had no time to say so, between two pieces
                    break
                piece = await client.receive()
        except DeadlineExpired:
            pass
        except OSError:
            raise PeerReset from None
        finally:
            if wait is not None:
                wait.client = None  # it stays in the queue for its time, and its session's socket need not
        return First(data, opening or sniffer.finish())

    def _begin(self, client: Endpoint) -> _Wait:
        wait = _Wait(client if self._wait else None, trio.current_time() + self._wait)
        if self._wait:
            self._waits.append(wait)
            self._some.set()
        return wait

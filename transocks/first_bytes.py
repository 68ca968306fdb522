"""The first bytes of a client: read before anything is dialled, within a bounded time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import inf
from typing import NamedTuple

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
        self._short, self._long = names.wait, names.long_wait

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
        reactor = client.reactor
        data = b""
        opening = None
        timer = None
        until = inf
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
                if not self._short:
                    break
                if timer is None or (data and not is_long):
                    if timer is not None:
                        timer.cancel()
                    is_long = bool(data) or port in self._client_first_ports
                    until = reactor.clock() + (self._long if is_long else self._short)
                    timer = reactor.call_at(until, partial(client.interrupt, DeadlineExpired()))
                if reactor.clock() >= until:  # also if that was between two pieces
                    break
                piece = await client.receive()
        except DeadlineExpired:
            pass
        except OSError:
            raise PeerReset from None
        finally:
            if timer is not None:
                timer.cancel()
        return First(data, opening or sniffer.finish())


def _ports(ranges: Iterable[Ports]) -> frozenset[int]:
    return frozenset(port for first, last in ranges for port in range(first, last + 1))

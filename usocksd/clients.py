"""A client: whose connection it is, and which clients may come in, by their address. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from usocksd.names.match import LINK_LOCAL, LOOPBACK, NetworkMap, parse_network
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

# RFC 1918, RFC 6598, RFC 4193
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")

ALLOW_FROM: Final = "allow_from"
TRUSTED: Final = "incoming.proxy_protocol.trusted"
"""The names, in records, metrics and verbs, of the settings that keep clients and proxies out."""

DEFAULT_CLIENTS = LOOPBACK + PRIVATE + LINK_LOCAL


class Client(NamedTuple):
    """The client of a connection, as far as it is known. Rules, egress, limits and records use this value. When a PROXY
    header or a password tells more, another Client replaces it.
    """

    host: str
    """The numeric address as text, a link-local one with its zone."""
    port: int
    address: IPAddress
    """The same address without a zone; IPv4-mapped ones are IPv4."""
    user: str | None = None
    """The authenticated user."""
    proxy: IPAddress | None = None
    """The proxy that has named this client in a PROXY header. None: the client has connected itself."""
    local: bool = False
    """The client is that proxy itself (LOCAL)."""

    @classmethod
    def at(cls, host: str, port: int = 0, user: str | None = None) -> Client:
        """The client with this numeric address. Raises ValueError."""
        return cls(host, port, numeric_address(host), user)

    def authenticated(self, user: str) -> Client:
        """The same client, now known as `user`."""
        return Client(self.host, self.port, self.address, user, self.proxy, self.local)


class ClientRules:
    """Networks whose clients may come in: those of `allow_from`, or `DEFAULT_CLIENTS`."""

    def __init__(self, allow_from: Iterable[IPNetwork] = ()) -> None:
        """Without networks only `DEFAULT_CLIENTS` are admitted, where the original admits everybody."""
        networks = tuple(allow_from) or map(parse_network, DEFAULT_CLIENTS)
        self._networks = NetworkMap(dict.fromkeys(networks, True))

    def admits(self, address: IPAddress) -> bool:
        """Whether a client with this address may connect."""
        return self._networks.match(address) is not None

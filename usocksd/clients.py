"""Who may come in: which clients `allow_from` admits, by their address. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address
from typing import Final

from usocksd.names.match import LINK_LOCAL, LOOPBACK, NetworkMap, parse_network
from usocksd.net.address import IPAddress, IPNetwork, numeric_address

# RFC 1918, RFC 6598, RFC 4193
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")

ALLOW_FROM: Final = "allow_from"
TRUSTED: Final = "incoming.proxy_protocol.trusted"
"""What records, metrics and verbs call the settings by which somebody may come in or not."""

DEFAULT_CLIENTS = LOOPBACK + PRIVATE + LINK_LOCAL


class ClientRules:
    """Which clients may connect at all: `allow_from`, or loopback, private and link-local networks."""

    _MOST_REMEMBERED = 16384

    def __init__(self, allow_from: Iterable[IPNetwork] = ()) -> None:
        """None given means `DEFAULT_CLIENTS`, where the original admitted everybody; `is_default` tells."""
        networks = tuple(allow_from)
        self.is_default = not networks
        self._networks = NetworkMap(dict.fromkeys(networks or map(parse_network, DEFAULT_CLIENTS), True))
        self._remembered: dict[str | IPAddress, bool] = {}

    def admits(self, peer: str | IPAddress) -> bool:
        """Whether a client with this address may connect; text as accept(2) gives it, also "fe80::1%eth0".

        IPv4-mapped IPv6 addresses, the peers of a dual-stack listener, are judged as IPv4.
        """
        try:
            return self._remembered[peer]
        except KeyError:
            pass
        address = numeric_address(peer) if isinstance(peer, str) else peer
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        if len(self._remembered) >= self._MOST_REMEMBERED:
            self._remembered.clear()
        admitted = self._remembered[peer] = self._networks.match(address) is not None
        return admitted

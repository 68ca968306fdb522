"""The networks that no name of others must lead to: this host by another address, its link, metadata services. Pure.

usocksd denies them unless a rule allows the address; transocks, where a route leads past the proxies by name.
"""

from __future__ import annotations

from usocksd.names.match import NetworkMap, parse_network

LOOPBACK = ("127.0.0.0/8", "::1/128")
LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")

# The metadata services answer credentials to whoever asks.
PROTECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loopback", LOOPBACK),
    ("unspecified", ("0.0.0.0/8", "::/128")),  # RFC 1122 section 3.2.1.3; Linux connects these to loopback
    ("link-local", LINK_LOCAL),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    ("broadcast", ("255.255.255.255/32",)),
    ("site-local", ("fec0::/10",)),  # deprecated by RFC 3879: what still has one is on a network of one's own
    (
        "cloud metadata",
        (
            "fd00:ec2::254/128",
            "fd00:ec2::23/128",
            "fd20:ce::254/128",
            "100.100.100.200/32",
            "192.0.0.192/32",
            "168.63.129.16/32",
        ),
    ),
)

PROTECTED_NETWORKS = NetworkMap({parse_network(text): kind for kind, texts in PROTECTED for text in texts})
"""What an address of them is."""

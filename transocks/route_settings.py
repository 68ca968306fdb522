"""[names] and [[route]] of transocks.toml as typed values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import attrs

from transocks.routes import DIRECT, REJECT, TCP, UDP, Route
from transocks.sniff import MOST
from usocksd.names.conditions import ConditionsConfig, Network, Ports, rule_name
from usocksd.settings.loader import Invalid, show
from usocksd.settings.types import integer, one_of, seconds

NAME, ADDRESS, REFUSE = "name", "address", "refuse"

SERVER_FIRST = (
    (21, 23),  # FTP (RFC 959 section 5.4), SSH (RFC 4253 section 4.2), Telnet (RFC 854)
    (24, 25),  # LMTP (RFC 2033), SMTP (RFC 5321 section 3.1)
    (110, 110),  # POP3 (RFC 1939 section 4)
    (119, 119),  # NNTP (RFC 3977 section 5.1)
    (143, 143),  # IMAP (RFC 9051 section 7.1)
    (587, 587),  # submission (RFC 6409)
    (2628, 2628),  # DICT (RFC 2229 section 3.1)
    (3306, 3306),  # MySQL ("Connection Phase" of its protocol)
    (3690, 3690),  # Subversion (svn_ra protocol)
    (4190, 4190),  # ManageSieve (RFC 5804 section 1.7)
    (5900, 5909),  # VNC (RFC 6143 section 7.1.1), the first ten displays
)
"""Ports of protocols in which the server speaks first, so waiting for the client would be useless."""

CLIENT_FIRST = ((80, 80), (443, 443))
"""Ports of protocols in which the client speaks first, HTTP and TLS: a silent client there is only slow."""

# The names in records and metrics for "no [[route]] matched", and for routes without a name.
RouteName = Annotated[str, rule_name("route", r"default|route \d+")]
Send = Annotated[str, one_of((NAME, ADDRESS))]
Protocol = Annotated[str, one_of((TCP, UDP))]


@attrs.frozen(kw_only=True)
class NamesConfig:
    """[names]: how the name of a connection is found in the client's first bytes."""

    sniff: bool = True
    wait: Annotated[float, seconds(zero=True)] = 0.3
    """how long the client has to begin; 0: no wait"""
    long_wait: Annotated[float, seconds()] = 5.0
    """how long it has on `client_first_ports`, and for the rest once it has begun"""
    size: Annotated[int, integer(1024, MOST)] = MOST
    """the most bytes to examine"""
    skip_ports: tuple[Ports, ...] = SERVER_FIRST
    client_first_ports: tuple[Ports, ...] = CLIENT_FIRST
    skip_networks: tuple[Network, ...] = ()
    send: Send = NAME
    """whether proxies that resolve names are asked for the name or the address"""
    when_unresolved: Annotated[str, one_of((ADDRESS, REFUSE))] = ADDRESS
    when_ech: Annotated[str, one_of((ADDRESS, NAME))] = ADDRESS


@attrs.frozen(kw_only=True)
class RouteConfig(ConditionsConfig):
    """[[route]]: which connections go where."""

    name: RouteName | None = None
    """None: "route N", counted from 1"""
    protocol: Protocol | None = None
    """None: both"""
    via: str
    """a group of upstreams, DIRECT or REJECT; `TransocksConfig.check_table` looks whether there is such a group"""
    send: Send | None = None
    """None: as [names] has it"""

    def faults(self) -> Iterator[Invalid]:
        yield from super().faults()
        if self.send is not None and self.via in (DIRECT, REJECT):
            yield Invalid("expected only where via is a group of proxies", shown=show(self.send), at="send")

    def route(self, number: int, names: NamesConfig) -> Route:
        """The route for the evaluator; `number` is its place, from 1."""
        return Route(
            name=self.name or f"route {number}",
            via=self.via,
            protocol=self.protocol,
            clients=self.from_,
            to=self.destinations(),
            ports=self.ports,
            send_name=(self.send or names.send) == NAME,
        )

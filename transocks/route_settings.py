"""[names] and [[route]] of transocks.toml as typed values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import attrs

from transocks.routes import DIRECT, REJECT, Route
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
"""Ports of protocols in which the server speaks first: a wait for the client would be in vain."""

CLIENT_FIRST = ((80, 80), (443, 443))
"""Ports of protocols in which the client speaks first, HTTP and TLS: one that is silent there is only slow."""

# What records and metrics say where no [[route]] decided, and what those without a name are called.
RouteName = Annotated[str, rule_name("route", r"default|route \d+")]
Send = Annotated[str, one_of((NAME, ADDRESS))]


@attrs.frozen(kw_only=True)
class NamesConfig:
    """[names]: the names of connections whose client speaks first."""

    sniff: bool = True
    wait: Annotated[float, seconds(zero=True)] = 0.3
    """how long the client has to begin; 0: nobody is waited for"""
    long_wait: Annotated[float, seconds()] = 5.0
    """how long it has on `client_first_ports`, and for the rest once it has begun"""
    size: Annotated[int, integer(1024, MOST)] = MOST
    """bytes to be looked at, at most"""
    skip_ports: tuple[Ports, ...] = SERVER_FIRST
    client_first_ports: tuple[Ports, ...] = CLIENT_FIRST
    skip_networks: tuple[Network, ...] = ()
    send: Send = NAME
    """what proxies that take names are asked for"""
    when_unresolved: Annotated[str, one_of((ADDRESS, REFUSE))] = ADDRESS
    when_ech: Annotated[str, one_of((ADDRESS, NAME))] = ADDRESS


@attrs.frozen(kw_only=True)
class RouteConfig(ConditionsConfig):
    """[[route]]: which way connections go."""

    name: RouteName | None = None
    """None: "route N", counted from 1"""
    via: str
    """a group of upstreams, DIRECT or REJECT; `TransocksConfig.check_table` looks whether there is such a group"""
    send: Send | None = None
    """None: as [names] has it"""

    def faults(self) -> Iterator[Invalid]:
        yield from super().faults()
        if self.send is not None and self.via in (DIRECT, REJECT):
            yield Invalid("expected only where via is a group of proxies", shown=show(self.send), at="send")

    def route(self, number: int, names: NamesConfig) -> Route:
        """As the evaluator takes it; `number` is its place, from 1."""
        return Route(
            name=self.name or f"route {number}",
            via=self.via,
            clients=self.from_,
            to=self.destinations(),
            ports=self.ports,
            send_name=(self.send or names.send) == NAME,
        )

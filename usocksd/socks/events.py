"""The events of the state machines: frozen values, and a sentinel for "nothing yet"."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from usocksd.socks.wire import AddressType, Command, Version


class NeedData(Enum):
    """An enum of one, so that a type checker understands `event is NEED_DATA`."""

    NEED_DATA = "need data"


NEED_DATA: Final = NeedData.NEED_DATA
"""There is no event until the peer sends more (perhaps only after it has got `data_to_send()`)."""


class Inquiry(Enum):
    """An enum of one, as NeedData is."""

    INQUIRY = "inquiry"


INQUIRY: Final = Inquiry.INQUIRY
"""The client was a probe: send `data_to_send()`, then close."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client's user name and password (RFC 1929), either may be empty. The server owes it a verdict."""

    username: str
    password: str = field(repr=False)


class Request(NamedTuple):
    """A client's request. The server owes it a reply.

    `host` is numeric (as inet_ntop(3) writes it) for the IP address types. For NAME it is as sent, UTF-8, not
    empty and free of control characters, but otherwise unchecked: it may well be an address. `user_id` is
    SOCKS4's, a claim that nobody has verified.
    """

    version: Version
    command: Command
    address_type: AddressType
    host: str
    port: int
    user_id: str = ""


@dataclass(frozen=True, slots=True)
class Established:
    """The proxy has connected: following bytes are the destination's. The address is the one that it connects from;
    0.0.0.0 port 0 if it does not tell (as many proxies), or can't (HTTP). After UDP_ASSOCIATE it is where datagrams
    go: 0.0.0.0 or :: is the proxy's own address.
    """

    bound_host: str = "0.0.0.0"
    bound_port: int = 0


@dataclass(frozen=True, slots=True)
class Probed:
    """The proxy answers, and has accepted everything so far. `ours`: it is a usocksd.

    `pipelines`: it takes greeting, credentials and request in one segment; None while that is not known.
    """

    ours: bool
    pipelines: bool | None

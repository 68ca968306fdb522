"""The request of a session to an upstream, an attempt at it, and the resulting tunnel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from transocks.upstreams.proxy_url import ProxyScheme
from usocksd.net.address import HostPort
from usocksd.net.dial import Target
from usocksd.net.endpoint import Endpoint, Interruptible, PeerReset


class TunnelRequest(NamedTuple):
    """The destination that a client wants to reach, and its first bytes."""

    client: HostPort
    """numeric address and port of the client"""
    destination: HostPort
    """the original destination"""
    name: str | None = None
    """the name to ask for instead of the address; canonical"""
    first: bytes = b""
    """the client's bytes so far, to be sent on unchanged and once"""
    repeatable: bool = False
    """`first` is a TLS hello: it may be sent to a second proxy if one fails"""
    udp: bool = False
    """a UDP association is wanted, and `destination` is that of the first datagram"""


class Tunnel(NamedTuple):
    """A connection to the destination, through an upstream or direct."""

    endpoint: Endpoint
    early: bytes
    """Bytes that the destination has already sent."""
    unsent: bytes = b""
    """The part of TunnelRequest.first that was not sent yet: the relay begins with it."""
    relay: HostPort | None = None
    """Of a UDP association: where datagrams for the proxy go. It ends with `endpoint`."""


class Progress(Protocol):
    """Is told what becomes of a request: the session's access record."""

    def trying(self, group: str, upstream: str, scheme: ProxyScheme | None) -> None:
        """A try begins, with this upstream of this group; scheme None: without one, directly."""

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        """There is a connection to the upstream, or to the destination directly."""


class Attempt:
    """One try to reach a destination through one upstream, until that has answered the request."""

    __slots__ = ("_better", "_client", "_replaceable", "left", "pipelined", "sent", "since")

    def __init__(self, client: Interruptible, *, replaceable: bool, better: Callable[[], bool] = lambda: False) -> None:
        """`client`: the session's. `replaceable`: something else can be tried. `better` tells whether that includes an
        upstream that is well.
        """
        self.since = client.reactor.clock()
        """When it began."""
        self.sent = False
        """Bytes of the client were sent to the upstream that may not be sent to another one."""
        self.pipelined = False
        """Everything was sent to the upstream at once, since it is known to take that."""
        self.left = False
        """The attempt was given up: it ends as if the client were gone."""
        self._better = better
        self._client = client
        self._replaceable = replaceable

    def check(self) -> None:
        """Raise PeerReset if it is `left`, or the client is gone. Call it after every wait: either may have happened
        between the end of the wait and the task's next step, and nothing else reports it.
        """
        if self.left:
            raise PeerReset
        self._client.check_peer()

    def leave(self) -> None:
        """Give it up, if something else can be tried (by the next session, if the client has to ask again)."""
        if self._replaceable and not self.left:
            self.left = True
            self._client.interrupt(PeerReset())

    def leave_for_better(self) -> None:
        """Give it up, if the session may go on with an upstream that is well."""
        if not self.sent and self._better():
            self.leave()

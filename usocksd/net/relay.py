"""The relay: carries bytes both ways between two connected sockets until both have ended, or one of them broke.

A session calls `relay()`, which waits; two Flows, one a direction, do the work in steps that the reactor
calls. What a Flow promises:

- Bytes arrive in order, each once, or the pair ends with a reason. While a sink takes no more, its source is not read.
- The end of one direction (FIN) is passed on, and the other direction flows on.
- A reset is passed on as a reset, after what came before it was delivered.
"""

from __future__ import annotations

import array
import fcntl
import socket
import termios
from typing import Protocol

from usocksd.net import tcp_info
from usocksd.net.ending import Limits, Reason, RelayResult, Side
from usocksd.net.endpoint import Endpoint
from usocksd.net.flow import Flow
from usocksd.net.keepalive import keep_alive
from usocksd.net.pipes import PipePool
from usocksd.net.reactor import Waitable


class Record(Protocol):
    """Is told how a relay ended."""

    def ends(self, result: RelayResult) -> None:
        """The relay has ended. Called once."""


async def relay(
    client: Endpoint,
    upstream: Endpoint,
    *,
    to_upstream: bytes = b"",
    to_client: bytes = b"",
    sent: int = 0,
    pipes: PipePool,
    limits: Limits,
    record: Record | None = None,
) -> RelayResult:
    """Carry bytes between the two until the end; closes neither.

    `to_upstream` and `to_client` are bytes left over from the handshakes: they are sent first. `sent` is how many of
    the client's bytes went to the upstream with a handshake; they count as relayed. `record` is told how it ended, also
    when a step raised an exception, and when the session is stopped. The session closes both endpoints afterwards by
    `close_pair`, which passes a reset on.
    """
    pair = Pair(client, upstream, pipes, limits)
    try:
        pair.up.count = sent
        pair.start(to_upstream, to_client)
        to_upstream = to_client = b""  # this frame lives as long as the connection, and there may be many idle ones
        if pair.result is None:
            await pair.wait()
        return pair.outcome()
    finally:
        pair.end(Reason.STOPPED, Side.PROXY)  # if it has not ended: the session is stopped
        pair.detach()
        if record is not None:
            assert pair.result is not None
            record.ends(pair.result)


async def close_pair(
    client: Endpoint, upstream: Endpoint, result: RelayResult, *, deliver: float = Limits().deliver
) -> None:
    """Close both endpoints of a relay as it ended: after a reset or an error the surviving side gets a reset.

    Before that it has `deliver` seconds to receive what was sent to it, since a reset throws that away.
    """
    if result.reason is Reason.CLOSED:
        client.close()
        upstream.close()
        return
    for endpoint, side in ((client, Side.CLIENT), (upstream, Side.UPSTREAM)):
        try:
            if side is not result.by and result.reason in (Reason.RESET, Reason.ERROR):
                await _delivered(endpoint, deliver)
        finally:
            endpoint.reset()


async def _delivered(endpoint: Endpoint, within: float) -> None:
    """Return when the peer has acknowledged everything, or after this many seconds."""
    wait = 0.001
    reactor = endpoint.reactor
    until = reactor.clock() + within
    while _unacknowledged(endpoint.sock) and (left := until - reactor.clock()) > 0:
        await reactor.sleep(min(wait, left))
        wait = min(wait * 2, 0.1)


def _unacknowledged(sock: socket.SocketType) -> int:
    """SIOCOUTQ of tcp(7): bytes sent and not yet acknowledged; 0 if the connection was reset."""
    if tcp_info.state(sock) == tcp_info.CLOSE:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    return count[0]


class Pair(Waitable):
    """Two flows, one for each direction; the session waits for their end."""

    __slots__ = (
        "_client",
        "_failure",
        "_upstream",
        "active",
        "down",
        "first",
        "half_closed",
        "limits",
        "pipes",
        "result",
        "up",
    )

    __deletable__ = ("down", "up")

    def __init__(self, client: Endpoint, upstream: Endpoint, pipes: PipePool, limits: Limits) -> None:
        super().__init__(client.reactor)
        self.pipes = pipes
        self.limits = limits
        self.active = self.reactor.now
        """When the last byte was moved."""
        self.first: Side | None = None
        """The side that has ended, while the other continues."""
        self.half_closed = 0.0
        """When it did."""
        self.result: RelayResult | None = None
        self._failure: Exception | None = None
        self._client = client
        self._upstream = upstream
        self.up = Flow(self, client, upstream)
        self.down = Flow(self, upstream, client)
        self.up.reverse = self.down
        self.down.reverse = self.up

    def start(self, to_upstream: bytes, to_client: bytes) -> None:
        """Take over the endpoints, send the leftovers, and move bytes that have already arrived."""
        self._client.watch()
        for flow, leftover in ((self.up, to_upstream), (self.down, to_client)):
            self.reactor.handlers[flow.source.fd] = flow
            flow.tail = leftover
        self.up.deadline = self.reactor.clock() + min(self.limits.idle, self.limits.keepalive.after)
        try:
            for flow in (self.up, self.down):
                flow.start()
        except Exception as error:
            self.fail(error)

    def outcome(self) -> RelayResult:
        """How it ended; raises the exception of a failed step."""
        if self._failure is not None:
            raise self._failure
        assert self.result is not None
        return self.result

    def end(self, reason: Reason, by: Side, error: int = 0) -> None:
        """The one way to end a pair, and the one place that wakes its session. The first call counts."""
        if self.result is not None:
            return
        alone = 0.0 if self.first is None else self.reactor.now - self.half_closed
        self.result = RelayResult(self.up.count, self.down.count, reason, by, error, self.first, alone)
        self.wake()

    def fail(self, error: Exception) -> None:
        """A bug in a step of this pair: raised in its own session."""
        self._failure = error
        self.end(Reason.ERROR, Side.PROXY)

    def keep_alive(self) -> None:
        """Have the kernel probe both peers: the pair has lived long enough to be worth the system calls.

        The client's socket has the options from its listener, but perhaps older ones.
        """
        keepalive = self.limits.keepalive
        timing = keepalive.open if self.first is None else keepalive.half
        for endpoint in (self._client, self._upstream):
            keep_alive(endpoint.sock, timing)

    def side(self, endpoint: Endpoint) -> Side:
        return Side.CLIENT if endpoint is self._client else Side.UPSTREAM

    def detach(self) -> None:
        """Give the endpoints back to the session, and return everything borrowed."""
        handlers = self.reactor.handlers
        for flow in (self.up, self.down):
            handlers[flow.source.fd] = flow.source
            flow.release()
        # Flows know their pair. Without this there would be a cycle for the collector in every connection.
        del self.up, self.down

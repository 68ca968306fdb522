"""The connections of one worker: accepts, serves, counts and ends them."""

from __future__ import annotations

import gc
import heapq
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from itertools import chain
from math import inf
from operator import attrgetter
from typing import Any, NoReturn

import trio

from usocksd.log.metrics import Metrics
from usocksd.net.address import join_port
from usocksd.net.datagrams import Association
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.net.flow import Flow
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import NOBODY, Tally
from usocksd.net.listeners import Listener
from usocksd.net.reactor import Reactor
from usocksd.net.relay import Pair
from usocksd.serve.associations import Associations
from usocksd.serve.timing import Timing

log = logging.getLogger(__name__)

# Connections make no cycles, so the collector would search much and find little.
_COLLECT_AFTER = 50_000
_SAY_AGAIN_AFTER = 10.0
_LOOK_AT_TIMERS_EVERY = 2.0


class Stopping(Exception):
    """The process is about to end, and with it this session."""


class Service:
    """Runs a session for each accepted connection.

    `most` is how many connections the process has descriptors for. When there are as many, new ones wait in the
    kernel's queue, unless idle ones can make room. `proxied` are ports whose connections a proxy makes for its clients:
    they count for no client until `count_as`. `workers`: how many accept from the same sockets.
    """

    def __init__(
        self,
        reactor: Reactor,
        session: Callable[[Endpoint, str, int], Awaitable[None]],
        *,
        most: int,
        workers: int = 1,
        tally: Tally,
        associations: Associations,
        metrics: Metrics,
        proxied: Collection[int] = (),
        keepalive: KeepAlive,
        timing: Timing,
    ) -> None:
        self.live = 0
        """Connections that are being served."""
        self.accepted = metrics.counter("connections_accepted_total", "Connections from clients")
        self.most = most
        self._reactor = reactor
        self._session = session
        self._workers = workers
        self._tally = tally
        self._associations = associations
        associations.room = self._has_room
        self._proxied = proxied
        self._keepalive = keepalive
        self._timing = timing
        self._rows: dict[Endpoint, int] = {}
        """Where a connection is counted, if that was not known at accept"""
        self._listeners: list[Listener] = []
        self._empty: trio.Event | None = None
        self._turned_away = metrics.counters(
            "connections_turned_away_total", "Accepted and closed at once, by the limit that said so", "limit"
        )
        for limit in ("connections", "per_client"):
            self._turned_away.labels(limit)
        self._shed = metrics.counter("connections_shed_total", "Idle connections ended to make room for new ones")
        self._said = -inf

    def listen(self, sockets: Iterable[socket.socket]) -> list[Listener]:
        """Accept from these too; returns what `close` takes."""
        listeners = [
            Listener(
                self._reactor,
                sock,
                self._accepted_for_others if sock.getsockname()[1] in self._proxied else self._accepted,
                room=self._has_room,
                processes=self._workers,
            )
            for sock in sockets
        ]
        for listener in listeners:
            listener.keep_alive(self._keepalive.open)
        self._listeners += listeners
        return listeners

    async def keep_alive(self) -> NoReturn:
        """Adapt keepalive to the timers of this host's connection tracking, also when they change."""
        while True:
            if self._keepalive.look():
                for listener in self._listeners:
                    listener.keep_alive(self._keepalive.open)
                for pair in self._pairs():
                    pair.keep_alive()
            await trio.sleep(_LOOK_AT_TIMERS_EVERY)

    def close(self, listeners: Sequence[Listener] | None = None) -> None:
        """Accept no more from these, or from any."""
        for listener in self._listeners[:] if listeners is None else listeners:
            if listener in self._listeners:
                self._listeners.remove(listener)
                listener.close()

    @property
    def paused(self) -> bool:
        """Whether accepting waits for descriptors."""
        return any(listener.paused for listener in self._listeners)

    def count_as(self, endpoint: Endpoint, host: str, port: int) -> bool:
        """Count a connection as one of this client, for which a proxy has made it.

        False if a limit forbids that; then it has been reset.
        """
        row = self._tally.row(host)
        self._tally.add(NOBODY, -1)
        limit = self._tally.exceeded(row)
        if limit is not None:
            self._tally.add(NOBODY, 1)
            self._turn_away(endpoint, host, port, limit)
            return False
        self._tally.add(row, 1)
        self._rows[endpoint] = row
        return True

    def begin(self, session: Coroutine[Any, Any, None], host: str, port: int) -> bool:
        """Serve a session that no listener has accepted, and count it as one of this client.

        False if a limit or the want of descriptors forbids that; then the session has not begun.
        """
        row = self._tally.row(host)
        limit = self._tally.exceeded(row)
        if limit is not None:
            self._count_turned_away(host, port, limit)
        elif self._has_room():
            self._begin(session, None, host, port, row)
            return True
        session.close()
        return False

    async def drain(self, within: float) -> None:
        """Accept no more, let connections end, and end those that are left after `within` seconds."""
        self.close()
        with trio.move_on_after(within):
            await self._emptied()
        if self.live:
            log.warning("ending the remaining connections", extra={"fields": {"live": self.live}})
            self._reactor.interrupt_all(Stopping)
            with trio.move_on_after(self._timing.session_ends):
                await self._emptied()
            self._reactor.stop_all()

    def connections(self) -> Iterator[dict[str, Any]]:
        """The live ones, as their sessions describe them, with bytes and seconds; "at" is when that was, by
        CLOCK_MONOTONIC.
        """
        handlers = self._reactor.handlers
        # By descriptor: if it has been closed meanwhile, it belongs to another connection by now, or to none.
        for fd in list(handlers):
            row = _describe(handlers.get(fd), self._reactor.clock())
            if row is not None:
                yield row
        for association in list(self._associations.live):
            yield _describe_association(association, self._reactor.clock())

    def moving(self) -> tuple[int, int]:
        """Bytes of the live connections so far, to the destinations and from there."""
        pairs, udp = self._pairs(), self._associations
        up, down = sum(pair.up.count for pair in pairs), sum(pair.down.count for pair in pairs)
        return up + int(udp.tx_bytes.value), down + int(udp.rx_bytes.value)

    async def _emptied(self) -> None:
        if self.live:
            self._empty = trio.Event()
            await self._empty.wait()

    def _pairs(self) -> list[Pair]:
        """The relays, once each."""
        flows = (handler for handler in self._reactor.handlers.values() if isinstance(handler, Flow))
        return [flow.pair for flow in flows if flow is flow.pair.up]

    def _has_room(self) -> bool:
        if 2 * self.live + self._associations.extra < 2 * self.most:
            return True
        self._make_room()
        return False  # connections that make room need a moment to end

    def _make_room(self) -> None:
        before = self._reactor.now - self._timing.shed_after
        all_of_them: Iterator[Pair | Association] = chain(self._pairs(), self._associations.live)
        idle = (each for each in all_of_them if each.active <= before and each.result is None)
        for each in heapq.nsmallest(self._timing.shed_at_once, idle, key=attrgetter("active")):
            self._shed.value += 1
            each.end(Reason.SHED, Side.PROXY)

    def _accepted(self, endpoint: Endpoint, host: str, port: int) -> None:
        self._admit(endpoint, host, port, self._tally.row(host))

    def _accepted_for_others(self, endpoint: Endpoint, host: str, port: int) -> None:
        self._admit(endpoint, host, port, NOBODY)

    def _admit(self, endpoint: Endpoint, host: str, port: int, row: int) -> None:
        limit = self._tally.exceeded(row)
        if limit is not None:
            self._turn_away(endpoint, host, port, limit)
            return
        self.accepted.value += 1
        self._begin(self._session(endpoint, host, port), endpoint, host, port, row)

    def _turn_away(self, endpoint: Endpoint, host: str, port: int, limit: str) -> None:
        endpoint.reset()
        self._count_turned_away(host, port, limit)

    def _count_turned_away(self, host: str, port: int, limit: str) -> None:
        turned_away = self._turned_away.labels(limit)
        turned_away.value += 1
        now = self._reactor.now
        if now - self._said > _SAY_AGAIN_AFTER:  # a flood of connections must not become a flood of records
            self._said = now
            fields = {"client_addr": join_port(host, port), "limit": limit, "turned_away": int(turned_away.value)}
            log.warning("too many connections", extra={"fields": fields})

    def _begin(self, session: Awaitable[None], endpoint: Endpoint | None, host: str, port: int, row: int) -> None:
        self._tally.add(row, 1)
        self.live += 1
        self._reactor.start(self._serve(session, endpoint, host, port, row))

    async def _serve(self, session: Awaitable[None], endpoint: Endpoint | None, host: str, port: int, row: int) -> None:
        try:
            await session
        except (OSError, DeadlineExpired, PeerReset, Stopping) as error:
            log.debug("session ends", extra={"fields": {"error": str(error) or type(error).__name__}})
        except Exception:
            # A bug in one session must not end the others.
            log.exception("session failed", extra={"fields": {"client_addr": join_port(host, port)}})
        finally:
            if endpoint is not None:
                endpoint.close()
                if self._rows:
                    row = self._rows.pop(endpoint, row)
            self._tally.add(row, -1)
            self.live -= 1
            if not self.live and self._empty is not None:
                self._empty.set()


def settle_memory() -> None:
    """Exempt all present objects from garbage collection, and make it run seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def _describe(handler: object, now: float) -> dict[str, Any] | None:
    """One row of `connections`: the handler is the client's side of a connection, in its handshake or its relay."""
    if isinstance(handler, Flow):
        pair, about = handler.pair, handler.source.about
        if handler is not pair.up or about is None:
            return None
        moved = {
            "state": "relay",
            "idle": max(now - pair.active, 0.0),
            "tx_bytes": pair.up.count,
            "rx_bytes": pair.down.count,
        }
    elif isinstance(handler, Endpoint) and handler.about is not None:
        about = handler.about
        moved = {"state": "handshake", "idle": 0.0, "tx_bytes": 0, "rx_bytes": 0}
    else:
        return None
    row: dict[str, Any] = about.describe()
    return row | moved | {"at": now}


def _describe_association(association: Association, now: float) -> dict[str, Any]:
    tx_bytes, rx_bytes = association.moved()
    return association.about.describe() | {
        "state": "association",
        "idle": max(now - association.active, 0.0),
        "tx_bytes": tx_bytes,
        "rx_bytes": rx_bytes,
        "at": now,
    }

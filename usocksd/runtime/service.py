"""The life of a daemon process: start, serve, reopen the log, stop gracefully or at once."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import trio

from usocksd.errors import Error
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint, PeerReset
from usocksd.runtime.hostport import join_port
from usocksd.runtime.listeners import Listener
from usocksd.runtime.reactor import Reactor

log = logging.getLogger(__name__)

Session = Callable[[Endpoint, str, int], Awaitable[None]]
"""Serves one accepted connection: endpoint, the peer's numeric address and port."""

_STOP_DELAY = "CANCELLATION_DELAY_SECONDS"
# What a session that was told to stop still needs to write its record and close.
_LAST_WORDS = 2.0
# A connection makes no cycles, so there is little for the collector to find and much to look through.
_COLLECT_AFTER = 50_000


class Stopping(Exception):
    """The process is about to end, and with it this session."""


def stop_delay() -> float:
    """CANCELLATION_DELAY_SECONDS: how long to go on accepting after SIGTERM, in seconds; 0 if it is not set.

    Raises Error for what is no number of seconds.
    """
    text = os.environ.get(_STOP_DELAY, "0")
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay < float("inf"):
        raise Error(f"environment: {_STOP_DELAY}={text!r}: expected a number of seconds, 0 or more")
    return delay


class Service:
    """Runs sessions for what the listeners accept, until it is told to stop.

    `most` is how many connections there may be at a time; while there are as many, none is accepted. `stop_within` is
    how long a graceful stop lets connections go on, in seconds; `reopen_log` answers SIGUSR1.
    """

    def __init__(self, reactor: Reactor, *, most: int, stop_within: float, reopen_log: Callable[[], None]) -> None:
        self.reactor = reactor
        self.live = 0
        """Connections that are being served."""
        self._stop_within = stop_within
        self._stop_delay = stop_delay()
        self._reopen_log = reopen_log
        self._empty: trio.Event | None = None
        """While somebody waits for the last connection to end."""
        self._sessions: trio.Nursery | None = None
        self._most = most

    async def run(
        self,
        sockets: Sequence[socket.socket],
        session: Session,
        *background: Callable[..., Awaitable[object]],
        started: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve `sockets` until SIGTERM or SIGINT, and what is under way then until it is over or time is.

        `background` tasks are started before the first connection is accepted (they call `task_status.started()`),
        and end with the service. `started` is called when connections are accepted.
        """
        async with trio.open_nursery() as base:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP) as signals:
                await base.start(self.reactor.run)
                for task in background:
                    await base.start(task)
                async with trio.open_nursery() as sessions:
                    self._sessions = sessions
                    listeners = [
                        Listener(self.reactor, sock, self._accepted(session), room=self._has_room) for sock in sockets
                    ]
                    gc.collect()
                    gc.freeze()
                    gc.set_threshold(_COLLECT_AFTER)
                    started()
                    sessions.start_soon(self._until_stopped, signals, listeners)
            base.cancel_scope.cancel()
        log.info("stopped")

    def _has_room(self) -> bool:
        return self.live < self._most

    def _accepted(self, session: Session) -> Callable[[Endpoint, str, int], None]:
        async def serve(endpoint: Endpoint, host: str, port: int) -> None:
            try:
                await session(endpoint, host, port)
            except (OSError, DeadlineExpired, PeerReset, Stopping) as error:
                log.debug("session ends", extra={"fields": {"error": str(error) or type(error).__name__}})
            except Exception:
                # A fault of ours in one session is no reason to end the others.
                log.exception("session failed", extra={"fields": {"client_addr": join_port(host, port)}})
            finally:
                endpoint.close()
                self.live -= 1
                if not self.live and self._empty is not None:
                    self._empty.set()

        def accepted(endpoint: Endpoint, host: str, port: int) -> None:
            assert self._sessions is not None
            self.live += 1
            self._sessions.start_soon(serve, endpoint, host, port, name="session")

        return accepted

    async def _until_stopped(self, signals: AsyncIterator[int], listeners: Sequence[Listener]) -> None:
        async for number in signals:
            if number == signal.SIGUSR1:
                self._reopen_log()
            elif number == signal.SIGHUP:
                log.warning("SIGHUP: this version re-reads its configuration only when restarted")
            else:
                break
        log.info("stopping", extra={"fields": {"signal": signal.Signals(number).name, "live": self.live}})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._at_once_when_told_again, signals)
            try:
                await trio.sleep(self._stop_delay)
            finally:
                for listener in listeners:
                    listener.close()
            await self._drain()
            nursery.cancel_scope.cancel()

    async def _drain(self) -> None:
        with trio.move_on_after(self._stop_within):
            await self._emptied()
        if self.live:
            log.warning("ending what is still connected", extra={"fields": {"live": self.live}})
            await self._end_all()

    async def _end_all(self) -> None:
        self.reactor.interrupt_all(Stopping())
        with trio.move_on_after(_LAST_WORDS):
            await self._emptied()
        assert self._sessions is not None
        self._sessions.cancel_scope.cancel()

    async def _emptied(self) -> None:
        if self.live:
            self._empty = trio.Event()
            await self._empty.wait()

    async def _at_once_when_told_again(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == signal.SIGUSR1:
                self._reopen_log()
            elif number in (signal.SIGTERM, signal.SIGINT):
                log.warning("told to stop again: ending at once", extra={"fields": {"live": self.live}})
                assert self._sessions is not None
                self.reactor.interrupt_all(Stopping())
                # One turn of the loop for the records of the relays that end here.
                await trio.lowlevel.checkpoint()
                self._sessions.cancel_scope.cancel()

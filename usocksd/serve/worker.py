"""A worker: reads the configuration that its master sends, serves the sockets that it hands over, and reports.

Messages: configure -> plan; serve -> ready; accept; then `alive` twice a second, until `drain` or the end of the
master. Instead of a plan or ready there may be `faults`. Only the first worker of a generation sends a plan. The keeper
sends its findings to the master as `share`; the master sends them to every worker as `shared`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import islice
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import Error
from usocksd.log.log import Log, parse_level, setup
from usocksd.log.metrics import Metrics
from usocksd.net import bridge
from usocksd.net.endpoint import Endpoint
from usocksd.net.limits import Tally, most_connections, raise_descriptor_limit
from usocksd.net.listeners import is_transparent
from usocksd.net.reactor import Reactor
from usocksd.serve.associations import Associations
from usocksd.serve.channel import Channel, Message, restore_socket
from usocksd.serve.configure import answer_faults, configure
from usocksd.serve.daemon import Application, Daemon, Parts
from usocksd.serve.service import Service, settle_memory
from usocksd.serve.vitals import Vitals
from usocksd.settings.files import NamedFiles

log = logging.getLogger(__name__)

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The terminal or a service manager sends these to all processes. They are for the master, which tells its workers."""

STDERR = "TRANSOCKS_STDERR"
"""In the environment of a worker: the descriptor of the master's stderr."""

# How long a worker accepts at an address that was given up, in seconds.
_EMPTY_FOR = 0.1
# How many connections are listed in one message.
_LISTED_AT_ONCE = 256


def main(daemon: Daemon[Any], fd: int) -> int:
    """Be a worker; `fd` is its end of the channel. Returns the exit status."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _take_stderr()
    reactor = Reactor()
    with contextlib.closing(reactor):
        return bridge.run(reactor, _run, daemon, fd, reactor)


def _take_stderr() -> None:
    """Replace stderr, until now a file that the master reads if this process dies, by the real one."""
    number = os.environ.pop(STDERR, None)
    if number is None:
        return
    early, stderr = os.dup(2), int(number)
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError), open(early, "rb") as file:
        file.seek(0)
        os.write(2, file.read())


async def _run(daemon: Daemon[Any], fd: int, reactor: Reactor) -> int:
    channel = Channel(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    with contextlib.closing(channel):
        try:
            await _work(daemon, channel, reactor)
        except Error as error:
            await answer_faults(channel, error)
        except Exception as error:
            # First, since the master ends this process when it has the answer.
            traceback.print_exc()
            await answer_faults(channel, Error(f"internal error: {_brief(error)}"))
            return 1
    return 0


async def _work(daemon: Daemon[Any], channel: Channel, reactor: Reactor) -> None:
    """From the configuration to the last connection. An exception before it is ready means that it can't start."""
    received = await channel.receive()
    if received is None:
        return
    config, files = await configure(daemon, channel, *received)
    received = await channel.receive()
    if received is None:
        return
    order, fds = received
    # Open the log first, so that failures can be recorded.
    try:
        sink = setup(daemon.name, **order["log"])
    except OSError as error:
        raise Error(f"can't open the log file {order['log']['filename']}: {error.strerror}") from None
    worker = Worker(daemon, channel, sink, order, fds, reactor=reactor)
    try:
        await worker.run(config, files)
    except Error:
        raise
    except Exception:
        log.critical("internal error", exc_info=True)
        raise
    finally:
        sink.close()
    await worker.report_end()


def _brief(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "".join(traceback.format_exception_only(error)).strip()


class Worker:
    """One worker from its first connection to its last."""

    def __init__(
        self, daemon: Daemon[Any], channel: Channel, sink: Log, order: Message, fds: Sequence[int], *, reactor: Reactor
    ) -> None:
        self._channel = channel
        self._sink = sink
        self._order = order
        *listeners, self._table = fds
        self._sockets = list(map(restore_socket, listeners))
        self._limit = raise_descriptor_limit()
        self._reactor = reactor
        self._metrics = Metrics(daemon.name)
        self._daemon = daemon
        self._shared: Any = order["shared"]
        """The latest value that was shared; None if there is none"""
        self._subscribers: list[Callable[[Any], None]] = []
        self._to_share: Any = None
        self._has_to_share = trio.Event()
        self._keeping = trio.CancelScope()
        self._vitals: Vitals | None = None

    async def run(self, config: Any, files: NamedFiles) -> None:
        """Serve until told to drain, or the master is gone, and then until the connections have ended. `files` are
        those that the configuration names.

        Raises Error if the daemon can't be put together.
        """
        order = self._order
        tally = Tally(self._table, order["column"], most=order["connections"], per_client=order["per_client"])
        most = most_connections(self._limit)
        associations = Associations(self._metrics)
        parts = Parts(
            self._sink,
            self._reactor,
            self._metrics,
            frozenset(order["ports"]),
            any(map(is_transparent, self._sockets)),
            self._limit,
            most,
            associations,
            lambda kind, per_client: Tally(self._table, order["column"], per_client=per_client, kind=kind),
            self._begin,
            count_as=self._count_as,
            share=self._share,
            shared=self._subscribe,
            read=files.read,
        )
        built: Application = self._daemon.call(self._daemon.build, config, parts)
        files.close()
        self._built = built
        self._service = Service(
            self._reactor,
            built.session,
            most=most,
            workers=order["workers"],
            tally=tally,
            associations=associations,
            metrics=self._metrics,
            proxied=built.proxied,
            keepalive=built.keepalive,
            timing=self._daemon.timing,
        )
        with contextlib.ExitStack() as last:
            last.callback(built.close)
            last.callback(self._reactor.stop_all)  # first: sessions use what was built
            async with trio.open_nursery() as base:
                try:
                    for task in built.background:
                        await base.start(task)
                    built.open()
                except Error as error:
                    await answer_faults(self._channel, error)
                    base.cancel_scope.cancel()
                    return
                # Runs until `drain`.
                async with trio.open_nursery() as serving:
                    self._serving = serving.cancel_scope
                    base.start_soon(self._service.keep_alive)
                    vitals = self._vitals = Vitals(self._service, self._metrics, self._sink, self._limit)
                    settle_memory()
                    await self._send({"type": "ready", "version": __version__})
                    base.start_soon(self._report, vitals)
                    base.start_soon(self._send_shared)
                    serving.start_soon(self._obey)
                base.cancel_scope.cancel()

    async def report_end(self) -> None:
        """Send the last figures: the log is closed, and knows how many records were lost."""
        if self._vitals is not None:
            await self._send(self._vitals.alive(last=True) | {"type": "ended"})

    async def _obey(self) -> None:
        """Follow the master's orders. A bug in one order does not end the connections."""
        async with trio.open_nursery() as orders:
            while (received := await self._channel.receive()) is not None:
                order, fds = received
                try:
                    self._follow(order, fds, orders)
                except Exception:
                    log.exception("an order from the master failed", extra={"fields": {"type": order["type"]}})
            # The master is gone, so no order will come.
            log.warning("the master is gone, draining")
            await self._drain(self._order["stop"])

    def _follow(self, order: Message, fds: Sequence[int], orders: trio.Nursery) -> None:
        match order["type"]:
            case "accept":
                self._service.listen(self._sockets)
                if self._order["keeper"]:
                    orders.start_soon(self._keep)
            case "drain":  # a later order with less time counts
                orders.start_soon(self._drain, order["within"])
            case "empty":
                orders.start_soon(self._empty, list(map(restore_socket, fds)))
            case "reopen":
                self._sink.reopen()
            case "level":
                self._sink.set_level(parse_level(order["level"]))
            case "shared":
                self._shared = order["value"]
                self._deliver(self._subscribers)
            case "ask":
                orders.start_soon(self._answer, order["id"], order["verb"], order["request"])

    async def _drain(self, within: float) -> None:
        self._keeping.cancel()
        self._built.shut()
        await self._service.drain(within)
        self._serving.cancel()

    async def _empty(self, sockets: Sequence[socket.socket]) -> None:
        """Serve the connections that wait at addresses that were given up. Stay until all others have closed these."""
        listeners = self._service.listen(sockets)
        await trio.sleep(_EMPTY_FOR)
        self._service.close(listeners)

    async def _keep(self) -> None:
        with self._keeping:
            async with trio.open_nursery() as tasks:
                for task in self._built.keeping:
                    tasks.start_soon(task)

    def _begin(self, session: Coroutine[Any, Any, None], host: str, port: int) -> bool:
        return self._service.begin(session, host, port)

    def _count_as(self, endpoint: Endpoint, host: str, port: int) -> bool:
        return self._service.count_as(endpoint, host, port)

    def _share(self, value: Any) -> None:
        self._to_share = value
        self._has_to_share.set()

    def _subscribe(self, subscriber: Callable[[Any], None]) -> None:
        self._subscribers.append(subscriber)
        self._deliver([subscriber])

    def _deliver(self, subscribers: Sequence[Callable[[Any], None]]) -> None:
        """Give the shared value to these receivers. One that can't use it, for example under another configuration,
        works without.
        """
        for subscriber in subscribers if self._shared is not None else ():
            try:
                subscriber(self._shared)
            except Exception:
                log.warning("can't use the shared value", exc_info=True)

    async def _send_shared(self) -> None:
        while True:
            await self._has_to_share.wait()
            self._has_to_share = trio.Event()
            await self._send({"type": "share", "value": self._to_share})

    async def _report(self, vitals: Vitals) -> None:
        while True:
            await self._send(vitals.alive() | {"type": "alive"})
            await trio.sleep(self._daemon.timing.heartbeat)

    async def _answer(self, number: int, verb: str, request: Message) -> None:
        """In parts, so that a long answer does not hold up connections."""
        answer: Message = {"type": "answer", "id": number, "last": False, "error": None}
        part: list[Any] = []
        error = None
        try:
            own = self._built.verbs.get(verb)
            rows = self._rows(verb) if own is None else iter([await own(request)])
            while len(part := list(islice(rows, _LISTED_AT_ONCE))) == _LISTED_AT_ONCE:
                await self._send(answer | {"rows": part})
        except Error as raised:
            part, error = [], str(raised)
        except Exception:  # so that the asker does not wait for a timeout
            log.exception("internal error", extra={"fields": {"verb": verb}})
            part, error = [], "internal error"
        await self._send(answer | {"rows": part, "last": True, "error": error})

    def _rows(self, verb: str) -> Iterator[Any]:
        match verb:
            case "measure" if self._vitals is not None:
                yield self._vitals.measure()
            case "status":
                yield self._built.status()
            case "connections":
                for row in self._service.connections():
                    yield row | {"worker": os.getpid()}

    async def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the master is gone, which `_obey` sees too
            await self._channel.send(message)

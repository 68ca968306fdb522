"""A worker: reads the configuration that its master sends, serves the sockets that it hands over, and reports.

configure -> plan or faults;  serve -> ready;  accept;  then `alive` twice a second, until `drain` or the master's end.
What the keeper finds out for all goes as `share` to the master, and comes back to every worker as `shared`; one that
can't take it says `refuse`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import trio

from usocksd import __version__
from usocksd.errors import ConfigError, Error, Fault
from usocksd.host.limits import Tally, most_connections, raise_descriptor_limit
from usocksd.log.log import Log, parse_level, setup
from usocksd.log.metrics import Metrics
from usocksd.net.endpoint import Endpoint
from usocksd.net.listeners import Listener, is_transparent
from usocksd.net.reactor import Reactor
from usocksd.serve.channel import Channel, Message
from usocksd.serve.plan import HANDOVER, Built, Daemon, Parts
from usocksd.serve.service import Service, settle_memory
from usocksd.serve.vitals import Vitals
from usocksd.settings import loader as configuration
from usocksd.settings.files import NamedFiles

log = logging.getLogger(__name__)

CHANNEL = "TRANSOCKS_CHANNEL"
"""In the environment of a worker: the descriptor of its end of the channel. The command line is the master's."""

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What the terminal or a service manager sends to all is for the master, which tells us."""

STDERR = "TRANSOCKS_STDERR"
"""In the environment of a worker: the descriptor of the master's stderr."""

HEARTBEAT = 0.5
"""Seconds between signs of life."""

# So many connections are listed in one message.
_LISTED_AT_ONCE = 256


def run_if_told(daemon: Daemon[Any]) -> int | None:
    """Be a worker, if this process has been started as one; returns the exit status then."""
    channel = os.environ.pop(CHANNEL, None)
    return None if channel is None else _main(daemon, int(channel))


def _main(daemon: Daemon[Any], fd: int) -> int:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _take_stderr()
    return trio.run(_run, daemon, fd)


def _take_stderr() -> None:
    """Have the master's stderr back. Until here there was a file in its place, which the master reads should we die."""
    number = os.environ.pop(STDERR, None)
    if number is None:
        return
    early, stderr = os.dup(2), int(number)
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError), open(early, "rb") as file:
        file.seek(0)
        os.write(2, file.read())


async def _run(daemon: Daemon[Any], fd: int) -> int:
    channel = Channel(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    with contextlib.closing(channel):
        try:
            await _work(daemon, channel)
        except Error as error:
            await _answer_faults(channel, error)
        except Exception as error:
            # First, since the master ends us when it has the answer.
            traceback.print_exc()
            await _answer_faults(channel, Error(f"internal error: {_brief(error)}"))
            return 1
    return 0


async def _work(daemon: Daemon[Any], channel: Channel) -> None:
    """From the configuration to the last connection. What is raised before it is ready keeps it from starting."""
    configured = await _configure(daemon, channel)
    received = None if configured is None else await channel.receive()
    if configured is None or received is None:
        return
    config, files = configured
    order, fds = received
    # The log is open before anything can go wrong that is worth a record.
    try:
        sink = setup(daemon.name, **order["log"])
    except OSError as error:
        raise Error(f"can't open the log file {order['log']['filename']}: {error.strerror}") from None
    worker = Worker(daemon, channel, sink, order, fds)
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


async def _configure(daemon: Daemon[Any], channel: Channel) -> tuple[Any, NamedFiles] | None:
    """The configuration, which the master has been told about, and the files that it names; None when there is none to
    serve by.
    """
    received = await channel.receive()
    if received is None:
        return None
    order, fds = received
    # (A master of before there was this passes nothing on.)
    files = NamedFiles.received(order.get("files", {}), fds)
    first = order["plan"]
    try:
        config = configuration.parse(daemon.config, order["text"], order["source"], files.keep if first else files.read)
        # One worker's answer is enough for the master, and the warnings in it take their time.
        plan = daemon.plan(config).as_json() if first else None
    except Error as error:
        await _answer_faults(channel, error)
        return None
    news = files if first else NamedFiles()
    await channel.send({"type": "plan", "plan": plan, "files": news.places}, news.fds)
    return config, files


async def _answer_faults(channel: Channel, error: Error) -> None:
    source: str = ""
    faults: tuple[Fault, ...] = (Fault("", "", str(error)),)
    if isinstance(error, ConfigError):
        source, faults = error.source, error.faults
    rows = [[fault.path, fault.value, fault.expected, fault.line] for fault in faults]
    with contextlib.suppress(OSError):
        await channel.send({"type": "faults", "source": source, "faults": rows})


class Worker:
    """One worker from its first connection to its last."""

    def __init__(self, daemon: Daemon[Any], channel: Channel, sink: Log, order: Message, fds: Sequence[int]) -> None:
        self._channel = channel
        self._sink = sink
        self._order = order
        *listeners, self._table = fds
        self._sockets = [_adopt(fd) for fd in listeners]
        self._adopted: dict[int, list[Listener]] = {}
        self._limit = raise_descriptor_limit()
        self._reactor = Reactor()
        self._metrics = Metrics(daemon.name)
        self._daemon = daemon
        self._draining = False
        # (A master of before there was anything to share says nothing of it.)
        self._shared: list[Any] = [order["shared"]] if order.get("shared") is not None else []
        """What was shared last, if anything"""
        self._subscribers: list[Callable[[Any], None]] = []
        self._news: dict[str, Any] = {}
        """What the master is to hear next: a value to "share", or one to "refuse". Only the latest counts."""
        self._newsworthy = trio.Event()
        self._keeping = trio.CancelScope()
        self._vitals: Vitals | None = None

    async def run(self, config: Any, files: NamedFiles) -> None:
        """Serve until told to drain, or the master is gone, and then until the connections are. `files` are those that
        the configuration names.

        Raises Error when the daemon can't be put together.
        """
        order = self._order
        tally = Tally(self._table, order["column"], most=order["connections"], per_client=order["per_client"])
        most = most_connections(self._limit)
        parts = Parts(
            self._sink,
            self._reactor,
            self._metrics,
            frozenset(order["ports"]),
            any(map(is_transparent, self._sockets)),
            self._limit,
            most,
            count_as=self._count_as,
            share=self._share,
            shared=self._subscribe,
            read=files.read,
        )
        built: Built = self._daemon.build(config, parts)
        files.close()
        self._built = built
        with contextlib.closing(built):
            async with trio.open_nursery() as base:
                await base.start(self._reactor.run)
                try:
                    for task in built.background:
                        await base.start(task)
                except Error as error:
                    await _answer_faults(self._channel, error)
                    base.cancel_scope.cancel()
                    return
                # Lives as long as there is something to serve: a drain is what ends it.
                async with trio.open_nursery() as sessions:
                    self._service = Service(
                        self._reactor,
                        built.session,
                        sessions,
                        most=most,
                        tally=tally,
                        metrics=self._metrics,
                        proxied=built.proxied,
                        keepalive=built.keepalive,
                    )
                    base.start_soon(self._service.keep_alive)
                    vitals = self._vitals = Vitals(self._service, self._metrics, self._sink, self._limit)
                    settle_memory()
                    ready = {"version": __version__, "handover": HANDOVER, "verbs": list(built.verbs)}
                    await self._send({"type": "ready", **ready})
                    base.start_soon(self._report, vitals)
                    base.start_soon(self._send_news)
                    sessions.start_soon(self._obey)
                base.cancel_scope.cancel()

    async def report_end(self) -> None:
        """Its last figures. The log has been closed, and knows what could not be written."""
        if self._vitals is not None:
            await self._send(self._vitals.alive(last=True) | {"type": "ended"})

    async def _obey(self) -> None:
        """What the master says. An order that can't be followed, of another version, say, is logged and left out."""
        async with trio.open_nursery() as orders:
            while (received := await self._channel.receive()) is not None:
                order, fds = received
                try:
                    await self._follow(order, fds, orders)
                except Exception:
                    log.exception("an order of the master can't be followed", extra={"fields": {"type": order["type"]}})
            # The master's end: nobody would tell us anything any more.
            log.warning("the master is gone, draining")
            self._draining = True
            self._keeping.cancel()
            await self._service.drain(self._order["stop"])

    async def _follow(self, order: Message, fds: Sequence[int], orders: trio.Nursery) -> None:
        match order["type"]:
            case "accept":
                self._service.listen(self._sockets)
                if self._order.get("keeper"):
                    orders.start_soon(self._keep)
            case "drain":
                # Said again with less time, that counts.
                self._draining = True
                self._keeping.cancel()
                orders.start_soon(self._service.drain, order["within"])
            case "adopt":
                self._adopt_more(order["id"], fds)
            case "release":
                self._service.close(self._adopted.pop(order["id"], []))
            case "reopen":
                self._sink.reopen()
            case "level":
                self._sink.set_level(parse_level(order["level"]))
            case "measure" | "status" as question:
                await self._answer(question, order["id"])
            case "connections" as question:
                orders.start_soon(self._answer, question, order["id"])
            case "shared":
                self._shared = [order["value"]]
                self._deliver(self._subscribers)
            case "verb":
                orders.start_soon(self._answer_verb, order["id"], order["request"])

    def _adopt_more(self, number: int, fds: Sequence[int]) -> None:
        """Accept from these too, until told to release them."""
        # A newer version of the master may not know that it has asked for this already.
        self._service.close(self._adopted.pop(number, []))
        sockets = [_adopt(fd) for fd in fds]
        if self._draining:  # told so meanwhile
            for sock in sockets:
                sock.close()
        else:
            self._adopted[number] = self._service.listen(sockets)

    async def _keep(self) -> None:
        with self._keeping:
            async with trio.open_nursery() as tasks:
                for task in self._built.keeping:
                    tasks.start_soon(task)

    def _count_as(self, endpoint: Endpoint, host: str, port: int) -> bool:
        return self._service.count_as(endpoint, host, port)

    def _share(self, value: Any) -> None:
        self._news["share"] = value
        self._newsworthy.set()

    def _subscribe(self, subscriber: Callable[[Any], None]) -> None:
        self._subscribers.append(subscriber)
        self._deliver([subscriber])

    def _deliver(self, subscribers: Sequence[Callable[[Any], None]]) -> None:
        """What is shared, to these. What one of them can't take (another version has shared it, say) is dropped, and
        the master told, so that it does not hand it on.
        """
        for value in self._shared:
            for subscriber in subscribers:
                try:
                    subscriber(value)
                except Exception:
                    log.warning("what was shared can't be taken", exc_info=True)
                    self._shared = []
                    self._news["refuse"] = value
                    self._newsworthy.set()
                    return

    async def _send_news(self) -> None:
        while True:
            await self._newsworthy.wait()
            self._newsworthy = trio.Event()
            while self._news:
                kind, value = self._news.popitem()
                await self._send({"type": kind, "value": value})

    async def _answer_verb(self, number: int, request: Message) -> None:
        verb = request["verb"]
        answer: Message
        try:
            handler = self._built.verbs.get(verb)
            if handler is None:
                raise Error(f"no such verb: {verb}")
            answer = {"answer": await handler(request)}
        except Error as error:
            answer = {"error": str(error)}
        except Exception:
            log.exception("internal error", extra={"fields": {"verb": verb}})
            answer = {"error": "internal error"}
        await self._send({"type": "answer", "id": number, "rows": [answer], "last": True})

    async def _report(self, vitals: Vitals) -> None:
        while True:
            await self._send(vitals.alive() | {"type": "alive"})
            await trio.sleep(HEARTBEAT)

    async def _answer(self, question: str, number: int) -> None:
        """In parts, so that a long answer does not hold up connections."""
        rows = self._rows(question)
        last = False
        while not last:
            part: list[Any] = []
            try:
                part += islice(rows, _LISTED_AT_ONCE)
            except Exception:  # whoever asks does not wait in vain
                log.exception("internal error", extra={"fields": {"question": question}})
            last = len(part) < _LISTED_AT_ONCE
            await self._send({"type": "answer", "id": number, "rows": part, "last": last})

    def _rows(self, question: str) -> Iterator[Any]:
        match question:
            case "measure":
                assert self._vitals is not None
                yield self._vitals.measure()
            case "status":
                yield self._built.status()
            case _:
                for row in self._service.connections():
                    yield row | {"worker": os.getpid()}

    async def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the master is gone, which `_obey` sees too
            await self._channel.send(message)


def _adopt(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock

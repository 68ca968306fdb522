"""A daemon inside the test's own process: its sessions on a real listener, reactor and log, with no master around.

It is put together by its own `build`, and gets here what a worker would give to it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket as Socket
from typing import Any, TypeVar

import daemons
import trio
from turning import turning

import transocks.commands.serve
import transocks.config
import usocksd.commands.serve
import usocksd.config
from usocksd.log import log as logging
from usocksd.log.metrics import Metrics
from usocksd.net.endpoint import Endpoint
from usocksd.net.flow import Flow
from usocksd.net.limits import Tally, make_table
from usocksd.net.listeners import Listener, listen
from usocksd.net.reactor import Reactor, Session
from usocksd.serve.associations import Associations
from usocksd.serve.daemon import Application, Parts
from usocksd.settings.loader import parse

C = TypeVar("C")


class Proxy(daemons.Log):
    """The daemon, listening on `host` and `port` of loopback."""

    def __init__(self, log: Path, metrics: Metrics, reactor: Reactor, address: tuple[str, int]) -> None:
        super().__init__(log)
        self.metrics = metrics
        self.reactor = reactor
        self.host, self.port = address
        self.live = 0
        """Sessions."""
        self.failures: list[Exception] = []
        """The exceptions of the sessions."""
        self.sessions: list[Session] = []
        """In the order in which they began."""

    async def connect(self) -> trio.SocketStream:
        """A connection to it."""
        sock = trio.socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            await sock.connect((self.host, self.port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    def count(self, name: str, *labels: str) -> float:
        """A counter, a gauge, or how often something was observed."""
        ((_, metric),) = [item for item in self.metrics.snapshot().items() if item[0].partition("_")[2] == name]
        for values, numbers in metric["values"]:
            if tuple(values) == labels:
                return sum(numbers[:-1]) if metric["kind"] == "histogram" else numbers[0]
        raise KeyError(labels)

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        """The children of a metric that have counted something."""
        metric = next(m for full, m in self.metrics.snapshot().items() if full.partition("_")[2] == name)
        return {tuple(values): numbers[0] for values, numbers in metric["values"] if any(numbers)}

    def observed(self, name: str) -> float:
        """The sum of what a histogram without labels has observed."""
        metric = next(m for full, m in self.metrics.snapshot().items() if full.partition("_")[2] == name)
        return float(metric["values"][0][1][-1])

    def connections(self) -> list[dict[str, Any]]:
        """The sessions' descriptions of the live connections."""
        found = []
        for handler in self.reactor.handlers.values():
            about = handler.source.about if isinstance(handler, Flow) else getattr(handler, "about", None)
            if about is not None:
                found.append(json.loads(json.dumps(about.describe())))
        return found

    async def over(self) -> None:
        """Returns when no session is left."""
        await self.until(lambda: not self.live, "every session ends")


@asynccontextmanager
async def usocksd_inside(folder: Path, text: str = "", *, listener: Socket | None = None) -> AsyncIterator[Proxy]:
    """usocksd with this configuration; `listener` in place of one on loopback."""
    build = usocksd.commands.serve.build
    async with _inside("usocksd", folder, usocksd.config.UsocksdConfig, text, build, listener=listener) as proxy:
        yield proxy


@asynccontextmanager
async def transocks_inside(
    folder: Path, text: str, *, connections: int = 1000, host: str = "127.0.0.1"
) -> AsyncIterator[Proxy]:
    """transocks with this configuration on this loopback address, with descriptors for this many connections."""
    build, kind, listener = transocks.commands.serve.build, transocks.config.TransocksConfig, listen(host, 0)
    async with _inside("transocks", folder, kind, text, build, listener=listener, connections=connections) as proxy:
        yield proxy


@asynccontextmanager
async def _inside(
    name: str,
    folder: Path,
    kind: type[C],
    text: str,
    build: Callable[[C, Parts], Application],
    *,
    listener: Socket | None = None,
    connections: int = 1000,
) -> AsyncIterator[Proxy]:
    log = logging.setup(name, str(folder / f"{name}.log"), "debug", "json")
    listener = listener or listen("127.0.0.1", 0)
    metrics, reactor = Metrics(name), Reactor(sweep_every=0.02)
    proxy = Proxy(folder / f"{name}.log", metrics, reactor, listener.getsockname()[:2])

    def begin(session: Session, _host: str, _port: int) -> bool:
        reactor.start(session)
        return True

    parts = Parts(
        log=log,
        reactor=reactor,
        metrics=metrics,
        ports=frozenset({proxy.port}),
        transparent=False,
        descriptors=1024,
        connections=connections,
        associations=Associations(metrics),
        tally=lambda kind, per_client: Tally(make_table(), 0, per_client=per_client, kind=kind),
        begin=begin,
        count_as=lambda _endpoint, _host, _port: True,
        share=lambda _: None,
        shared=lambda _: None,
    )
    built = build(parse(kind, text, f"{name}.toml"), parts)

    async def serve(endpoint: Endpoint, host: str, port: int) -> None:
        try:
            await built.session(endpoint, host, port)
        except Exception as error:
            proxy.failures.append(error)
        finally:
            endpoint.close()
            proxy.live -= 1

    def accepted(endpoint: Endpoint, host: str, port: int) -> None:
        proxy.live += 1
        session = serve(endpoint, host, port)
        proxy.sessions.append(session)
        reactor.start(session)

    try:
        async with turning(reactor), trio.open_nursery() as nursery:
            for task in built.background:
                await nursery.start(task)
            accepting = Listener(reactor, listener, accepted, room=lambda: True)
            try:
                yield proxy
            finally:
                accepting.close()
                nursery.cancel_scope.cancel()
    finally:
        built.close()
        log.close()

"""A daemon that is as small as one can be, on the real master and workers: for the tests of the process model. The
first word of a client decides about its connection: "echo", "who" (tells process and version, then echoes), "crash",
"late" (a deadline passes), "busy" (waits for something that is no socket of ours), or "relay" and the port of what to
relay to. The log tells of it.

The environment tells what else: TINY_TIMING is a JSON object of fields of `Timing` and their values, and files in the
folder TINY_FOLDER make workers misbehave: {hold,die,bug}-{import,plan,build}, fail-build, fail-task, choosy (takes nothing that is shared). With the file "keep"
there one worker finds out something for all: its own process number.
"""

# ruff: noqa: E402 - a process that should die at import does so before it imports much
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from math import inf
from pathlib import Path
from typing import Annotated, Any

FOLDER = Path(os.environ["TINY_FOLDER"])


def misbehave(where: str) -> None:
    """Follow the files' instructions, in workers."""
    if (FOLDER / f"hold-{where}").exists():
        (FOLDER / f"held-{where}-{os.getpid()}").touch()
        while (FOLDER / f"hold-{where}").exists():
            time.sleep(0.005)
    if (FOLDER / f"die-{where}").exists():
        os._exit(3)
    if (FOLDER / f"bug-{where}").exists():
        raise ZeroDivisionError(f"on purpose, in {where}")


if "TRANSOCKS_CHANNEL" in os.environ and __name__ == "__main__":
    misbehave("import")

import logging
import resource

import attrs
import trio

from usocksd import __version__
from usocksd.errors import Error, Fault
from usocksd.log.metrics import BYTES
from usocksd.net.dial import Dialer, Target
from usocksd.net.ending import Limits
from usocksd.net.endpoint import Endpoint
from usocksd.net.limits import most_pipes
from usocksd.net.pipes import PipePool
from usocksd.net.reactor import Waitable
from usocksd.net.relay import close_pair, relay
from usocksd.serve.daemon import Application, Daemon, Parts, Remarks, run
from usocksd.serve.timing import Timing
from usocksd.settings.common import CommonConfig
from usocksd.settings.types import (
    LOCALHOST,
    ListenAddress,
    ListenIPs,
    ListenPort,
    ReadableFile,
    SocketPath,
    Workers,
    text,
)

log = logging.getLogger("usocksd.tiny")


@attrs.frozen(kw_only=True)
class TinyConfig(CommonConfig):
    workers: Workers | None = 1
    control: SocketPath = None
    addresses: ListenIPs = LOCALHOST[:1]
    optional: bool = False
    ports: tuple[ListenPort, ...] = (0,)
    metrics_port: ListenPort | None = None
    metrics_default: ListenPort = 0  # type: ignore[misc]
    metrics_address: ListenIPs = LOCALHOST[:1]
    warning: Annotated[str, text(str, "a text")] = ""
    file: ReadableFile | None = None

    @property
    def listen_keys(self) -> tuple[tuple[str, ListenAddress], ...]:
        listen = [ListenAddress(at, port, self.optional) for at in self.addresses for port in self.ports]
        return tuple(("addresses", at) for at in listen)


def examine(config: TinyConfig, _: str | None) -> Remarks:
    misbehave("plan")
    return Remarks([Fault("", "", config.warning)] if config.warning else [])


def say(**fields: object) -> None:
    log.info("tiny", extra={"fields": {"pid": os.getpid(), **fields}})


def keeping(parts: Parts) -> tuple[Callable[[], Awaitable[None]], ...]:
    """The task of the keeper, if the test wants one."""
    known: list[Any] = []

    def learn(value: Any) -> None:
        if (FOLDER / "choosy").exists():
            raise ValueError("can't take it: the test says so")
        known.append(value)
        say(known=value)

    async def keep() -> None:
        """Shares which worker has found it out, unless one has already."""
        if not known:
            parts.share(os.getpid())
        say(keeps=True)
        await trio.sleep_forever()

    parts.shared(learn)
    return (keep,) if (FOLDER / "keep").exists() else ()


def build(config: TinyConfig, parts: Parts) -> Application:
    misbehave("build")
    if config.file is not None:
        say(file=parts.read(config.file).decode())
    return make(parts)


def make(parts: Parts) -> Application:
    if (FOLDER / "fail-build").exists():
        raise Error("can't build: the test says so")
    pipes = PipePool(most_pipes(parts.descriptors))
    for way in ("tx", "rx"):
        parts.metrics.histogram(f"proxy_{way}_bytes", "What every daemon of ours counts", BYTES)
    say(built=True, ports=sorted(parts.ports))

    async def session(client: Endpoint, host: str, port: int) -> None:
        say(session=port)
        word, *rest = (await client.receive()).split() or [b""]
        match word:
            case b"":
                return
            case b"crash":
                raise ZeroDivisionError("on purpose")
            case b"late":
                client.deadline = client.reactor.clock()
                await client.receive()
            case b"busy":
                say(word="busy")
                try:
                    await Waitable(client.reactor).wait()  # where no interrupt reaches it
                finally:
                    say(ended="busy")
            case b"relay":
                client.deadline = inf
                target = Target("127.0.0.1", int(rest[0]))
                upstream, _ = await Dialer(client.reactor).dial([target], deadline=client.reactor.clock() + 10)
                try:
                    await client.send_all(word)
                    result = await relay(client, upstream, pipes=pipes, limits=Limits())
                    say(ended="relay", reason=result.reason.value, up=result.to_upstream)
                    await close_pair(client, upstream, result)
                finally:
                    upstream.close()
            case _:
                await client.send_all(word if word == b"echo" else f"{os.getpid()} {__version__}\n".encode())
                while data := await client.receive():
                    await client.send_all(data)
                say(ended="echo")

    async def background(*, task_status: trio.TaskStatus[None]) -> None:
        if (FOLDER / "fail-task").exists():
            raise Error("can't start a task: the test says so")
        say(background="begins")
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            say(background="ends")

    return Application(session, (background,), lambda: say(closed=True), keeping=keeping(parts))


# As __main__: under PYTHONSAFEPATH the folder of a script is not on the path.
DAEMON: Daemon[Any] = Daemon(
    name="tiny",
    description="tiny",
    config=TinyConfig,
    file="/nonexistent",
    file_required=True,
    control="/nonexistent",
    examine="__main__:examine",
    build="__main__:build",
    timing=Timing(**json.loads(os.environ.get("TINY_TIMING", "{}"))),
)

if __name__ == "__main__":
    if limit := int(os.environ.get("TINY_DESCRIPTORS", "0")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sys.exit(run(DAEMON, lambda _: None))

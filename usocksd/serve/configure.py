"""A worker's first exchange with its master: a configuration comes, and a plan or its faults go back."""

from __future__ import annotations

import contextlib
from typing import Any

from usocksd import __version__
from usocksd.errors import ConfigError, Error, Fault
from usocksd.serve.channel import Channel, Message
from usocksd.serve.daemon import Daemon
from usocksd.serve.plan import PROTOCOL, make_plan
from usocksd.settings import loader as configuration
from usocksd.settings.files import NamedFiles


async def configure(daemon: Daemon[Any], channel: Channel, order: Message, fds: list[int]) -> tuple[Any, NamedFiles]:
    """The configuration, and the files that it names. The first worker of a generation tells the master of both.

    Raises ConfigError, or Error for an order of a version that has another protocol.
    """
    if order.get("protocol") != PROTOCOL:
        version = order.get("version", "another")
        raise Error(f"version {__version__} can't be reloaded into from {version}: restart the daemon")
    files, first = NamedFiles.received(order["files"], fds), order["first"]
    read = files.keep if first else files.read
    config = configuration.parse(daemon.config, order["text"], order["source"], read)
    if first:
        examined = daemon.call(daemon.examine, config, None)
        warnings = [fault.at(order["source"]) for fault in (*examined.warnings, *examined.notes)]
        plan = make_plan(config, warnings).as_json()
        await channel.send({"type": "plan", "plan": plan, "files": files.places}, files.fds)
    return config, files


async def answer_faults(channel: Channel, error: Error) -> None:
    """Tell the master what keeps this worker from serving."""
    source: str = ""
    faults: tuple[Fault, ...] = (Fault("", "", str(error)),)
    if isinstance(error, ConfigError):
        source, faults = error.source, error.faults
    rows = [[fault.path, fault.value, fault.expected, fault.line] for fault in faults]
    with contextlib.suppress(OSError):
        await channel.send({"type": "faults", "source": source, "faults": rows})

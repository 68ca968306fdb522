"""What a master needs to know of a configuration. Workers read the configuration itself; the master reads only this.

So a new version of the program, with settings that the running master has never heard of, can be reloaded into, and
the master needs nothing of what a daemon is made of.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import attrs

from usocksd.host.cgroup import usable_cpus
from usocksd.log.log import Log
from usocksd.log.metrics import Metrics
from usocksd.net.endpoint import Endpoint
from usocksd.net.keepalive import KeepAlive
from usocksd.net.reactor import Reactor
from usocksd.serve.service import Session
from usocksd.settings.common import Common
from usocksd.settings.files import read_file
from usocksd.settings.types import LogConfig

C = TypeVar("C")


HANDOVER = 1
"""The format of what a master passes on to a newer version of itself; a number for each change of it."""


class Address(NamedTuple):
    """Where to listen; an optional one may be missing (a family that the host lacks), if another is there.

    New fields go to the end, with a default: a plan of another version may have more, or fewer.
    """

    host: str
    port: int
    optional: bool = False
    transparent: bool = False
    """With IP_TRANSPARENT. (A master of before there was this opens an ordinary socket; transocks refuses to serve
    on that, see commands/serve.py.)"""


class Metering(NamedTuple):
    """Where the metrics endpoint is. `required`: somebody asked for just this port, so not having it is an error."""

    host: str
    port: int
    required: bool
    others: tuple[str, ...] = ()
    """More hosts, with the same port"""

    @property
    def hosts(self) -> tuple[str, ...]:
        """All of them."""
        return (self.host, *self.others)

    @property
    def where(self) -> tuple[tuple[str, ...], int]:
        """Where it is, whoever has asked for that."""
        return self.hosts, self.port


@attrs.frozen(kw_only=True)
class Plan:
    """One configuration, as the master sees it."""

    version: str
    """of the program that has read it"""
    listen: tuple[Address, ...]
    workers: int
    log: LogConfig
    metrics: Metering | None
    control: str | None
    """Path of the control socket"""
    drain: float
    """Seconds that connections may go on after a reload"""
    stop: float
    """Seconds that connections may go on when the daemon stops"""
    connections: int
    """At most so many in all, 0 for as many as there are descriptors"""
    per_client: int
    """At most so many from one client address, 0 for any number"""
    warnings: tuple[str, ...] = ()
    """What is no fault, and yet not what an operator would want"""

    def as_json(self) -> dict[str, Any]:
        """As a message carries it."""
        return attrs.asdict(self, recurse=False) | {"log": attrs.asdict(self.log)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """From a message, of this version or a later one: what is not known here is left out.

        Raises KeyError, TypeError or ValueError when that is not enough.
        """
        known = _known(cls, values)
        metrics = known["metrics"]
        known |= {
            "listen": tuple(Address(*address[: len(Address._fields)]) for address in known["listen"]),
            "log": LogConfig(**_known(LogConfig, known["log"])),
            "metrics": None if metrics is None else make_metering(metrics),
            "warnings": tuple(known["warnings"]),
        }
        return cls(**known)


def make_metering(values: Sequence[Any]) -> Metering:
    """From JSON, of this version or another."""
    host, port, required, *more = values
    return Metering(host, port, required, tuple(more[0]) if more else ())


def _known(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in attrs.fields(cls) if field.name in values}


def make_plan(common: Common, *, version: str, warnings: Sequence[str]) -> Plan:
    """The plan of a configuration, read by this `version` of the program."""
    port = common.metrics_default if common.metrics_port is None else common.metrics_port
    required = common.metrics_port is not None
    host, *others = map(str, common.metrics_addresses)
    return Plan(
        version=version,
        listen=tuple(Address(str(at.address), at.port, at.optional, at.transparent) for _, at in common.listen),
        workers=common.workers or usable_cpus(),
        log=common.log,
        metrics=Metering(host, port, required, tuple(others)) if port else None,
        control=common.control_here,
        drain=common.timeouts.drain,
        stop=common.timeouts.stop,
        connections=common.limits.connections,
        per_client=common.limits.per_client,
        warnings=tuple(warnings),
    )


class Parts(NamedTuple):
    """What a worker gives to the daemon that it runs."""

    log: Log
    reactor: Reactor
    metrics: Metrics
    ports: frozenset[int]
    """The ports that are listened on"""
    transparent: bool
    """Whether one of the sockets has IP_TRANSPARENT"""
    descriptors: int
    """How many open files the process may have"""
    connections: int
    """How many connections fit into them"""
    count_as: Callable[[Endpoint, str, int], bool]
    """Have a connection on one of `Built.proxied` count as one of this client, numeric address and port. False if a
    limit forbids that; then it has been reset."""
    share: Callable[[Any], None]
    """Hand a JSON value to the master, which passes it on to all workers, this one and those to come. Only the latest
    counts, and only from what runs in `Built.keeping`."""
    shared: Callable[[Callable[[Any], None]], None]
    """Have a function called with what is shared: at once if there is something, and whenever it is shared again. It
    may have been shared under another configuration."""
    read: Callable[[Path], bytes] = read_file
    """Read a file that the configuration names, as it was when that was read; for now, not for later."""


class Built(NamedTuple):
    """A daemon, ready to serve."""

    session: Session
    background: tuple[Callable[..., Awaitable[object]], ...] = ()
    """Tasks started before the first connection is accepted; they say `task_status.started()`."""
    close: Callable[[], None] = lambda: None
    """When everything is over."""
    keeping: tuple[Callable[[], Awaitable[object]], ...] = ()
    """Tasks that one worker does for all, the keeper: from when it accepts connections until it drains or dies, and
    then they begin in another one. What they find out they `Parts.share`."""
    verbs: Mapping[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = MappingProxyType({})
    """What the daemon itself answers on the control socket: gets the whole request, returns the answer. Raises Error
    when there is none. One worker is asked, so it is for what all know."""
    proxied: Collection[int] = ()
    """Ports whose connections a proxy makes for its clients: they count for nobody until `Parts.count_as`."""
    keepalive: KeepAlive = KeepAlive()
    """What the relays of `session` go by. It is kept up to date with the timers of this host."""
    status: Callable[[], dict[str, Any]] = dict
    """What the answer to `status` has under "daemon": JSON values that are the same in all workers."""


@attrs.frozen
class Daemon(Generic[C]):
    """One of the two daemons, as everything that is common to both sees it.

    `plan` and `build` are "module:function": only workers load what is behind them.
    """

    name: str
    config: type[C]
    _plan: str
    """(config) -> Plan"""
    _build: str
    """(config, parts) -> Built. Raises Error when that can't be done."""

    def plan(self, config: C) -> Plan:
        """What the master needs to know."""
        plan: Plan = pkgutil.resolve_name(self._plan)(config)
        return plan

    def build(self, config: C, parts: Parts) -> Built:
        """Put the daemon together. Raises Error."""
        built: Built = pkgutil.resolve_name(self._build)(config, parts)
        return built

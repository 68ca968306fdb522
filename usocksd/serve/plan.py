"""A plan: the part of a configuration that the master needs. A generation: a configuration that is or was in force.

A master never reads a configuration: its workers do, and the first of them sends this. So the master loads none of a
daemon's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple

import attrs

from usocksd.host.cgroup import usable_cpus
from usocksd.settings.common import CommonConfig
from usocksd.settings.files import NamedFiles
from usocksd.settings.types import ListenAddress, LogConfig

PROTOCOL = 2
"""The version of all messages between processes of this program: orders, answers, plans, and the state that a master
passes on when it becomes a new version. Increment it with every change of those: a reload into a version with another
number is refused.
"""


class MetricsAddress(NamedTuple):
    """The addresses of the metrics endpoint."""

    hosts: tuple[str, ...]
    port: int
    required: bool
    """The configuration has this port, so that it is an error if it can't be had"""


@attrs.frozen(kw_only=True)
class Plan:
    """One configuration, as the master sees it."""

    listen: tuple[ListenAddress, ...]
    workers: int
    log: LogConfig
    metrics: MetricsAddress | None
    control: str | None
    """Path of the control socket"""
    drain: float
    """Seconds that connections may go on after a reload"""
    stop: float
    """Seconds that connections may go on when the daemon stops"""
    connections: int
    """The most connections at a time; 0: no limit but descriptors"""
    per_client: int
    """The most connections of one client address; 0: no limit"""
    warnings: tuple[str, ...] = ()
    """The warnings about the configuration"""

    def as_json(self) -> dict[str, Any]:
        """As JSON values, for a message."""
        listen = [[str(at.address), at.port, at.optional, at.transparent] for at in self.listen]
        return attrs.asdict(self, recurse=False) | {"listen": listen, "log": attrs.asdict(self.log)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """From a message."""
        metrics = values["metrics"]
        return cls(
            **values
            | {
                "listen": tuple(ListenAddress(ip_address(host), *rest) for host, *rest in values["listen"]),
                "log": LogConfig(**values["log"]),
                "metrics": None if metrics is None else MetricsAddress(tuple(metrics[0]), *metrics[1:]),
                "warnings": tuple(values["warnings"]),
            }
        )


def make_plan(config: CommonConfig, warnings: Sequence[str] = ()) -> Plan:
    """The plan of a configuration."""
    port = config.metrics_default if config.metrics_port is None else config.metrics_port
    hosts = tuple(map(str, config.metrics_address))
    return Plan(
        listen=tuple(at for _, at in config.listen_keys),
        workers=config.workers or usable_cpus(),
        log=config.log,
        metrics=MetricsAddress(hosts, port, required=config.metrics_port is not None) if port else None,
        control=config.control_here,
        drain=config.timeouts.drain,
        stop=config.timeouts.stop,
        connections=config.limits.connections,
        per_client=config.limits.per_client,
        warnings=tuple(warnings),
    )


@attrs.frozen
class Generation:
    """A configuration that is or was in force. Each has the next number."""

    number: int
    text: str
    source: str
    """The file that the text is from"""
    plan: Plan
    log: LogConfig
    """The log settings of the plan, with flags of the command line"""
    since: float
    """Seconds since the epoch"""
    files: NamedFiles
    """The files that it names; closed when no more workers of this generation will be started"""

    def as_json(self) -> dict[str, Any]:
        """For this process's next program; its files' descriptors stay open."""
        values = attrs.asdict(self, recurse=False) | {"log": attrs.asdict(self.log), "plan": self.plan.as_json()}
        return values | {"files": [self.files.places, self.files.fds]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Generation:
        """From this process's previous program."""
        plan, log, files = (
            Plan.from_json(values["plan"]),
            LogConfig(**values["log"]),
            NamedFiles.received(*values["files"]),
        )
        return cls(**values | {"plan": plan, "log": log, "files": files})

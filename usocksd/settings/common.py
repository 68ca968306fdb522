"""The tables and settings that the configurations of both daemons have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs

from usocksd.net.address import IPAddress
from usocksd.settings.control_path import control_path
from usocksd.settings.loader import current_lines
from usocksd.settings.locate import Lines
from usocksd.settings.types import DnsConfig, LimitsConfig, ListenAddress, LogConfig, SocketPath, Timeouts, Workers


@attrs.frozen(kw_only=True)
class CommonConfig:
    """The keys that both files have in the same place, and properties for what stands in different places."""

    metrics_default: ClassVar[int]
    """The port of the metrics endpoint if `metrics_port` is None"""
    metrics_table: ClassVar[str] = ""
    """The prefix of metrics_port and metrics_address in the file: a table with its dot, or nothing"""
    mark_key: ClassVar[str] = "mark"

    lines: Lines = attrs.field(init=False, eq=False, repr=False, factory=current_lines)
    """the places of the keys in the file"""
    log: LogConfig = attrs.field(factory=LogConfig)
    dns: DnsConfig = attrs.field(factory=DnsConfig)
    timeouts: Timeouts = attrs.field(factory=Timeouts)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
    workers: Workers | None = None
    """None: one for each CPU that this process may use"""
    control: SocketPath
    """None: no control socket"""

    @property
    def control_here(self) -> str | None:
        """Where this user's daemon has its control socket; see control_path.py."""
        if self.control is None:
            return None
        return control_path(self.control, attrs.fields_dict(type(self))["control"].default or "")

    @property
    def listen_keys(self) -> tuple[tuple[str, ListenAddress], ...]:
        """The addresses to listen on, with the key of each."""
        raise NotImplementedError

    @property
    def metrics_port(self) -> int | None:
        """None: metrics_default if nobody else has it; 0: no metrics endpoint."""
        raise NotImplementedError

    @property
    def metrics_address(self) -> tuple[IPAddress, ...]:
        raise NotImplementedError

    @property
    def mark(self) -> int | None:
        """SO_MARK of the connections that this daemon makes."""
        raise NotImplementedError

    @property
    def shown(self) -> Mapping[str, object]:
        """What `check` shows of this daemon's own settings, by key, without secrets."""
        return {}

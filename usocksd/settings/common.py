"""What the configurations of both daemons have in common, and in one form whatever their files call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from usocksd.net.address import IPAddress
from usocksd.settings.control_path import control_path
from usocksd.settings.loader import current_lines
from usocksd.settings.locate import Lines
from usocksd.settings.types import DnsConfig, LimitsConfig, ListenAddress, LogConfig, SocketPath, Timeouts, Workers


@attrs.frozen(kw_only=True)
class Common:
    """Settings of a daemon, and under which keys it has those that stand in different places."""

    listen: tuple[tuple[str, ListenAddress], ...]
    """with the key of each"""
    metrics_prefix: str
    """what stands before metrics_port and metrics_address: "" or a table with its dot"""
    metrics_port: int | None
    metrics_default: int
    """the port if `metrics_port` is None"""
    metrics_addresses: tuple[IPAddress, ...]
    mark_key: str
    mark: int | None
    log: LogConfig
    timeouts: Timeouts
    limits: LimitsConfig
    workers: int | None
    control: str | None
    control_default: str | None
    more: Mapping[str, object]
    """what else of this daemon's settings is worth showing, by key, without secrets"""

    @property
    def control_here(self) -> str | None:
        """Where this user's daemon has its control socket; see control_path.py."""
        if self.control is None or self.control_default is None:
            return self.control
        return control_path(self.control, self.control_default)


@attrs.frozen(kw_only=True)
class CommonConfig:
    """The tables and keys that the files of both daemons have in the same place."""

    lines: Lines = attrs.field(init=False, eq=False, repr=False, factory=current_lines)
    """where in its text the keys are"""
    log: LogConfig = attrs.field(factory=LogConfig)
    dns: DnsConfig = attrs.field(factory=DnsConfig)
    timeouts: Timeouts = attrs.field(factory=Timeouts)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
    workers: Workers | None = None
    """None: one for each CPU that this process may use"""
    control: SocketPath
    """None: no control socket"""

    def _common(self, *, control_default: str, **own: Any) -> Common:
        """With the settings that each daemon has in its own place."""
        here = {key: getattr(self, key) for key in ("log", "timeouts", "limits", "workers", "control")}
        return Common(**here, control_default=control_default, **own)

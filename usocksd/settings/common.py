"""The settings that both daemons have, in one form, whatever their files call them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from usocksd.net.address import IPAddress
from usocksd.settings.control_path import control_path
from usocksd.settings.types import LimitsConfig, ListenAddress, LogConfig, Timeouts


@attrs.frozen(kw_only=True)
class Common:
    """What both daemons have, and under which keys each has those that stand in different places."""

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

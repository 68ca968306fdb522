"""How a relay ends: why, by whom, after how many bytes; and the time limits that end it."""

from __future__ import annotations

from enum import StrEnum
from math import inf
from typing import NamedTuple

from usocksd.net.keepalive import KeepAlive

_KEEPALIVE = KeepAlive()


class Reason(StrEnum):
    """Why a relay ended, as access records show it."""

    CLOSED = "closed"
    RESET = "reset"
    ERROR = "error"
    IDLE = "idle timeout"
    HALF_CLOSED = "half-closed timeout"
    STOPPED = "stopped"
    SHED = "shed"
    """It was idle, and its descriptors were needed."""


class Side(StrEnum):
    """The side that ended it."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    PROXY = "proxy"


class RelayResult(NamedTuple):
    """How a relay ended. Bytes are those that the receiving side's kernel took."""

    to_upstream: int
    to_client: int
    reason: Reason
    by: Side
    errno: int = 0
    first: Side | None = None
    """The side that ended first, if one of them did."""
    alone: float = 0.0
    """Seconds for which the other side continued after that."""


class Limits(NamedTuple):
    """Seconds without a byte in either direction after which a relay is ended (inf: never), and more of its times."""

    idle: float = inf
    half_closed: float = inf
    """the same once one side has ended"""
    keepalive: KeepAlive = _KEEPALIVE
    deliver: float = 5.0
    """seconds that the other side may take after a reset to receive the bytes before it"""

"""The timers of the kernel's connection tracking: how long it remembers a TCP connection that is silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

FOLDER = Path("/proc/sys/net/netfilter")

DEFAULTS: Mapping[str, int] = MappingProxyType(
    {
        "established": 432_000,
        "unacknowledged": 300,
        "max_retrans": 300,
        "fin_wait": 120,
        "time_wait": 120,
        "close_wait": 60,
        "last_ack": 30,
        "close": 10,
    }
)
"""What the kernel sets, in seconds, by the end of their names: net.netfilter.nf_conntrack_tcp_timeout_NAME
(Documentation/networking/nf_conntrack-sysctl.rst)."""


def tcp_timers(names: Iterable[str] = DEFAULTS, folder: Path = FOLDER) -> dict[str, int]:
    """Those of this network namespace, in seconds. What can't be read is left out: all of them where nothing is
    tracked, or in a container that may not see it.
    """
    found = {}
    for name in names:
        try:
            with open(f"{folder}/nf_conntrack_tcp_timeout_{name}", "rb", buffering=0) as file:
                found[name] = int(file.read())
        except (OSError, ValueError):
            continue
    return found

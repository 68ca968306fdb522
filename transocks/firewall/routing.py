"""Where the kernel would send a packet: rtnetlink(7), RTM_GETROUTE. Asks, and changes nothing; needs no privilege."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import attrs

from usocksd.match import IPAddress

# linux/rtnetlink.h
_RTN_LOCAL = 2
_REFUSED = {6: errno.EINVAL, 7: errno.EHOSTUNREACH, 8: errno.EACCES}  # blackhole, unreachable, prohibit


@attrs.frozen
class Route:
    """What the routing tables say of one packet."""

    local: bool
    """it ends on this host"""
    device: str
    """the interface it leaves by"""
    gateway: IPAddress | str | None


def lookup(destination: IPAddress, *, source: IPAddress | None = None, iif: str | None = None, mark: int = 0) -> Route:
    """Where a packet goes: one that this host sends, or with `iif` one that comes in there from `source`.

    Raises OSError when it goes nowhere: for one that comes in also when its source is not believed (EINVAL, EXDEV:
    rp_filter and the like, as ip-sysctl of the kernel has them).
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped] # noqa: PLC0415  (0.1 s and 12 MB)
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped] # noqa: PLC0415

    question: dict[str, Any] = {"dst": str(destination), "mark": mark}
    if source is not None:
        question["src"] = str(source)
    if iif is not None:
        question["iif"] = socket.if_nametoindex(iif)
    try:
        with IPRoute() as netlink:
            (answer,) = netlink.route("get", **question)
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from None
    kind = answer["type"]
    if kind in _REFUSED:
        raise OSError(_REFUSED[kind], os.strerror(_REFUSED[kind]))
    index = answer.get_attr("RTA_OIF")
    return Route(kind == _RTN_LOCAL, socket.if_indextoname(index) if index else "", answer.get_attr("RTA_GATEWAY"))

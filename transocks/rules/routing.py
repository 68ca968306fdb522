"""Where the kernel would send a packet: rtnetlink(7), RTM_GETROUTE. Asks, and changes nothing; needs no privilege."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

import attrs

from transocks.tools import FirewallError, run
from usocksd.net.address import IPAddress, without_zone

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


def lookup(
    destination: IPAddress,
    *,
    source: IPAddress | None = None,
    iif: str | None = None,
    mark: int = 0,
    uid: int | None = None,
) -> Route:
    """Where a packet goes: one that this host sends, as this user, or with `iif` one that comes in there from `source`.

    Raises OSError when it goes nowhere: for one that comes in also when its source is not believed (EINVAL, EXDEV:
    rp_filter and the like, as ip-sysctl of the kernel has them).
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped] # noqa: PLC0415  (0.1 s and 12 MB)
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped] # noqa: PLC0415

    question: dict[str, Any] = {"dst": str(without_zone(destination)), "mark": mark}
    if source is not None:
        question["src"] = str(source)
    if uid is not None:
        question["uid"] = uid
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


def policy_against(destination: IPAddress, mark: int, uid: int | None) -> str | None:
    """The rules of the routing policy for this mark or user, if without these the packet would go another way."""
    try:
        plain = lookup(destination)
    except OSError:
        return None
    try:
        if lookup(destination, mark=mark, uid=uid) == plain:
            return None
    except OSError:
        pass
    try:
        found = json.loads(run("ip", "-N", "-json", "-6" if destination.version == 6 else "-4", "rule", "show"))
        texts = run("ip", "-6" if destination.version == 6 else "-4", "rule", "show").splitlines()
    except (FirewallError, ValueError):
        return None
    ours = [
        " ".join(text.split())
        for rule, text in zip(found, texts, strict=False)
        if (mark and "fwmark" in rule and int(rule["fwmark"], 0) == mark & int(rule.get("fwmask", "0xffffffff"), 0))
        or (uid is not None and "uid_start" in rule and rule["uid_start"] <= uid <= rule["uid_end"])
    ]
    return f'"{ours[0]}"' if ours else None

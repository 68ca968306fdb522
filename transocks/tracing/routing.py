"""Where the kernel would send a packet: rtnetlink(7), RTM_GETROUTE. Asks, and changes nothing; needs no privilege."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from ipaddress import ip_address

import attrs

from transocks.tools import FirewallError, run, run_json
from usocksd.host.netlink import ACK, ROUTE, ask, attribute, attributes, connect
from usocksd.net.address import IPAddress, without_zone

# linux/rtnetlink.h
_RTMSG = struct.Struct("=8BI")  # family, lengths of destination and source, tos, table, protocol, scope, type; flags
_GETROUTE = 26
_DESTINATION, _OIF, _GATEWAY, _MARK, _UID = 1, 4, 5, 16, 25
_REFUSED = {6: errno.EINVAL, 7: errno.EHOSTUNREACH, 8: errno.EACCES}  # blackhole, unreachable, prohibit


@attrs.frozen
class Route:
    """What the routing tables say of one packet."""

    device: str
    """the interface it leaves by"""
    gateway: IPAddress | None


def lookup(destination: IPAddress, *, mark: int = 0, uid: int | None = None) -> Route:
    """Where a packet goes that this host sends, as this user. Raises OSError when it goes nowhere."""
    address = without_zone(destination)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, address.max_prefixlen, *(0,) * 7) + attribute(_DESTINATION, address.packed)
    body += attribute(_MARK, struct.pack("=I", mark))
    body += b"" if uid is None else attribute(_UID, struct.pack("=I", uid))
    with connect(ROUTE) as sock:
        answer, *_ = [message.body for message in ask(sock, _GETROUTE, ACK, body)]
    kind = _RTMSG.unpack_from(answer)[7]
    if kind in _REFUSED:
        raise OSError(_REFUSED[kind], os.strerror(_REFUSED[kind]))
    found = dict(attributes(answer[_RTMSG.size :]))
    index = int.from_bytes(found.get(_OIF, b""), sys.byteorder)
    gateway = found.get(_GATEWAY)
    return Route(socket.if_indextoname(index) if index else "", ip_address(gateway) if gateway else None)


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
    family = f"-{destination.version}"
    try:
        found, texts = (
            run_json("ip", "-N", "-json", family, "rule", "show"),
            run("ip", family, "rule", "show").splitlines(),
        )
    except FirewallError:
        return None
    ours = [
        " ".join(text.split())
        for rule, text in zip(found, texts, strict=False)
        if (mark and "fwmark" in rule and int(rule["fwmark"], 0) == mark & int(rule.get("fwmask", "0xffffffff"), 0))
        or (uid is not None and "uid_start" in rule and rule["uid_start"] <= uid <= rule["uid_end"])
    ]
    return f'"{ours[0]}"' if ours else None

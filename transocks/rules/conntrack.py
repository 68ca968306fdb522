"""Enters existing connections of this host in its connection tracking (ctnetlink).

Rules that refuse packets without a connection would refuse those of connections that were never tracked: on most hosts,
the admin's own SSH session.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection
from typing import Any

from transocks.tools import FirewallError
from usocksd.host.sockets import Connection, tcp_connections

# linux/netfilter/nf_conntrack_common.h, nf_conntrack_tcp.h
_SEEN_ASSURED_CONFIRMED = 2 | 4 | 8
_ESTABLISHED = 3
_LIBERAL = (8, 8)  # IP_CT_TCP_FLAG_BE_LIBERAL, and its mask: the windows of these connections are unknown
_SECONDS = 432_000


def enter(*, ports: Collection[int]) -> None:
    """Enter all TCP connections of this network namespace, except those of transocks's clients on this host, which are
    connected to these ports. Connections that are tracked already stay as they are. Raises FirewallError.
    """
    # 0.1 s and 12 MB, which only this verb needs.
    from pyroute2 import NFCTSocket  # type: ignore[import-untyped] # noqa: PLC0415
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped] # noqa: PLC0415

    try:
        found = list(tcp_connections())
        clients = {connection.peer for connection in found if connection.local[1] in ports}
        for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
            with NFCTSocket(family) as tracking:
                for each in found:
                    (local, _), (peer, _) = each
                    if local.version == version and each.local not in clients and not peer.is_loopback:
                        try:
                            tracking.entry("add", **_entry(each, family))
                        except NetlinkError as error:
                            if error.code != errno.EEXIST:
                                raise
    except (OSError, NetlinkError) as error:
        why = os.strerror(error.code) if isinstance(error, NetlinkError) else error.strerror
        raise FirewallError(
            "connections that are there can't be made known to connection tracking, and would be refused"
            f" ({why}): load nf_conntrack_netlink, or set rules.when_down to open"
        ) from None


def _entry(connection: Connection, family: int) -> dict[str, Any]:
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple  # type: ignore[import-untyped] # noqa: PLC0415

    (source, sport), (destination, dport) = connection
    original = NFCTAttrTuple(
        family=family,
        saddr=str(source),
        daddr=str(destination),
        proto=socket.IPPROTO_TCP,
        sport=sport,
        dport=dport,
    )
    tcp = [
        ("CTA_PROTOINFO_TCP_STATE", _ESTABLISHED),
        ("CTA_PROTOINFO_TCP_FLAGS_ORIGINAL", {"value": _LIBERAL}),
        ("CTA_PROTOINFO_TCP_FLAGS_REPLY", {"value": _LIBERAL}),
    ]
    return {
        "tuple_orig": original,
        "tuple_reply": original.reverse(),
        "status": _SEEN_ASSURED_CONFIRMED,
        "timeout": _SECONDS,
        "protoinfo": {"attrs": [("CTA_PROTOINFO_TCP", {"attrs": tcp})]},
    }

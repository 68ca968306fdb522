"""What this kernel and this host can do at all."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.tools import which

_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and the same for IPv6


def original_destination(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """SO_ORIGINAL_DST is known where connection tracking is."""
    missing = [
        name
        for family, level, name in (
            (socket.AF_INET, socket.IPPROTO_IP, "IPv4"), (socket.AF_INET6, socket.IPPROTO_IPV6, "IPv6"),
        )
        if not _knows_original(family, level)
    ]  # fmt: skip
    if "IPv4" in missing:
        yield fault("kernel", f"no SO_ORIGINAL_DST for {' and '.join(missing)}", "load nf_conntrack (and nf_nat)")
    elif missing:
        yield warning("kernel", "no SO_ORIGINAL_DST for IPv6", "load nf_conntrack, or leave IPv6 out of the rules")
    else:
        yield fine("kernel", "SO_ORIGINAL_DST for IPv4 and IPv6")


def _knows_original(family: int, level: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.getsockopt(level, _SO_ORIGINAL_DST, 28)
    except OSError as error:
        # ENOENT: it knows the question, and has no connection of this socket.
        return error.errno not in {errno.ENOPROTOOPT, errno.EAFNOSUPPORT}
    return True


def tools(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """What loads rules here, and whether two kinds of iptables work beside each other."""
    if not {"nft", "iptables"} & seen.tools:
        yield fault("tools", "neither nft nor iptables is installed", "install nftables")
        return
    variant = _variant()
    names = ["nft"] if "nft" in seen.tools else []
    names += [f"iptables ({variant})"] if "iptables" in seen.tools else []
    if seen.hidden_legacy:
        yield warning(
            "tools", f"{', '.join(names)}; and there are rules of iptables-legacy too, which iptables does not show",
            "look at iptables-legacy-save, and move what is needed from there to one of the two",
        )  # fmt: skip
    else:
        yield fine("tools", ", ".join(names))


def _variant() -> str:
    path = os.path.realpath(which("iptables") or "")
    return "nft" if "nft" in os.path.basename(path) else "legacy" if "legacy" in os.path.basename(path) else path

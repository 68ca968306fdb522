"""What this kernel and this host can do at all."""

from __future__ import annotations

import errno
import gzip
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import Flows
from transocks.doctor.seen import Seen
from transocks.netfilter.ruleset import Kind
from transocks.tools import which

_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and the same for IPv6
_FEATURES = {
    Kind.REDIRECT: ("CONFIG_NFT_REDIR", "CONFIG_NETFILTER_XT_TARGET_REDIRECT"),
    Kind.TPROXY: ("CONFIG_NFT_TPROXY", "CONFIG_NETFILTER_XT_TARGET_TPROXY"),
}


def original_destination(seen: Seen, flows: Flows) -> Iterator[Finding]:
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


def targets(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """REDIRECT and TPROXY: proven where rules use them, else as the kernel's configuration says."""
    used = {target.action.kind for target in flows.leading}
    built = _kernel_config(seen)
    for kind, options in _FEATURES.items():
        if kind in used:
            yield fine("kernel", f"{kind.value}: in use")
        elif built is None:
            yield unchecked("kernel", f"{kind.value}: no rule uses it, and there is no /proc/config.gz")
        elif any(built.get(option) in {"y", "m"} for option in options):
            yield fine("kernel", f"{kind.value}: as its configuration says")
        elif kind is Kind.REDIRECT or seen.config.listen_tproxy:
            yield fault("kernel", f"has no {kind.value}", f"a kernel with {options[0]} or {options[1]}")
        else:
            yield fine("kernel", f"has no {kind.value}, which nothing here uses")


def _kernel_config(seen: Seen) -> dict[str, str] | None:
    try:
        text = gzip.decompress((seen.proc / "config.gz").read_bytes()).decode("ascii", "replace")
    except OSError:
        try:
            text = Path(f"/boot/config-{os.uname().release}").read_text("ascii", "replace")
        except OSError:
            return None
    return dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_"))


def tools(seen: Seen, flows: Flows) -> Iterator[Finding]:
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

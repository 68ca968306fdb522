"""What loads rules here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.tools import which


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

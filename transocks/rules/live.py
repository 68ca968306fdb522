"""The rules loaded on this host, and how the tools would print others. Runs their commands; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from transocks.rules.config import Mode, Tool
from transocks.rules.loaded import Table, parse_nft, parse_save
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError, run, which
from usocksd.host.sockets import listeners
from usocksd.net.address import join_port

_MODES = (
    *(Redirection(mode=mode, port=0) for mode in Mode),
    *(Redirection(mode=mode, port=0, udp=True) for mode in (Mode.HOST, Mode.TPROXY)),
)
TABLES = tuple(each.table for each in _MODES)
"""Our nft tables."""
GUARDS = tuple(each.guard for each in _MODES)
"""The nft tables of `transocks rules hold`."""
CHAINS = tuple(chain for each in _MODES for chain in each.chains)
"""Our chains in iptables's tables."""


def versions() -> tuple[int, ...]:
    """The IP versions that this kernel has."""
    return (4, 6) if os.path.exists("/proc/self/net/if_inet6") else (4,)


def routed_versions() -> tuple[int, ...]:
    """The IP versions in use: with disable_ipv6=1 nothing can listen on IPv6 or be routed."""
    return (4, 6) if 6 in versions() and Path("/proc/self/net/if_inet6").read_text("ascii") else (4,)


def choose_tool() -> Tool | None:
    """nft if it is installed (one transaction for both families), else iptables, else None."""
    if which("nft"):
        return Tool.NFT
    return Tool.IPTABLES if which("iptables-restore") else None


# ---- nft


def tables() -> list[str]:
    """The names of all tables of the inet family; none without nft. Raises FirewallError."""
    return [line.split()[2] for line in run("nft", "list", "tables", "inet").splitlines()] if which("nft") else []


def loaded(names: Collection[str] = TABLES) -> list[Table]:
    """The tables of these names that are loaded; by default ours. Raises FirewallError."""
    there = [name for name in tables() if name in names]
    return [table for name in there for table in parse_nft(run("nft", "list", "table", "inet", name))]


def as_loaded(text: str) -> list[Table]:
    """`text` as nft would print it. It is loaded in a network namespace of its own, which takes CAP_SYS_ADMIN.

    Raises FirewallError.
    """
    return parse_nft(run("unshare", "--net", "sh", "-c", "nft -f - && nft list ruleset", stdin=text))


# ---- iptables


def iptables(version: int) -> str:
    """The name of iptables for one family."""
    return "ip6tables" if version == 6 else "iptables"


def variants(version: int) -> list[str]:
    """The installed variants of iptables that may have different rules: first iptables itself, then for example
    "iptables-legacy".
    """
    found: dict[str, str] = {}
    name = iptables(version)
    for variant in (name, f"{name}-nft", *([f"{name}-legacy"] if has_legacy(version) else [])):
        if (path := which(f"{variant}-save")) is not None:
            found.setdefault(os.path.realpath(path), variant)
    return list(found.values())


def is_nft(variant: str) -> bool:
    """Whether this is iptables-nft."""
    return "legacy" not in os.path.basename(os.path.realpath(which(f"{variant}-save") or variant))


def has_legacy(version: int) -> bool:
    """Whether there are tables of iptables-legacy. (To run it would create them.)"""
    try:
        return bool(Path(f"/proc/self/net/ip{'6' if version == 6 else ''}_tables_names").read_text("ascii").strip())
    except OSError:  # no table was ever created
        return False


def saved(version: int, variant: str | None = None, own: Collection[str] | None = None) -> list[Table]:
    """The tables that iptables-save prints, or that of another variant; see `parse_save`. Raises FirewallError."""
    return parse_save(run(f"{variant or iptables(version)}-save"), own)


def saved_as_loaded(texts: Iterable[str], version: int) -> list[Table]:
    """Our chains in these texts, as iptables-save would print them; see `as_loaded`."""
    script = f"{iptables(version)}-restore --noflush && {iptables(version)}-save"
    return parse_save("".join(run("unshare", "--net", "sh", "-c", script, stdin=text) for text in texts), CHAINS)


# ---- listeners


def missing_listeners(redirection: Redirection) -> list[str]:
    """Addresses to which the rules send connections and on which nobody listens, for example "127.0.0.1:1081". Raises
    FirewallError.
    """
    try:
        there = [listener for listener in listeners(udp=redirection.udp) if listener.port == redirection.port]
    except OSError as error:
        raise FirewallError(f"the kernel does not tell who listens: {error.strerror}") from None
    missing = []
    for version in routed_versions():
        address = redirection.destination(version)
        # A gateway's connections come in by any interface: there may be a listener for the one that is meant.
        others = redirection.mode is Mode.GATEWAY and any(
            listener.address.version == version and not listener.address.is_loopback for listener in there
        )
        if not others and not any(listener.accepts(address, redirection.port) for listener in there):
            missing.append(join_port(address, redirection.port))
    return missing

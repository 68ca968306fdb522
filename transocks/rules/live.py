"""What is loaded on this host, and what the tools make of rules that are not. Runs their commands; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import attrs

from transocks.rules.config import Mode, Tool
from transocks.rules.loaded import Table, parse_nft, parse_save
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError, run, run_json, which
from usocksd.host.sockets import listeners

PREFERENCE = 7474
"""The preference of TPROXY's rules in the routing policy: before those of VPNs, which are around 32764."""
PROTOCOL = 116
"""Who has made a route, for those that look, and for `remove`: a number that has no name of its own."""

_MODES = tuple(Redirection(mode=mode, port=0) for mode in Mode)
TABLES = tuple(each.table for each in _MODES)
"""Our nft tables."""
GUARDS = tuple(each.guard for each in _MODES)
"""Those that belong to `transocks rules hold`."""
CHAINS = tuple(chain for each in _MODES for chain in each.chains)
"""Our chains in iptables's tables."""


def versions() -> tuple[int, ...]:
    """The IP versions that this kernel has."""
    return (4, 6) if os.path.exists("/proc/self/net/if_inet6") else (4,)


def uses_ipv6() -> bool:
    """Whether any interface has an address of it: with disable_ipv6=1 there is nothing to listen on, nor a route."""
    return 6 in versions() and bool(Path("/proc/self/net/if_inet6").read_text("ascii"))


def routed_versions() -> tuple[int, ...]:
    """The IP versions that interfaces have addresses of."""
    return (4, 6) if uses_ipv6() else (4,)


def has(program: str) -> bool:
    """Whether a program is installed."""
    return which(program) is not None


def choose_tool() -> Tool | None:
    """nft where it is (one transaction for both families), else iptables, else None."""
    if has("nft"):
        return Tool.NFT
    return Tool.IPTABLES if has("iptables-restore") else None


# ---- nft


def tables() -> list[str]:
    """The names of all tables of the inet family; none without nft. Raises FirewallError."""
    return [line.split()[2] for line in run("nft", "list", "tables", "inet").splitlines()] if has("nft") else []


def loaded(names: Collection[str] = TABLES) -> list[Table]:
    """Those of these tables that are loaded, ours by default. Raises FirewallError."""
    there = [name for name in tables() if name in names]
    return [table for name in there for table in parse_nft(run("nft", "list", "table", "inet", name))]


def as_loaded(text: str) -> list[Table]:
    """What nft would print of `text`, loaded in a network namespace of its own: takes CAP_SYS_ADMIN.

    Raises FirewallError.
    """
    return parse_nft(run("unshare", "--net", "sh", "-c", "nft -f - && nft list ruleset", stdin=text))


# ---- iptables


def iptables(version: int) -> str:
    """The name of iptables for one family."""
    return "ip6tables" if version == 6 else "iptables"


def variants(version: int) -> list[str]:
    """The installed iptables: first what goes by that name, then a variant that may have other rules, as in
    "iptables-legacy".
    """
    found: dict[str, str] = {}
    name = iptables(version)
    for variant in (name, f"{name}-nft", *([f"{name}-legacy"] if has_legacy(name) else [])):
        if (path := which(f"{variant}-save")) is not None:
            found.setdefault(os.path.realpath(path), variant)
    return list(found.values())


def is_nft(variant: str) -> bool:
    """Whether this iptables is the one that stands on nft."""
    return "legacy" not in os.path.basename(os.path.realpath(which(f"{variant}-save") or variant))


def has_legacy(name: str, net: Path = Path("/proc/self/net")) -> bool:
    """Whether there are tables of legacy iptables, or ip6tables: `name`. (To run the tool would create them.)"""
    try:
        return bool((net / f"{name.removesuffix('tables')}_tables_names").read_text("ascii").strip())
    except OSError:  # there never were any
        return False


def saved(version: int, variant: str | None = None, own: Collection[str] | None = None) -> list[Table]:
    """What iptables-save prints, or that of another variant; see `parse_save`. Raises FirewallError."""
    return parse_save(run(f"{variant or iptables(version)}-save"), own)


def saved_as_loaded(texts: Iterable[str], version: int) -> list[Table]:
    """What it would print of our chains in these texts: as `as_loaded`."""
    script = f"{iptables(version)}-restore --noflush && {iptables(version)}-save"
    return parse_save("".join(run("unshare", "--net", "sh", "-c", script, stdin=text) for text in texts), CHAINS)


# ---- routing


@attrs.frozen
class Routing:
    """TPROXY's part of the routing of one IP version, with this mark."""

    mark: int
    version: int

    def command(self, kind: str, action: str) -> tuple[str, ...]:
        """ip(8) for its "rule" or "route": to "add" or "del", also one that others have made."""
        words = {
            "rule": ("pref", str(PREFERENCE), "fwmark", f"{self.mark:#x}", "lookup", str(self.mark)),
            "route": ("local", "default", "dev", "lo", "table", str(self.mark)),
        }[kind]
        made_by = ("proto", str(PROTOCOL)) if (kind, action) == ("route", "add") else ()
        return ("ip", f"-{self.version}", kind, action, *words, *made_by)

    def by_hand(self, kind: str) -> str:
        """The same to type, to add it."""
        return " ".join(self.command(kind, "add"))


@attrs.frozen
class RoutingState:
    """What the routing of one IP version has that looks like TPROXY's, for any mark."""

    rules: tuple[Routing, ...]
    routes: tuple[Routing, ...]
    made: tuple[Routing, ...]
    """those of `routes` that `transocks rules` has made"""
    others: Mapping[int, list[str]]
    """the destinations of all other routes, by their table"""


def routing(version: int) -> RoutingState:
    """As it is now. Raises FirewallError."""
    ip = ("ip", "-N", "-json", f"-{version}")
    rules, routes, made = [], [], []
    others: dict[int, list[str]] = {}
    for rule in run_json(*ip, "rule", "show", "pref", str(PREFERENCE)) or ():
        mark = int(str(rule.get("fwmark", "0")), 0)
        if mark and str(rule.get("table")) == str(mark):
            rules.append(Routing(mark, version))
    # Of all tables, since asking for one that has never been is an error.
    for route in run_json(*ip, "route", "show", "table", "all") or ():
        if (number := str(route.get("table"))).isdigit():
            local = route.get("type") in ("local", "2")  # RTN_LOCAL
            if local and (route.get("dst"), route.get("dev")) == ("default", "lo"):
                routes.append(Routing(int(number), version))
                made += routes[-1:] if str(route.get("protocol")) == str(PROTOCOL) else []
            else:
                others.setdefault(int(number), []).append(str(route.get("dst")))
    return RoutingState(tuple(rules), tuple(routes), tuple(made), others)


# ---- listeners


def unheard(redirection: Redirection) -> list[str]:
    """Where the rules would send connections and nobody listens, as in "127.0.0.1:1081". Raises FirewallError."""
    try:
        there = [listener.address for listener in listeners() if listener.port == redirection.port]
    except OSError as error:
        raise FirewallError(f"the kernel does not tell who listens: {error.strerror}") from None
    missing = []
    for version in routed_versions():
        loopback, anywhere = ("127.0.0.1", "0.0.0.0") if version == 4 else ("::1", "::")
        mine = {str(address) for address in there if address.version == version}
        expected = [str(address) for address in redirection.addresses if address.version == version] or [loopback]
        if redirection.mode is Mode.GATEWAY:
            expected = [address for address in mine if address != loopback] or [anywhere]
        if not mine.intersection([anywhere, *expected]):
            host = f"[{expected[0]}]" if version == 6 else expected[0]
            missing.append(f"{host}:{redirection.port}")
    return missing

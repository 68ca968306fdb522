"""What is loaded on this host, and how the tools write what should be. Runs their commands; changes nothing here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import attrs

from transocks.rules.config import Mode, Tool
from transocks.rules.nft_json import entries, ruleset_json
from transocks.rules.redirection import Redirection
from transocks.rules.saved import Table, merge, parse_save
from transocks.tools import FirewallError, run, run_json, which
from usocksd.host.sockets import listeners
from usocksd.net.address import IPAddress

PREFERENCE = 7474
"""The preference of TPROXY's rules in the routing policy: before those of VPNs, which are around 32764."""

PROTOCOL = 116
"""Who has made a route, for those that look, and for `remove`: a number that has no name of its own."""

TABLES = tuple(Redirection(mode=mode, port=0).table for mode in Mode)
"""Our nft tables."""
GUARDS = tuple(Redirection(mode=mode, port=0).guard for mode in Mode)
"""Those that belong to `transocks rules hold`."""
KINDS = ("", "-UDP", "-TCP")
CHAINS = tuple(f"{Redirection(mode=mode, port=0).chain}{kind}" for mode in Mode for kind in KINDS)
"""Our chains in iptables's tables."""

_LISTEN = "0A"  # in the column "st" of /proc/net/tcp


def has_ipv6() -> bool:
    """Whether this kernel has IPv6."""
    return os.path.exists("/proc/self/net/if_inet6")


def uses_ipv6() -> bool:
    """Whether any interface has an address of it: with disable_ipv6=1 there is nothing to listen on, nor a route."""
    return has_ipv6() and bool(Path("/proc/self/net/if_inet6").read_text("ascii"))


def choose_tool(which: Callable[[str], str | None] = which) -> Tool | None:
    """nft where it is (one transaction for both families), else iptables, else None."""
    if which("nft"):
        return Tool.NFT
    return Tool.IPTABLES if which("iptables-restore") else None


def has(program: str) -> bool:
    """Whether a program is installed."""
    return which(program) is not None


@attrs.frozen
class Ruleset:
    """What nft says, in both of its languages: the entries of its JSON, and text with handles."""

    entries: tuple[Mapping[str, Any], ...] = ()
    listing: str = ""

    def tables(self) -> set[tuple[str, str]]:
        """Family and name of each table."""
        return {(found["family"], found["name"]) for entry in self.entries if (found := entry.get("table"))}


def ruleset() -> Ruleset:
    """Everything that nft sees. Raises FirewallError."""
    found = _entries(lambda: ruleset_json(run))
    return Ruleset(found, run("nft", "-a", "list", "ruleset"))


def tables() -> set[tuple[str, str]]:
    """Family and name of each table of nft. Raises FirewallError."""
    return {(words[1], words[2]) for line in run("nft", "list", "tables").splitlines() if (words := line.split())}


def as_loaded(text: str) -> Ruleset:
    """What nft would say of `text`, if that were all: loaded in a network namespace of its own. Raises FirewallError.

    Takes CAP_SYS_ADMIN.
    """
    script = "nft -f - && nft -j list ruleset && nft -a list ruleset"
    first, _, listing = run("unshare", "--net", "sh", "-c", script, stdin=text).partition("\n")
    return Ruleset(_entries(lambda: first), listing)


def _entries(ask: Callable[[], str]) -> tuple[Mapping[str, Any], ...]:
    try:
        return entries(ask())
    except (ValueError, LookupError, TypeError) as error:  # in one table of many, too: see ruleset_json
        raise FirewallError(f"what nft says of its rules in JSON can't be read: {error}") from None


def iptables(six: bool) -> str:
    """The name of iptables for one family."""
    return "ip6tables" if six else "iptables"


def variants(six: bool) -> list[str]:
    """What is here of iptables: first what goes by that name, then a variant beside it that may have rules, as
    "iptables-legacy".
    """
    found: dict[str, str] = {}
    for name in (iptables(six), f"{iptables(six)}-nft", f"{iptables(six)}-legacy"):
        if name.endswith("-legacy") and not has_legacy(iptables(six)):
            continue
        if (path := which(f"{name}-save")) is not None:
            found.setdefault(os.path.realpath(path), name)
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


def saved(six: bool, variant: str | None = None) -> list[Table]:
    """What iptables-save says, or ip6tables-save, or that of another variant. Raises FirewallError."""
    return parse_save(
        run(
            f"{variant or iptables(six)}-save",
        )
    )


def saved_as_loaded(texts: Iterable[str], six: bool) -> list[Table]:
    """What it would say of these texts, if that were all; as `as_loaded`."""
    script = f"{iptables(six)}-restore --noflush && {iptables(six)}-save"
    return merge(
        table for text in texts for table in parse_save(run("unshare", "--net", "sh", "-c", script, stdin=text))
    )


@attrs.frozen
class Routing:
    """TPROXY's part of the routing of one family, with this mark."""

    mark: int
    six: bool

    @property
    def rule(self) -> tuple[str, ...]:
        """For `ip rule`."""
        return ("pref", str(PREFERENCE), "fwmark", f"{self.mark:#x}", "lookup", str(self.mark))

    @property
    def route(self) -> tuple[str, ...]:
        """For `ip route`."""
        return ("local", "default", "dev", "lo", "table", str(self.mark))

    def step(self, kind: str, action: str) -> tuple[str, ...]:
        """The command for its "rule" or "route": to "add" or "del", also of what others have made."""
        words = self.rule if kind == "rule" else self.route
        if (kind, action) == ("route", "add"):
            words = (*words, "proto", str(PROTOCOL))
        return ("ip", "-6" if self.six else "-4", kind, action, *words)

    def by_hand(self, kind: str) -> str:
        """The same to type, to add it."""
        return " ".join(self.step(kind, "add"))


def routing_rules(six: bool) -> list[Routing]:
    """Of the routing policy, those rules that are of our shape: for any mark. Raises FirewallError."""
    answer = run_json("ip", "-N", "-json", "-6" if six else "-4", "rule", "show", "pref", str(PREFERENCE))
    found = []
    for rule in answer or ():
        mark, table = int(str(rule.get("fwmark", "0")), 0), str(rule.get("table"))
        if mark and table == str(mark):
            found.append(Routing(mark, six))
    return found


@attrs.frozen
class Routes:
    """The routes of all tables of one family."""

    six: bool
    entries: tuple[Mapping[str, Any], ...]

    @classmethod
    def here(cls, six: bool) -> Routes:
        """Those of this host. Raises FirewallError."""
        # Of all tables, since asking for one that has never been is an error.
        answer = run_json("ip", "-N", "-json", "-6" if six else "-4", "route", "show", "table", "all")
        return cls(six, tuple(answer or ()))

    def has(self, routing: Routing) -> bool:
        """Whether its route is there."""
        return any(_ours(route) for route in self._of(routing))

    def others(self, routing: Routing) -> list[str]:
        """What else is in its table: destinations."""
        return [str(route.get("dst")) for route in self._of(routing) if not _ours(route)]

    def orphans(self) -> list[Routing]:
        """Routes that `transocks rules` has made, for any mark, and whether or not there is a rule that leads there."""
        return [
            Routing(int(route["table"]), self.six)
            for route in self.entries
            if _ours(route) and str(route.get("protocol")) == str(PROTOCOL) and str(route.get("table")).isdigit()
        ]

    def _of(self, routing: Routing) -> list[Mapping[str, Any]]:
        return [route for route in self.entries if str(route.get("table")) == str(routing.mark)]


def _ours(route: Mapping[str, Any]) -> bool:
    local = route.get("type") in ("local", "2")  # RTN_LOCAL
    return local and (route.get("dst"), route.get("dev")) == ("default", "lo")


def listening(port: int) -> set[IPAddress]:
    """The addresses on which something listens on this TCP port, in the network namespace of this process."""
    try:
        # `transocks rules hold` asks each second: of /proc the kernel makes a walk over the table of all connections.
        return {listener.address for listener in listeners() if listener.port == port}
    except OSError:  # a kernel without, or netlink is forbidden
        return _listening_by_proc(port)


def _listening_by_proc(port: int) -> set[IPAddress]:
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{name}").read_text("ascii").splitlines()[1:]
        except OSError:  # no such family
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            raw, _, hex_port = local.partition(":")
            if state == _LISTEN and int(hex_port, 16) == port:
                # Words of 32 bits as numbers of this CPU.
                words = (int(raw[at : at + 8], 16) for at in range(0, len(raw), 8))
                found.add(ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words)))
    return found


def unheard(wanted: Redirection, ipv6: bool) -> list[str]:
    """Where the rules would send connections and nobody listens: "127.0.0.1:1081" and such."""
    there = listening(wanted.port)
    missing = []
    for version in (4, 6) if ipv6 and uses_ipv6() else (4,):
        loopback, anywhere = ("127.0.0.1", "0.0.0.0") if version == 4 else ("::1", "::")
        mine = {str(address) for address in there if address.version == version}
        expected = [str(address) for address in wanted.addresses if address.version == version]
        if wanted.mode is Mode.GATEWAY:
            expected = [address for address in mine if address != loopback] or [anywhere]
        elif not expected:
            expected = [loopback]
        if not ({anywhere, *expected} & mine):
            shown = expected[0]
            missing.append(f"[{shown}]:{wanted.port}" if version == 6 else f"{shown}:{wanted.port}")
    return missing

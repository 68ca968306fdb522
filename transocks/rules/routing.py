"""TPROXY's part of the routing: a rule for packets with its mark, and a route that makes all addresses local."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import attrs

from transocks.rules.live import routed_versions, versions
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError, complaint, run, run_json, which

PREFERENCE = 7474
"""The preference of our rules in the routing policy: before those of VPNs, which are around 32764."""
PROTOCOL = 116
"""The origin of our routes (rtm_protocol of rtnetlink(7)), by which `remove` finds them: a number without a name."""


@attrs.frozen
class Routing:
    """A rule and a route of one IP version, for this mark."""

    mark: int
    version: int

    def command(self, kind: str, action: str) -> tuple[str, ...]:
        """Arguments of ip(8) to "add" or "del" the "rule" or "route", also one that others have made."""
        words = {
            "rule": ("pref", str(PREFERENCE), "fwmark", f"{self.mark:#x}", "lookup", str(self.mark)),
            "route": ("local", "default", "dev", "lo", "table", str(self.mark)),
        }[kind]
        made_by = ("proto", str(PROTOCOL)) if (kind, action) == ("route", "add") else ()
        return ("ip", f"-{self.version}", kind, action, *words, *made_by)

    def by_hand(self, kind: str) -> str:
        """The command to add it, as an operator types it."""
        return " ".join(self.command(kind, "add"))


@attrs.frozen
class RoutingState:
    """The rules and routes of this shape in one IP version, for any mark."""

    rules: Sequence[Routing]
    routes: Sequence[Routing]
    made: Sequence[Routing]
    """those of `routes` that `transocks rules` has made"""
    others: Mapping[int, list[str]]
    """the destinations of all other routes, by their table"""


def needed(redirections: Sequence[Redirection]) -> list[Routing]:
    """The routing that these redirections need."""
    marks = dict.fromkeys(each.tproxy_mark for each in redirections if each.by_tproxy)
    return [Routing(mark, version) for mark in marks for version in routed_versions()]


def current(version: int) -> RoutingState:
    """The routing of this shape that exists now. Raises FirewallError."""
    ip = ("ip", "-N", "-json", f"-{version}")
    rules, routes, made = [], [], []
    others: dict[int, list[str]] = {}
    for rule in run_json(*ip, "rule", "show", "pref", str(PREFERENCE)) or ():
        mark = int(str(rule.get("fwmark", "0")), 0)
        if mark and str(rule.get("table")) == str(mark):
            rules.append(Routing(mark, version))
    # All tables are listed, since ip(8) reports an error for one that does not exist.
    for route in run_json(*ip, "route", "show", "table", "all") or ():
        if (number := str(route.get("table"))).isdigit():
            local = route.get("type") in ("local", "2")  # RTN_LOCAL
            if local and (route.get("dst"), route.get("dev")) == ("default", "lo"):
                routes.append(Routing(int(number), version))
                made += routes[-1:] if str(route.get("protocol")) == str(PROTOCOL) else []
            else:
                others.setdefault(int(number), []).append(str(route.get("dst")))
    return RoutingState(rules, routes, made, others)


def add(redirections: Sequence[Redirection]) -> Callable[[], object]:
    """Add missing routing that these redirections need; returns how to undo that. Raises FirewallError, and then it is
    undone.
    """
    added: list[tuple[str, ...]] = []

    def undo() -> list[str | None]:
        return [complaint(*command) for command in reversed(added)]

    try:
        for each in needed(redirections):
            there = current(each.version)
            if others := there.others.get(each.mark):
                raise FirewallError(
                    f"routing table {each.mark} has routes of others ({', '.join(others)}):"
                    " set rules.tproxy_mark, which is its number, to another"
                )
            for kind, same in (("route", there.routes), ("rule", there.rules)):
                if each not in same:
                    run(*each.command(kind, "add"))
                    added.append(each.command(kind, "del"))
    except FirewallError:
        undo()
        raise
    return undo


def remove(*, but: Collection[Routing] = ()) -> list[str]:
    """Remove rules and routes that have our shape or that we made; returns complaints."""
    complaints = []
    for version in versions() if which("ip") else ():  # without it, nobody has added any
        try:
            there = current(version)
        except FirewallError as error:
            complaints.append(str(error))
            continue
        gone = [rule.command("rule", "del") for rule in there.rules if rule not in but]
        routes = [route for route in there.routes if route in there.rules or route in there.made]
        gone += [route.command("route", "del") for route in routes if route not in but]
        complaints += [words for command in gone if (words := complaint(*command))]
    return complaints

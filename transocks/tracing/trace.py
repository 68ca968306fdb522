"""The trace of one packet through the kernel's hooks, made from the kernel's reports: where it went, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import attrs

from transocks.tracing.reports import Packet, Report, Verdict
from usocksd.net.address import IPAddress

TABLE = "transocks_trace"
"""The tracer's own table. At each hook it has empty chains between those of others."""
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
FIRST, LAST = -2_000_000_000, 2_000_000_000
"""Priorities before and after all those in use."""
_OTHERS, ROUTING, LO = "other rules", "routing", "lo"
PLACES = {
    FIRST: _OTHERS, -299: "raw", -201: "connection tracking", -199: "mangle", -151: "mangle", -149: _OTHERS,
    -101: "nat", -89: "nat", -1: "filter", 1: "security", 99: "nat", 101: _OTHERS, LAST: ROUTING,
}  # fmt: skip
"""The priorities of these chains, and what follows each: tables of iptables and parts of the kernel. See
linux/netfilter_ipv4.h, enum nf_ip_hook_priorities."""

_LOOPBACK = 1  # the number of the interface lo
_ENDS = {Verdict.DROP, Verdict.QUEUE, Verdict.STOLEN}


@attrs.frozen
class Cause:
    """The cause of a change: a rule, or, if nft knows none, something that follows one of our chains."""

    rule: Report | None
    version: int
    hook: str
    place: str


@attrs.frozen
class Rewrite:
    """A change of the packet's mark or destination."""

    cause: Cause
    before: int = 0
    after: int = 0
    to: tuple[IPAddress, int] | None = None


@attrs.frozen(kw_only=True)
class Trace:
    """The trace of the first packet in one direction."""

    reports: tuple[Report, ...]
    packet: Packet
    """at the first hook"""
    destination: tuple[IPAddress, int]
    """the last one"""
    iif: int
    """the interface that it came in by; 0: none"""
    oif: int
    """the interface that it was last to leave by; 0: none"""
    turn: Rewrite | None
    """the first change of its destination"""
    marks: tuple[Rewrite, ...]
    stop: Cause | None
    """what stopped it, so that it was neither delivered nor sent"""
    delivered: bool
    """it reached the socket lookup of this host"""
    left: bool
    """it left this host, or would have left without our table"""

    @property
    def ended(self) -> bool:
        """No further report of it can come."""
        return self.delivered or self.left or (self.stop is not None and self.stop.rule is not None)

    @property
    def rules(self) -> tuple[Report, ...]:
        """The rules of others that matched."""
        return tuple(report for report in self.reports if report.table != TABLE and report.handle is not None)

    @property
    def untracked(self) -> bool:
        """Connection tracking ignores it, and so does NAT."""
        return any(report.table == TABLE and report.verdict is Verdict.JUMP for report in self.reports)


def trace_of(reports: Sequence[Report], protocol: int, port: int, *, back: bool = False) -> Trace | None:
    """The trace of the first packet from this port, with `back` of the first to it; None if it was not reported."""
    found = tuple(_of_first(reports, protocol, port, back))
    if not found or found[0].packet is None:
        return None
    packet = found[0].packet
    destination, oif, mark = (packet.destination, packet.dport), 0, found[0].mark
    hook, place, accept, turn = "ingress", FIRST, None, None
    marks: list[Rewrite] = []

    def cause(rule: Report | None) -> Cause:
        behind = LO if (hook, place) == ("postrouting", LAST) else PLACES.get(place, _OTHERS)
        return Cause(rule, packet.source.version, hook, behind)

    for report in found:
        here = place_of(report)
        if report.mark != mark:
            marks.append(Rewrite(cause(accept if report.table == TABLE else report), mark, report.mark))
            mark = report.mark
        if report.packet is not None:
            oif = report.oif
            now = report.packet.destination, report.packet.dport
            if turn is None and now != destination:
                turn = Rewrite(cause(accept), to=now)
            destination = now
        if here is not None:
            (hook, place), accept = here, None
        elif report.handle is not None and report.verdict is Verdict.ACCEPT:
            accept = report
    last = found[-1]
    rule = last if last.verdict in _ENDS and last.table != TABLE else None
    delivered = rule is None and (hook, place) == ("input", LAST)
    left = rule is None and (hook, place) == ("postrouting", LAST) and oif != _LOOPBACK
    return Trace(
        reports=found, packet=packet, destination=destination, iif=found[0].iif, oif=oif, turn=turn, marks=tuple(marks),
        stop=None if delivered or left else cause(rule), delivered=delivered, left=left,
    )  # fmt: skip


def _of_first(reports: Sequence[Report], protocol: int, port: int, back: bool) -> Iterator[Report]:
    """The reports of that packet, up to where it ended or was sent again."""
    ours: dict[int, bool] = {}
    begun: set[str] = set()
    for report in reports:
        packet = report.packet
        if packet is not None:
            ours[report.id] = packet.protocol == protocol and (packet.dport if back else packet.sport) == port
        if not ours.get(report.id):
            continue
        hook, place = place_of(report) or ("", 0)
        if place == FIRST and packet is not None:
            if hook in begun or (hook == "output" and begun):
                return
            begun.add(hook)
        yield report
        if report.verdict in _ENDS:
            return


def place_of(report: Report) -> tuple[str, int] | None:
    """The hook and priority of one of the tracer's own chains; None for other chains."""
    found = re.fullmatch(r"([a-z]+)_([mp])(\d+)", report.chain) if report.table == TABLE else None
    return None if found is None else (found[1], int(found[3]) * (-1 if found[2] == "m" else 1))

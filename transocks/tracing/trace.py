"""The trace of one packet through the kernel's hooks, made from its reports: where it got, and what did that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import attrs

from transocks.tracing.events import Event, Packet, Verdict
from usocksd.net.address import IPAddress

TABLE = "transocks_trace"
"""The tracer's own table. At each hook it has empty chains between those of others."""
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
FIRST, LAST = -2_000_000_000, 2_000_000_000
"""Priorities before and behind all others that anybody sets."""
_OTHERS, ROUTING, LO = "other rules", "routing", "lo"
PLACES = {
    FIRST: _OTHERS, -299: "raw", -201: "connection tracking", -199: "mangle", -151: "mangle", -149: _OTHERS,
    -101: "nat", -89: "nat", -1: "filter", 1: "security", 99: "nat", 101: _OTHERS, LAST: ROUTING,
}  # fmt: skip
"""The priorities of these chains, and what comes behind each: tables of iptables and the kernel's own parts. See
linux/netfilter_ipv4.h, enum nf_ip_hook_priorities."""

_LOOPBACK = 1  # the number of the interface lo
_ENDS = {Verdict.DROP, Verdict.QUEUE, Verdict.STOLEN}


@attrs.frozen
class Cause:
    """What did something to a packet: a rule, or, if nft knows of none, something behind one of our chains."""

    rule: Event | None
    version: int
    hook: str
    place: str


@attrs.frozen
class Rewrite:
    """Another mark, or another destination, than before."""

    cause: Cause
    before: int = 0
    after: int = 0
    to: tuple[IPAddress, int] | None = None


@attrs.frozen(kw_only=True)
class Trace:
    """The trace of the first packet in one direction."""

    events: tuple[Event, ...]
    packet: Packet
    """as it was at first"""
    destination: tuple[IPAddress, int]
    """in the end"""
    iif: int
    """the interface that it came in by; 0: none"""
    oif: int
    """the interface that it was last to leave by; 0: none"""
    turn: Rewrite | None
    """the first time that it got another destination"""
    marks: tuple[Rewrite, ...]
    stop: Cause | None
    """what kept it from being delivered and from leaving"""
    delivered: bool
    """it got to where its socket is looked for"""
    left: bool
    """it left this host, or would have if our table had let it"""

    @property
    def ended(self) -> bool:
        """Nothing more can be reported of it."""
        return self.delivered or self.left or (self.stop is not None and self.stop.rule is not None)

    @property
    def rules(self) -> tuple[Event, ...]:
        """The rules of others that matched."""
        return tuple(event for event in self.events if event.table != TABLE and event.handle is not None)

    @property
    def untracked(self) -> bool:
        """Connection tracking passed it over, and so will NAT."""
        return any(event.table == TABLE and event.verdict is Verdict.JUMP for event in self.events)


def trace_of(events: Sequence[Event], protocol: int, port: int, *, back: bool = False) -> Trace | None:
    """The trace of the first packet from this port; `back`: of the first to it. None: nothing was reported of it."""
    found = tuple(_of_first(events, protocol, port, back))
    if not found or found[0].packet is None:
        return None
    packet = found[0].packet
    destination, oif, mark = (packet.destination, packet.dport), 0, found[0].mark
    hook, place, accept, turn = "ingress", FIRST, None, None
    marks: list[Rewrite] = []

    def cause(rule: Event | None) -> Cause:
        behind = LO if (hook, place) == ("postrouting", LAST) else PLACES.get(place, _OTHERS)
        return Cause(rule, packet.source.version, hook, behind)

    for event in found:
        here = place_of(event)
        if event.mark != mark:
            marks.append(Rewrite(cause(accept if event.table == TABLE else event), mark, event.mark))
            mark = event.mark
        if event.packet is not None:
            oif = event.oif
            now = event.packet.destination, event.packet.dport
            if turn is None and now != destination:
                turn = Rewrite(cause(accept), to=now)
            destination = now
        if here is not None:
            (hook, place), accept = here, None
        elif event.handle is not None and event.verdict is Verdict.ACCEPT:
            accept = event
    last = found[-1]
    rule = last if last.verdict in _ENDS and last.table != TABLE else None
    delivered = rule is None and (hook, place) == ("input", LAST)
    left = rule is None and (hook, place) == ("postrouting", LAST) and oif != _LOOPBACK
    return Trace(
        events=found, packet=packet, destination=destination, iif=found[0].iif, oif=oif, turn=turn, marks=tuple(marks),
        stop=None if delivered or left else cause(rule), delivered=delivered, left=left,
    )  # fmt: skip


def _of_first(events: Sequence[Event], protocol: int, port: int, back: bool) -> Iterator[Event]:
    """The events of that packet, up to where it ended or was sent again."""
    ours: dict[int, bool] = {}
    begun: set[str] = set()
    for event in events:
        packet = event.packet
        if packet is not None:
            ours[event.id] = packet.protocol == protocol and (packet.dport if back else packet.sport) == port
        if not ours.get(event.id):
            continue
        hook, place = place_of(event) or ("", 0)
        if place == FIRST and packet is not None:
            if hook in begun or (hook == "output" and begun):
                return
            begun.add(hook)
        yield event
        if event.verdict in _ENDS:
            return


def place_of(event: Event) -> tuple[str, int] | None:
    """The hook and priority of a chain of the tracer's own; None if it is another's."""
    found = re.fullmatch(r"([a-z]+)_([mp])(\d+)", event.chain) if event.table == TABLE else None
    return None if found is None else (found[1], int(found[3]) * (-1 if found[2] == "m" else 1))

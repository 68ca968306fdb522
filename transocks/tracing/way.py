"""The way of one packet through the hooks, from what the kernel told of it: where it got, and which rule did that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from transocks.tracing.events import Event, Packet, Verdict
from transocks.tracing.table import FIRST, LAST, TABLE, place_of
from usocksd.net.address import IPAddress

_BETWEEN = {
    -299: "raw", -201: "connection tracking", -199: "mangle", -151: "mangle", -101: "nat", -89: "nat", -1: "filter",
    1: "security", 99: "nat",
}  # fmt: skip
_ENDS = {Verdict.DROP, Verdict.QUEUE, Verdict.STOLEN}


@attrs.frozen(kw_only=True)
class Change:
    """Something of the packet was other than before."""

    rule: Event | None
    """None: nft knows of no rule that did it"""
    hook: str
    place: str
    """which of iptables's tables, or of the kernel's own, was between"""
    before: int
    after: int
    to: tuple[IPAddress, int] | None = None


@attrs.frozen
class Way:
    """Of the first packet in one direction; there is one event at least."""

    events: tuple[Event, ...]

    @property
    def packet(self) -> Packet:
        """As it was."""
        return next(event.packet for event in self.events if event.packet is not None)

    @property
    def destination(self) -> tuple[IPAddress, int]:
        """In the end."""
        last = next(event.packet for event in reversed(self.events) if event.packet is not None)
        return last.destination, last.dport

    @property
    def mark(self) -> int:
        """In the end."""
        return self.events[-1].mark

    @property
    def iif(self) -> int:
        """The interface that it came in by; 0: none."""
        return self.events[0].iif

    @property
    def oif(self) -> int:
        """The interface that it was last to leave by; 0: none."""
        return next((event.oif for event in reversed(self.events) if event.packet is not None), 0)

    @property
    def rules(self) -> tuple[Event, ...]:
        """Those of others than this tracer, which matched."""
        return tuple(event for event in self.events if event.table != TABLE and event.handle is not None)

    @property
    def dropped(self) -> Event | None:
        """The rule, or the chain by its policy, that ended it."""
        last = self.events[-1]
        return last if last.verdict in _ENDS and last.table != TABLE else None

    @property
    def at(self) -> tuple[str, int]:
        """The hook and the place in it where it was seen last."""
        return next((place for event in reversed(self.events) if (place := place_of(event))), ("ingress", FIRST))

    @property
    def delivered(self) -> bool:
        """It has got to where its socket is looked for."""
        return self.at == ("input", LAST)

    @property
    def left(self) -> bool:
        """It left this host, or would have if we had let it."""
        return self.dropped is None and self.at == ("postrouting", LAST) and self.oif != 1

    @property
    def lost_in(self) -> str | None:
        """Which of iptables's tables or of the kernel's own has it, if nft knows of no rule that ended it."""
        _, place = self.at
        if self.dropped is not None or place == LAST:
            return None
        return _BETWEEN.get(place, "other rules")

    @property
    def lost(self) -> str | None:
        """Where it was lost between the hooks, in words."""
        hook, place = self.at
        if self.dropped is not None or self.delivered or self.left or place != LAST:
            return None
        return "on its way through lo" if hook == "postrouting" else f"by routing, behind {hook.upper()}"

    @property
    def routed_nowhere(self) -> bool:
        """Lost between PREROUTING and what comes next."""
        return self.at == ("prerouting", LAST) and self.dropped is None

    @property
    def untracked(self) -> bool:
        """Connection tracking passed it over, and so will NAT."""
        return any(event.table == TABLE and event.verdict is Verdict.JUMP for event in self.events)

    @property
    def turn(self) -> Change | None:
        """The first time that it got another destination."""
        before: tuple[IPAddress, int] | None = None
        for number, event in enumerate(self.events):
            if event.packet is not None:
                now = event.packet.destination, event.packet.dport
                if before not in {None, now}:
                    return self._change(number, 0, 0, to=now)
                before = now
        return None

    @property
    def marks(self) -> Iterator[Change]:
        """Each time that it got another mark."""
        for number in range(1, len(self.events)):
            before, event = self.events[number - 1].mark, self.events[number]
            if event.mark != before:
                yield self._change(number, before, event.mark)

    def _change(self, number: int, before: int, after: int, to: tuple[IPAddress, int] | None = None) -> Change:
        """Between the event of this number and those before, back to a place of ours."""
        rule = self.events[number] if to is None and self.events[number].table != TABLE else None
        hook, place = "ingress", FIRST
        for event in reversed(self.events[:number]):
            if (found := place_of(event)) is not None:
                hook, place = found
                break
            if rule is None and event.handle is not None and event.verdict is Verdict.ACCEPT:
                rule = event
        return Change(rule=rule, hook=hook, place=_BETWEEN.get(place, "other rules"), before=before, after=after, to=to)


def way_of(events: Sequence[Event], port: int, *, back: bool = False) -> Way | None:
    """Of the first packet from this port; `back`: of the first to it. None: nothing was told of it."""
    found: list[Event] = []
    mine: dict[int, bool] = {}
    begun: set[str] = set()
    for event in events:
        packet = event.packet
        if packet is not None:
            mine[event.id] = (packet.dport if back else packet.sport) == port
        if not mine.get(event.id):
            continue
        if found and found[-1].verdict in _ENDS:
            break  # what follows is sent again
        place = place_of(event)
        if place is not None and place[1] == FIRST and event.packet is not None:
            if place[0] in begun or (place[0] == "output" and begun):
                break  # sent again
            begun.add(place[0])
        found.append(event)
    return Way(tuple(found)) if found else None

"""Samples tried on this host: first packets of connections that transocks should get, each made once, on demand."""

from __future__ import annotations

from functools import cached_property
from ipaddress import ip_address

import attrs

from transocks.doctor.seen import Seen
from transocks.rules.config import Mode, RulesConfig
from transocks.rules.redirection import Redirection, reached, redirections_of
from transocks.tools import FirewallError
from transocks.tracing.fate import Fate, What, fate_of
from transocks.tracing.names import RuleNames
from transocks.tracing.samples import TCP, Outcome, Sample, samples, send, try_out
from transocks.tracing.sockets import Identity
from transocks.tracing.table import Tracer
from transocks.tracing.way import Way, way_of
from usocksd.net.address import IPAddress

AS_ROOT = "run it as root"


@attrs.frozen
class Tried:
    """A sample, for which rules it was, and what became of it."""

    wanted: Redirection
    outcome: Outcome
    fate: Fate

    @property
    def sample(self) -> Sample:
        return self.outcome.sample

    @property
    def name(self) -> str:
        """For findings."""
        return f"{self.wanted.mode.value}, IPv{self.sample.version}"

    @property
    def meets_ours(self) -> bool:
        """It reached a rule of transocks, or a port of transocks."""
        fate = self.fate
        return fate.what in {What.ARRIVED, What.STOPPED} or (fate.what is What.PASSED and bool(fate.text))

    @property
    def end(self) -> tuple[IPAddress, int]:
        """Where it is sent; TPROXY leaves the destination as it is."""
        if self.wanted.mode is Mode.TPROXY:
            own = [address for address in self.wanted.addresses if address.version == self.sample.version]
            return (own or [ip_address("127.0.0.1" if self.sample.version == 4 else "::1")])[0], self.wanted.port
        assert self.outcome.way is not None
        return self.outcome.way.destination


class Trials:
    """All of them. Without a tracer nothing is tried, and `why` says why."""

    def __init__(self, seen: Seen, tracer: Tracer | None, why: str = "", client: IPAddress | None = None) -> None:
        self.seen, self.tracer, self.why, self.client = seen, tracer, why, client
        self.names = RuleNames()

    @property
    def stated(self) -> bool:
        """Whether the configuration says which rules there should be."""
        return self.seen.config.rules is not None

    @cached_property
    def wanted(self) -> tuple[Redirection, ...]:
        """The rules of [rules]; or, where they are loaded by hand, of each mode that the listeners are for."""
        config = self.seen.config
        rules = config.rules
        if rules is None:
            modes = [
                mode for mode in Mode if reached(mode, config.listen_tproxy if mode is Mode.TPROXY else config.listen)
            ]
            if Mode.TPROXY in modes and Mode.GATEWAY in modes and not _all_unspecified(config.listen):
                modes.remove(Mode.GATEWAY)
            rules = RulesConfig(mode=tuple(modes))
        try:
            return tuple(redirections_of(rules, config.listen, config.listen_tproxy, config.mark))
        except FirewallError:
            return ()

    @cached_property
    def results(self) -> tuple[Tried, ...]:
        """Of all modes."""
        if self.tracer is None:
            return ()
        if self.client is not None:
            return self._of_client(self.tracer, self.client)
        versions = (4, 6) if self.seen.ipv6 else (4,)
        tried = tuple(
            Tried(wanted, outcome, fate_of(outcome, wanted, self.names))
            for wanted in self.wanted
            for sample in samples(wanted, self.seen.here, versions)
            for outcome in [try_out(self.tracer, sample)]
        )
        return tried if self.stated else _of_modes_with_rules(tried)

    def _of_client(self, tracer: Tracer, client: IPAddress) -> tuple[Tried, ...]:
        """What was told of the first connection of this client, which was waited for."""
        port = tracer.port_of(client)
        if port is None:
            return ()
        events = tracer.events(TCP, port)
        way = way_of(events, port)
        assert way is not None
        back = way_of(events, port, back=True)
        found = []
        for wanted in self.wanted:
            if wanted.mode is not Mode.HOST:
                packet = way.packet
                sample = Sample(
                    mode=wanted.mode, destination=packet.destination, port=packet.dport, source=client,
                    iif=self.seen.device(way.iif),
                )  # fmt: skip
                answered = back is not None and back.packet.flags & 0x16 == 0x12
                outcome = Outcome(sample=sample, way=way, back=back, answered=answered)
                found.append(Tried(wanted, outcome, fate_of(outcome, wanted, self.names)))
        return tuple(found) if self.stated else _of_modes_with_rules(tuple(found))

    @cached_property
    def arrived(self) -> tuple[Tried, ...]:
        """Of each mode and family the first that got to where it should."""
        found: dict[tuple[Mode, int], Tried] = {}
        for one in self.results:
            if one.fate.what is What.ARRIVED:
                found.setdefault((one.wanted.mode, one.sample.version), one)
        return tuple(found.values())

    def has(self, *modes: Mode) -> bool:
        """Whether there are rules of these modes, as far as can be told."""
        return any(one.wanted.mode in modes for one in self.results)

    def sent(self, who: Identity, address: IPAddress, port: int) -> Outcome | None:
        """A connection of a process of this host; it does not come about. None: it can't be tried."""
        if self.tracer is None:
            return None
        return send(self.tracer, Sample(mode=Mode.HOST, destination=address, port=port, who=who))

    def fate(self, outcome: Outcome, wanted: Redirection) -> Fate:
        """Of one more sample of these rules."""
        return fate_of(outcome, wanted, self.names)

    def comes_back(self, outcome: Outcome | None) -> str | None:
        """By which rule it is redirected to a port of ours, if it is."""
        way = outcome.way if outcome is not None else None
        turn = way.turn if way is not None else None
        if way is None or turn is None or turn.to is None or not self.is_ours(*turn.to):
            return None
        return self.names.change(turn, way)

    def is_ours(self, address: IPAddress, port: int) -> bool:
        """Whether transocks listens there, as its configuration has it."""
        config = self.seen.config
        ports = {listen.port for listen in (*config.listen, *config.listen_tproxy)}
        return port in ports and self.seen.is_local(address)

    def why_not(self, way: Way | None) -> str | None:
        """What on this host stopped a packet, in words."""
        if way is None:
            return None
        if way.dropped is not None:
            return self.names.does(way.dropped)
        if (place := way.lost_in) is not None:
            return f"{self.names.gap(way.at[0], place, way)} drops it"
        return None


def _of_modes_with_rules(tried: tuple[Tried, ...]) -> tuple[Tried, ...]:
    """By hand they need not be there for all that the listeners could be for."""
    modes = {one.wanted.mode for one in tried if one.meets_ours}
    return tuple(one for one in tried if one.wanted.mode in modes) if modes else tried


def _all_unspecified(listen: object) -> bool:
    return all(one.address.is_unspecified for one in listen)  # type: ignore[attr-defined]

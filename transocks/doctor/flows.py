"""The connections that the rules mean to bring to transocks: for each rule that does, an example, and where it gets."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal

import attrs

from transocks.doctor.seen import Identity, Seen
from transocks.netfilter.ruleset import (
    UNKNOWN,
    Action,
    Kind,
    Match,
    Packet,
    Range,
    Unknown,
    Version,
)
from transocks.netfilter.walk import Step, Target, Way, targets, walk
from usocksd.match import IPAddress

# Somebody of whom the rules have not heard.
NOBODY = Identity(uid=65534, gid=65534)
# Where an example goes to, if the rules don't say: addresses of the documentation ranges, which rules like ours take
# for the Internet, and one that all others do. Nothing is sent to them.
EXAMPLES: dict[Version, tuple[IPAddress, ...]] = {
    4: (IPv4Address("203.0.113.1"), IPv4Address("9.9.9.9")),
    6: (IPv6Address("2001:db8:ffff::1"), IPv6Address("2620:fe::fe")),
}
LOOPBACK: dict[Version, IPAddress] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}
_PORTS = (443, 80)


class Mode(Enum):
    """How connections come to transocks."""

    HOST = "host"
    """this host's own, by REDIRECT or DNAT in the output hook"""
    GATEWAY = "gateway"
    """those that are routed through, by REDIRECT or DNAT in the prerouting hook"""
    TPROXY = "tproxy"
    """those that are routed through, by TPROXY"""


@attrs.frozen
class Flow:
    """An example of what a target is for, of one family, and its way through the hook."""

    target: Target
    packet: Packet
    way: Way
    arrives: bool
    """it gets to a port of ours"""

    @property
    def version(self) -> Version:
        return self.packet.version

    @property
    def mode(self) -> Mode:
        return mode_of(self.target)


class Flows:
    """All of them, found when they are asked for."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Every rule that leads to a port that transocks has."""
        return tuple(target for target in self.leading if target.action.port in ports(self.seen, target.action.kind))

    @cached_property
    def leading(self) -> tuple[Target, ...]:
        """Every rule that sends connections to a port of this host, be it ours or not."""
        ruleset = self.seen.ruleset
        if ruleset is None:
            return ()
        return tuple(
            target
            for chain in ruleset.chains
            if chain.hook in {"prerouting", "output"}
            for target in targets(ruleset, chain, {Kind.REDIRECT, Kind.DNAT, Kind.TPROXY})
            if target.action.port is not None and _ours(target.action, self.seen)
        )

    @cached_property
    def best(self) -> tuple[Flow, ...]:
        """For each mode and family with a target the flow that gets furthest."""
        found: dict[tuple[Mode, Version], Flow] = {}
        for target in self.targets:
            for version in _versions(target):
                if version == 6 and not self.seen.ipv6:
                    continue
                key = mode_of(target), version
                if key in found and found[key].arrives:
                    continue
                flow = self._flow(target, version)
                if flow is not None and (key not in found or flow.arrives):
                    found[key] = flow
        return tuple(found.values())

    @property
    def arriving(self) -> tuple[Flow, ...]:
        return tuple(flow for flow in self.best if flow.arrives)

    def has(self, *modes: Mode, version: Version | None = None) -> bool:
        """Whether there is a rule for this."""
        return any(flow.mode in modes and version in {None, flow.version} for flow in self.best)

    def _flow(self, target: Target, version: Version) -> Flow | None:
        ruleset = self.seen.ruleset
        assert ruleset is not None
        first = None
        for packet in examples(target, version, self.seen):
            way = walk(ruleset, target.chain.hook or "output", packet)
            turned = way.turned
            flow = Flow(target, packet, way, turned is not None and leads_to_us(turned, self.seen))
            if flow.arrives:
                return flow
            first = first or flow
        return first


def mode_of(target: Target) -> Mode:
    """How it brings connections to transocks."""
    if target.action.kind is Kind.TPROXY:
        return Mode.TPROXY
    return Mode.HOST if target.chain.hook == "output" else Mode.GATEWAY


def ports(seen: Seen, kind: Kind) -> set[int]:
    """The ports at which transocks expects what comes this way."""
    config = seen.config
    own = config.listen if kind is not Kind.TPROXY else config.listen_tproxy
    return {listen.port for listen in own}


def leads_to_us(step: Step, seen: Seen) -> bool:
    """Whether this step sends a connection to a port of ours on this host."""
    return step.action.port in ports(seen, step.kind) and _ours(step.action, seen)


def output_packet(seen: Seen, who: Identity, destination: IPAddress, port: int, *, protocol: str = "tcp") -> Packet:
    """What a process of this host sends."""
    version: Version = 4 if destination.version == 4 else 6
    local = seen.is_local(destination)
    return Packet(
        version=version, protocol=protocol, destination=destination, dport=port, uid=who.uid, gid=who.gid,
        mark=who.mark, oif="lo" if local else seen.uplinks.get(version, UNKNOWN), source_type="local",
        destination_type="local" if local else "unicast",
    )  # fmt: skip


def local_ends(flow: Flow, seen: Seen) -> tuple[IPAddress, ...]:
    """The addresses of this host that connections of an arriving flow may end at."""
    action = flow.target.action
    if action.address is not None and action.kind in {Kind.DNAT, Kind.TPROXY}:
        return (action.address,)
    if flow.mode is Mode.HOST:
        return (LOOPBACK[flow.version],)
    networks = [network for link in seen.links if link.name == flow.packet.iif for network in link.networks]
    return tuple(
        sorted(
            address
            for address in seen.addresses
            if address.version == flow.version
            and not address.is_link_local
            and any(address in network for network in networks)
        )
    )


def comes_back(way: Way, seen: Seen) -> bool:
    """Whether what this host sent is certainly redirected to a port of ours."""
    return way.turned is not None and leads_to_us(way.turned, seen)


def sent(seen: Seen, who: Identity, address: IPAddress, port: int) -> Way:
    """The way of a connection of this host through the output hook."""
    assert seen.ruleset is not None
    return walk(seen.ruleset, "output", output_packet(seen, who, address, port))


def _ours(action: Action, seen: Seen) -> bool:
    return action.address is None or seen.is_local(action.address)


def _versions(target: Target) -> Iterator[Version]:
    version: Version
    for version in (4, 6):
        narrowed = [m for m in target.matches if m.version not in {None, version}]
        stated = [m for m in target.matches if m.field == "version"]
        stated_no = [m for m in stated if any(r.low == version for r in m.values if isinstance(r, Range)) is m.negate]
        if target.chain.takes(version) and not narrowed and not stated_no:
            yield version


def examples(target: Target, version: Version, seen: Seen) -> Iterator[Packet]:
    """Packets that fulfil what is asked for on the way to this rule, as far as that can be read off."""
    matches = target.matches
    protocols = _positive(matches, "protocol")
    if protocols and "tcp" not in protocols:
        return
    not_understood = frozenset(str(match.values[0]) for match in matches if match.field == "unknown")
    base: dict[str, object] = {"version": version, "mark": 0, "assumed": not_understood}
    for mark in _positive(matches, "mark"):
        if isinstance(mark, Range):
            base["mark"] = mark.low
    if target.chain.hook == "output":
        uplink: str | Unknown = seen.uplinks.get(version) or UNKNOWN
        base |= {"source_type": "local", "oif": _name(matches, "oif") or uplink}
        for field, ordinary in (("uid", NOBODY.uid), ("gid", NOBODY.gid)):
            base[field] = _number(matches, field, ordinary)
    else:
        base |= {"iif": _incoming(matches, version, seen), "source": _source(matches, version, seen)}
    for destination in _destinations(matches, version):
        for port in _destination_ports(matches):
            yield Packet(**base, destination=destination, dport=port)  # type: ignore[arg-type]


def _positive(matches: tuple[Match, ...], field: str) -> tuple[Range | str, ...]:
    """The values that a field has to have one of; of several conditions the last, which is the narrowest."""
    found = [match.values for match in matches if match.field == field and not match.negate]
    return found[-1] if found else ()


def _number(matches: tuple[Match, ...], field: str, ordinary: int | Unknown) -> int | Unknown:
    wanted = [value.low for value in _positive(matches, field) if isinstance(value, Range)]
    return wanted[0] if wanted else ordinary


def _name(matches: tuple[Match, ...], field: str) -> str | None:
    wanted = [value for value in _positive(matches, field) if isinstance(value, str)]
    return wanted[0] if wanted else None


def _incoming(matches: tuple[Match, ...], version: Version, seen: Seen) -> str | Unknown:
    """The interface that clients are behind: as the rules say, or one that does not lead to the Internet."""
    wanted = _name(matches, "iif")
    names = [link.name for link in seen.links if link.networks]
    if wanted is not None:
        fitting = [name for name in names if Match("iif", (wanted,))._has(name)]
        return fitting[0] if fitting else wanted
    inside = [name for name in names if name != seen.uplinks.get(int(version))]
    return next(iter(inside or names), UNKNOWN)


def _source(matches: tuple[Match, ...], version: Version, seen: Seen) -> IPAddress | Unknown:
    """A client's address."""
    wanted = [value.low for value in _positive(matches, "source") if isinstance(value, Range)]
    if wanted:
        return _address(wanted[0] + 1, version)
    incoming = _incoming(matches, version, seen)
    for link in seen.links:
        for network in link.networks:
            if link.name == incoming and network.version == version and not network.is_link_local:
                hosts = (_address(int(network.network_address) + n, version) for n in range(2, 255))
                return next((host for host in hosts if host in network and host not in seen.addresses), UNKNOWN)
    return UNKNOWN


def _destinations(matches: tuple[Match, ...], version: Version) -> tuple[IPAddress, ...]:
    wanted = [value.low for value in _positive(matches, "destination") if isinstance(value, Range)]
    fitting = tuple(
        address
        for address in EXAMPLES[version]
        if not wanted or any(low <= int(address) <= high for low, high in _ranges(matches, "destination"))
    )
    return fitting or tuple(_address(low, version) for low in wanted[:4])


def _destination_ports(matches: tuple[Match, ...]) -> tuple[int, ...]:
    ranges = _ranges(matches, "dport")
    fitting = tuple(port for port in _PORTS if not ranges or any(low <= port <= high for low, high in ranges))
    return fitting or tuple(low for low, _ in ranges[:4])


def _ranges(matches: tuple[Match, ...], field: str) -> tuple[Range, ...]:
    return tuple(value for value in _positive(matches, field) if isinstance(value, Range))


def _address(number: int, version: Literal[4, 6]) -> IPAddress:
    size = 4 if version == 4 else 16
    return ip_address(number.to_bytes(size, "big"))

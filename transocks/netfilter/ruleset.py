"""Firewall rules, as far as they decide where a new connection goes: whatever tool they were loaded with.

Every match is three-valued. What is not understood here (an ipset, a rate, a cgroup) may hold or not: then what
follows from it is uncertain, and is not reported as if it were known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import attrs

from usocksd.match import IPAddress, IPNetwork

Version: TypeAlias = Literal[4, 6]
Hook: TypeAlias = Literal["prerouting", "input", "forward", "output", "postrouting"]


class Unknown(Enum):
    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN
"""The value of a packet's field that nobody can tell."""


class Range(NamedTuple):
    """Whole numbers from low to high, both included: ports, ids, marks, and addresses as numbers."""

    low: int
    high: int


def network_range(network: IPNetwork) -> Range:
    """The addresses of a network."""
    return Range(int(network.network_address), int(network.broadcast_address))


TCP_FLAGS: Final = {
    "fin": 0x01,
    "syn": 0x02,
    "rst": 0x04,
    "psh": 0x08,
    "ack": 0x10,
    "urg": 0x20,
    "ecn": 0x40,
    "cwr": 0x80,
}
"""RFC 9293, section 3.1."""


@attrs.frozen(kw_only=True)
class Packet:
    """A packet, if not said otherwise the first of a connection.

    A field is None when a packet at that place has none: no match on it holds.
    """

    version: Version
    protocol: str = "tcp"
    source: IPAddress | Unknown = UNKNOWN
    destination: IPAddress
    dport: int
    sport: int | Unknown = UNKNOWN
    iif: str | Unknown = ""
    oif: str | Unknown = ""
    mark: int | Unknown = 0
    uid: int | Unknown | None = None
    gid: int | Unknown | None = None
    destination_type: str | Unknown = "unicast"
    source_type: str | Unknown = UNKNOWN
    state: frozenset[str] = frozenset({"new"})
    """of its connection: new, untracked, dnat"""
    flags: int = TCP_FLAGS["syn"]
    """if the protocol is TCP"""
    assumed: frozenset[str] = frozenset()
    """conditions that are not understood here, and hold for it all the same"""


@attrs.frozen
class Match:
    """A condition: `field` of the packet is (or with `negate` is not) among `values`; strings may end in "*".

    `version`: holds for packets of this family only. `mask`: applied to the packet's value first.
    """

    field: str
    values: tuple[Range | str, ...]
    negate: bool = False
    version: Version | None = None
    mask: int | None = None

    def holds(self, packet: Packet) -> bool | None:
        """None: it can't be told."""
        if self.version not in {None, packet.version}:
            return False
        if self.field == "never":
            return False
        if self.field == "unknown":
            return True if self.values[0] in packet.assumed else None
        value: Any = getattr(packet, self.field)
        if value is UNKNOWN:
            return None
        if value is None:
            return False
        return self._has(value) is not self.negate

    def implies(self, other: Match) -> bool:
        """Whether `other` holds wherever this does, as far as that can be read off."""
        if self == other:
            return True
        if self.field != other.field or other.version not in {None, self.version} or self.negate:
            return False
        return self.mask is other.mask is None and all(other._takes_all(value) for value in self.values)

    def _takes_all(self, value: Range | str) -> bool:
        """Whether it holds for everything in there, if the mask is None."""
        if isinstance(value, str):
            return self._has(value) is not self.negate
        ranges = [v for v in self.values if isinstance(v, Range)]
        if self.negate:
            return all(value.high < low or high < value.low for low, high in ranges)
        return any(low <= value.low and value.high <= high for low, high in ranges)

    def _has(self, value: Any) -> bool:
        if isinstance(value, frozenset):
            return any(text in value for text in self.values)
        if isinstance(value, str):
            return any(_same(value, pattern) for pattern in self.values if isinstance(pattern, str))
        number = int(value) if self.mask is None else int(value) & self.mask
        return any(low <= number <= high for low, high in (v for v in self.values if isinstance(v, Range)))


def _same(text: str, pattern: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def unknown(text: str) -> Match:
    """A condition that is not understood here."""
    return Match("unknown", (text,))


NEVER: Final = Match("never", ())
"""A condition that the first packet of a connection does not meet."""


class Kind(Enum):
    """What a rule does with a packet."""

    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    REDIRECT = "redirect"
    DNAT = "dnat"
    TPROXY = "tproxy"
    MARK = "mark"
    NOTRACK = "notrack"
    QUEUE = "queue"
    UNKNOWN = "unknown"
    """not understood here: it may be the end, or not"""


@attrs.frozen
class Action:
    """One thing that a rule does. Of `address` and `port` what it does not say is None."""

    kind: Kind
    chain: str = ""
    """of jump and goto"""
    address: IPAddress | None = None
    port: int | None = None
    mark: Range | None = None
    """of MARK: (value, mask) of the bits that are set"""


@attrs.frozen
class Rule:
    """All conditions hold: all actions are taken, in order."""

    matches: tuple[Match, ...]
    actions: tuple[Action, ...]
    text: str
    """as the tool writes it"""


@attrs.frozen(kw_only=True)
class Chain:
    """Rules, and where they are hooked in if they are."""

    family: Literal["ip", "ip6", "inet"]
    table: str
    name: str
    rules: tuple[Rule, ...]
    tool: Literal["nft", "iptables"]
    hook: Hook | None = None
    type: str = "filter"
    priority: int = 0
    drops: bool = False
    """its policy"""

    def __str__(self) -> str:
        if self.tool == "iptables":
            return f"{'ip6tables' if self.family == 'ip6' else 'iptables'} -t {self.table}, chain {self.name}"
        return f"nft table {self.family} {self.table}, chain {self.name}"

    def takes(self, version: Version) -> bool:
        """Whether packets of this family come here."""
        return self.family in {"inet", "ip" if version == 4 else "ip6"}


# Whatever their own priority, all chains of type nat run where the kernel's NAT hooks are, in order of priority among
# each other: netfilter_ipv4.h, NF_IP_PRI_NAT_DST and NF_IP_PRI_NAT_SRC.
_NAT_PRIORITY = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}


@attrs.frozen
class Ruleset:
    """Every chain of a network namespace."""

    chains: tuple[Chain, ...]
    _index: Mapping[tuple[str, str, str, str], Chain] = attrs.field(init=False, repr=False, eq=False)

    @_index.default
    def _make_index(self) -> Mapping[tuple[str, str, str, str], Chain]:
        return {(chain.tool, chain.family, chain.table, chain.name): chain for chain in self.chains}

    def hooked(self, hook: Hook, version: Version) -> list[Chain]:
        """The chains that packets of one family come through there, in this order."""
        found = [chain for chain in self.chains if chain.hook == hook and chain.takes(version)]
        return sorted(
            found, key=lambda c: (_NAT_PRIORITY[hook] if c.type == "nat" and hook != "forward" else c.priority,
                                  c.priority)
        )  # fmt: skip

    def beside(self, chain: Chain, name: str) -> Chain | None:
        """The chain `name` of the same table."""
        return self._index.get((chain.tool, chain.family, chain.table, name))


def merged(rulesets: Iterable[Ruleset]) -> Ruleset:
    """All of them as one."""
    return Ruleset(tuple(chain for ruleset in rulesets for chain in ruleset.chains))

"""The table [rules] of transocks.toml as typed values: what `transocks rules` applies, and to which traffic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from ipaddress import ip_network
from typing import Annotated

import attrs

from usocksd.names.conditions import keep_host_bits, port_range
from usocksd.names.match import parse_network
from usocksd.net.address import IPNetwork
from usocksd.settings.loader import Invalid, Parser, show
from usocksd.settings.types import Interface, Mark, integer, text


class Mode(Enum):
    """What is redirected, and how. iptables/ has files for each mode."""

    HOST = "host"
    """what this host sends: REDIRECT in OUTPUT"""
    GATEWAY = "gateway"
    """what is routed through this host: REDIRECT in PREROUTING"""
    TPROXY = "tproxy"
    """the same, by TPROXY and policy routing instead of NAT"""


class Tool(Enum):
    """The tool that loads the rules."""

    NFT = "nft"
    IPTABLES = "iptables"


class WhenDown(Enum):
    """What happens to selected connections while transocks does not accept."""

    OPEN = "open"
    CLOSED = "closed"


_MODES = '"host", "gateway", "tproxy", or a list of "host" and one of the others'


def _modes(value: object) -> tuple[Mode, ...]:
    names = [value] if type(value) is str else value
    if type(names) is not list or not names or not all(type(name) is str for name in names):
        raise ValueError
    modes = tuple(Mode(name) for name in names)
    if len(set(modes)) < len(modes):
        raise Invalid("expected each mode once")
    if {Mode.GATEWAY, Mode.TPROXY} <= set(modes):
        raise Invalid('expected "gateway" or "tproxy": both take what is routed through this host')
    return modes


def _account(value: object) -> int | str:
    """The number of a user or group, or its name, which getpwnam(3) finds."""
    if type(value) is int or (type(value) is str and value.isascii() and value.isdigit()):
        integer(0, 2**32 - 2).parse(int(value))
        return int(value)
    if type(value) is not str or not re.fullmatch(r"[^\s:,\"'\\-][^\s:,\"'\\]{0,255}", value):
        raise ValueError
    return value


def _cgroup(value: str) -> str:
    path = value.strip("/")
    if not path or re.search(r"[\x00-\x1f\"\\]|(^|/)\.{0,2}(/|$)", path):
        raise ValueError
    return path


def _interface(value: object) -> str:
    name: str | None = Interface.__metadata__[0].parse(value)  # type: ignore[attr-defined]
    if name is None or re.search(r"[+*\"'\\,!]", name):  # wildcards, of either tool
        raise ValueError
    return name


def _network(value: str) -> IPNetwork:
    """Like that of other settings, but IPv6 stays IPv6: packets with IPv4-mapped addresses are of that family."""
    parse_network(value)
    return keep_host_bits(ip_network(value, strict=False), value)


def _udp_ports(value: object) -> tuple[tuple[int, int], ...]:
    if value == "all":
        return ALL_PORTS
    parse: Callable[[object], tuple[int, int]] = port_range(1).parse  # type: ignore[assignment]
    return tuple(map(parse, value)) if type(value) is list else (parse(value),)


ALL_PORTS = ((1, 65535),)
"""The value of udp_ports = "all": unlike the same range as a list, it leaves QUIC to `reject_quic`."""

Modes = Annotated[tuple[Mode, ...], Parser(_modes, _MODES)]
Account = Annotated[int | str, Parser(_account, 'a name or a number, as in "backup" or 1000')]
CgroupPath = Annotated[
    str, text(_cgroup, 'the path of a cgroup (v2) below its root, as in "system.slice/NAME.service"')
]
InterfaceName = Annotated[str, Parser(_interface, 'the name of an interface, at most 15 characters, as in "eth0"')]
RuleNetwork = Annotated[IPNetwork, text(_network, 'a network or an IP address, as in "10.0.0.0/8" or "192.0.2.1"')]
RulePorts = Annotated[tuple[int, int], port_range(1)]
UDPPorts = Annotated[
    tuple[tuple[int, int], ...], Parser(_udp_ports, '"all", or a list of ports and ranges, as in [53, "6000-6100"]')
]


@attrs.frozen(kw_only=True)
class RulesConfig:
    """[rules]. One of users, groups and cgroups must match; every other setting narrows the selection."""

    mode: Modes
    tool: Annotated[Tool | None, text(Tool, '"nft" or "iptables"')] = None
    """None: nft where it is"""
    users: tuple[Account, ...] = ()
    groups: tuple[Account, ...] = ()
    cgroups: tuple[CgroupPath, ...] = ()
    interfaces: tuple[InterfaceName, ...] = ()
    """where connections come in"""
    from_: tuple[RuleNetwork, ...] = ()
    to: tuple[RuleNetwork, ...] = ()
    ports: tuple[RulePorts, ...] = ()
    udp_ports: UDPPorts = ()
    """the ports of UDP that are taken too, by TPROXY in every mode"""
    exclude: tuple[RuleNetwork, ...] | None = None
    """destinations to leave alone; None: those of the files in iptables/"""
    exempt_users: tuple[Account, ...] = ()
    reject_quic: bool = True
    when_down: Annotated[WhenDown, text(WhenDown, '"open" or "closed"')] = WhenDown.OPEN
    tproxy_mark: Mark = 0x7474
    """the mark for TPROXY's policy routing, and the number of its routing table"""

    @staticmethod
    def check_table(table: Mapping[str, object]) -> Iterator[Invalid]:
        """Settings that contradict each other."""
        try:
            modes = _modes(table.get("mode"))
        except ValueError:
            return
        if Mode.HOST not in modes:
            for key in ("users", "groups", "cgroups", "exempt_users"):
                if table.get(key):
                    expected = 'expected mode "host" beside it: what is routed through has no user here'
                    yield Invalid(expected, shown=show(table[key]), at=key)
        elif len(modes) == 1 and table.get("interfaces"):
            expected = 'expected mode "gateway" or "tproxy" beside it: what this host sends comes in by none'
            yield Invalid(expected, shown=show(table["interfaces"]), at="interfaces")
        mark = table.get("tproxy_mark", 1)
        if (Mode.TPROXY in modes or table.get("udp_ports")) and mark in (253, 254, 255):  # the kernel's own tables
            yield Invalid("expected another number than 253, 254 and 255", shown=show(mark), at="tproxy_mark")

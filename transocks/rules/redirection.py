"""What to redirect, and to where, with all names resolved: the input of render.py."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

import attrs

from transocks.rules.config import ALL_PORTS, Mode, RulesConfig, WhenDown
from transocks.tools import FirewallError
from usocksd.host.mounts import mounts
from usocksd.net.address import IPAddress, IPNetwork
from usocksd.settings.types import ListenAddress

CGROUPS = "/sys/fs/cgroup"
MARK = 0x7473
"""The mark that the files in iptables/ leave alone."""
QUIC = 443
LOOPBACK: dict[int, IPAddress] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}
_ANY: dict[int, IPAddress] = {4: IPv4Address("0.0.0.0"), 6: IPv6Address("::")}


@attrs.frozen(kw_only=True)
class Redirection:
    """What the rules of one mode do, and to which traffic. One of users, groups, cgroups and class ids must match;
    everything else narrows the selection.
    """

    mode: Mode
    port: int
    """where transocks listens"""
    udp: bool = False
    """it takes UDP, and by TPROXY: of this host (mode HOST), or what is routed through it (mode TPROXY)"""
    addresses: tuple[IPAddress, ...] = ()
    """TPROXY: where its listeners are, if not on all addresses; one for each family"""
    name: str | None = None
    """the name of these rules, [a-z0-9_], at most 20 characters; None: the names in the files"""
    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    cgroups: tuple[str, ...] = ()
    """paths in the hierarchy of version 2"""
    cgroups_at: str = "."
    """the mount of that hierarchy, relative to /sys/fs/cgroup: "unified" beside version 1"""
    classids: tuple[int, ...] = ()
    """of cgroups of version 1, by net_cls"""
    interfaces: tuple[str, ...] = ()
    from_: tuple[IPNetwork, ...] = ()
    to: tuple[IPNetwork, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    mark: int | None = None
    """the mark of connections to leave alone; None: that of the files"""
    exempt_users: tuple[int, ...] = ()
    exclude: tuple[IPNetwork, ...] | None = None
    """destinations to leave alone; None: those of the files"""
    reject_quic: bool = True
    closed: bool = False
    """refuse forgotten connections; TPROXY: also new ones while transocks does not listen"""
    tproxy_mark: int = 0x7474
    """TPROXY: also the number of the routing table"""

    def destination(self, version: int) -> IPAddress:
        """The local address to which connections of this IP version are sent; unspecified: any address but loopback."""
        if self.mode is Mode.GATEWAY:
            return _ANY[version]
        return next((address for address in self.addresses if address.version == version), LOOPBACK[version])

    @property
    def by_tproxy(self) -> bool:
        """Whether it needs TPROXY's routing."""
        return self.udp or self.mode is Mode.TPROXY

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.mode.value} (UDP)" if self.udp else self.mode.value

    @property
    def file(self) -> str:
        """The name of its files in iptables/, without their endings."""
        if not self.udp:
            return self.mode.value
        return "dgram" if self.mode is Mode.HOST else "tproxy_dgram"

    @property
    def table(self) -> str:
        """The name of the nft table."""
        name = self.name or ("transocks" if self.mode is Mode.HOST else f"transocks_{self.mode.value}")
        return f"{name}_dgram" if self.udp and self.name is None else name

    @property
    def guard(self) -> str:
        """The name of the nft table of `transocks rules hold` beside it."""
        return f"{self.table}_guard"

    @property
    def chain(self) -> str:
        """The name of the iptables chain that redirects."""
        return self.table.upper().replace("_", "-")

    @property
    def chains(self) -> tuple[str, ...]:
        """The names of its iptables chains. TCP: those for QUIC and forgotten connections after the first."""
        if self.udp:
            return (self.chain, f"{self.chain}-IN") if self.mode is Mode.HOST else (self.chain,)
        return (self.chain, f"{self.chain}-UDP", f"{self.chain}-TCP")


def redirections_of(
    rules: RulesConfig,
    listen: Sequence[ListenAddress],
    listen_tproxy: Sequence[ListenAddress],
    mark: int | None,
    listen_udp: Sequence[ListenAddress] = (),
) -> list[Redirection]:
    """The redirections of [rules], one for each mode, and with `listen_udp` one more for its UDP. Raises FirewallError
    for users and groups that do not exist.
    """
    users, groups = _ids(rules.users, "users", _uid), _ids(rules.groups, "groups", _gid)
    exempt_users = _ids(rules.exempt_users, "exempt_users", _uid)
    found = []
    for mode in rules.mode:
        listeners, host = eligible(mode, listen_tproxy if mode is Mode.TPROXY else listen), mode is Mode.HOST
        found.append(
            Redirection(
                mode=mode, port=listeners[0].port, addresses=_specific(listeners) if mode is Mode.TPROXY else (),
                users=users if host else (), groups=groups if host else (), cgroups=rules.cgroups if host else (),
                cgroups_at=cgroups_at() if rules.cgroups else ".", interfaces=() if host else rules.interfaces,
                from_=rules.from_, to=rules.to, ports=rules.ports, mark=mark, exempt_users=exempt_users,
                exclude=rules.exclude, reject_quic=rules.reject_quic and not takes_quic(rules),
                closed=rules.when_down is WhenDown.CLOSED,
                tproxy_mark=rules.tproxy_mark,
            )
        )  # fmt: skip
    udp = eligible(Mode.TPROXY, listen_udp) if rules.udp_ports else []
    return found + [
        attrs.evolve(
            each,
            udp=True,
            mode=Mode.HOST if each.mode is Mode.HOST else Mode.TPROXY,
            port=udp[0].port,
            addresses=_specific(udp),
            ports=_without_quic() if rules.udp_ports is ALL_PORTS and rules.reject_quic else rules.udp_ports,
        )
        for each in found
        if udp
    ]


def takes_quic(rules: RulesConfig) -> bool:
    """Whether QUIC is carried, and so not refused."""
    return rules.udp_ports is not ALL_PORTS and any(low <= QUIC <= high for low, high in rules.udp_ports)


def _without_quic() -> tuple[tuple[int, int], ...]:
    return (1, QUIC - 1), (QUIC + 1, 65535)


def cgroups_at() -> str:
    """Where cgroups of version 2 are, from /sys/fs/cgroup, where nft looks for them."""
    points = [mount.point for mount in mounts("cgroup2")]
    return os.path.relpath(points[0], CGROUPS) if points and CGROUPS not in points else "."


def eligible(mode: Mode, listen: Sequence[ListenAddress]) -> list[ListenAddress]:
    """The listeners on the port to which the rules of this mode send connections, best first; may be none.

    REDIRECT sends what this host sends itself to 127.0.0.1 and ::1, and what is routed through it to an address of the
    interface that it came in by. TPROXY reaches a listener on any address that its rule names. Listeners on link-local
    addresses are left out, since they serve one link only.
    """
    fixed = [each for each in listen if each.port and getattr(each.address, "scope_id", None) is None]
    if mode is Mode.HOST:
        fixed = [listener for listener in fixed if listener.address.is_loopback or listener.address.is_unspecified]
    elif mode is Mode.GATEWAY:
        fixed = [listener for listener in fixed if not listener.address.is_loopback]
        fixed.sort(key=lambda listener: not listener.address.is_unspecified)
    return [listener for listener in fixed if listener.port == fixed[0].port]


def _specific(listeners: Sequence[ListenAddress]) -> tuple[IPAddress, ...]:
    """One address for each family that has no listener on all of them."""
    families = [[each.address for each in listeners if each.address.version == version] for version in (4, 6)]
    return tuple(some[0] for some in families if some and not any(address.is_unspecified for address in some))


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid


def _ids(accounts: Sequence[int | str], key: str, look_up: Callable[[str], int]) -> tuple[int, ...]:
    found = []
    for account in accounts:
        try:
            found.append(account if isinstance(account, int) else look_up(account))
        except KeyError:
            raise FirewallError(f"rules.{key}: {account!r}: there is none of that name on this host") from None
    return tuple(found)

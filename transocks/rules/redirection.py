"""What is to be in force, with everything looked up: the input of render.py."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Sequence

import attrs

from transocks.rules.config import Mode, RulesConfig, WhenDown
from transocks.tools import FirewallError
from usocksd.host.mounts import mounts
from usocksd.net.address import IPAddress, IPNetwork
from usocksd.settings.types import ListenAddress

CGROUPS = "/sys/fs/cgroup"
MARK = 0x7473
"""What the files leave alone when nothing else is said."""


@attrs.frozen(kw_only=True)
class Selection:
    """Which traffic. Of users, groups, cgroups and class ids one has to match; all else narrows that further."""

    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    cgroups: tuple[str, ...] = ()
    """paths in the hierarchy of version 2"""
    cgroups_at: str = "."
    """where that is mounted, from /sys/fs/cgroup: "unified", where version 1 is there too"""
    classids: tuple[int, ...] = ()
    """of cgroups of version 1, by net_cls"""
    interfaces: tuple[str, ...] = ()
    from_: tuple[IPNetwork, ...] = ()
    to: tuple[IPNetwork, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()


@attrs.frozen(kw_only=True)
class Redirection:
    """The rules of one mode."""

    mode: Mode
    port: int
    """where transocks listens"""
    addresses: tuple[IPAddress, ...] = ()
    """TPROXY: where its listeners are, if not on all addresses; one for each family"""
    name: str | None = None
    """what tells these rules from others on the host, [a-z0-9_], at most 20 characters; None: the files' own names"""
    mark: int | None = None
    """of connections to leave alone; None: the files' own"""
    exempt_users: tuple[int, ...] = ()
    selection: Selection = Selection()
    exclude: tuple[IPNetwork, ...] | None = None
    """destinations to leave alone; None: those of the files"""
    reject_quic: bool = True
    closed: bool = False
    """TPROXY: refuse when transocks does not listen; else connections go out directly"""
    tproxy_mark: int = 0x7474
    """TPROXY: also the number of the routing table"""

    @property
    def table(self) -> str:
        """The name of the nft table."""
        if self.name is not None:
            return self.name
        return "transocks" if self.mode is Mode.HOST else f"transocks_{self.mode.value}"

    @property
    def guard(self) -> str:
        """The name of the nft table of `transocks rules hold` beside it."""
        return f"{self.table}_guard"

    @property
    def chain(self) -> str:
        """The name of the iptables chain; the one for UDP has -UDP behind it."""
        return self.table.upper().replace("_", "-")

    @property
    def selection_here(self) -> Selection:
        """What of the selection means something in this mode: the rest is for the mode beside it."""
        if self.mode is Mode.HOST:
            return attrs.evolve(self.selection, interfaces=())
        return attrs.evolve(self.selection, users=(), groups=(), cgroups=(), classids=())


def redirections_of(
    rules: RulesConfig, listen: Sequence[ListenAddress], listen_tproxy: Sequence[ListenAddress], mark: int | None
) -> list[Redirection]:
    """What [rules] asks for, one for each mode. Raises FirewallError for users and groups that there are not."""
    selection = Selection(
        users=tuple(_ids(rules.users, "users", lambda name: pwd.getpwnam(name).pw_uid)),
        groups=tuple(_ids(rules.groups, "groups", lambda name: grp.getgrnam(name).gr_gid)),
        cgroups=rules.cgroups,
        cgroups_at=cgroups_at() if rules.cgroups else ".",
        interfaces=rules.interfaces,
        from_=rules.from_,
        to=rules.to,
        ports=rules.ports,
    )
    exempt_users = tuple(_ids(rules.exempt_users, "exempt_users", lambda name: pwd.getpwnam(name).pw_uid))
    found = []
    for mode in rules.mode:
        listeners = reached(mode, listen_tproxy if mode is Mode.TPROXY else listen)
        found.append(
            Redirection(
                mode=mode,
                port=listeners[0].port,
                addresses=tuple(_specific(listeners)) if mode is Mode.TPROXY else (),
                mark=mark,
                exempt_users=exempt_users,
                selection=selection,
                exclude=rules.exclude,
                reject_quic=rules.reject_quic,
                closed=rules.when_down is WhenDown.CLOSED,
                tproxy_mark=rules.tproxy_mark,
            )
        )
    return found


def cgroups_at() -> str:
    """Where cgroups of version 2 are, from /sys/fs/cgroup, where nft looks for them."""
    points = [mount.point for mount in mounts("cgroup2")]
    return os.path.relpath(points[0], CGROUPS) if points and CGROUPS not in points else "."


def reached(mode: Mode, listen: Sequence[ListenAddress]) -> list[ListenAddress]:
    """Of the listeners, those with the port that the rules of this mode send connections to, best first; may be none.

    REDIRECT sends what this host sends itself to 127.0.0.1 and ::1, and what is routed through it to an address of the
    interface that it came in by. TPROXY finds a listener on any address that it is told. One on a link-local address
    is for that link, and rules are not for a link.
    """
    fixed = [each for each in listen if each.port and getattr(each.address, "scope_id", None) is None]
    if mode is Mode.HOST:
        fixed = [listener for listener in fixed if listener.address.is_loopback or listener.address.is_unspecified]
    elif mode is Mode.GATEWAY:
        fixed = [listener for listener in fixed if not listener.address.is_loopback]
        fixed.sort(key=lambda listener: not listener.address.is_unspecified)
    return [listener for listener in fixed if listener.port == fixed[0].port]


def _specific(listeners: Iterable[ListenAddress]) -> Iterable[IPAddress]:
    """One address for each family that has no listener on all of them."""
    for version in (4, 6):
        of_family = [listener.address for listener in listeners if listener.address.version == version]
        if of_family and not any(address.is_unspecified for address in of_family):
            yield of_family[0]


def _ids(accounts: Iterable[str], key: str, look_up: Callable[[str], int]) -> Iterable[int]:
    for account in accounts:
        try:
            yield int(account) if account.isascii() and account.isdigit() else look_up(account)
        except KeyError:
            raise FirewallError(f"rules.{key}: {account!r}: there is none of that name on this host") from None

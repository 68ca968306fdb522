"""What the checks look at: this host as it is now, read once. Nothing is changed, and nothing is sent."""

from __future__ import annotations

import os
import pwd
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import attrs

from transocks.config import Config
from transocks.firewall import live, routing
from transocks.firewall.steps import FirewallError
from transocks.netfilter.loaded import NotShown, loaded
from transocks.netfilter.ruleset import UNKNOWN, Ruleset, Unknown
from transocks.sockets import Listener, listeners
from transocks.tools import which
from usocksd.addresses import HostAddresses
from usocksd.match import IPAddress
from usocksd.runtime.verbs.client import Answer, Client, VerbError

_UCRED = struct.Struct("=iII")
_RTF_UP = 1


@attrs.frozen(kw_only=True)
class Identity:
    """What firewall rules can tell a process's connections by."""

    uid: int | Unknown = UNKNOWN
    gid: int | Unknown = UNKNOWN
    mark: int | Unknown = 0


@attrs.frozen
class Link:
    """An interface other than loopback, and the networks on it."""

    name: str
    networks: tuple[IPv4Network | IPv6Network, ...]


@attrs.frozen(kw_only=True)
class Seen:
    """One look at this host."""

    config: Config
    config_file: str
    ruleset: Ruleset | None
    """None: see `ruleset_unread`"""
    ruleset_unread: str = ""
    listeners: tuple[Listener, ...] | None
    """None: the kernel does not tell"""
    addresses: frozenset[IPAddress]
    links: tuple[Link, ...]
    uplinks: Mapping[int, str]
    """the interface of the default route by IP version, where there is one"""
    daemon: Identity
    pid: int | None = None
    """of the daemon's master, where its control socket tells"""
    status: Answer | None = None
    """what the running daemon says of itself"""
    root: bool
    ipv6: bool = True
    """some interface has an address of it; with disable_ipv6=1 nobody can listen, nor send"""
    hidden_legacy: bool = False
    """iptables-legacy has rules, and is not what goes by the name iptables"""
    proc: Path = Path("/proc")
    tools: frozenset[str] = frozenset()
    route: Callable[..., routing.Route] = routing.lookup

    def sysctl(self, name: str) -> str | None:
        """A kernel setting, net.ipv4.ip_forward say; None if there is none of that name."""
        return self.read(f"sys/{name.replace('.', '/')}")

    def number(self, name: str) -> int | None:
        """The same, of a setting that is a number."""
        text = self.sysctl(name)
        return int(text) if text and text.lstrip("-").isdigit() else None

    def interface_number(self, family: str, interface: str, name: str) -> int:
        """A setting of net.FAMILY.conf.INTERFACE; interfaces may have dots in their names."""
        return int(self.read(f"sys/net/{family}/conf/{interface}/{name}") or 0)

    def read(self, path: str) -> str | None:
        """A file below /proc, if it is there and may be read."""
        try:
            return (self.proc / path).read_text("ascii", "replace").strip()
        except OSError:
            return None

    def is_local(self, address: IPAddress) -> bool:
        """Whether a connection to it ends on this host."""
        return address in self.addresses or address.is_loopback

    def listener(self, address: IPAddress, port: int) -> Listener | None:
        """Who accepts what is sent to this local address."""
        found = (listener for listener in self.listeners or () if listener.accepts(address, port))
        return next(found, None)


def look(config: Config, config_file: str) -> Seen:
    """Look at this host, as this user."""
    root = os.geteuid() == 0
    ruleset, unread = _ruleset(root)
    try:
        listening: tuple[Listener, ...] | None = listeners()
    except OSError:
        listening = None
    pid, uid, gid, status = _ask(config.control)
    if uid is None:
        uid = _listener_uid(listening, {listen.port for listen in config.listen})
    links = _links()
    return Seen(
        config=config, config_file=config_file, ruleset=ruleset, ruleset_unread=unread, listeners=listening,
        addresses=HostAddresses().current, links=links[0], uplinks=links[1],
        daemon=Identity(
            uid=UNKNOWN if uid is None else uid, gid=UNKNOWN if gid is None else gid, mark=config.mark or 0
        ),
        pid=pid, status=status, root=root, ipv6=live.uses_ipv6(), hidden_legacy=root and _hidden_legacy(),
        tools=frozenset(tool for tool in ("nft", "iptables", "ip6tables", "iptables-legacy") if which(tool)),
    )  # fmt: skip


def _ruleset(root: bool) -> tuple[Ruleset | None, str]:
    """Every rule there is, or why not."""
    try:
        return loaded(), ""
    except NotShown as error:
        return None, str(error) if root else "firewall rules are shown to root only"


def _hidden_legacy() -> bool:
    """Empty tables are no rules: they stay until the next boot when it was given up."""
    beside = ((six, variant) for six in (False, True) for variant in live.variants(six) if variant.endswith("-legacy"))
    try:
        return any(table.rules for six, variant in beside for table in live.saved(six, variant))
    except FirewallError:
        return False


def _ask(path: str | None) -> tuple[int | None, int | None, int | None, Answer | None]:
    """Pid, user and group of the running daemon, and its status."""
    if path is None:
        return None, None, None, None
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(path)
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
    except OSError:
        return None, None, None, None
    try:
        return pid, uid, gid, Client("transocks", path).ask("status", timeout=2)
    except VerbError:
        return pid, uid, gid, None


def _listener_uid(found: tuple[Listener, ...] | None, ports: set[int]) -> int | None:
    for listener in found or ():
        if listener.port in ports:
            return listener.uid
    try:
        return pwd.getpwnam("transocks").pw_uid
    except KeyError:
        return None


def _links() -> tuple[tuple[Link, ...], dict[int, str]]:
    """Interfaces with the networks on them, and the interfaces of the default routes."""
    networks: dict[str, list[IPv4Network | IPv6Network]] = {
        name: [] for _, name in socket.if_nameindex() if name != "lo"
    }
    uplinks: dict[int, str] = {}
    for line in _lines("/proc/net/route")[1:]:
        name, destination, gateway, flags, _, _, _, mask = line.split()[:8]
        length = int(mask, 16).bit_count()
        if not int(flags, 16) & _RTF_UP or name not in networks:
            continue
        if not length:
            uplinks.setdefault(4, name)
        elif int(gateway, 16) == 0:
            networks[name].append(IPv4Network((int(destination, 16).to_bytes(4, sys.byteorder), length)))
    for line in _lines("/proc/net/ipv6_route"):
        destination, prefix, _, _, gateway, _, _, _, _, name = line.split()
        if name not in networks:
            continue
        if int(prefix, 16) == 0 and int(gateway, 16):
            uplinks.setdefault(6, name)
        elif 0 < int(prefix, 16) < 128 and not int(gateway, 16) and not destination.startswith("ff"):
            networks[name].append(IPv6Network((int(destination, 16), int(prefix, 16))))
    return tuple(Link(name, tuple(found)) for name, found in networks.items()), uplinks


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii").splitlines()
    except OSError:  # no such family
        return []

"""What the checks look at: this host as it is when the look begins. Nothing is changed, and nothing is sent."""

from __future__ import annotations

import os
import pwd
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from transocks.config import Config
from transocks.rules import live, routing
from transocks.rules.loops import sender_of
from transocks.tools import FirewallError, which
from transocks.tracing.links import Links, filtered_bridges, links
from transocks.tracing.sockets import Identity
from usocksd.host.addresses import HostAddresses
from usocksd.host.sockets import Listener, listeners
from usocksd.net.address import IPAddress, without_zone
from usocksd.serve.verbs.client import Answer, Client, VerbError

_UCRED = struct.Struct("=iII")


@attrs.frozen(kw_only=True)
class Seen:
    """One look at this host."""

    config: Config
    config_file: str
    listeners: tuple[Listener, ...] | None
    """None: the kernel does not tell"""
    addresses: frozenset[IPAddress]
    here: Links
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
    counters: Mapping[str, int] = {}
    """what the kernel had dropped until the look began: see `counted`"""
    bridges: Mapping[tuple[str, int], str] = {}
    """those whose packets the rules see, by name and IP version: the setting"""
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

    def since(self, name: str) -> int:
        """By how much a counter of `counted` has grown since the look began."""
        return counted(self.proc).get(name, 0) - self.counters.get(name, 0)

    def device(self, index: int) -> str:
        """The name of an interface by its number."""
        try:
            return socket.if_indextoname(index)
        except OSError:
            return f"interface {index}"

    def is_local(self, address: IPAddress) -> bool:
        """Whether a connection to it ends on this host."""
        return without_zone(address) in self.addresses or address.is_loopback

    def listener(self, address: IPAddress, port: int) -> Listener | None:
        """Who accepts what is sent to this local address."""
        found = (listener for listener in self.listeners or () if listener.accepts(without_zone(address), port))
        return next(found, None)


def setting_of(interface: str, name: str) -> str:
    """A setting of an interface for IPv4, as sysctl(8) takes it: with / for each dot of a VLAN's name, say."""
    return f"net.ipv4.conf.{interface.replace('.', '/')}.{name}"


def look(config: Config, config_file: str) -> Seen:
    """Look at this host, as this user."""
    root = os.geteuid() == 0
    try:
        listening: tuple[Listener, ...] | None = listeners()
    except OSError:
        listening = None
    pid, uid, gid, status = _ask(config.control)
    ports = {listen.port for listen in (*config.listen, *config.listen_tproxy)}
    daemon = next((listener for listener in listening or () if listener.port in ports), None)
    if uid is None:
        uid = daemon.uid if daemon is not None else _account()
    cgroup = None
    if config.rules is not None and config.rules.cgroups and daemon is not None:  # what this process has is another
        cgroup = sender_of(daemon).cgroup
    return Seen(
        config=config, config_file=config_file, listeners=listening, addresses=HostAddresses().current, here=links(),
        daemon=Identity(uid=uid, gid=gid, mark=config.mark or 0, cgroup=cgroup),
        pid=pid, status=status, root=root, ipv6=live.uses_ipv6(), hidden_legacy=root and _hidden_legacy(),
        counters=counted(), bridges=filtered_bridges(),
        tools=frozenset(tool for tool in ("nft", "iptables", "ip6tables", "iptables-legacy") if which(tool)),
    )  # fmt: skip


def counted(proc: Path = Path("/proc")) -> dict[str, int]:
    """What this network namespace has dropped so far: the counters of /proc/net/netstat by name, and conntrack's "drop"
    and "early_drop".
    """
    found: dict[str, int] = {}
    lines = _lines(proc / "net/netstat")
    for names, values in zip(lines[::2], lines[1::2], strict=False):  # a line of names, a line of values
        pairs = zip(names.split()[1:], values.split()[1:], strict=False)
        found |= {name: int(value) for name, value in pairs}
    head, *rows = [line.split() for line in _lines(proc / "net/stat/nf_conntrack")] or [[]]
    for name in {"drop", "early_drop"} & set(head):  # hexadecimal, a line for each CPU
        found[name] = sum(int(row[head.index(name)], 16) for row in rows)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", "replace").splitlines()
    except OSError:
        return []


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


def _account() -> int | None:
    """The user that it would run as, by the name of one."""
    try:
        return pwd.getpwnam("transocks").pw_uid
    except KeyError:
        return None

"""Would rules that are not applied yet send the proxies' own connections back to transocks?

Loaded rules can be tried; these can only be read. They are our own, so a few comparisons are enough: who opens the
connection, and to which address.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import tomllib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from transocks.config import DIRECT, TransocksConfig
from transocks.rules.config import Mode
from transocks.rules.redirection import LOOPBACK, MARK, Redirection
from transocks.rules.render import excluded
from usocksd.host.addresses import HostAddresses
from usocksd.host.sockets import ListeningSocket, listeners
from usocksd.net.address import IPAddress, join_port, without_zone

_PUBLIC: tuple[IPAddress, ...] = (IPv4Address("9.9.9.9"), IPv6Address("2620:fe::fe"))
_DNS = (53, 853)
_SOCKS_PORT = 1080  # for proxies whose port is in DNS


@attrs.frozen(kw_only=True)
class Sender:
    """The properties by which rules recognise a process's connections. None if unknown: seeing processes of other users
    takes CAP_SYS_PTRACE.
    """

    uid: int | None = None
    gid: int | None = None
    cgroup: str | None = None
    marks: frozenset[int] | None = frozenset({0})
    """each connection has one of these"""
    usocksd: bool = False

    @property
    def user(self) -> str:
        """The user, for messages."""
        if self.uid is None:
            return "its user"
        with contextlib.suppress(KeyError):
            return f"user {pwd.getpwuid(self.uid).pw_name}"
        return f"user {self.uid}"


def takes(redirection: Redirection, sender: Sender, destination: IPAddress, port: int) -> bool:
    """Whether the rules of host mode redirect a connection to a destination other than this host, as far as known."""
    mine = MARK if redirection.mark is None else redirection.mark
    if port in _DNS or sender.uid in redirection.exempt_users or sender.marks in (None, {mine}):
        return False
    if redirection.users or redirection.groups or redirection.cgroups:
        inside = any(f"{sender.cgroup}/".startswith(f"{path}/") for path in redirection.cgroups)
        if not (sender.uid in redirection.users or sender.gid in redirection.groups or inside):
            return False
    if any(destination in ip_network(network) for network in excluded(redirection)):
        return False
    if redirection.to and not any(destination in network for network in redirection.to):
        return False
    return not redirection.ports or any(low <= port <= high for low, high in redirection.ports)


def loops(config: TransocksConfig, redirections: list[Redirection]) -> Iterator[str]:
    """Each loop in words, with what to do. Reads the sockets and processes of this host."""
    host = next((each for each in redirections if each.mode is Mode.HOST and not each.udp), None)
    if host is not None:
        with contextlib.suppress(OSError):  # the kernel does not tell who listens
            yield from _loops(config, host, listeners())


def _loops(config: TransocksConfig, host: Redirection, there: tuple[ListeningSocket, ...]) -> Iterator[str]:
    own = next((sender_of(listener) for listener in there if listener.port == host.port), Sender())
    own = attrs.evolve(own, marks=frozenset({config.mark or 0}))
    mark, addresses = f"{config.mark or MARK:#x}", HostAddresses().current
    exempt = f"Set mark = {mark}, or rules.exempt_users to its own user"
    examples = list(_selected(host))
    for upstream, port in dict.fromkeys(upstreams_of(config, _PUBLIC[0])):
        address = without_zone(upstream)
        shown = join_port(address, port)
        if not (address in addresses or address.is_loopback):
            if takes(host, own, address, port):
                yield (
                    f"a loop: the rules would send transocks's own connections to its upstream {shown} to transocks."
                    f" {exempt}"
                )
            continue
        listener = next((listener for listener in there if listener.accepts(address, port)), None)
        sender = sender_of(listener) if listener is not None else None
        if sender is not None and any(takes(host, sender, *where) for where in examples):
            set_mark = (
                f"Set mark = {mark} here and in what it is, if that can set one (if it does already, use --force)"
            )
            if sender.usocksd:
                set_mark = f"It is a usocksd without the mark {mark}: set mark = {mark} in both configurations"
            yield (
                f"a loop: the rules would send to transocks what the upstream {shown} on this host connects to."
                f" {set_mark}, or name {sender.user} in rules.exempt_users, if that user runs nothing else"
            )
    if goes_direct(config) and any(takes(host, own, *where) for where in examples):
        yield f"a loop: the rules would send transocks's direct connections to transocks. {exempt}"


def goes_direct(config: TransocksConfig) -> bool:
    """Whether transocks may connect to destinations directly."""
    groups = config.groups().values()
    return DIRECT in {*(route.via for route in config.route), *(group.when_all_down for group in groups)}


def upstreams_of(config: TransocksConfig, named: IPAddress) -> Iterator[tuple[IPAddress, int]]:
    """Address and port of each upstream. No name server is asked: `named` stands for upstreams with a name."""
    for group in config.groups().values():
        for proxy in group.proxy_url:
            if proxy.host == "localhost":
                yield from ((address, proxy.port) for address in LOOPBACK.values())
            else:
                yield named if isinstance(proxy.host, str) else proxy.host, proxy.port or _SOCKS_PORT


def _selected(redirection: Redirection) -> Iterator[tuple[IPAddress, int]]:
    """Examples of destinations that the rules select."""
    ports = [low for low, _ in redirection.ports] or [443]
    for address in [network[0] for network in redirection.to] or _PUBLIC:
        yield from ((address, port) for port in ports)


# ---- processes


def sender_of(listener: ListeningSocket, proc: Path = Path("/proc")) -> Sender:
    """The sender of connections of the process that listens there."""
    process = _owner(listener.inode, proc)
    if process is None:
        return Sender(uid=listener.uid, marks=None)
    gid = cgroup = None
    with contextlib.suppress(OSError, ValueError):
        gid = next(int(line.split()[2]) for line in _lines(process / "status") if line.startswith("Gid:"))
        cgroup = next((line[3:].strip("/") for line in _lines(process / "cgroup") if line.startswith("0::")), None)
    marks, usocksd = _marks_of(process)
    return Sender(uid=listener.uid, gid=gid, cgroup=cgroup, marks=marks, usocksd=usocksd)


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "surrogateescape").splitlines()


def _owner(inode: int, proc: Path) -> Path | None:
    """The process that has this socket open, if this user may see that."""
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for entry in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry) == f"socket:[{inode}]":
                        return folder
    return None


def _marks_of(process: Path) -> tuple[frozenset[int] | None, bool]:
    """The marks that a usocksd sets, by its configuration; and whether the process is a usocksd."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if not any(os.path.basename(word) == "usocksd" for word in words):
            return frozenset({0}), False  # as nearly every process
        file = next((after for word, after in pairwise(words) if word == "-f"), None)
        file = file or next((word[3:] for word in words if word.startswith("-f=")), "/etc/usocksd.toml")
        path = os.path.join(os.readlink(process / "cwd"), file)
        return _marks(tomllib.loads((process / "root" / path.lstrip("/")).read_text("utf-8-sig"))), True
    except FileNotFoundError:
        return frozenset({0}), True  # a usocksd without a configuration file
    except (OSError, ValueError, TypeError, AttributeError):
        return None, True


def _marks(config: dict[str, Any]) -> frozenset[int]:
    """The marks of all egress pools."""
    pools = config.get("egress", {})
    tables = [*pools.values(), *([] if "default" in pools else [config.get("outgoing", {})])]
    return frozenset(int(table.get("mark", 0)) for table in tables)

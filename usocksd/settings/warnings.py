"""Warnings of both daemons about settings that are valid, but do not work on this host or together.

Each check is a function that yields faults: the key, the value, and what would be right. None opens a file, binds a
socket or asks another host.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from ipaddress import IPv6Address
from pathlib import Path

import attrs

from usocksd.errors import Fault
from usocksd.net.address import IPAddress
from usocksd.net.limits import most_connections
from usocksd.net.listeners import may_be_transparent
from usocksd.settings.common import CommonConfig
from usocksd.settings.control_path import NotPrivate, check_folder
from usocksd.settings.loader import counted, show
from usocksd.settings.types import LOCALHOST


@attrs.frozen(kw_only=True)
class HostFacts:
    """The facts about this host, and this process's permissions, that checks use."""

    addresses: Collection[IPAddress]
    interfaces: Collection[str]
    ipv6: bool
    nonlocal_bind: Collection[int]
    """IP versions whose addresses can be bound even if this host lacks them: net.ipv4.ip_nonlocal_bind, ip(7)"""
    descriptors: int
    """how many files each process may have open: the hard limit, since the daemons raise the soft one"""
    cpus: int
    may_mark: bool
    """whether SO_MARK is allowed, socket(7)"""
    may_be_transparent: bool
    """whether IP_TRANSPARENT is, ip(7)"""

    @classmethod
    def here(cls, addresses: Collection[IPAddress]) -> HostFacts:
        """This host, with `addresses` as usocksd.host.addresses has them."""
        return cls(
            addresses=addresses,
            interfaces=[name for _, name in socket.if_nameindex()],
            ipv6=os.path.exists("/proc/net/if_inet6"),
            nonlocal_bind=[version for version, name in ((4, "ipv4"), (6, "ipv6")) if _nonlocal_bind(name)],
            descriptors=_hard_limit(),
            cpus=len(os.sched_getaffinity(0)),
            may_mark=_may_mark(),
            may_be_transparent=may_be_transparent(),
        )

    def has(self, address: IPAddress) -> bool:
        """Whether it is an address of this host; all of 127.0.0.0/8 is."""
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            address = IPv6Address(int(address))
        return address in self.addresses or (address.version == 4 and address.is_loopback)


def _nonlocal_bind(name: str) -> bool:
    try:
        return Path(f"/proc/sys/net/{name}/ip_nonlocal_bind").read_text("ascii").strip() == "1"
    except OSError:  # no such family
        return False


def _hard_limit() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(Path("/proc/sys/fs/nr_open").read_text("ascii")) if hard == resource.RLIM_INFINITY else hard


def _may_mark() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)
        except OSError:
            return False
    return True


def lint_common(config: CommonConfig, host: HostFacts) -> Iterator[Fault]:
    """All warnings about the settings that both daemons have."""
    for key, listen in config.listen_keys:
        if not listen.optional:
            yield from lint_address(key, listen.address, host)
    yield from _metrics(config, host)
    yield from lint_mark(config.mark_key, config.mark, host)
    yield from _numbers(config, host)
    if config.control is not None and config.control_here is not None:
        yield from _path("control", config.control, lambda: _control_problem(Path(config.control_here or "")))
    if (name := config.log.filename) is not None:
        yield from _path("log.filename", name, lambda: _log_problem(Path(name)))


def lint_address(key: str, address: IPAddress, host: HostFacts) -> Iterator[Fault]:
    """Whether a socket can be bound to it."""
    if address.version == 6 and not host.ipv6:
        problem = "this host has no IPv6, so this can't be listened on: remove it"
    elif isinstance(address, IPv6Address) and address.scope_id not in (None, *host.interfaces):
        problem = f"this host has no interface {address.scope_id}, so this can't be listened on: expected another"
    elif not (address.is_unspecified or host.has(address) or address.version in host.nonlocal_bind):
        problem = (
            "not an address of this host, so it can't be listened on: add it to an interface, remove it here, or"
            f" set net.ipv{address.version}.ip_nonlocal_bind=1"
        )
    else:
        return
    yield Fault(key, str(address), problem)


def _metrics(config: CommonConfig, host: HostFacts) -> Iterator[Fault]:
    port_key, key = f"{config.metrics_table}metrics_port", f"{config.metrics_table}metrics_address"
    port, addresses = config.metrics_port, config.metrics_address
    if port == 0:
        if addresses != LOCALHOST[:1]:
            shown = ", ".join(map(str, addresses))
            yield Fault(key, shown, "not used, since metrics_port is 0: remove it, or set a port")
        return
    for address in addresses:
        yield from lint_address(key, address, host)
        # A private monitoring network is the purpose of the setting.
        if address.is_unspecified or (address.is_global and not getattr(address, "is_site_local", False)):
            reach = "everybody who reaches this host" if address.is_unspecified else "the Internet"
            yield Fault(key, str(address), f"lets {reach} read the metrics: expected loopback or a private address")
        for other, listen in config.listen_keys:
            if listen.port == port and _overlap(address, listen.address):
                yield Fault(port_key, str(port), f"is the port of {other} ({listen}) too: expected another")
                break


def _overlap(one: IPAddress, other: IPAddress) -> bool:
    return one.version == other.version and (one == other or one.is_unspecified or other.is_unspecified)


def lint_mark(key: str, mark: int | None, host: HostFacts) -> Iterator[Fault]:
    """Whether connections can be marked so."""
    if mark is not None and not host.may_mark:
        missing = f"{_user()} may not set marks here: the daemon does not start without CAP_NET_ADMIN"
        yield Fault(key, f"{mark:#x}", missing)


def _numbers(config: CommonConfig, host: HostFacts) -> Iterator[Fault]:
    """Workers, limits and timeouts that contradict this host or each other."""
    limits, timeouts, workers = config.limits, config.timeouts, config.workers or host.cpus
    if workers > host.cpus:
        few = f"more than the CPUs, so they only take memory: expected at most {host.cpus}"
        yield Fault("workers", str(workers), few)
    if limits.connections > (most := connections_of_descriptors(config, host)):
        never = (
            f"never reached, since {workers} x {host.descriptors} file descriptors allow {most}: expected no more, or"
        )
        never += " a higher limit on open files (LimitNOFILE of the unit)"
        yield Fault("limits.connections", str(limits.connections), never)
    if 0 < limits.connections < limits.per_client:
        never = f"never reached, since limits.connections is {limits.connections}: expected less than that"
        yield Fault("limits.per_client", str(limits.per_client), never)
    idle = f"expected at most timeouts.idle, which is {timeouts.idle:g}"
    if timeouts.handshake > timeouts.idle:
        longer = f"a client that has not said where to may stay longer than a connection that is silent: {idle}"
        yield Fault("timeouts.handshake", f"{timeouts.handshake:g}", longer)
    if timeouts.half_closed > timeouts.idle:
        longer = f"a silent connection lives longer once half of it has ended: {idle}"
        yield Fault("timeouts.half_closed", f"{timeouts.half_closed:g}", longer)
    if timeouts.drain < timeouts.stop:
        sooner = "a reload ends connections sooner than a stop of the service does: expected at least timeouts.stop,"
        yield Fault("timeouts.drain", f"{timeouts.drain:g}", f"{sooner} which is {timeouts.stop:g}")


def connections_of_descriptors(config: CommonConfig, host: HostFacts) -> int:
    """How many connections the limit on open files allows, all workers together."""
    return (config.workers or host.cpus) * most_connections(host.descriptors)


def _path(key: str, shown: str, problem: Callable[[], str | None]) -> Iterator[Fault]:
    """The result of `problem` for a path; a path that can't be examined is a problem too."""
    try:
        found = problem()
    except OSError as error:
        found = f"can't be looked at: {error.strerror}"
    except NotPrivate as error:
        found = str(error)
    if found is not None:
        yield Fault(key, show(shown), found)


def _control_problem(path: Path) -> str | None:
    """Why the control socket can't be made here."""
    folder = path.parent
    check_folder(str(path))
    mode = _mode(folder)
    if not mode:
        # The daemon makes the folder, if only that is missing.
        missing = f"{folder} does not exist: create it (RuntimeDirectory= of the unit does)"
        return None if _may_create_in(folder.parent) else missing
    if not stat.S_ISDIR(mode):
        return f"{folder} is not a directory"
    if not _may_create_in(folder):
        return f"{_user()} may not create it in {folder}: give the directory to the user of the service"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return f"everybody may replace it, since {folder} is writable for all: chmod o-w {folder}"
    found = _mode(path)
    return "is there and is no socket: expected the path of one" if found and not stat.S_ISSOCK(found) else None


def _log_problem(path: Path) -> str | None:
    """Why the log file can't be written."""
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return "is a directory: expected a file"
    if mode:
        writable = os.access(path, os.W_OK, effective_ids=True)
        return None if writable else f"{_user()} may not write it: give it to the user of the service"
    if not stat.S_ISDIR(_mode(path.parent)):
        return f"{path.parent} is not a directory: create it"
    if not _may_create_in(path.parent):
        return f"{_user()} may not create it in {path.parent}: give the directory to the user of the service"
    return None


def _mode(path: Path) -> int:
    """The mode of a file; 0 if there is none. Raises OSError if that can't be found out, which pathlib's `exists` hides
    from Python 3.14 on.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _may_create_in(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def readable_by_all(path: str | os.PathLike[str]) -> bool:
    """Whether every user of this host may read this file, as far as its own mode says."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False


def first_few(faults: Iterable[Fault], most: int = 10) -> Iterator[Fault]:
    """The first faults of each list (one of 100,000 entries may have many), and the number of the others."""
    found = list(faults)
    yield from found[:most]
    if more := found[most:]:
        last = more[-1]
        others = f" ({counted(len(more) - 1, 'other')} like it)" if len(more) > 1 else ""
        yield Fault(last.path, last.value, last.expected + others)


def _user() -> str:
    uid = os.geteuid()
    return "this process, though root," if uid == 0 else f"this user (uid {uid})"

"""resolv.conf(5), read as glibc reads it, and sockets to its servers."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import frozen

from usocksd.errors import Fault
from usocksd.names.match import canonical_host
from usocksd.net.address import HostPort, numeric_address, socket_address

RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53
# Such errors may be temporary; the first query will show.
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}

MOST_SERVERS = 3
"""How many servers are used: MAXNS of resolv.conf(5)."""
_MOST_NDOTS, _LONGEST_TIMEOUT, _MOST_ATTEMPTS = 15, 30, 5
"""Higher values count as these."""


@frozen
class ResolvConf:
    """The settings of the file, with the defaults of resolv.conf(5)."""

    servers: tuple[str, ...] = ()
    """Numeric addresses, with a %zone if they have one."""
    search: tuple[str, ...] = ()
    """The search domains, canonical."""
    ndots: int = 1
    """A name with at least this many dots is first asked for as it is."""
    timeout: int = 5
    """Seconds for a server."""
    attempts: int = 2
    rotate: bool = False
    """Whether each query begins with another server."""
    faults: tuple[tuple[str, str], ...] = ()
    """Lines that were ignored, and why."""


def parse(text: str, *, hostname: str = "") -> ResolvConf:
    """`hostname` is this host's; its domain is searched if the file names none."""
    servers: list[str] = []
    faults: list[tuple[str, str]] = []
    domains = hostname.partition(".")[2].split()
    options: dict[str, str] = {}
    for line in text.splitlines():
        # (Comments begin in the first column, but no server or domain contains these characters.)
        keyword, *values = line.split("#")[0].split(";")[0].split() or [""]
        if keyword == "nameserver" and values:
            try:
                numeric_address(values[0])
            except ValueError:
                faults.append((line.strip(), "not an address"))
            else:
                servers.append(values[0])
        elif keyword in {"search", "domain"} and values:
            domains = values
        elif keyword == "options":
            options |= {name: value for name, _, value in (each.partition(":") for each in values)}
    search = []
    for domain in domains:
        try:
            # The root adds nothing to a name.
            if domain != ".":
                search.append(_domain(domain))
        except ValueError as error:
            faults.append((f"search {domain}", str(error)))
    return ResolvConf(
        tuple(dict.fromkeys(servers))[:MOST_SERVERS],
        tuple(dict.fromkeys(search)),
        ndots=_number(options, "ndots", lambda number: min(number, _MOST_NDOTS), 1),
        # The C library treats 0 as 1.
        timeout=_number(options, "timeout", lambda number: min(max(number, 1), _LONGEST_TIMEOUT), 5),
        attempts=_number(options, "attempts", lambda number: min(max(number, 1), _MOST_ATTEMPTS), 2),
        rotate="rotate" in options,
        faults=tuple(faults),
    )


def _domain(text: str) -> str:
    host = canonical_host(text)
    if not isinstance(host, str):
        raise ValueError(f"an address, not a domain: {text!r}")
    return host


def open_socket(server: HostPort, kind: int, mark: int | None = None) -> socket.socket:
    """A socket of this kind, connected (or connecting) to this server; `mark` is its SO_MARK (socket(7)).

    The unspecified address means this host, as to the C library. Raises OSError.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    try:
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        with contextlib.suppress(BlockingIOError):
            sock.connect(socket_address(*server))
    except OSError:
        sock.close()
        raise
    return sock


def lint_servers(given: Sequence[HostPort] | None, resolv_conf: Path = RESOLV_CONF) -> list[Fault]:
    """The name servers (`given`, or those of `resolv_conf`) to which this host can open no socket, and why."""
    servers = given or ()
    if given is None:
        with contextlib.suppress(OSError):
            servers = [HostPort(host, PORT) for host in parse(resolv_conf.read_text("utf-8", "replace")).servers]
    faults = []
    for server in servers:
        host = server.host
        try:
            open_socket(server, socket.SOCK_DGRAM).close()
        except OSError as error:
            if error.errno not in _NO_WAY:
                link_local = host.lower().startswith("fe80:") and "%" not in host
                why = "needs its interface, as in fe80::1%eth0" if link_local else f"can't be used: {error.strerror}"
                key = "dns.servers" if given is not None else str(resolv_conf)
                faults.append(Fault(key, f'"{host}"', f"a name server that {why}"))
    return faults


def _number(options: dict[str, str], name: str, bound: Callable[[int], int], default: int) -> int:
    with contextlib.suppress(KeyError, ValueError):
        return bound(max(int(options[name]), 0))
    return default

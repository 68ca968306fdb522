"""The types of single settings, and the tables that the configurations of both daemons have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, TypeVar

import attrs

from usocksd.log.formats import FORMATS
from usocksd.log.log import LEVELS
from usocksd.net.address import HostPort, IPAddress, join_port
from usocksd.net.keepalive import KEEPALIVE
from usocksd.settings.files import NotRegular
from usocksd.settings.loader import Faults, Invalid, Parser, current_load

T = TypeVar("T")

MOST_WORKERS = 64
_PATH_MAX, _SOCKET_PATH_MAX = 4095, 107  # the limits of open(2), and of sun_path in unix(7) without the final zero


# Single settings.


def integer(low: int, high: int) -> Parser:
    """An integer from `low` to `high`; not a boolean, and not a float, even if it is whole."""

    def parse(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return Parser(parse, f"an integer from {low} to {high}")


def text(parse: Callable[[str], object], expected: str, *, secret: bool = False) -> Parser:
    """A string, as the value that `parse` makes of it (which raises ValueError, or Invalid to say more)."""

    def parse_text(value: object) -> object:
        if type(value) is not str:
            raise ValueError
        return parse(value)

    return Parser(parse_text, expected, secret)


def one_or_more(
    parse: Callable[[str], Iterable[T]],
    expected: str,
    *,
    distinct: Callable[[T, Sequence[T]], None] = lambda _, __: None,
    empty: bool = False,
    secret: bool = False,
) -> Parser:
    """A string or a list of strings, each of which `parse`, as in `text`, turns into values: one tuple of all.
    `distinct(value, earlier)` raises Invalid if a value clashes with earlier ones; `empty`: an empty list is allowed.
    """

    def parse_all(value: object) -> tuple[T, ...]:
        found: list[T] = []

        def add(entry: str) -> None:
            for each in parse(entry):
                distinct(each, found)
                found.append(each)

        read = text(add, expected, secret=secret).read
        if type(value) is not list:
            read(value)
        elif not value and not empty:
            raise ValueError
        else:
            faults = Faults()
            for index, entry in enumerate(value):
                faults.read(f"[{index}]", read, entry)
            faults.check()
        return tuple(found)

    return Parser(parse_all, expected, secret)


def seconds(*, zero: bool = False) -> Parser:
    """A duration, integer or float; `zero`: whether 0 is one. At most a year, so that no clock overflows."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not 0 <= value <= 31_536_000 or (value == 0 and not zero):  # nan is in no range either
            raise ValueError
        return float(value)

    return Parser(parse, f"seconds, {'0 or more' if zero else 'more than 0'} and at most 31536000 (a year)")


def parse_address(value: str) -> IPAddress:
    """One IP address. An IPv4-mapped one becomes the IPv4 address. Zones (fe80::1%eth0) are not accepted."""
    address = ip_address(value)
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise Invalid("expected an IP address without a zone")
        return address.ipv4_mapped or address
    return address


def parse_zoned_address(value: str) -> IPAddress:
    """One IP address to listen on or to connect to: a link-local one of IPv6 has its interface as the zone (RFC 4007
    section 11), since it means another host, or none, on each link. By name: numbers change from one boot to the next.

    Raises ValueError, Invalid.
    """
    host, percent, zone = value.partition("%")
    address = parse_address(host)
    if not (address.version == 6 and address.is_link_local):
        if percent:
            raise Invalid("expected an IP address without a zone: only link-local ones have one")
        return address
    if not _is_interface(zone) or zone.isdigit() or "%" in zone:
        raise Invalid('expected a link-local address with the name of its interface, as in "fe80::1%eth0"')
    return IPv6Address(f"{address}%{zone}")


def split_port(value: str) -> tuple[str, int | None]:
    """The host (no brackets) and the port, if any, of "host:port", "[v6]:port", "host", "[v6]" or a bare v6.

    Raises ValueError when the brackets don't match or the port is none.
    """
    if value.startswith("["):
        match = re.fullmatch(r"\[([^\[\]]*:[^\[\]]*)\](?::([0-9]{1,5}))?", value)
    elif value.count(":") > 1:
        match = re.fullmatch(r"([0-9a-fA-F:.]+(?:%[^\[\]]*)?)()", value)
    else:
        match = re.fullmatch(r"([^:\[\]]*)(?::([0-9]{1,5}))?", value)
    if match is None:
        raise ValueError
    port = int(match[2]) if match[2] else None
    if port is not None and port > 65535:
        raise Invalid("expected a port from 0 to 65535 behind the colon")
    return match[1], port


@attrs.frozen
class ListenAddress:
    """An address to listen on; port 0 is one of the kernel's choice. str() gives "ip:port" or "[ip]:port".

    `optional`: it stands for one family of a pair (localhost, all interfaces), and a host may lack that family.
    `transparent`: with IP_TRANSPARENT, for connections that TPROXY rules bring.
    """

    address: IPAddress
    port: int
    optional: bool = False
    transparent: bool = False

    def __str__(self) -> str:
        return join_port(self.address, self.port)


ANY_ADDRESS: tuple[IPAddress, IPAddress] = (IPv4Address("0.0.0.0"), IPv6Address("::"))
LOCALHOST: tuple[IPAddress, IPAddress] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))


def check_distinct_address(address: IPAddress, earlier: Sequence[IPAddress]) -> None:
    """Two sockets can't listen on one address, nor on a family's wildcard and another address of it."""
    for other in earlier:
        if address == other:
            raise Invalid("is there already, expected every address once")
        if address.version == other.version and (address.is_unspecified or other.is_unspecified):
            wildcard = address if address.is_unspecified else other
            raise Invalid(f"clashes with {other}, expected {wildcard} alone since it covers the others")


def parse_listen_address(value: str) -> IPAddress:
    """One IP address to listen on. Raises ValueError, Invalid."""
    address = parse_zoned_address(value)
    if address.is_multicast:
        raise Invalid("is multicast, expected an address of this host")
    return address


def _listen_ip(value: str) -> list[IPAddress]:
    return [parse_listen_address(value)]


def host_ip(value: str) -> IPAddress:
    """The address of one host. Raises ValueError, Invalid."""
    return _one_host(parse_address(value))


def _one_host(address: IPAddress) -> IPAddress:
    if address.is_unspecified or address.is_multicast:
        kind = "multicast" if address.is_multicast else "the unspecified address"
        raise Invalid(f"is {kind}, expected the address of one host")
    return address


def _dns_server(value: str) -> HostPort:
    host, port = split_port(value)
    if port == 0:
        raise Invalid("expected a port from 1 to 65535 behind the colon")
    return HostPort(str(_one_host(parse_zoned_address(host))), 53 if port is None else port)


def _interface(value: str) -> str | None:
    if value == "":  # means none in the original's configuration
        return None
    if not _is_interface(value):
        raise ValueError
    return value


def _is_interface(name: str) -> bool:
    """Valid as for the kernel's dev_valid_name()."""
    return 1 <= len(name.encode()) <= 15 and name not in (".", "..") and not re.search(r"[\s/:\x00-\x1f]", name)


def _path(value: str, most: int = _PATH_MAX) -> str | None:
    if "\0" in value or len(os.fsencode(value)) > most:
        raise ValueError
    return value or None


def read_named(value: str) -> tuple[Path, bytes]:
    """The path of a file that a configuration names, relative to its folder, and the file's content. Raises Invalid."""
    load = current_load()
    path = load.folder / value
    try:
        return path, load.read(path)
    except NotRegular:
        raise Invalid("expected a regular file") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the path
        raise Invalid("expected a file that exists") from None
    except OSError as exc:
        raise Invalid(f"expected a readable file: {exc.strerror}") from None


def _readable_file(value: str) -> Path:
    return read_named(value)[0]


def none_if_empty(values: tuple[T, ...] | None) -> tuple[T, ...] | None:
    """attrs converter: an empty list means the same as an absent one, as in the originals."""
    return values or None


Port = Annotated[int, integer(1, 65535)]
ListenPort = Annotated[int, integer(0, 65535)]
"""0: of the kernel's choice"""
Count = Annotated[int, integer(0, 2**31 - 1)]
Workers = Annotated[int, integer(1, MOST_WORKERS)]
Seconds = Annotated[float, seconds()]
SecondsOrZero = Annotated[float, seconds(zero=True)]
KeepAliveSeconds = Annotated[int, integer(1, 32767)]
"""what TCP_KEEPIDLE takes, tcp(7)"""
Mark = Annotated[int, integer(1, 2**32 - 1)]
"""SO_MARK of socket(7); not 0, the mark of all other sockets: rules that exempt it would exempt everything."""
_LISTEN_IP = 'an IP address, as in "127.0.0.1" or "::1", or a list of them'
_listen_ips = partial(one_or_more, _listen_ip, _LISTEN_IP, distinct=check_distinct_address)
ListenIPs = Annotated[tuple[IPAddress, ...], _listen_ips()]
ListenIPsOrNone = Annotated[tuple[IPAddress, ...], _listen_ips(empty=True)]
"""may be an empty list"""
DnsServer = Annotated[
    HostPort,
    text(_dns_server, 'the IP address of a name server, as in "192.0.2.53", "192.0.2.53:53" or "[::1]:53"'),
]
Interface = Annotated[str | None, text(_interface, 'the name of an interface, at most 15 characters, as in "eth0"')]
SocketPath = Annotated[
    str | None, text(partial(_path, most=_SOCKET_PATH_MAX), f"the path of a socket, at most {_SOCKET_PATH_MAX} bytes")
]
ReadableFile = Annotated[Path, text(_readable_file, "the path of a readable file")]


def one_of(names: Collection[str], *, or_none: bool = False) -> Parser:
    """One of these strings; with `or_none` also "", for None."""

    def parse(value: str) -> str | None:
        if value not in names and not (or_none and value == ""):
            raise ValueError
        return value or None

    return text(parse, "one of " + ", ".join(f'"{name}"' for name in names))


# Tables that both daemons have.


@attrs.frozen(kw_only=True)
class LogConfig:
    """[log], as `usocksd.log.log.setup` takes it. None, or "" as in the originals, leaves it the choice.

    A relative `filename` is relative to the working directory.
    """

    filename: Annotated[str | None, text(_path, "the path of a file")] = None
    level: Annotated[str | None, one_of(LEVELS, or_none=True)] = None
    format: Annotated[str | None, one_of(FORMATS, or_none=True)] = None


@attrs.frozen(kw_only=True)
class DnsConfig:
    """[dns]. `servers` None: those of /etc/resolv.conf. `resolver` "system": getaddrinfo(3) instead."""

    servers: tuple[DnsServer, ...] | None = attrs.field(default=None, converter=none_if_empty)
    resolver: Annotated[str, one_of(("dns", "system"))] = "dns"

    def __attrs_post_init__(self) -> None:
        if self.resolver == "system" and self.servers is not None:
            expected = 'expected "dns" beside servers, which the system is not told of'
            raise Invalid(expected, shown='"system"', at="resolver")


@attrs.frozen(kw_only=True)
class Timeouts:
    """[timeouts], all in seconds."""

    handshake: Seconds = 10.0
    """from accept to the end of the client's request; transocks: for the proxy's part of the answer to ours"""
    connect: Seconds = 30.0
    """for resolving and connecting to the destination, all its addresses together"""
    idle: Seconds = 7440.0
    """without a byte in either direction"""
    half_closed: Seconds = 300.0
    """the same once one direction has ended"""
    keepalive: KeepAliveSeconds = KEEPALIVE
    """until a silent peer is probed; sooner if connection tracking forgets sooner"""
    stop: SecondsOrZero = 30.0
    """how long a graceful stop waits for connections to end"""
    drain: SecondsOrZero = 600.0
    """how long connections may go on in workers that a reload has replaced"""


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """[limits], over all workers together; 0 is no limit but that of the descriptors."""

    connections: Count = 0
    per_client: Count = 0
    """from one client address"""

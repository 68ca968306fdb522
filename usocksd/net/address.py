"""Addresses and ports: as values, as text, and in the form that sockets need."""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import SocketType, if_indextoname, if_nametoindex
from typing import NamedTuple, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network


def without_zone(address: IPAddress) -> IPAddress:
    """The address alone, as other hosts and the kernel's tables have it, and as IPv4 if it is IPv4-mapped."""
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return mapped
        if address.scope_id is not None:
            return IPv6Address(int(address))
    return address


@lru_cache(maxsize=8192)
def numeric_address(text: str) -> IPAddress:
    """Parse an address as inet_ntop(3) and accept(2) write it, with or without %zone; IPv4-mapped is IPv4.

    Strict, unlike `canonical_host`: for peers' addresses and for configuration. Raises ValueError.
    """
    return without_zone(ip_address(text))


@lru_cache(maxsize=8192)
def address_text(address: IPAddress) -> str:
    """The address as text. (`str` takes 5 µs for an IPv6 address, and those of a name are shown with each request.)"""
    return str(address)


def join_port(host: object, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


class HostPort(NamedTuple):
    """A numeric address, a link-local one with its zone (fe80::1%eth0), and a port: one end of a connection."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_port(self.host, self.port)


def socket_address(host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A numeric address as bind(2) and connect(2) take it: the zone of a link-local one, the name of an interface, as
    a number. Raises OSError (ENODEV) where there is no such interface.
    """
    if "%" not in host:
        return host, port
    address, _, zone = host.partition("%")
    try:
        return address, port, 0, if_nametoindex(zone)
    except OSError:  # which has no errno
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None


def bound_to(sock: SocketType) -> HostPort:
    """The socket's own address: getsockname(2), a link-local one with its zone."""
    host, port, *more = sock.getsockname()
    return HostPort(with_zone(host, more[1]) if more and more[1] else host, port)


def peer_of(sock: SocketType) -> HostPort:
    """The other end of a connected socket: getpeername(2), a link-local one with its zone."""
    host, port, *more = sock.getpeername()
    return HostPort(with_zone(host, more[1]) if more and more[1] else host, port)


def with_zone(host: str, scope: int) -> str:
    """A numeric address with the name of the interface of this number, if there is one."""
    try:
        return f"{host}%{if_indextoname(scope)}"
    except OSError:
        return host


def unmapped(host: str) -> str:
    """A numeric address as a socket gives it, with an IPv4-mapped one (::ffff:192.0.2.1, of sockets for both families)
    as IPv4: one host has one address for limits, rules, records and the PROXY protocol.
    """
    return host.removeprefix("::ffff:") if "." in host else host

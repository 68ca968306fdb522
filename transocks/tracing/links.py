"""The interfaces of this host: which networks are on them, and which of them lead out."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import attrs

from transocks.tools import FirewallError, run
from usocksd.net.address import IPAddress

_RTF_UP = 1
_SIOCGIFFLAGS, _SIOCGIFHWADDR = 0x8913, 0x8927  # linux/sockios.h
_IFF_UP = 1


@attrs.frozen
class Link:
    """An interface other than loopback, and the networks on it."""

    name: str
    networks: tuple[IPv4Network | IPv6Network, ...]

    def has(self, address: IPAddress) -> bool:
        """Whether this address is in a network here."""
        return any(address in network for network in self.networks)


@attrs.frozen
class Links:
    """All of them."""

    links: tuple[Link, ...]
    uplinks: Mapping[int, str]
    """the interface of the default route by IP version, where there is one"""
    ports: Mapping[str, list[str]] = {}
    """of each bridge"""

    def port(self, name: str) -> str:
        """Where that comes in which comes in by this interface: a port of it, if it is a bridge."""
        return next(iter(self.ports.get(name, ())), name)

    def of(self, address: IPAddress) -> Link | None:
        """The one with the network that this address is in."""
        return next((link for link in self.links if link.has(address)), None)


def links() -> Links:
    """Those of now."""
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
    return Links(tuple(Link(name, tuple(found)) for name, found in networks.items()), uplinks, bridge_ports())


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii").splitlines()
    except OSError:  # no such family
        return []


def is_up(name: str) -> bool:
    """Whether this interface is up. Raises OSError when there is none of that name."""
    flags: int = struct.unpack_from("H", _ask(name, _SIOCGIFFLAGS), 16)[0]
    return bool(flags & _IFF_UP)


def hardware_address(name: str) -> bytes:
    """That of this interface; zeros where it has none. Raises OSError when there is none of that name."""
    return _ask(name, _SIOCGIFHWADDR)[18:24]


def _ask(name: str, question: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer: bytes = fcntl.ioctl(sock, question, struct.pack("16s24x", name.encode()))
    return answer


def bridge_ports() -> dict[str, list[str]]:
    """Each bridge, and the interfaces that are its ports; nothing where there is no ip(8)."""
    try:
        found = json.loads(run("ip", "-json", "-details", "link", "show") or "[]")
    except (FirewallError, ValueError):
        return {}
    bridges = [link["ifname"] for link in found if link.get("linkinfo", {}).get("info_kind") == "bridge"]
    return {
        bridge: [link["ifname"] for link in found if link.get("master") == bridge and "UP" in link.get("flags", ())]
        for bridge in bridges
    }


def filtered_bridges() -> dict[tuple[str, int], str]:
    """Each bridge and IP version whose packets the rules see on their way through it, with the setting that says so.

    With these (br_netfilter, which Docker and Kubernetes load) TPROXY gets nothing: it gives a packet its socket too
    early, and that is lost on the way up from the bridge.
    """
    found: dict[tuple[str, int], str] = {}
    for version, tool in ((4, "iptables"), (6, "ip6tables")):
        setting = f"net.bridge.bridge-nf-call-{tool}"
        if _lines(f"/proc/sys/{setting.replace('.', '/')}") == ["1"]:
            found |= {(bridge, version): setting for bridge in bridge_ports()}
    return found

"""The interfaces of this host: which networks are on them, and which of them lead out."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import attrs

from transocks.tools import FirewallError, run_json
from usocksd.net.address import IPAddress, IPNetwork


@attrs.frozen
class Link:
    """An interface other than lo, and the networks on it."""

    name: str
    networks: tuple[IPNetwork, ...]


@attrs.frozen
class Links:
    """All of them."""

    links: tuple[Link, ...] = ()
    uplinks: Mapping[int, str] = {}
    """the interface of the default route by IP version, where there is one"""
    ports: Mapping[str, list[str]] = {}
    """of each bridge, those that are up"""
    lo_is_up: bool = True

    def port(self, name: str) -> str:
        """A port of this interface, if it is a bridge; else the interface itself."""
        return next(iter(self.ports.get(name, ())), name)

    def of(self, address: IPAddress) -> Link | None:
        """The one with the network that this address is in."""
        return next((link for link in self.links if any(address in network for network in link.networks)), None)


def links() -> Links:
    """The interfaces as they are now. Raises FirewallError, without ip(8) for example."""
    found = _ip("-details", "link", "show")
    networks: dict[str, list[IPNetwork]] = {link["ifname"]: [] for link in found if link["ifname"] != "lo"}
    uplinks: dict[int, str] = {}
    for version in (4, 6):
        for route in _ip(f"-{version}", "route", "show"):
            device = route.get("dev") or next((hop.get("dev") for hop in route.get("nexthops", ())), None)
            if device not in networks:
                continue
            if route["dst"] == "default":
                uplinks.setdefault(version, device)
            elif not {"gateway", "via"} & route.keys():
                network = ip_network(route["dst"])
                networks[device] += [] if network.is_link_local else [network]
    return Links(
        links=tuple(Link(name, tuple(there)) for name, there in networks.items()), uplinks=uplinks, ports=_ports(found),
        lo_is_up=any(link["ifname"] == "lo" and "UP" in link["flags"] for link in found),
    )  # fmt: skip


def _ports(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    bridges = [link["ifname"] for link in found if link.get("linkinfo", {}).get("info_kind") == "bridge"]
    return {
        bridge: [link["ifname"] for link in found if link.get("master") == bridge and "UP" in link["flags"]]
        for bridge in bridges
    }


def _ip(*words: str) -> list[dict[str, Any]]:
    return run_json("ip", "-json", *words) or []


def filtered_bridges() -> dict[tuple[str, int], str]:
    """Each bridge and IP version whose packets the rules see on their way through it, with the setting that says so.

    With these (br_netfilter, which Docker and Kubernetes load) TPROXY gets nothing: it gives a packet its socket too
    early, and that is lost on the way up from the bridge.
    """
    settings = {}
    for version, tool in ((4, "iptables"), (6, "ip6tables")):
        setting = f"net.bridge.bridge-nf-call-{tool}"
        path = Path(f"/proc/sys/{setting.replace('.', '/')}")
        if path.exists() and path.read_text("ascii").strip() == "1":
            settings[version] = setting
    try:
        bridges = _ports(_ip("-details", "link", "show")) if settings else {}
    except FirewallError:
        return {}
    return {(bridge, version): setting for version, setting in settings.items() for bridge in bridges}

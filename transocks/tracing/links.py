"""The interfaces and routes of this host, by ip(8): which networks are where, which links lead out."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import attrs

from transocks.tools import FirewallError, run, run_json
from usocksd.net.address import IPAddress, IPNetwork, without_zone


@attrs.frozen
class Links:
    """All interfaces."""

    networks: Mapping[str, list[IPNetwork]] = {}
    """the networks on each interface other than lo"""
    uplinks: Mapping[int, str] = {}
    """the interface of the default route by IP version, where there is one"""
    bridges: Mapping[str, list[str]] = {}
    """the ports of each bridge that are up"""
    lo_is_up: bool = True

    def port(self, name: str) -> str:
        """A port of this interface, if it is a bridge; else the interface itself."""
        return next(iter(self.bridges.get(name, ())), name)

    def of(self, address: IPAddress) -> str | None:
        """The interface with the network that this address is in."""
        return next((name for name, there in self.networks.items() if any(address in net for net in there)), None)


def links() -> Links:
    """The interfaces as they are now. Raises FirewallError, without ip(8) for example."""
    found = {link["ifname"]: link for link in _ip("-details", "link", "show")}
    networks: dict[str, list[IPNetwork]] = {name: [] for name in found if name != "lo"}
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
    bridges: dict[str, list[str]] = {
        name: [] for name, link in found.items() if link.get("linkinfo", {}).get("info_kind") == "bridge"
    }
    for name, link in found.items():
        if link.get("master") in bridges and "UP" in link["flags"]:
            bridges[link["master"]].append(name)
    return Links(networks=networks, uplinks=uplinks, bridges=bridges, lo_is_up="UP" in found["lo"]["flags"])


def _ip(*words: str) -> list[dict[str, Any]]:
    return run_json("ip", "-json", *words) or []


def filtered_bridges() -> dict[tuple[str, int], str]:
    """Each bridge and IP version whose packets the rules see on their way through it, with the setting that says so.

    With these (br_netfilter, which Docker and Kubernetes load) TPROXY does not work: it assigns the socket too early,
    and the bridge loses it.
    """
    settings = {}
    for version, tool in ((4, "iptables"), (6, "ip6tables")):
        setting = f"net.bridge.bridge-nf-call-{tool}"
        path = Path(f"/proc/sys/{setting.replace('.', '/')}")
        if path.exists() and path.read_text("ascii").strip() == "1":
            settings[version] = setting
    try:
        bridges = links().bridges if settings else {}
    except FirewallError:
        return {}
    return {(bridge, version): setting for version, setting in settings.items() for bridge in bridges}


def lookup(destination: IPAddress, *, mark: int = 0, uid: int | None = None) -> tuple[str, str | None]:
    """The interface by which a packet of this user leaves, and the gateway. Raises FirewallError without a route."""
    user = () if uid is None else ("uid", str(uid))
    (route,) = _ip("route", "get", str(without_zone(destination)), "mark", str(mark), *user)
    return route.get("dev", ""), route.get("gateway")


def policy_against(destination: IPAddress, mark: int, uid: int | None) -> str | None:
    """The rule of the routing policy for this mark or user, if without it the packet would go another way."""
    family = f"-{destination.version}"
    try:
        plain = lookup(destination)
        try:
            if lookup(destination, mark=mark, uid=uid) == plain:
                return None
        except FirewallError:
            pass
        rules, texts = _ip("-N", family, "rule", "show"), run("ip", family, "rule", "show").splitlines()
    except FirewallError:
        return None
    for rule, text in zip(rules, texts, strict=False):
        marked = int(rule.get("fwmark", "0"), 0) == mark & int(rule.get("fwmask", "0xffffffff"), 0)
        users = range(rule.get("uid_start", 0), rule.get("uid_end", -1) + 1)
        if (mark and "fwmark" in rule and marked) or uid in users:
            return f'"{" ".join(text.split())}"'
    return None

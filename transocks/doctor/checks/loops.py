"""Is the exemption in force: do the rules leave the proxies' own connections alone?"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked
from transocks.doctor.flows import EXAMPLES, LOOPBACK, Flows, Mode, comes_back, sent
from transocks.doctor.seen import Identity, Seen
from transocks.doctor.upstreams import goes_direct, proxies
from transocks.netfilter.ruleset import UNKNOWN, Unknown, Version
from transocks.netfilter.walk import walk
from transocks.sockets import Listener
from usocksd.match import IPAddress

_EXEMPT = "exempt it in the rules by its user, or by a mark that its configuration sets"


def loops(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """What transocks sends to its upstream, and what an upstream on this host sends on."""
    if seen.ruleset is None:
        yield unchecked("loops", seen.ruleset_unread, "run it as root")
        return
    if not flows.targets:
        return
    if goes_direct(seen.config):
        for version in (4, 6):
            yield from _own(seen, flows, EXAMPLES[version][0], 443, "direct connections")
    for address, port in _addresses(seen):
        yield from _own(seen, flows, address, port, "connections to its upstream")
        if seen.is_local(address):
            yield from _from_upstream_here(seen, flows, address, port)
        else:
            yield from _from_upstream_behind(seen, flows, address)


def _addresses(seen: Seen) -> Iterator[tuple[IPAddress, int]]:
    """Those of the upstreams that need no name server."""
    for proxy in proxies(seen.config):
        if proxy.host == "localhost":
            yield from ((address, proxy.port) for address in LOOPBACK.values())
        elif not isinstance(proxy.host, str):
            yield proxy.host, proxy.port
        else:
            # By name it is somewhere else: any address that the rules take for the Internet stands for it.
            yield EXAMPLES[4][0], proxy.port


def _own(seen: Seen, flows: Flows, address: IPAddress, port: int, what: str) -> Iterator[Finding]:
    if not flows.has(Mode.HOST):
        return
    way = sent(seen, seen.daemon, address, port)
    if comes_back(way, seen):
        yield fault("loops", f"transocks's own {what} are redirected to it: {way.turned}", _EXEMPT)
    elif way.turned is None and not way.certain:
        yield unchecked("loops", f"whether transocks's own {what} are exempt: {way.steps[0]}")
    else:
        yield fine("loops", f"transocks's own {what} are not redirected")


def _from_upstream_here(seen: Seen, flows: Flows, address: IPAddress, port: int) -> Iterator[Finding]:
    """An upstream on this host connects to destinations: those connections must not be redirected either."""
    listener = seen.listener(address, port)
    if listener is None or not flows.has(Mode.HOST):
        return
    version: Version
    for version in sorted({flow.version for flow in flows.best if flow.mode is Mode.HOST}):
        name = f"the upstream on this host (port {port}), IPv{version}"
        servers = [Identity(uid=listener.uid, mark=mark) for mark in _marks_of(listener, seen)]
        ways = [sent(seen, server, EXAMPLES[version][0], 443) for server in servers]
        if (looping := next((way for way in ways if comes_back(way, seen)), None)) is not None:
            yield fault("loops", f"{name}: its connections come back to transocks: {looping.turned}", _EXEMPT)
        elif all(way.certain for way in ways):
            yield fine("loops", f"{name}: its connections are not redirected")
        else:
            yield unchecked("loops", f"{name}: whether it sets the mark that is exempt", "see what it marks with")


def _from_upstream_behind(seen: Seen, flows: Flows, address: IPAddress) -> Iterator[Finding]:
    """An upstream on the inside network of a gateway: what it sends comes through the gateway's own rules."""
    assert seen.ruleset is not None
    for flow in flows.arriving:
        if flow.mode is Mode.HOST or flow.version != address.version:
            continue
        link = next((link for link in seen.links if any(address in network for network in link.networks)), None)
        if link is None or link.name == seen.uplinks.get(flow.version):
            continue
        packet = attrs.evolve(flow.packet, source=address, iif=link.name)
        way = walk(seen.ruleset, "prerouting", packet)
        if comes_back(way, seen):
            yield fault(
                "loops", f"the upstream {address} is behind {link.name}, and so redirected: {way.turned}",
                f"leave out what comes from {address}",
            )  # fmt: skip


def _marks_of(listener: Listener, seen: Seen) -> set[int | Unknown]:
    """SO_MARK of what a usocksd sends, as its configuration says; unknown for other servers, and without root."""
    pid = _owner(listener.inode, seen.proc)
    if pid is None:
        return {UNKNOWN}
    process = seen.proc / str(pid)
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if not any(os.path.basename(word) == "usocksd" for word in words):
            return {UNKNOWN}
        file = words[words.index("-f") + 1] if "-f" in words else "/etc/usocksd.toml"
        path = os.path.join(os.readlink(process / "cwd"), file)
        return _marks(tomllib.loads((process / "root" / path.lstrip("/")).read_text("utf-8-sig")))
    except FileNotFoundError:
        return {0}  # as a usocksd without a file has it
    except (OSError, ValueError, TypeError, AttributeError):
        return {UNKNOWN}


def _marks(config: dict[str, Any]) -> set[int | Unknown]:
    """Of each pool that connections may leave from."""
    pools = config.get("egress", {})
    tables = [*pools.values(), *([] if "default" in pools else [config.get("outgoing", {})])]
    return {int(table.get("mark", 0)) for table in tables}


def _owner(inode: int, proc: Path) -> int | None:
    """The process that has this socket open, if this user may see that."""
    wanted = f"socket:[{inode}]"
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                for entry in (folder / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if os.readlink(entry) == wanted:
                            return int(folder.name)
    return None

"""A resolver whose questions are redirected to the proxy that needs names."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import EXAMPLES, NOBODY, Flows, Mode, comes_back, sent
from transocks.doctor.seen import Identity, Seen
from transocks.doctor.upstreams import proxies
from transocks.netfilter.walk import Step
from usocksd.match import IPAddress

_DNS = 53
# What systemd-resolved asks in turn, where resolv.conf has only itself.
_RESOLVED = "/run/systemd/resolve/resolv.conf"
_DO = "leave out TCP port 53 in the rules, as the rule files do, or exempt transocks by its user"


def resolver(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """DNS goes over TCP when an answer is long: then the name of the upstream needs the upstream."""
    named = [proxy for proxy in proxies(seen.config) if isinstance(proxy.host, str) and proxy.host != "localhost"]
    if seen.ruleset is None:
        yield unchecked("resolver", seen.ruleset_unread, "run it as root")
        return
    if not flows.has(Mode.HOST):
        return
    # Name servers are asked by sockets without the mark.
    asker = attrs.evolve(seen.daemon, mark=0)
    redirected = [
        (server, step) for server, who in _servers(seen, asker) if (step := _redirected(seen, who, server)) is not None
    ]
    if not redirected:
        yield fine("resolver", "queries over TCP are not redirected")
        return
    server, step = redirected[0]
    text = f"queries to {server} over TCP are redirected to transocks: {step}"
    if named:
        yield fault("resolver", f"{text}; it needs them to find {named[0].host}", _DO)
    else:
        yield warning("resolver", f"{text}; names need the proxy then", _DO)


def _servers(seen: Seen, asker: Identity) -> Iterator[tuple[IPAddress, Identity]]:
    """Each name server with who asks it: transocks, or somebody on this host on its behalf."""
    own = seen.config.dns.servers
    servers = _listed("/etc/resolv.conf") if own is None else [server.address for server in own]
    for server in servers:
        if not seen.is_local(server):
            yield server, asker
            continue
        # A forwarder, that asks others as a user of its own.
        for forwarded in _listed(_RESOLVED) or [EXAMPLES[4][0]]:
            yield forwarded, NOBODY


def _listed(file: str) -> list[IPAddress]:
    try:
        lines = Path(file).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(ip_address(words[1].partition("%")[0]))
            except ValueError:
                continue
    return found


def _redirected(seen: Seen, who: Identity, server: IPAddress) -> Step | None:
    way = sent(seen, who, server, _DNS)
    return way.turned if comes_back(way, seen) else None

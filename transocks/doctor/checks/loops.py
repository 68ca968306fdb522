"""Do the rules leave the proxies' own connections alone?"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked
from transocks.doctor.host import AS_ROOT, Host
from transocks.rules.config import Mode
from transocks.rules.loops import goes_direct, upstreams_of
from transocks.tracing.fate import Reach, fate_of
from transocks.tracing.reports import TCP, UDP
from transocks.tracing.samples import EXAMPLES
from usocksd.net.address import IPAddress

_EXEMPT = "exempt it in the rules by its user, or by a mark that its configuration sets"


def loops(host: Host) -> Iterator[Finding]:
    """Connections of transocks to its upstream, and of an upstream on this host, or behind it, to destinations."""
    if host.tracer is None:
        yield unchecked("loops", host.why, AS_ROOT)
        return
    if goes_direct(host.config):
        for version in host.versions:
            yield _own(host, EXAMPLES[version][0], 443, "direct connections")
            for port in sorted({fate.sample.port for fate in host.fates if fate.redirection.udp})[:1]:
                yield _own(host, EXAMPLES[version][0], port, "direct datagrams", UDP)
    # An upstream with a name is on another host; an Internet address stands for it.
    for address, port in dict.fromkeys(upstreams_of(host.config, EXAMPLES[4][0])):
        if address.version in host.versions:
            yield _own(host, address, port, "connections to its upstream")
            yield from _from_upstream_here(host, address, port)
            yield from _from_upstream_behind(host, address)


def _own(host: Host, address: IPAddress, port: int, what: str, protocol: int = TCP) -> Finding:
    result = host.open(host.daemon, address, port, protocol)
    if result.trace is None and not result.no_route:
        return unchecked("loops", f"whether transocks's own {what} are redirected: {result.why}")
    if (rule := host.comes_back(result)) is not None:
        return fault("loops", f"transocks's own {what} are redirected to it: {rule}", _EXEMPT)
    return fine("loops", f"transocks's own {what} are not redirected")


def _from_upstream_here(host: Host, address: IPAddress, port: int) -> Iterator[Finding]:
    """An upstream on this host connects to destinations: those connections must not be redirected either."""
    listener = host.listener(address, port) if host.is_local(address) else None
    if listener is None:
        return
    sender = host.sender(listener)
    for version in sorted({f.sample.version for f in host.arrived if f.redirection.mode is Mode.HOST}):
        name = f"the upstream on this host (port {port}), IPv{version}"
        who = [attrs.evolve(sender, marks=frozenset({mark})) for mark in sender.marks or {0}]
        rule = next(filter(None, (host.comes_back(host.open(one, EXAMPLES[version][0], 443)) for one in who)), None)
        if rule is not None and sender.marks is not None:
            yield fault("loops", f"{name}: its connections come back to transocks: {rule}", _EXEMPT)
        elif rule is not None:
            yield unchecked("loops", f"{name}: whether it sets the mark that is exempt", "see what it marks with")
        else:
            yield fine("loops", f"{name}: its connections are not redirected")


def _from_upstream_behind(host: Host, address: IPAddress) -> Iterator[Finding]:
    """An upstream on the inside network of a gateway: its connections pass the gateway's own rules."""
    iif = host.links.of(address)
    if iif is None or iif == host.links.uplinks.get(address.version):
        return
    for fate in host.arrived:
        if fate.sample.iif is None or fate.sample.version != address.version:
            continue
        sample = attrs.evolve(fate.sample, source=address, iif=iif, device=host.links.port(iif))
        found = fate_of(host.try_out(sample), fate.redirection, host.names)
        if found.reach is Reach.ARRIVED:
            text = f"the upstream {address} is behind {iif}, and so redirected: {found.text}"
            yield fault("loops", text, f"leave out what comes from {address}")

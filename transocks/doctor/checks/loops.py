"""Is the exemption in force: do the rules leave the proxies' own connections alone?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import ip_address

from transocks.doctor.finding import Finding, fault, fine, unchecked
from transocks.doctor.seen import Seen
from transocks.doctor.tried import AS_ROOT, Trials
from transocks.doctor.upstreams import goes_direct, proxies
from transocks.rules.config import Mode
from transocks.rules.loops import sender_of
from transocks.tools import FirewallError
from transocks.tracing.fate import What
from transocks.tracing.samples import EXAMPLES, Sample, receive
from transocks.tracing.sockets import Identity
from usocksd.net.address import IPAddress

_EXEMPT = "exempt it in the rules by its user, or by a mark that its configuration sets"
_LOOPBACK: tuple[IPAddress, ...] = (ip_address("127.0.0.1"), ip_address("::1"))


def loops(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """What transocks sends to its upstream, and what an upstream on this host sends on."""
    if trials.tracer is None:
        yield unchecked("loops", trials.why, AS_ROOT)
        return
    versions = (4, 6) if seen.ipv6 else (4,)
    if goes_direct(seen.config):
        for version in versions:
            yield from _own(seen, trials, EXAMPLES[version][0], 443, "direct connections")
    for address, port in _addresses(seen):
        if address.version in versions:
            yield from _own(seen, trials, address, port, "connections to its upstream")
            yield from _from_upstream_here(seen, trials, address, port)
            yield from _from_upstream_behind(seen, trials, address)


def _addresses(seen: Seen) -> Iterator[tuple[IPAddress, int]]:
    """Those of the upstreams that need no name server."""
    for proxy in proxies(seen.config):
        if proxy.host == "localhost":
            yield from ((address, proxy.port) for address in _LOOPBACK)
        elif not isinstance(proxy.host, str):
            yield proxy.host, proxy.port
        else:
            # By name it is somewhere else: any address that the rules take for the Internet stands for it.
            yield EXAMPLES[4][0], proxy.port


def _own(seen: Seen, trials: Trials, address: IPAddress, port: int, what: str) -> Iterator[Finding]:
    outcome = trials.sent(seen.daemon, address, port)
    rule = trials.comes_back(outcome)
    if outcome is None or (outcome.way is None and isinstance(outcome.problem, FirewallError)):
        yield unchecked("loops", f"whether transocks's own {what} are redirected: {outcome and outcome.problem}")
    elif rule is not None:
        yield fault("loops", f"transocks's own {what} are redirected to it: {rule}", _EXEMPT)
    else:
        yield fine("loops", f"transocks's own {what} are not redirected")


def _from_upstream_here(seen: Seen, trials: Trials, address: IPAddress, port: int) -> Iterator[Finding]:
    """An upstream on this host connects to destinations: those connections must not be redirected either."""
    listener = seen.listener(address, port) if seen.is_local(address) else None
    if listener is None:
        return
    for version in sorted({one.sample.version for one in trials.arrived if one.wanted.mode is Mode.HOST}):
        name = f"the upstream on this host (port {port}), IPv{version}"
        sender = sender_of(listener, seen.proc)
        cgroup = sender.cgroup if seen.config.rules is not None and seen.config.rules.cgroups else None
        looping = None
        for mark in sender.marks or {0}:
            who = Identity(uid=listener.uid, gid=sender.gid, mark=mark, cgroup=cgroup)
            looping = looping or trials.comes_back(trials.sent(who, EXAMPLES[version][0], 443))
        if looping is not None and sender.marks is not None:
            yield fault("loops", f"{name}: its connections come back to transocks: {looping}", _EXEMPT)
        elif looping is not None:
            yield unchecked("loops", f"{name}: whether it sets the mark that is exempt", "see what it marks with")
        else:
            yield fine("loops", f"{name}: its connections are not redirected")


def _from_upstream_behind(seen: Seen, trials: Trials, address: IPAddress) -> Iterator[Finding]:
    """An upstream on the inside network of a gateway: what it sends comes through the gateway's own rules."""
    link = seen.here.of(address)
    for one in trials.arrived if link is not None and trials.tracer is not None else ():
        if one.sample.iif is None or one.sample.version != address.version:
            continue
        assert link is not None
        assert trials.tracer is not None
        if link.name == seen.here.uplinks.get(address.version):
            continue
        sample = Sample(
            mode=one.wanted.mode, destination=one.sample.destination, port=one.sample.port, source=address,
            iif=link.name, device=seen.here.port(link.name),
        )  # fmt: skip
        with contextlib.suppress(OSError):
            fate = trials.fate(receive(trials.tracer, sample), one.wanted)
            if fate.what is What.ARRIVED:
                yield fault(
                    "loops", f"the upstream {address} is behind {link.name}, and so redirected: {fate.text}",
                    f"leave out what comes from {address}",
                )  # fmt: skip

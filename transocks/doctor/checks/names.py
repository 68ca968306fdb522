"""Do questions to name servers get there? By UDP as applications ask, and by TCP as transocks may have to."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import AS_ROOT, Trials
from transocks.doctor.upstreams import proxies
from transocks.rules.config import Mode
from transocks.tracing.samples import EXAMPLES, Sample, send_datagram
from transocks.tracing.sockets import NOBODY, Identity
from usocksd.net.address import IPAddress

_DNS = 53
# What systemd-resolved asks in turn, where resolv.conf has only itself.
_RESOLVED = "/run/systemd/resolve/resolv.conf"
_DO = "leave out TCP port 53 in the rules, as the rule files do, or exempt transocks by its user"
_QUESTION = bytes.fromhex("7473 0100 0001 0000 0000 0000 00 0002 0001")  # the name servers of the root: RFC 1035
_PATIENCE = 1.5  # seconds


def resolver(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """DNS goes over TCP when an answer is long: then the name of the upstream needs the upstream."""
    if trials.tracer is None:
        yield unchecked("resolver", trials.why, AS_ROOT)
        return
    if trials.client is not None:
        return
    named = [proxy for proxy in proxies(seen.config) if isinstance(proxy.host, str) and proxy.host != "localhost"]
    servers = list(_servers(seen, attrs.evolve(seen.daemon, mark=0)))  # they are asked by sockets without the mark
    for server, who in servers:
        if (rule := trials.comes_back(trials.sent(who, server, _DNS))) is not None:
            text = f"queries to {server} over TCP are redirected to transocks: {rule}"
            if named:
                yield fault("resolver", f"{text}; it needs them to find {named[0].host}", _DO)
            else:
                yield warning("resolver", f"{text}; names need the proxy then", _DO)
            break
    else:
        yield from _by_udp(seen, trials) or [fine("resolver", "nothing on this host keeps queries from name servers")]


def _by_udp(seen: Seen, trials: Trials) -> list[Finding]:
    """Redirecting is well, where somebody answers."""
    assert trials.tracer is not None
    for server in dict.fromkeys([*_own_servers(seen), *_listed("/etc/resolv.conf")]):
        for who in (NOBODY, attrs.evolve(seen.daemon, mark=0)):
            sample = Sample(mode=Mode.HOST, destination=server, port=_DNS, who=who)
            way = send_datagram(trials.tracer, sample).way
            if way is None:
                continue
            why = trials.why_not(way)
            turn = way.turn
            if why is None and turn is not None and turn.to is not None:
                to = f"port {turn.to[1]} of {turn.to[0]}"
                why = f"{trials.names.change(turn, way)} sends it to {to}"
            if why is None:
                continue
            if send_datagram(trials.tracer, sample, _QUESTION, keep=False, answer=_PATIENCE).answered:
                continue
            do = "take that rule out, or let somebody answer there: transocks takes no UDP"
            return [fault("resolver", f"queries to {server} over UDP get no answer: {why}", do)]
    return []


def _own_servers(seen: Seen) -> list[IPAddress]:
    return [server.address for server in seen.config.dns.servers or ()]


def _servers(seen: Seen, asker: Identity) -> Iterator[tuple[IPAddress, Identity]]:
    """Each name server with who asks it: transocks, or somebody on this host on its behalf."""
    for server in _own_servers(seen) or _listed("/etc/resolv.conf"):
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

"""Do the rules bring connections to transocks, and does nothing bypass it? Judged by the traces of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from transocks.doctor.checks.network import routing
from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.host import AS_ROOT, Host, device
from transocks.rules.config import Mode
from transocks.rules.live import choose_tool
from transocks.rules.verify import differences
from transocks.tools import FirewallError
from transocks.tracing.fate import Fate, Reach
from transocks.tracing.reports import ACK, UDP
from transocks.tracing.trace import LO, ROUTING
from usocksd.net.address import join_port

_APPLY = "transocks rules apply"


def rules(host: Host) -> Iterator[Finding]:
    """Whether connections that the rules select reach our ports."""
    if host.tracer is None:
        yield unchecked("rules", host.why, AS_ROOT)
        return
    fates = host.fates
    if not fates:
        yield unchecked("rules", "nothing can be tried: no interface (ip link) or listener that rules could be for")
    unmet = [fate for fate in fates if fate.reach is Reach.PASSED and not fate.text]
    nowhere = [fate for fate in fates if fate.reach is Reach.NOWHERE]
    if len(unmet) + len(nowhere) == len(fates):  # no rule was met
        # Rules loaded by hand may be for clients; without a client's packet nothing can be said about them.
        if unmet and (host.stated or all(fate.sample.iif is None for fate in nowhere)):
            yield _missing(host, fates)
        yield from dict.fromkeys(map(_nowhere, nowhere))
        return
    firsts: dict[object, Fate] = {}
    for fate in fates:
        firsts.setdefault((fate.name, fate.reach, fate.text), fate)
    yield from dict.fromkeys(finding for fate in firsts.values() for finding in _findings(fate, host))


def _missing(host: Host, fates: Sequence[Fate]) -> Finding:
    for table in host.names.tables:
        if table.dormant and table.name.startswith("inet transocks"):
            text = f"table {table.name} is switched off (flags dormant), so its rules have no effect"
            return fault("rules", text, f"nft add table {table.name}")
    ports = " and ".join(sorted({str(fate.redirection.port) for fate in fates}))
    what = "datagrams" if all(fate.redirection.udp for fate in fates) else "connections"
    do = _APPLY if host.stated else f"{_APPLY}, with [rules] in the configuration; or load those of iptables/"
    return fault("rules", f"no rule sends {what} to transocks (port {ports})", do)


def _nowhere(fate: Fate) -> Finding:
    text = f"{fate.name}: {fate.text}"
    if fate.sample.iif is None:
        return unchecked("rules", text)
    do = "transocks doctor --client ADDRESS waits for a real one"
    return unchecked("rules", f"{text}: a client's packet can't be made here", do)


def _findings(fate: Fate, host: Host) -> Iterator[Finding]:
    name, text, port = fate.name, fate.text, fate.redirection.port
    arrived = {(other.redirection.title, other.sample.version) for other in host.arrived}
    title, version = fate.redirection.title, fate.sample.version
    other_family = (title, 10 - version) in arrived and (title, version) not in arrived  # see `both_families`
    match fate.reach:
        case Reach.ARRIVED:
            to = join_port(fate.sample.destination, fate.sample.port)
            yield fine("rules", f"{name}: {to} gets to port {port}, by {text}")
        case Reach.STOPPED:
            yield _stopped(fate, host)
        case Reach.NOWHERE:
            if fate.sample.iif is not None:
                yield _nowhere(fate)
        case Reach.PASSED:
            # Rules loaded by hand need not cover all modes.
            if text or (host.stated and not {(title, 4), (title, 6)} & arrived):
                yield _passed(fate, host)
        case Reach.DROPPED:
            if host.stated or not other_family:
                do = _APPLY if fate.by_guard else "accept it there, or remove that rule"
                yield fault("rules", f"{name}: dropped on the way: {text}", do)
        case Reach.UNTRACKED:
            do = "take such traffic out of that rule"
            yield fault("rules", f"{name}: not tracked, and so never redirected: {text}", do)
        case Reach.UNMARKED:
            do = f"take that rule out, or have it leave what has mark {fate.redirection.tproxy_mark:#x} alone"
            yield fault("rules", f"{name}: {text}", do)
        case Reach.TAKEN if fate.by_ours:
            do = f"make that rule and {_setting(fate)} use the same port"
            yield fault("rules", f"{name}: {text}, and transocks has {port}", do)
        case Reach.TAKEN:
            do = "remove that rule, or load ours at an earlier place (nft: a lower priority)"
            yield fault("rules", f"{name}: other rules take it before ours: {text}", do)


def _passed(fate: Fate, host: Host) -> Finding:
    """The sample met our rules and none redirected it; or there are no rules."""
    tproxy = fate.redirection.by_tproxy
    if tproxy and (found := _no_listener(fate, host)) is not None:
        return found
    if not fate.text:
        return _missing(host, [fate])
    to = join_port(fate.sample.destination, fate.sample.port)
    text = f"{fate.name}: {to} is not redirected; the last of our rules that it matches is {fate.text}"
    if tproxy:  # without a transparent socket, the packet goes on to the next rule
        do = f"put the port of the TPROXY rule and {_setting(fate)} ({fate.redirection.port}) together, or {_APPLY}"
        return fault("rules", f"{text}; TPROXY takes only what a transparent socket listens for", do)
    return fault("rules", text, _APPLY)


def _setting(fate: Fate) -> str:
    if fate.redirection.udp:
        return "listen_udp"
    return "listen_tproxy" if fate.redirection.by_tproxy else "listen"


def _no_listener(fate: Fate, host: Host) -> Finding | None:
    """What is wrong with the listener behind the rule, or None."""
    (address, port), udp = fate.end, fate.redirection.udp
    listener = host.listener(address, port, udp=udp)
    if listener is None:
        what, lacks = ("datagrams", "takes them") if udp else ("connections", "accepts")
        text = f"{fate.name}: the rules send {what} to {join_port(address, port)}, where nobody {lacks}"
        value = f'":{port}"' if fate.redirection.mode is Mode.GATEWAY else f'"localhost:{port}"'
        return fault("listeners", text, f"start transocks, with {_setting(fate)} = {value}")
    if fate.redirection.by_tproxy and listener.transparent is False:
        text = f"{fate.name}: the socket on port {port} lacks IP_TRANSPARENT, and TPROXY passes it over"
        return fault("listeners", text, f"name the port in {_setting(fate)}")
    return None


def _stopped(fate: Fate, host: Host) -> Finding:
    """What stops a connection that our rule has redirected."""
    trace, mode = fate.result.trace, fate.redirection.mode
    assert trace is not None
    if trace.left or (trace.stop is not None and (trace.stop.hook, trace.stop.place) == ("prerouting", ROUTING)):
        return routing(fate, host)
    text = f"{fate.name}: redirected connections are dropped: {fate.text}"
    if mode is Mode.HOST and trace.stop is not None and trace.stop.place in {LO, ROUTING}:
        return fault("lo", text, "ip link set lo up")
    what = f"TCP to port {fate.redirection.port} from {fate.sample.iif or 'lo'}"
    if fate.redirection.by_tproxy:
        what = f"what has mark {fate.redirection.tproxy_mark:#x}"
    where = "input" if trace.stop is not None and trace.stop.hook == "input" else "rules"
    return fault(where, text, f"accept {what} there, before it is dropped")


def applied(host: Host) -> Iterator[Finding]:
    """The faults of `transocks rules verify`, if the configuration has [rules]."""
    check, config = "applied rules", host.config
    if config.rules is None:
        return
    if host.tracer is None:
        yield unchecked(check, "firewall rules are shown to root only", AS_ROOT)
        return
    tool = config.rules.tool or choose_tool()
    if tool is None:
        return
    try:
        found = differences(host.redirections, tool)
    except FirewallError as error:
        yield unchecked(check, str(error))
        return
    for line, is_fault in found:
        if is_fault:
            yield fault(check, line, f"{_APPLY} (and `verify` tells the same)")
        else:
            yield warning(check, line, "see transocks rules verify")
    if not any(is_fault for _, is_fault in found):
        yield fine(check, f"as [rules] says ({tool.value})")


def listeners(host: Host) -> Iterator[Finding]:
    """Whether a listener accepts the connections that arrive, and its answer gets back; if none arrives, whether there
    is a listener where the configuration says.
    """
    if host.listeners is None:
        yield unchecked("listeners", "the kernel does not tell which sockets listen (sock_diag)")
    for fate in host.arrived:
        yield from _answer(fate, host)
    if host.arrived or host.listeners is None:
        return
    config = host.config
    of_udp = [(listen, True) for listen in config.listen_udp]
    for listen, udp in [*((listen, False) for listen in (*config.listen, *config.listen_tproxy)), *of_udp]:
        does = "takes datagrams" if udp else "accepts"
        if host.listener(listen.address, listen.port, udp=udp) is not None:
            yield fine("listeners", f"somebody {does} on {listen}")
        elif not listen.optional or listen.address.version == 4:
            yield fault("listeners", f"nobody {does} on {listen}", "start transocks")


def _answer(fate: Fate, host: Host) -> Iterator[Finding]:
    result, port = fate.result, fate.redirection.port
    if fate.redirection.udp:  # no socket gets the datagram, so nothing answers
        if host.listeners is not None:
            yield _no_listener(fate, host) or fine("listeners", f"{fate.name}: somebody takes datagrams on port {port}")
    elif result.answered:
        yield fine("listeners", f"{fate.name}: accepted on port {port}")
    elif host.listeners is not None and (found := _no_listener(fate, host)) is not None:
        yield found
    elif (why := host.stop(result.back)) is not None:
        yield fault("answers", f"{fate.name}: what transocks answers gets lost: {why}", "accept it there")
    elif host.client is not None and result.back is None:
        yield unchecked("listeners", f"{fate.name}: no answer was seen")
    elif fate.redirection.mode is not Mode.TPROXY or (fate.sample.iif, fate.sample.version) not in host.bridges:
        yield fault(
            "listeners", f"{fate.name}: the socket on port {port} does not answer",
            "look whether transocks runs well (transocks status); restart it if it does not answer",
        )  # fmt: skip


def both_families(host: Host) -> Iterator[Finding]:
    """Rules for one family let the other bypass transocks, if this host has both."""
    for fate in host.arrived:
        title, other = fate.redirection.title, 10 - fate.sample.version
        theirs = [f for f in host.fates if (f.redirection.title, f.sample.version) == (title, other)]
        name = f"{title}: IPv{other}"
        if not theirs or any(f.reach is Reach.ARRIVED for f in theirs):
            continue
        first, trace = theirs[0], theirs[0].result.trace
        if first.reach is Reach.NOWHERE and first.sample.iif is None:
            yield fine("families", f"{name} has no rules that are met, and no way out either")
        elif first.reach is Reach.DROPPED and not host.stated:
            yield fine("families", f"{name} has no rules, and is dropped: {first.text}")
        elif first.reach is Reach.PASSED and not first.text and trace is not None:
            text = f"{name} has no rules, and goes out by {device(trace.oif)}, past transocks"
            yield fault("families", text, f"load the rules for IPv{other} too, or take its default route away")


def _connections(host: Host) -> list[Fate]:
    """The samples of TCP that arrived."""
    return [fate for fate in host.arrived if not fate.redirection.udp]


def old_connections(host: Host) -> Iterator[Finding]:
    """Rules must not redirect packets of a connection that began before they were loaded."""
    if host.client is not None:
        return
    for fate in _connections(host):
        trace, tproxy = host.try_out(fate.sample, flags=ACK).trace, fate.redirection.mode is Mode.TPROXY
        if trace is None:
            continue
        changes = [trace.turn] if trace.turn is not None and trace.destination[1] == fate.redirection.port else []
        if tproxy:
            changes += [mark for mark in trace.marks if mark.after == fate.redirection.tproxy_mark]
        for change in changes[:1]:
            which = "all" if tproxy else "those that nothing tracked before"
            yield warning(
                "old connections",
                f"{fate.name}: to load these rules ends old connections ({which}), since they take the middle of one"
                f" too: {host.names.of(change.cause)}",
                "limit them to first segments: tcp flags & (fin | syn | rst | ack) == syn (iptables: --syn)",
            )  # fmt: skip


def quic(host: Host) -> Iterator[Finding]:
    """Browsers prefer HTTP/3, which is UDP and is not proxied."""
    if host.client is not None:
        return
    for fate in _connections(host):
        if fate.sample.port != 443:
            continue
        trace = host.try_out(attrs.evolve(fate.sample, protocol=UDP)).trace
        if (why := host.stop(trace)) is not None:
            yield fine("quic", f"{fate.name}: refused: {why}")
        elif trace is not None and trace.left:
            yield warning(
                "quic", f"{fate.name}: UDP to port 443 (HTTP/3) goes out past transocks",
                "reject it where TCP is redirected, as the rule files do, so that browsers take TCP",
            )  # fmt: skip

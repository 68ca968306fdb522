"""Do the rules bring connections to transocks, and does nothing go past it? By what the kernel did with samples."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen, setting_of
from transocks.doctor.tried import AS_ROOT, Trials, Tried
from transocks.rules.config import Mode
from transocks.rules.live import Routing
from transocks.rules.verify import dormant
from transocks.tracing.events import ACK
from transocks.tracing.fate import What, is_guard, is_ours
from transocks.tracing.samples import UDP, try_out
from usocksd.net.address import join_port

_APPLY = "transocks rules apply"
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EADDRNOTAVAIL}


def rules(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Whether the connections that the rules are for get to our ports."""
    if trials.tracer is None:
        yield unchecked("rules", trials.why, AS_ROOT)
        return
    results = trials.results
    if not trials.arrived and all(not one.fate.text or one.fate.what is What.NOWHERE for one in results):
        # Where the rules may be for clients and nothing of these could be tried, that none is met here means nothing.
        told = trials.stated or all(one.sample.iif is None or one.fate.what is not What.NOWHERE for one in results)
        if told and any(one.fate.what is What.PASSED for one in results):
            yield _missing(seen, trials)
        yield from dict.fromkeys(_nowhere(one) for one in results if one.fate.what is What.NOWHERE)
        return
    known: set[object] = set()
    for one in results:
        key = one.name, one.fate.what, one.fate.text
        if key not in known:
            known.add(key)
            yield from _of(one, seen, trials)


def _missing(seen: Seen, trials: Trials) -> Finding:
    for table in dormant(trials.names.listing):
        text = f"table inet {table} is switched off (flags dormant): none of its rules is asked"
        return fault("rules", text, f"nft add table inet {table}")
    ports = " and ".join(sorted({str(one.wanted.port) for one in trials.results}))
    do = _APPLY if trials.stated else f"{_APPLY}, with [rules] in the configuration; or load those of iptables/"
    return fault("rules", f"none sends connections to transocks (port {ports})", do)


def _nowhere(one: Tried) -> Finding:
    text = f"{one.name}: {one.fate.text}"
    if one.sample.iif is None:
        return unchecked("rules", text)
    return unchecked(
        "rules",
        f"{text}: a client's packet can't be made here",
        "transocks doctor --client ADDRESS waits for a real one",
    )


def _of(one: Tried, seen: Seen, trials: Trials) -> Iterator[Finding]:
    name, what, text = one.name, one.fate.what, one.fate.text
    arrived = {tried.wanted.mode for tried in trials.arrived}
    match what:
        case What.ARRIVED:
            to = join_port(one.sample.destination, one.sample.port)
            yield fine("rules", f"{name}: {to} gets to port {one.wanted.port}, by {text}")
        case What.STOPPED:
            yield _stopped(one, seen)
        case What.NOWHERE:
            if one.sample.iif is not None:
                yield _nowhere(one)
        case What.PASSED:
            # For one family only is another check's; where the rules are not stated, they need not be for all modes.
            if text or (trials.stated and one.wanted.mode not in arrived):
                yield _passed(one, seen, trials)
        case What.DROPPED:
            families = {tried.sample.version for tried in trials.arrived if tried.wanted.mode is one.wanted.mode}
            if trials.stated or not families or one.sample.version in families:
                do = _APPLY if is_guard(one.fate.rule) else "let it pass there, or remove that rule"
                yield fault("rules", f"{name}: dropped on the way: {text}", do)
        case What.UNTRACKED:
            yield fault(
                "rules", f"{name}: not tracked, and so never redirected: {text}", "take such traffic out of that rule"
            )
        case What.ELSEWHERE if one.fate.rule is not None and is_ours(one.fate.rule, trials.names):
            setting = "listen_tproxy" if one.wanted.mode is Mode.TPROXY else "listen"
            yield fault(
                "rules", f"{name}: {text}, and transocks has {one.wanted.port}", f"put that rule and {setting} together"
            )
        case What.ELSEWHERE if one.wanted.mode is Mode.TPROXY and "makes mark" in text:
            yield fault(
                "rules", f"{name}: {text}",
                f"take that rule out, or have it leave what has mark {one.wanted.tproxy_mark:#x} alone",
            )  # fmt: skip
        case _:
            yield fault(
                "rules", f"{name}: others' rules take it before ours: {text}",
                "remove that rule, or load ours at an earlier place (nft: a lower priority)",
            )  # fmt: skip


def _passed(one: Tried, seen: Seen, trials: Trials) -> Finding:
    """Our rules have seen it, and let it go; or there are none."""
    if one.wanted.mode is Mode.TPROXY and (found := _no_listener(one, seen)) is not None:
        return found
    if not one.fate.text:
        return _missing(seen, trials)
    to = join_port(one.sample.destination, one.sample.port)
    text = f"{one.name}: {to} goes past transocks: {one.fate.text} is the last of our rules that it meets"
    if one.wanted.mode is Mode.TPROXY:  # without a socket that is transparent it goes on to the next rule
        do = f"put the port of the TPROXY rule and listen_tproxy ({one.wanted.port}) together, or {_APPLY}"
        return fault("rules", f"{text}; TPROXY takes only what a transparent socket listens for", do)
    return fault("rules", text, _APPLY)


def _no_listener(one: Tried, seen: Seen) -> Finding | None:
    """None if there is one that will do."""
    address, port = one.end
    listener = seen.listener(address, port)
    if listener is None:
        setting = "listen_tproxy" if one.wanted.mode is Mode.TPROXY else "listen"
        wanted = f'":{port}"' if one.wanted.mode is Mode.GATEWAY else f'"localhost:{port}"'
        return fault(
            "listeners", f"{one.name}: the rules send connections to {join_port(address, port)}, where nobody accepts",
            f"start transocks, with {setting} = {wanted}",
        )  # fmt: skip
    if one.wanted.mode is Mode.TPROXY and listener.transparent is False:
        return fault(
            "listeners", f"{one.name}: the socket on port {port} lacks IP_TRANSPARENT, and TPROXY passes it over",
            "name the port in listen_tproxy",
        )  # fmt: skip
    return None


def _stopped(one: Tried, seen: Seen) -> Finding:
    """Behind the rule that has it for us."""
    way = one.outcome.way
    assert way is not None
    if way.routed_nowhere or way.left:
        return _routing(one, seen)
    where = "input" if way.at[0] == "input" else "rules"
    if one.wanted.mode is Mode.TPROXY:
        do = f"accept what has mark {one.wanted.tproxy_mark:#x} there, before it is dropped"
    else:
        on = "lo" if one.wanted.mode is Mode.HOST else one.sample.iif
        do = f"accept TCP to port {one.wanted.port} from {on} there, before it is dropped"
    if way.lost is not None and one.wanted.mode is Mode.HOST:
        return fault("lo", f"{one.name}: redirected connections get lost {one.fate.text}", "ip link set lo up")
    return fault(where, f"{one.name}: redirected connections are dropped: {one.fate.text}", do)


def _routing(one: Tried, seen: Seen) -> Finding:
    """The kernel's routing dropped it, or sent it away: a lookup tells why."""
    way, iif, version = one.outcome.way, one.sample.iif or "", one.sample.version
    assert way is not None
    if one.wanted.mode is Mode.GATEWAY and way.destination[0].is_loopback:
        return fault(
            "route_localnet", f"DNAT to {way.destination[0]} from {iif}, and route_localnet is 0: dropped",
            f'use REDIRECT and listen = ":{one.wanted.port}"',
        )  # fmt: skip
    mark = one.wanted.tproxy_mark
    strict = max(seen.interface_number("ipv4", name, "rp_filter") for name in ("all", iif))
    believed = seen.interface_number("ipv4", "all", "src_valid_mark") or seen.interface_number(
        "ipv4", iif, "src_valid_mark"
    )
    if version == 4 and way.routed_nowhere and believed and one.wanted.mode is Mode.TPROXY:
        return fault(
            "reverse path", f"src_valid_mark=1: what has mark {mark:#x} is dropped, its source is looked up with it",
            f"sysctl {setting_of('all', 'src_valid_mark')}=0 {setting_of(iif, 'src_valid_mark')}=0",
        )  # fmt: skip
    if version == 4 and way.routed_nowhere and strict == 1:
        return fault(
            "reverse path", f"clients behind {iif} are dropped, their source is not believed (rp_filter={strict})",
            f"sysctl {setting_of(iif, 'rp_filter')}=2, or route the clients' network back through {iif}",
        )  # fmt: skip
    if one.wanted.mode is not Mode.TPROXY:
        return fault("routes", f"{one.name}: it is lost {one.fate.text}", "look at ip route and ip rule")
    routing = Routing(mark, version == 6)
    by_hand = "; ".join(map(routing.by_hand, ("rule", "route")))
    return fault(
        "routes", f"{one.name}: what TPROXY takes (mark {mark:#x}) is not routed to this host",
        f"{_APPLY}, or by hand: {by_hand}" if seen.config.rules is not None else by_hand,
    )  # fmt: skip


def answers(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Whether a listener accepts connections that arrive, and its answer gets back."""
    for one in trials.arrived:
        port = one.wanted.port
        if one.outcome.answered:
            yield fine("listeners", f"{one.name}: accepted on port {port}")
        elif (found := _no_listener(one, seen)) is not None:
            yield found
        elif (why := trials.why_not(one.outcome.back)) is not None:
            yield fault("answers", f"{one.name}: what transocks answers gets lost: {why}", "let it pass there")
        elif trials.client is not None and one.outcome.back is None:
            yield unchecked("listeners", f"{one.name}: no answer was seen")
        elif one.wanted.mode is not Mode.TPROXY or (one.sample.iif, one.sample.version) not in seen.bridges:
            yield fault(
                "listeners", f"{one.name}: the socket on port {port} does not answer",
                "look whether transocks runs well (transocks status); restart it if it does not answer",
            )  # fmt: skip


def both_families(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Rules for one family only let the other pass by, if this host has it."""
    for one in trials.arrived:
        mode, other = one.wanted.mode, 10 - one.sample.version
        mine = [t for t in trials.results if (t.wanted.mode, t.sample.version) == (mode, other)]
        name = f"{mode.value}: IPv{other}"
        if not mine or any(t.fate.what is What.ARRIVED for t in mine):
            continue
        fate = mine[0].fate
        way = mine[0].outcome.way
        if fate.what is What.NOWHERE and mine[0].sample.iif is None:
            yield fine("families", f"{name} has no rules that are met, and no way out either")
        elif fate.what is What.DROPPED and not trials.stated:
            yield fine("families", f"{name} has no rules, and is dropped: {fate.text}")
        elif fate.what is What.PASSED and not fate.text and way is not None:
            yield fault(
                "families", f"{name} has no rules, and goes out by {seen.device(way.oif)}, past transocks",
                f"load the rules for IPv{other} too, or take its default route away",
            )  # fmt: skip


def way_out(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Where an application wants to go there has to be a route, or no rule is asked, though what they redirect does not
    take it. A host that reaches nothing but its proxy often has none.
    """
    used = {n.version for link in seen.here.links for n in link.networks if not n.is_link_local}
    mine = [one for one in trials.results if one.wanted.mode is Mode.HOST and one.sample.version in used]
    missing = {
        one.sample.version: f"no route to {one.sample.destination}, so no rule is asked ({problem.strerror})"
        for one in mine
        if isinstance(problem := one.outcome.problem, OSError)
        and one.outcome.way is None
        and problem.errno in _NO_ROUTE
    }
    versions = {one.sample.version for one in mine}
    if missing and (4 in missing or set(missing) == versions):  # without IPv6 applications take IPv4
        version = min(missing)
        say = fault if set(missing) == versions else warning
        device = next((link.name for link in seen.here.links if any(n.version == version for n in link.networks)), "lo")
        yield say(
            "routes", f"IPv{version}: {missing[version]}",
            f"ip -{version} route add default dev {device}: what is redirected does not go there",
        )  # fmt: skip
    elif mine and not missing:
        yield fine("routes", "there is one to where the redirected connections of this host mean to go")


def old_connections(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Rules must not take packets from the middle of a connection that they have not seen begin."""
    if trials.tracer is None or trials.client is not None:
        return
    for one in trials.arrived:
        way = try_out(trials.tracer, one.sample, flags=ACK).way
        turn = way.turn if way is not None else None
        taken = way is not None and any(mark.after == one.wanted.tproxy_mark for mark in way.marks)
        if way is not None and (
            (turn is not None and turn.to is not None and turn.to[1] == one.wanted.port)
            or (one.wanted.mode is Mode.TPROXY and taken)
        ):
            which = "all" if one.wanted.mode is Mode.TPROXY else "those that nothing tracked before"
            change = turn or next(way.marks)
            yield warning(
                "old connections",
                f"{one.name}: to load these rules ends old connections ({which}), since they take the middle of one"
                f" too: {trials.names.change(change, way)}",
                "limit them to first segments: tcp flags & (fin | syn | rst | ack) == syn (iptables: --syn)",
            )  # fmt: skip


def quic(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Browsers prefer HTTP/3, which is UDP and is not proxied."""
    if trials.tracer is None:
        return
    for one in trials.arrived:
        if one.sample.port != 443 or trials.client is not None:
            continue
        way = try_out(trials.tracer, one.sample, protocol=UDP).way
        if (why := trials.why_not(way)) is not None:
            yield fine("quic", f"{one.name}: refused: {why}")
        elif way is not None and way.left:
            yield warning(
                "quic", f"{one.name}: UDP to port 443 (HTTP/3) goes out past transocks",
                "reject it where TCP is redirected, as the rule files do, so that browsers take TCP",
            )  # fmt: skip

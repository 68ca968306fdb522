"""Are the upstreams there, and do they speak what the configuration says?"""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.doctor.upstreams import Greeted, begins_with_header, describe, greet_all


def upstreams(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """A greeting to each, at each of its addresses; one that answers at none of them is a fault."""
    greeted = greet_all(seen, trials)
    for proxy in dict.fromkeys(one.proxy for one in greeted):
        ours = [one for one in greeted if one.proxy == proxy]
        answering = any(one.problem is None and not one.redirected for one in ours)
        for one in ours:
            if one.redirected:
                yield unchecked("upstream", f"{describe(one)}: connections to it are redirected to transocks")
            elif one.problem is None:
                if one.fits is not None:
                    yield _large(one, seen)
                    continue
                if one.doubt is not None:
                    yield unchecked("upstream", f"{describe(one)}: {one.doubt}")
                    continue
                yield fine("upstream", f"{describe(one)} answers, in {one.seconds * 1000:.0f} ms")
            elif trials.tracer is None:
                # Nor is it known then whether the greeting got there.
                yield unchecked(
                    "upstream", f"{describe(one)}: {one.problem}; or this user's connections are redirected",
                    "run it as root",
                )  # fmt: skip
            else:
                say = warning if answering else fault
                if one.cause is not None:
                    yield say("upstream", f"{describe(one)}: {one.problem}: {one.cause}", _let_out(one, seen))
                else:
                    yield say("upstream", f"{describe(one)}: {one.problem}", _do(one, seen))


def _let_out(one: Greeted, seen: Seen) -> str:
    who = f"mark {seen.daemon.mark:#x}" if seen.daemon.mark else f"user {seen.daemon.uid or 0}"
    return f"take that out, or exempt what transocks sends ({who}) before it"


def _large(one: Greeted, seen: Seen) -> Finding:
    """An MTU blackhole: a link on the way carries less than ours, and the ICMP that says so does not come back."""
    text = f"{describe(one)}: small packets get there, large ones don't (an MTU blackhole)"
    if not one.fits or one.address is None:
        return fault("upstream", text, "sysctl net.ipv4.tcp_mtu_probing=1; and look for what drops ICMP on the way")
    try:
        route = seen.route(one.address, mark=seen.daemon.mark)
    except OSError:
        return fault("upstream", text, f"lower the MTU towards it to {one.fits}")
    via = f"via {route.gateway} " if route.gateway else ""
    do = f"ip route replace {one.address} {via}dev {route.device} mtu {one.fits}"
    return fault("upstream", f"{text}; {one.fits} bytes do", do)


def _do(one: Greeted, seen: Seen) -> str:
    problem, proxy = one.problem or "", one.proxy
    if one.address is None:
        return "see that its name resolves on this host, or put its address into proxy_url"
    if "no credentials" in problem or (" 407" in problem and proxy.username is None):
        return "put user and password into proxy_url (percent-encoded)"
    if "other than a user name" in problem:
        return "take user and password out of proxy_url, if it wants none"
    if "user name" in problem or " 407" in problem:
        return "put user and password in proxy_url right (percent-encoded)"
    if "SOCKS" in problem or "HTTP" in problem:
        return f"look what listens there: {proxy} is to be a proxy of this kind"
    if "closed within" in problem or "reset by peer" in problem:
        # It is there, and will have none of this.
        if begins_with_header(proxy, seen.config):
            doubt = "whether it expects a PROXY header on this port, and trusts this host's address (its `trusted`)"
        else:
            doubt = "whether it admits this host's address (its `allow_from`), or expects a PROXY header on this port"
        return f"look into its log; {doubt}"
    return "start it, or put proxy_url right; look for a firewall on the way"

"""Are the upstreams there, and do they speak what the configuration says?"""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import Flows
from transocks.doctor.seen import Seen
from transocks.doctor.upstreams import Greeted, begins_with_header, describe, greet_all


def upstreams(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """A greeting to each, at each of its addresses; one that answers at none of them is a fault."""
    greeted = greet_all(seen)
    for proxy in dict.fromkeys(one.proxy for one in greeted):
        ours = [one for one in greeted if one.proxy == proxy]
        answering = any(one.problem is None and not one.redirected for one in ours)
        for one in ours:
            if one.redirected:
                yield unchecked("upstream", f"{describe(one)}: connections to it are redirected to transocks")
            elif one.problem is None:
                if one.doubt is not None:
                    yield unchecked("upstream", f"{describe(one)}: {one.doubt}")
                    continue
                yield fine("upstream", f"{describe(one)} answers, in {one.seconds * 1000:.0f} ms")
            elif seen.ruleset is None:
                # Nor is it known then whether the greeting got there.
                yield unchecked(
                    "upstream", f"{describe(one)}: {one.problem}; or this user's connections are redirected",
                    "run it as root",
                )  # fmt: skip
            else:
                say = warning if answering else fault
                yield say("upstream", f"{describe(one)}: {one.problem}", _do(one, seen))


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

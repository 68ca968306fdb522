"""Is what `transocks rules` would apply in force, as it would apply it?"""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import AS_ROOT, Trials
from transocks.rules.examine import examine
from transocks.rules.live import choose_tool, has_ipv6
from transocks.rules.redirection import redirections_of
from transocks.tools import FirewallError

_NAME = "applied rules"
# Of what else `verify` tells there is a check of its own, which sees rules by hand too.
_OTHERWISE = ("nobody listens on ",)


def applied(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """`transocks rules verify`, where the configuration has [rules]."""
    config = seen.config
    if config.rules is None:
        return
    if not seen.root:
        yield unchecked(_NAME, "firewall rules are shown to root only", AS_ROOT)
        return
    tool = config.rules.tool or choose_tool()
    if tool is None:
        return
    try:
        wanted = redirections_of(config.rules, config.listen, config.listen_tproxy, config.mark)
        report = examine(wanted, tool, ipv6=has_ipv6(), trying=False)
    except FirewallError as error:
        yield unchecked(_NAME, str(error))
        return
    faults = [line for line in report.faults if not line.startswith(_OTHERWISE)]
    for line in faults:
        yield fault(_NAME, line, "transocks rules apply (and `verify` tells the same)")
    for line in report.notes:
        yield warning(_NAME, line, "see transocks rules verify")
    if not faults:
        yield fine(_NAME, f"as [rules] says ({tool.value})")

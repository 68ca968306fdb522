"""Rules of others that take connections before those of [rules] do: tried out, not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transocks.rules.config import Tool
from transocks.rules.live import has_legacy, iptables, routed_versions
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError
from transocks.tracing.fate import IPTABLES_PLACE, What, fate_of, is_guard, is_ours
from transocks.tracing.links import links
from transocks.tracing.names import RuleNames
from transocks.tracing.path import Cause
from transocks.tracing.samples import samples, try_out
from transocks.tracing.tracer import Tracer

_UNKNOWN = "whether others take connections first can't be tried out"
_TAKEN = {What.DROPPED, What.TAKEN, What.UNMARKED, What.UNTRACKED}


def shadows(wanted: Sequence[Redirection], tool: Tool, *, well: bool) -> Iterator[tuple[str, bool]]:
    """A line for each, and whether it is a fault. `well`: there is no other fault that might explain what happens.

    Something that can't be tried is reported, but is no fault.
    """
    names = RuleNames()
    try:
        with Tracer() as tracer:
            here = links()
            for redirection in wanted:
                tried = samples(redirection, here, routed_versions())
                fates = [fate_of(try_out(tracer, sample), redirection, names) for sample in tried]
                for fate in fates:
                    to = f"connections to port {fate.sample.port}"
                    ours = is_guard(fate.rule) or (fate.rule is not None and is_ours(fate.rule, names))
                    if fate.what in _TAKEN and not ours:
                        yield f"{fate.text}: it has {to} before our rules do", True
                    elif fate.what is What.PASSED and not fate.text and well and tool is Tool.IPTABLES:
                        version = fate.sample.version
                        if has_legacy(iptables(version)):
                            cause = Cause(None, version, *IPTABLES_PLACE[redirection.mode])
                            yield f"{names.of(cause)}: {to} do not get to our rules", True
                if fates and all(fate.what is What.NOWHERE for fate in fates):
                    yield f"{_UNKNOWN} ({redirection.mode.value}): {fates[0].text}", False
    except FirewallError as error:
        yield f"{_UNKNOWN}: {error}", False

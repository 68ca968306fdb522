"""What takes connections before the rules of [rules] do: tried out, not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transocks.rules.config import Mode, Tool
from transocks.rules.live import has_legacy, iptables, uses_ipv6
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError
from transocks.tracing.fate import What, fate_of, is_guard, is_ours
from transocks.tracing.links import links
from transocks.tracing.names import RuleNames
from transocks.tracing.samples import samples, try_out
from transocks.tracing.table import Tracer

_TAKEN = {What.DROPPED, What.ELSEWHERE, What.UNTRACKED, What.ENDED}


def shadows(wanted: Sequence[Redirection], tool: Tool, *, well: bool) -> Iterator[tuple[str, bool]]:
    """A line for each, and whether it is a fault. `well`: there is no other fault that might explain what happens.

    Something that can't be tried is reported, but is no fault.
    """
    versions = (4, 6) if uses_ipv6() else (4,)
    names = RuleNames()
    try:
        with Tracer() as tracer:
            here = links()
            for w in wanted:
                outcomes = [try_out(tracer, sample) for sample in samples(w, here, versions)]
                for outcome in outcomes:
                    fate = fate_of(outcome, w, names)
                    to = f"connections to port {outcome.sample.port}"
                    ours = is_guard(fate.rule) or (fate.rule is not None and is_ours(fate.rule, names))
                    if fate.what in _TAKEN and not ours:
                        yield f"{fate.text}: it has {to} before our rules do", True
                    elif fate.what is What.PASSED and not fate.text and well and outcome.way is not None:
                        table = "mangle" if w.mode is Mode.TPROXY else "nat"
                        hook = "output" if w.mode is Mode.HOST else "prerouting"
                        if tool is Tool.IPTABLES and has_legacy(iptables(outcome.sample.version == 6)):
                            yield f"{names.gap(hook, table, outcome.way)}: {to} do not get to our rules", True
                if outcomes and all(outcome.way is None for outcome in outcomes):
                    why = outcomes[0].why
                    yield f"whether others take connections first can't be tried out ({w.mode.value}): {why}", False
    except FirewallError as error:
        yield f"whether others take connections first can't be tried out: {error}", False

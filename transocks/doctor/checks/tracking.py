"""Connection tracking, which REDIRECT needs: without an entry no original destination is known."""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.flows import Flows, Mode
from transocks.doctor.seen import Seen

_FULL, _FILLING = 0.95, 0.75


def conntrack(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """How full the table is, and whether it was too full before."""
    count, most = seen.number("net.netfilter.nf_conntrack_count"), seen.number("net.netfilter.nf_conntrack_max")
    if count is None or most is None:
        if flows.has(Mode.HOST, Mode.GATEWAY):
            yield fault("conntrack", "this kernel does not track connections", "load nf_conntrack")
        return
    # 0 is no limit.
    share = count / most if most else 0.0
    seen_text = f"{count} of {most} entries ({share:.0%})" if most else f"{count} entries, no limit"
    do = f"sysctl net.netfilter.nf_conntrack_max={max(2 * most, 4 * count)} (of the host: containers can't set it)"
    dropped, early = _statistic(seen, "drop"), _statistic(seen, "early_drop")
    if share >= _FULL:
        yield fault("conntrack", f"{seen_text}: the table is full, new connections are dropped", do)
    elif share >= _FILLING:
        yield warning("conntrack", f"{seen_text}: the table fills up", do)
    elif dropped or early:
        yield warning(
            "conntrack", f"{seen_text} now, but it was full: {dropped} connections dropped, {early} pushed out", do
        )
    else:
        yield fine("conntrack", seen_text)


def _statistic(seen: Seen, name: str) -> int:
    """The sum over all CPUs; hexadecimal, a line for each."""
    lines = (seen.read("net/stat/nf_conntrack") or "").splitlines()
    if len(lines) < 2 or name not in lines[0].split():
        return 0
    column = lines[0].split().index(name)
    return sum(int(line.split()[column], 16) for line in lines[1:])

"""Connection tracking, which REDIRECT needs: without an entry no original destination is known."""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.rules.config import Mode
from usocksd.net.keepalive import CONNTRACK_TIMERS, tcp_timers

_FULL, _FILLING = 0.95, 0.75
_TIMERS = ("established", "fin_wait", "close_wait")
_SHORT = 10


def conntrack(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """How full the table is, whether it dropped anything while this looked, and how soon it forgets."""
    count, most = seen.number("net.netfilter.nf_conntrack_count"), seen.number("net.netfilter.nf_conntrack_max")
    if count is None or most is None:
        return  # nothing is tracked, and so nothing redirected: see `rules`
    # 0 is no limit.
    share = count / most if most else 0.0
    text = f"{count} of {most} entries ({share:.0%})" if most else f"{count} entries, no limit"
    do = f"sysctl net.netfilter.nf_conntrack_max={max(2 * most, 4 * count)} (of the host: containers can't set it)"
    dropped, early = seen.since("drop"), seen.since("early_drop")
    if share >= _FULL or dropped:
        yield fault("conntrack", f"{text}: the table is full, new connections are dropped", do)
    elif share >= _FILLING or early:
        yield warning("conntrack", f"{text}: the table fills up", do)
    else:
        yield fine("conntrack", text)


def conntrack_timers(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """With timers of seconds, it forgets connections in use: keepalive can't be that fast."""
    if not trials.has(Mode.HOST, Mode.GATEWAY):
        return
    found = tcp_timers(_TIMERS, seen.proc / "sys/net/netfilter")
    prefix = "net.netfilter.nf_conntrack_tcp_timeout_"
    short = {name: seconds for name, seconds in found.items() if seconds < _SHORT}
    if short:
        told = ", ".join(f"{prefix}{name}={seconds}" for name, seconds in short.items())
        yield fault(
            "conntrack timers", f"redirected connections that are silent for seconds are forgotten: {told}",
            "sysctl " + " ".join(f"{prefix}{name}={CONNTRACK_TIMERS[name]}" for name in short),
        )  # fmt: skip
    elif found:
        yield fine("conntrack timers", ", ".join(f"{name} {seconds} s" for name, seconds in found.items()))

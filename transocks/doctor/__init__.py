"""What is wrong on this host, between the firewall and the upstream: `transocks doctor`.

    look -> first packets of connections, tried out -> checks

`seen.py` reads the host, once; `tried.py` asks the kernel what it does with packets that transocks should get, with
`transocks/tracing/`; `checks/` judges. Nothing is changed, and only upstreams are connected to (`upstreams.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from transocks.config import Config
from transocks.doctor.checks import CHECKS
from transocks.doctor.finding import Check, Finding, State, fault, unchecked
from transocks.doctor.seen import Seen, look
from transocks.doctor.tried import AS_ROOT, Trials
from transocks.tools import FirewallError
from transocks.tracing.table import Tracer
from usocksd.net.address import IPAddress

log = logging.getLogger(__name__)

WAIT_FOR_CLIENT = 60.0
_SETTLE = 0.5  # seconds until the first packet of a connection has gone its way


def examine(
    config: Config, config_file: str, *, client: IPAddress | None = None, say: Callable[[str], None] = print
) -> list[Finding]:
    """Look at this host as this user, within seconds; or wait for the next connection of this client first."""
    seen = look(config, config_file)
    if not seen.root:
        return judge(seen, Trials(seen, None, "packets are traced for root only"))
    try:
        with Tracer((client,) if client else ()) as tracer:
            if client is not None:
                say(f"waiting up to {WAIT_FOR_CLIENT:.0f} s for {client} to open a new TCP connection: open one there")
                if tracer.first_of(client, WAIT_FOR_CLIENT, _SETTLE) is None:
                    return [_nothing_from(client)]
            return judge(seen, Trials(seen, tracer, client=client))
    except FirewallError as error:
        return judge(seen, Trials(seen, None, str(error)))


def _nothing_from(client: IPAddress) -> Finding:
    return fault(
        "client", f"nothing came from {client} within {WAIT_FOR_CLIENT:.0f} s",
        "look whether this host is its gateway (ip route there), and whether it opened a connection at all",
    )  # fmt: skip


def judge(seen: Seen, trials: Trials, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What these checks say, in this order."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(seen, trials)
        except Exception as error:  # one check's fault must not hide what the others have found
            log.debug("a check failed", exc_info=True)
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):  # of a nursery
                cause = cause.exceptions[0]
            findings.append(unchecked(check.__name__, f"the check itself failed: {type(cause).__name__}: {cause}"))
    return findings


__all__ = ["AS_ROOT", "Finding", "State", "examine", "judge"]

"""`transocks doctor`: finds what is wrong on this host, from the firewall to the upstream.

`host.py` reads the state of the host, and has the kernel report what it does with sample packets
(`transocks/tracing/`); `checks/` judge both. Nothing is changed, and only upstreams are connected to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from transocks.config import TransocksConfig
from transocks.doctor.checks import CHECKS, Check
from transocks.doctor.finding import Finding, State, fault, unchecked
from transocks.doctor.host import Host
from transocks.tools import FirewallError
from transocks.tracing.tracer import Tracer
from usocksd.net.address import IPAddress

log = logging.getLogger(__name__)

WAIT_FOR_CLIENT = 60.0
_SETTLE = 0.5  # seconds for the first packet of a connection to be traced


def examine(
    config: TransocksConfig, *, client: IPAddress | None = None, say: Callable[[str], None] = print
) -> list[Finding]:
    """Look at this host as this user, within seconds; or wait for the next connection of this client first."""
    if os.geteuid() != 0:
        return judge(Host(config=config, why="packets are traced for root only"))
    try:
        with Tracer(client) as tracer:
            host = Host(config=config, tracer=tracer, client=client)
            if client is not None:
                say(f"waiting up to {WAIT_FOR_CLIENT:.0f} s for {client} to open a new TCP connection: open one there")
                if tracer.wait_for(client, WAIT_FOR_CLIENT, _SETTLE) is None:
                    do = "look whether this host is its gateway (ip route there), and whether it opened a connection"
                    return [fault("client", f"nothing came from {client} within {WAIT_FOR_CLIENT:.0f} s", do)]
            return judge(host)
    except FirewallError as error:
        return judge(Host(config=config, why=str(error)))


def judge(host: Host, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """The findings of these checks, in this order."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(host)
        except Exception as error:  # a bug in one check must not hide the findings of the others
            log.debug("a check failed", exc_info=True)
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):  # of a nursery
                cause = cause.exceptions[0]
            findings.append(unchecked(check.__name__, f"the check itself failed: {type(cause).__name__}: {cause}"))
    return findings


__all__ = ["Finding", "State", "examine", "judge"]

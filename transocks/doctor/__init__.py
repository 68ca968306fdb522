"""What is wrong on this host, between the firewall and the upstream: `transocks doctor`.

    look -> the rules, as chains of conditions -> examples of what they redirect, walked through them -> checks

`seen.py` reads the host, once; `flows.py` makes the packets that are taken through its rules (transocks/netfilter/);
`checks/` judges. Nothing is changed, and only upstreams are connected to (`upstreams.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from transocks.config import Config
from transocks.doctor.checks import CHECKS
from transocks.doctor.finding import Check, Finding, State, unchecked
from transocks.doctor.flows import Flows
from transocks.doctor.probe import probe
from transocks.doctor.seen import Seen, look

log = logging.getLogger(__name__)


def examine(config: Config, config_file: str, *, probing: bool = False) -> list[Finding]:
    """Look at this host as this user, within seconds; `probing`: also make a connection that is to be redirected."""
    return judge(look(config, config_file), (*CHECKS, probe) if probing else CHECKS)


def judge(seen: Seen, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What these checks say, in this order."""
    flows = Flows(seen)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(seen, flows)
        except Exception as error:  # one check's fault must not hide what the others have found
            log.debug("a check failed", exc_info=True)
            findings.append(unchecked(check.__name__, f"the check itself failed: {type(error).__name__}: {error}"))
    return findings


__all__ = ["Finding", "State", "examine", "judge"]

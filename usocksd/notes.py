"""Notes about settings that lock clients out, so that nobody does that by mistake.

They may be intended, so these are no warnings. The last requests in the log tell how many would be denied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from usocksd.acl import CONNECT
from usocksd.config import UsocksdConfig
from usocksd.decision import Policy
from usocksd.errors import Fault
from usocksd.records import lines_of
from usocksd.replay import Replay
from usocksd.settings.loader import counted, show

_HTTPS = 443
_TAIL = 1 << 21
"""Bytes that are read from the end of the log: 2,000 requests or so, in a tenth of a second."""


def notes(config: UsocksdConfig, policy: Callable[[], Policy] | None) -> list[Fault]:
    """Key, value and effect. `policy` makes the rules of the configuration, and is called if there is a log; None
    if they can't be made.
    """
    return config.lines.locate([*_clients(config), *_https(config), *_denied(config, policy)])


def _clients(config: UsocksdConfig) -> Iterator[Fault]:
    incoming = config.incoming
    if incoming.allow_from is None or all(listen.address.is_loopback for listen in incoming.listen):
        return
    others = {network for network in incoming.allow_from if not network.is_loopback}
    if not others:
        admitted = "clients on this host only"
    elif len(others) == 1 and (only := next(iter(others))).num_addresses == 1:
        admitted = f"one client only, {only.network_address}"
    else:
        return
    allowed = show([str(network) for network in incoming.allow_from])
    yield Fault("incoming.allow_from", allowed, f"admits {admitted}: all others are turned away")


def _https(config: UsocksdConfig) -> Iterator[Fault]:
    denied = f"denies HTTPS (port {_HTTPS}) to everybody"
    for at, rule in enumerate(config.rule):
        if rule.action == "allow":  # the log shows for whom, and for what
            return
        has = rule.ports is not None and any(first <= _HTTPS <= last for first, last in rule.ports)
        everybody = rule.from_ is None and rule.user is None and rule.to is None
        if has and everybody and (rule.commands is None or CONNECT in rule.commands):
            yield Fault(f"rule[{at}].ports", show(rule.name) if rule.name else "", denied)
            return
    if _HTTPS in config.outgoing.deny_ports:
        at = config.outgoing.deny_ports.index(_HTTPS)
        yield Fault(f"outgoing.deny_ports[{at}]", str(_HTTPS), denied)


def _denied(config: UsocksdConfig, policy: Callable[[], Policy] | None) -> Iterator[Fault]:
    """How many requests were allowed, by the log, and would be denied by this configuration."""
    path = config.log.filename
    if path is None or policy is None or not (lines := _tail(Path(path))):
        return
    rules = policy()
    replay = Replay(rules, rules)
    replay.read(lines)
    requests, denied = counted(replay.requests, "request"), replay.denials
    if denied:
        ((rule, most),) = denied.most_common(1)
        by = f"by {rule}" if len(denied) == 1 else f"{most:,} of them by {rule}"
        last = f"of the last {requests} {denied.total():,} were allowed and would be denied, {by}"
        yield Fault("log.filename", show(str(path)), last)


def _tail(path: Path) -> list[bytes]:
    """The last lines of the log, none if it is no file: reading a FIFO would take records away."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return []
            file.seek(max(status.st_size - _TAIL, 0))  # perhaps in the middle of a line, whose rest is no record
            return list(lines_of(file.readline))
    except OSError:
        return []

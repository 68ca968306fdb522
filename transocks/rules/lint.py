"""Warnings about a valid [rules]: what could not be applied on this host, or would have no effect."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Iterator, Sequence

from transocks.rules.config import Mode, RulesConfig, Tool
from transocks.tools import which
from usocksd.errors import Fault
from usocksd.names.lint import unclear_networks
from usocksd.settings.warnings import HostFacts, first_few


def lint_rules(rules: RulesConfig, mark: int | None, host: HostFacts) -> Iterator[Fault]:
    """The warnings: key, value, and what is wrong with it. `mark` is that of the proxy's own connections."""
    if rules.tool is not None and not which("nft" if rules.tool is Tool.NFT else "iptables-restore"):
        yield Fault("rules.tool", rules.tool.value, "is not installed here")
    if Mode.HOST in rules.mode and mark is None and not rules.exempt_users:
        yield Fault(
            "rules.mode", "host", "nothing exempts the proxies' own connections, so those to public addresses come back"
            " to them: expected mark, or rules.exempt_users",
        )  # fmt: skip
    if Mode.TPROXY in rules.mode and rules.tool is Tool.IPTABLES:
        yield Fault(
            "rules.tool", "iptables", "without transocks, connections time out under TPROXY whatever when_down says:"
            " expected nft, which can refuse them or let them out",
        )  # fmt: skip
    for key, users in (("users", rules.users), ("exempt_users", rules.exempt_users)):
        yield from _accounts(key, users, pwd.getpwnam)
    yield from _accounts("groups", rules.groups, grp.getgrnam)
    for key, networks in (("from", rules.from_), ("to", rules.to), ("exclude", rules.exclude or ())):
        yield from first_few(unclear_networks(f"rules.{key}", networks))
    for index, name in enumerate(rules.interfaces):
        if name not in host.interfaces:
            yield Fault(f"rules.interfaces[{index}]", name, "no interface of this host has that name now")


def _accounts(key: str, accounts: Sequence[int | str], look_up: Callable[[str], object]) -> Iterator[Fault]:
    for index, account in enumerate(accounts):
        if isinstance(account, str):
            try:
                look_up(account)
            except KeyError:
                yield Fault(f"rules.{key}[{index}]", account, "there is none of that name on this host")

"""What rules are called: their table, chain and text, as the tool that has loaded them prints it."""

from __future__ import annotations

import re
from functools import cached_property

from transocks.rules import live
from transocks.rules.verify import rule_texts
from transocks.tools import FirewallError, run
from transocks.tracing.events import Event, Verdict
from transocks.tracing.way import Change, Way

_IPTABLES = {"raw", "mangle", "nat", "filter", "security"}
_VERSIONS = {"ip": "IPv4", "ip6": "IPv6"}
_DOES = {Verdict.DROP: "drops it", Verdict.QUEUE: "hands it to a program", Verdict.STOLEN: "takes it away"}
_WIDTH = 160


class RuleNames:
    """Of this host, as it is when they are asked for."""

    def __init__(self) -> None:
        self._saved_of: dict[str, str] = {}

    def rule(self, event: Event) -> str:
        """A rule, or a chain with its policy."""
        place = f"{self._table(event)}, chain {event.chain}"
        if event.handle is None:
            return f"{place} (its policy)"
        text = self.text(event)
        return f'{place}: "{text}"' if text else f"{place}, rule {event.handle}"

    def does(self, event: Event) -> str:
        """What ends the way of a packet, and how."""
        return f"{self.rule(event)} {_DOES.get(event.verdict, 'ends it')}"

    def change(self, change: Change, way: Way) -> str:
        """What has changed a packet."""
        return self.rule(change.rule) if change.rule is not None else self.gap(change.hook, change.place, way)

    def gap(self, hook: str, place: str, way: Way) -> str:
        """What nft does not show, at this place."""
        version = way.packet.source.version
        if place in _IPTABLES and (variant := self._legacy(version)) is not None:
            table = f"IPv{version} table {place} of {variant}"
            return self._legacy_rules(variant, place, hook) or f"{table}, chain {hook.upper()}"
        return f"something that nft does not show, in {hook.upper()} at the place of {place}"

    def text(self, event: Event) -> str:
        """A rule's own words; "" where nobody tells them."""
        if event.table in _IPTABLES and event.family in _VERSIONS and (text := self._saved(event)):
            return text
        text = " ".join(rule_texts(self.listing, event.family, event.table).get(event.handle or 0, "").split())
        return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."

    def _table(self, event: Event) -> str:
        if event.table in _IPTABLES and event.family in _VERSIONS and self._saved_lines(event.family):
            return f"{_VERSIONS[event.family]} table {event.table}"
        return f"table {event.family} {event.table}"

    @cached_property
    def listing(self) -> str:
        """All that nft shows, with handles; "" if it does not."""
        try:
            return run("nft", "-a", "list", "ruleset")
        except FirewallError:
            return ""

    def _saved(self, event: Event) -> str:
        """iptables prints what nft can't; its rules stand in the same order."""
        block = re.search(rf"^table {event.family} {event.table} \{{.*?^\}}", self.listing, re.MULTILINE | re.DOTALL)
        chain = re.search(
            rf"^\tchain {re.escape(event.chain)} \{{.*?^\t\}}", block[0] if block else "", re.MULTILINE | re.DOTALL
        )
        handles = re.findall(r"^\t\t\S.* # handle (\d+)$", chain[0] if chain else "", re.MULTILINE)
        table = re.search(rf"^\*{event.table}$.*?^COMMIT$", self._saved_lines(event.family), re.MULTILINE | re.DOTALL)
        rules = re.findall(rf"^-A {re.escape(event.chain)} .*$", table[0] if table else "", re.MULTILINE)
        if len(handles) != len(rules) or str(event.handle) not in handles:
            return ""
        return str(rules[handles.index(str(event.handle))])

    def _saved_lines(self, family: str) -> str:
        """What the iptables that stands on nft prints."""
        if family not in self._saved_of:
            variant = next((v for v in live.variants(family == "ip6") if live.is_nft(v)), None)
            try:
                self._saved_of[family] = (
                    run(
                        f"{variant}-save",
                    )
                    if variant
                    else ""
                )
            except FirewallError:
                self._saved_of[family] = ""
        return self._saved_of[family]

    @staticmethod
    def _legacy(version: int) -> str | None:
        if not live.has_legacy(live.iptables(version == 6)):
            return None
        return next((v for v in live.variants(version == 6) if not live.is_nft(v)), None)

    @staticmethod
    def _legacy_rules(variant: str, table: str, hook: str) -> str:
        """What there is in that place, if it is little enough to be read."""
        version = 6 if variant.startswith("ip6") else 4
        try:
            tables = live.saved(version == 6, variant)
        except FirewallError:
            return ""
        rules = [rule.rest for t in tables if t.name == table for rule in t.of(hook.upper())]
        where = f"IPv{version} table {table} of {variant}, chain {hook.upper()}"
        return f'{where}: "{rules[0]}"' if len(rules) == 1 else where

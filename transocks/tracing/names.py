"""Rules as their tools print them: table, chain and text."""

from __future__ import annotations

from functools import cache, cached_property

from transocks.rules import live
from transocks.rules.loaded import Table, parse_nft, parse_save
from transocks.tools import FirewallError, run
from transocks.tracing.reports import Report, Verdict
from transocks.tracing.trace import LO, ROUTING, Cause

_IPTABLES = {"raw", "mangle", "nat", "filter", "security"}
_VERSIONS = {"ip": 4, "ip6": 6}
_STOPS = {Verdict.QUEUE: "hands it to a program", Verdict.STOLEN: "takes it away"}
_WIDTH = 160


class RuleNames:
    """The rules of this host, read when first asked for."""

    def __init__(self) -> None:
        self._saved = cache(_saved)

    def of(self, cause: Cause) -> str:
        """The rule or kernel part that did something to a packet, for messages."""
        if cause.rule is not None:
            return self._rule(cause.rule)
        if cause.place == ROUTING:
            return f"routing, behind {cause.hook.upper()},"
        if cause.place == LO:
            return "the interface lo"
        version, place, hook = cause.version, cause.place, cause.hook.upper()
        if place in _IPTABLES and (variant := _legacy(version)) is not None:
            where = f"IPv{version} table {place} of {variant}, chain {hook}"
            rules = _rules(self._saved(variant), place, hook)
            return f'{where}: "{rules[0]}"' if len(rules) == 1 else where
        return f"something that nft does not show, in {hook} at the place of {place}"

    def stop(self, cause: Cause) -> str:
        """The rule or part of the kernel that stopped a packet, and how."""
        return f"{self.of(cause)} {_STOPS.get(cause.rule.verdict, 'drops it') if cause.rule else 'drops it'}"

    def text(self, rule: Report) -> str:
        """The rule as its tool prints it; "" if it can't be found."""
        lines = _rules(self.tables, f"{rule.family} {rule.table}", rule.chain)
        texts = {handle: text for text, _, handle in (line.rpartition(" # handle ") for line in lines) if text}
        rules = _rules(self._saved(_nft_variant(rule)), rule.table, rule.chain)
        if len(rules) == len(texts):  # iptables prints what nft can't; its rules stand in the same order
            texts = {handle: f"-A {rule.chain} {line}" for handle, line in zip(texts, rules, strict=True)}
        text = " ".join(texts.get(str(rule.handle), "").split())
        return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."

    @cached_property
    def tables(self) -> list[Table]:
        """The lines of nft's listing, with handles; none without nft."""
        try:
            return parse_nft(run("nft", "-a", "list", "ruleset"))
        except FirewallError:
            return []

    def _rule(self, rule: Report) -> str:
        """A rule, or a chain with its policy."""
        iptables = self._saved(_nft_variant(rule))
        table = f"IPv{_VERSIONS[rule.family]} table {rule.table}" if iptables else f"table {rule.family} {rule.table}"
        place = f"{table}, chain {rule.chain}"
        if rule.handle is None:
            return f"{place} (its policy)"
        text = self.text(rule)
        return f'{place}: "{text}"' if text else f"{place}, rule {rule.handle}"


def _rules(tables: list[Table], name: str, chain: str) -> list[str]:
    return [rule for table in tables if table.name == name for rule in table.chains.get(chain, ())]


def _saved(variant: str | None) -> list[Table]:
    """The tables that this variant of iptables prints."""
    try:
        return parse_save(run(f"{variant}-save")) if variant is not None else []
    except FirewallError:
        return []


def _nft_variant(rule: Report) -> str | None:
    """The iptables-nft that may have made a rule which nft reports."""
    if rule.table not in _IPTABLES or rule.family not in _VERSIONS:
        return None
    return next((v for v in live.variants(_VERSIONS[rule.family]) if live.is_nft(v)), None)


def _legacy(version: int) -> str | None:
    if not live.has_legacy(version):
        return None
    return next((v for v in live.variants(version) if not live.is_nft(v)), None)

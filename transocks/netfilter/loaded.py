"""The rules that are loaded in this network namespace, by whatever tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from transocks.netfilter.iptables import read_iptables
from transocks.netfilter.nft import iptables_tables, read_nft
from transocks.netfilter.nft_json import ruleset_json
from transocks.netfilter.ruleset import Ruleset, Version, merged
from transocks.tools import run as tools_run
from transocks.tools import which
from usocksd.errors import Error

_NET = Path("/proc/self/net")

Run: TypeAlias = Callable[..., str]
"""Runs a command, words as arguments, and returns what it says; raises Error if it fails."""

_FAMILIES: tuple[tuple[str, Version, str], ...] = (("ip", 4, "iptables"), ("ip6", 6, "ip6tables"))


class NotShown(Error):
    """The rules can't be read."""


def loaded(run: Run | None = None, net: Path = _NET) -> Ruleset:
    """All of them; takes CAP_NET_ADMIN. Nothing is loaded by looking. Raises NotShown."""
    run = run or tools_run
    try:
        found = [*(_of_nft(run) if which("nft") else _of_iptables(run)), *_of_legacy(run, net)]
    except (Error, ValueError, LookupError) as error:
        raise NotShown(str(error) or type(error).__name__) from None
    if not found:
        raise NotShown("there is neither nft nor iptables")
    return merged(found)


def _of_nft(run: Run) -> list[Ruleset]:
    """Its own tables, and those of iptables-nft, which nft shows without what is in their matches."""
    text = ruleset_json(run)
    theirs = iptables_tables(text)
    saved: list[Ruleset] = []
    for family, version, name in _FAMILIES:
        tool = _tool(name)
        if tool and any(f == family for f, _ in theirs):
            saved.append(read_iptables(run(tool), version))
    read = {(chain.family, chain.table) for ruleset in saved for chain in ruleset.chains}
    return [*saved, read_nft(text, without=read & theirs)]


def _of_iptables(run: Run) -> list[Ruleset]:
    tools = ((_tool(name), version) for _, version, name in _FAMILIES)
    return [read_iptables(run(tool), version) for tool, version in tools if tool]


def _tool(name: str) -> str | None:
    """What shows the tables of iptables-nft; where there is no such tool, those of the one iptables that there is."""
    plain = () if which(f"{name}-legacy-save") else (f"{name}-save",)
    return next(filter(which, (f"{name}-nft-save", *plain)), None)


def _of_legacy(run: Run, net: Path) -> list[Ruleset]:
    """Where it has tables."""
    return [
        read_iptables(run(f"{name}-legacy-save"), version)
        for _, version, name in _FAMILIES
        if which(f"{name}-legacy-save") and has_legacy(name, net)
    ]


def has_legacy(name: str, net: Path = _NET) -> bool:
    """Whether there are tables of the legacy iptables, or ip6tables: `name`. Who asks its tool makes them."""
    try:
        return bool((net / f"{name.removesuffix('tables')}_tables_names").read_text("ascii").strip())
    except OSError:  # there never were any
        return False

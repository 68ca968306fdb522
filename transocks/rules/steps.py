"""Commands of the system's own tools, and how they are run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs

from transocks import tools
from transocks.rules.config import Tool
from usocksd.errors import Error


class FirewallError(Error):
    """Rules could not be loaded, read or removed; the message has the tool's own words."""


@attrs.frozen
class Step:
    """One command and what it reads on standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


@attrs.frozen
class RuleSet:
    """How to load the rules, and how to remove them; each step is atomic by itself."""

    load: tuple[Step, ...]
    unload: tuple[Step, ...]


def run(step: Step) -> str:
    """Run a command; returns its standard output. Raises FirewallError when it can't be run, fails, or does not end."""
    try:
        return tools.run(*step.argv, stdin=step.stdin)
    except tools.ToolError as error:
        raise FirewallError(str(error)) from None


def run_json(step: Step) -> Any:
    """The same of a command that answers in JSON; None if it says nothing."""
    answer = run(step)
    try:
        return json.loads(answer) if answer.strip() else None
    except ValueError as error:
        raise FirewallError(f"{' '.join(step.argv)}: not JSON: {error}") from None


def complaint(step: Step) -> str | None:
    """Run a command; returns what it complained of, None if it has succeeded."""
    try:
        run(step)
    except FirewallError as error:
        return str(error)
    return None


def choose_tool(which: Callable[[str], str | None] = tools.which) -> Tool | None:
    """nft where it is (one transaction for both families), else iptables, else None."""
    if which("nft"):
        return Tool.NFT
    return Tool.IPTABLES if which("iptables-restore") else None

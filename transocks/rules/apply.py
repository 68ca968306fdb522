"""Runs the commands of a rule set: what `transocks exec` needs. `transocks rules` has live.py and change.py."""

from __future__ import annotations

from transocks.rules.render import Commands
from transocks.tools import FirewallError, complaint, run


def apply(rules: Commands) -> None:
    """Load the rules. Raises FirewallError, and then nothing of them is left."""
    for done, (command, text) in enumerate(rules.load):
        try:
            run(*command.split(), stdin=text)
        except FirewallError:
            if done:
                remove(rules)
            raise


def remove(rules: Commands) -> list[str]:
    """Remove the rules, or what is there of them; returns what the tools complained of: what was gone, say."""
    return [said for command, text in rules.unload if (said := complaint(*command.split(), stdin=text))]

"""Runs the commands of a rule set: what `transocks exec` needs. `transocks rules` has live.py and change.py."""

from __future__ import annotations

from transocks.rules.steps import FirewallError, RuleSet, complaint, run


def apply(rules: RuleSet) -> None:
    """Load the rules. Raises FirewallError, and then nothing of them is left."""
    for done, step in enumerate(rules.load):
        try:
            run(step)
        except FirewallError:
            if done:
                remove(rules)
            raise


def remove(rules: RuleSet) -> list[str]:
    """Remove the rules, or what is there of them; returns what the tools complained of: what was gone, say."""
    return [said for step in rules.unload if (said := complaint(step))]

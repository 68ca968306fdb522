"""Runs the commands of a rule set."""

from __future__ import annotations

import subprocess

from transocks.firewall.render import RuleSet, Step
from usocksd.errors import Error


class FirewallError(Error):
    """Rules could not be loaded, or removed; the message has the tool's own words."""


def apply(rules: RuleSet) -> None:
    """Load the rules. Raises FirewallError, and then nothing of them is left."""
    for done, step in enumerate(rules.load):
        if complaint := _run(step):
            if done:
                remove(rules)
            raise FirewallError(complaint)


def remove(rules: RuleSet) -> list[str]:
    """Remove the rules, or what is there of them; returns what the tools complained of: what was gone, say."""
    return [complaint for step in rules.unload if (complaint := _run(step))]


def _run(step: Step) -> str | None:
    try:
        done = subprocess.run(step.argv, input=step.stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{step.argv[0]}: {error.strerror}"
    if done.returncode == 0:
        return None
    return f"{' '.join(step.argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}"

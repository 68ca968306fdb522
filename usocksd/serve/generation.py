"""A configuration that is or was in force, and what its workers are told."""

from __future__ import annotations

from typing import Any

import attrs

from usocksd.serve.plan import Plan
from usocksd.settings.files import NamedFiles


@attrs.frozen
class Generation:
    """One of those; the next has the next number."""

    number: int
    text: str
    source: str
    plan: Plan
    said: dict[str, Any]
    """The plan as its worker has said it, with what only a later version knows"""
    log: dict[str, str | None]
    """As usocksd.log.log.setup takes it"""
    since: float
    """Seconds since the epoch"""
    files: NamedFiles
    """What it names, closed when no worker of this generation will be started any more"""

    def as_json(self) -> dict[str, Any]:
        """For the program that this process is about to become, but for `files`."""
        return {key: value for key, value in attrs.asdict(self, recurse=False).items() if key not in ("plan", "files")}

    @classmethod
    def from_json(cls, values: dict[str, Any], files: NamedFiles) -> Generation:
        """From the program that this process was."""
        return cls(**values, plan=Plan.from_json(values["said"]), files=files)

"""Findings, the results of checks: as text that fits a screen, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import partial

import attrs

from usocksd.serve.verbs.client import visible


class State(Enum):
    """How bad it is; worst first."""

    FAULT = "fault"
    WARNING = "warning"
    UNCHECKED = "not checked"
    OK = "ok"


@attrs.frozen
class Finding:
    """One line of what was seen, and one of what to do about it."""

    check: str
    seen: str
    do: str = ""
    state: State = State.OK


fine = Finding
fault = partial(Finding, state=State.FAULT)
"""A fault: it does not work."""
warning = partial(Finding, state=State.WARNING)
"""A warning: it works, but not as well or as safely as it should."""
unchecked = partial(Finding, state=State.UNCHECKED)
"""It can't be checked from here."""


def as_text(findings: Sequence[Finding], *, everything: bool = False) -> Iterator[str]:
    """Faults, warnings, then what was not checked; passed checks in one line, or with `everything` in full."""
    ordered = sorted(findings, key=lambda finding: list(State).index(finding.state))
    for finding in ordered:
        if finding.state is not State.OK or everything:
            yield f"{finding.state.value}: {finding.check}: {visible(finding.seen)}"
        if finding.do:
            yield f"    {visible(finding.do)}"
    bad = {finding.check for finding in findings if finding.state is not State.OK}
    well = dict.fromkeys(finding.check for finding in findings if finding.check not in bad)
    if well and not everything:
        yield f"ok: {', '.join(well)}"
    faults, warnings, not_checked, _ = (sum(finding.state is state for finding in findings) for state in State)
    yield (
        f"{faults} fault{'' if faults == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
        + (f", {not_checked} not checked" if not_checked else "")
    )


def as_json(findings: Sequence[Finding], config_file: str) -> dict[str, object]:
    """One object: "ok", and all findings, faults first."""
    ordered = sorted(findings, key=lambda finding: list(State).index(finding.state))
    return {
        "file": config_file,
        "ok": not any(finding.state is State.FAULT for finding in findings),
        "findings": [{"check": f.check, "state": f.state.value, "seen": f.seen, "do": f.do or None} for f in ordered],
    }

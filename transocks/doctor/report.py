"""What the checks say, as text that fits a screen, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transocks.doctor.finding import Finding, State
from usocksd.serve.verbs.client import visible

_ORDER = (State.FAULT, State.WARNING, State.UNCHECKED)


def as_text(findings: Sequence[Finding], *, everything: bool = False) -> Iterator[str]:
    """Faults first, then warnings, then what was not checked; what is well in a line, or with `everything` in full."""
    for state in _ORDER:
        for finding in findings:
            if finding.state is state:
                yield f"{state.value}: {finding.check}: {visible(finding.seen)}"
                if finding.do:
                    yield f"    {visible(finding.do)}"
    well = [finding for finding in findings if finding.state is State.OK]
    if everything:
        yield from (f"ok: {finding.check}: {visible(finding.seen)}" for finding in well)
    elif well:
        bad = {finding.check for finding in findings if finding.state is not State.OK}
        yield f"ok: {', '.join(dict.fromkeys(f.check for f in well if f.check not in bad))}"
    counts = {state: sum(finding.state is state for finding in findings) for state in State}
    yield f"{_count(counts[State.FAULT], 'fault')}, {_count(counts[State.WARNING], 'warning')}" + (
        f", {counts[State.UNCHECKED]} not checked" if counts[State.UNCHECKED] else ""
    )


def as_json(findings: Sequence[Finding], config_file: str) -> dict[str, object]:
    """One object: "ok", and all findings, faults first."""
    ordered = sorted(findings, key=lambda finding: list(State).index(finding.state))
    return {
        "file": config_file,
        "ok": not any(finding.state is State.FAULT for finding in findings),
        "findings": [
            {"check": f.check, "state": f.state.value, "seen": f.seen, "do": f.do or None} for f in ordered
        ],
    }  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

"""What a check says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import TypeAlias

import attrs

from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials


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
    state: State
    seen: str
    do: str = ""


Check: TypeAlias = Callable[[Seen, Trials], Iterator[Finding]]


def fault(check: str, seen: str, do: str) -> Finding:
    """It does not work like this."""
    return Finding(check, State.FAULT, seen, do)


def warning(check: str, seen: str, do: str) -> Finding:
    """It works, but not as well, or not as safely, as it should."""
    return Finding(check, State.WARNING, seen, do)


def unchecked(check: str, why: str, do: str = "") -> Finding:
    """It can't be told from here."""
    return Finding(check, State.UNCHECKED, why, do)


def fine(check: str, seen: str) -> Finding:
    """Nothing is wrong with it."""
    return Finding(check, State.OK, seen)

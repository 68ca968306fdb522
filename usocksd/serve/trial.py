"""A configuration on trial: unless somebody confirms it in time, the one before comes back."""

from __future__ import annotations

import attrs
import trio

from usocksd.serve.generation import Generation
from usocksd.settings.files import NamedFiles


@attrs.frozen
class Before:
    """What comes back: the text, and the files that it names, as they were."""

    text: str
    source: str
    files: NamedFiles

    @classmethod
    def of(cls, generation: Generation) -> Before:
        """What is in force now."""
        return cls(generation.text, generation.source, generation.files.copy())


@attrs.define
class Trial:
    """`deadline` is by trio's clock, which setting the time does not move; `seconds` is what was asked for."""

    before: Before
    seconds: int
    deadline: float
    returning: bool = False
    """The time is over, and the configuration before is being brought up."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(self.deadline - trio.current_time(), 0.0)

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return trio.current_time() >= self.deadline

    def close(self) -> None:
        """It has been decided."""
        self.before.files.close()

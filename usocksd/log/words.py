"""Numbers and what they count, as people write them."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """1 fault, 2 faults, 1,204 requests; `many` where an s does not make it so."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"

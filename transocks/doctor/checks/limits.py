"""How many files the daemon may have open: two for each connection."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials

_FEW = 4096
_FULL = 0.9


def descriptors(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """The limit of the running daemon, and how close its workers are to it."""
    if seen.status is not None:
        yield from _of_workers(seen.status)
        return
    if seen.pid is not None and (limit := _hard_limit(seen.read(f"{seen.pid}/limits"))) is not None:
        yield _of_limit(limit, "")
    else:
        yield unchecked("descriptors", "the daemon does not tell, on its control socket", "run it as root, or its user")


def _of_workers(status: dict[str, object]) -> Iterator[Finding]:
    generations: list[dict[str, list[dict[str, dict[str, int]]]]] = status["generations"]  # type: ignore[assignment]
    files = [worker["descriptors"] for generation in generations for worker in generation["workers"]]
    if not files:
        yield unchecked("descriptors", "the daemon has no workers")
        return
    fullest = max(files, key=lambda one: one["open"] / max(one["limit"], 1))
    if fullest["open"] > _FULL * fullest["limit"]:
        yield fault(
            "descriptors", f"a worker has {fullest['open']} of {fullest['limit']} files open",
            "raise LimitNOFILE= of the unit, or look for who opens so many connections (transocks connections)",
        )  # fmt: skip
    else:
        yield _of_limit(fullest["limit"], f", {fullest['open']} open")


def _of_limit(limit: int, more: str) -> Finding:
    text = f"{limit} files for each process{more}: {limit // 2} connections at most"
    if limit < _FEW:
        return warning("descriptors", text, "raise LimitNOFILE= of the unit (1048576 in ours)")
    return fine("descriptors", text)


def _hard_limit(limits: str | None) -> int | None:
    """From /proc/PID/limits: the daemons raise the soft limit to the hard one."""
    found = re.search(r"^Max open files\s+\S+\s+(\d+)", limits or "", re.MULTILINE)
    return int(found[1]) if found else None

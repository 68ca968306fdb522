"""Doors can't be opened without descriptors."""

import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import trio

from usocksd.errors import Error
from usocksd.net.listeners import ListenError
from usocksd.serve.control import Control, ControlError
from usocksd.serve.doors import Doors
from usocksd.serve.plan import MetricsAddress
from usocksd.serve.timing import Timing


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Allow `count` descriptors from the first free one."""
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def failures(do: Callable[[], Any], expected: type[Error]) -> int:
    """How often `do` fails when it gets one more descriptor each time; and nothing stays open."""
    gc.collect()  # or garbage of earlier tests would be closed meanwhile
    for count in range(100):
        before = set(os.listdir("/proc/self/fd"))
        with suppress(expected):
            with descriptors(count):
                do().close()
            return count
        assert set(os.listdir("/proc/self/fd")) <= before
    raise AssertionError("it always fails")


async def test_doors_without_descriptors(tmp_path: Path) -> None:
    """However many are missing, the error is an expected one."""
    async with trio.open_nursery() as nursery:
        report: Any = Mock()
        doors = Doors("tiny", nursery, report, {}, Timing())
        address = MetricsAddress(("127.0.0.1", "127.0.0.2"), 0, required=True)
        assert failures(lambda: doors.prepare(address), ListenError) >= 2
        assert failures(lambda: Control.open(str(tmp_path / "control"), "tiny", {}), ControlError) >= 2

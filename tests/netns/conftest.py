"""Makes `import lab` work for the tests here, and hands out the two topologies of lab.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab
from delay import ROUND_TRIP, DelayLine

T = TypeVar("T")


@pytest.fixture
def host_net() -> Iterator[lab.Net]:
    """client --- outside; the daemons and rules go on the client (OUTPUT)."""
    yield from _built(lab.host_net)


@pytest.fixture(scope="module")
def delayed_net() -> Iterator[tuple[lab.Net, DelayLine]]:
    """As host_net, and there and back takes ROUND_TRIP seconds. One for all tests of a module."""
    try:
        yield from _built(lambda: lab.delayed_net(ROUND_TRIP))
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no TUN devices here: {error}")


@pytest.fixture
def gateway_net() -> Iterator[lab.Net]:
    """client --- gateway --- outside; the daemons and rules go on the gateway (PREROUTING)."""
    yield from _built(lab.gateway_net)


def _built(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    reason = lab.unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with make() as net:
        yield net

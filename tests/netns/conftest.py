"""Makes `import lab` work for the tests here, and hands out the two topologies of lab.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab


@pytest.fixture
def host_net() -> Iterator[lab.Net]:
    """client --- outside; the daemons and rules go on the client (OUTPUT)."""
    yield from _built(lab.host_net)


@pytest.fixture
def gateway_net() -> Iterator[lab.Net]:
    """client --- gateway --- outside; the daemons and rules go on the gateway (PREROUTING)."""
    yield from _built(lab.gateway_net)


def _built(make: object) -> Iterator[lab.Net]:
    reason = lab.unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with make() as net:  # type: ignore[operator]
        yield net

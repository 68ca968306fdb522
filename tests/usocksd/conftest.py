"""What several files here connect to."""

from __future__ import annotations

from collections.abc import Iterator

import daemons
import pytest
from daemons import Served


@pytest.fixture(scope="module")
def destination() -> Iterator[Served]:
    """An echo on 127.0.0.1."""
    with Served(daemons.loopback(), daemons.echo) as server:
        yield server

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
import scene as scenes
from delay import ROUND_TRIP, DelayLine

T = TypeVar("T")


@pytest.fixture
def host_net() -> Iterator[lab.Net]:
    """client --- outside; the daemons and rules go on the client (OUTPUT)."""
    yield from _built(lab.host_net)


@pytest.fixture
def delayed_net() -> Iterator[tuple[lab.Net, DelayLine]]:
    """As host_net, with a round trip of ROUND_TRIP seconds."""
    try:
        yield from _built(lambda: lab.delayed_net(ROUND_TRIP))
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no TUN devices here: {error}")


@pytest.fixture
def gateway_net() -> Iterator[lab.Net]:
    """client --- gateway --- outside; the daemons and rules go on the gateway (PREROUTING)."""
    yield from _built(lab.gateway_net)


@pytest.fixture(scope="module")
def shared_host_net() -> Iterator[lab.Net]:
    """As host_net, one for all tests of a module."""
    yield from _built(lab.host_net)


@pytest.fixture(scope="module")
def shared_gateway_net() -> Iterator[lab.Net]:
    """As gateway_net, one for all tests of a module."""
    yield from _built(lab.gateway_net)


def _built(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    reason = lab.unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with make() as net:
        yield net


@pytest.fixture(params=scenes.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A tool: "nft", "iptables-nft" or "iptables-legacy"."""
    return str(request.param)


@pytest.fixture(params=["host", "gateway", "tproxy"])
def mode(request: pytest.FixtureRequest) -> str:
    """A mode of [rules]."""
    return str(request.param)


@pytest.fixture
def scene(mode: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[scenes.Scene]:
    """One of each, on the topology that it is for."""
    net = request.getfixturevalue("host_net" if mode == "host" else "gateway_net")
    made = scenes.Scene(net, mode, backend, tmp_path)
    yield made
    made.close()

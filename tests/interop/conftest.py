"""Makes `import world` work for the tests here, and hands out its parts. The daemons live as long as the test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import world


@pytest.fixture(scope="session")
def far() -> Iterator[world.FarEnd]:
    """The destination of clients."""
    far = world.FarEnd()
    yield far
    far.close()


@pytest.fixture(scope="session")
def names() -> Iterator[str]:
    """The name server; tests that need names ask for it and are skipped where it can't be had."""
    with world.dnsmasq(world.need("dnsmasq", "dnsmasq-base")) as address:
        yield address


@pytest.fixture(scope="session")
def dns(request: pytest.FixtureRequest) -> str:
    """A name server for the daemons: where there is no dnsmasq nobody answers, but no name leaves this machine."""
    try:
        address: str = request.getfixturevalue("names")
    except pytest.skip.Exception:
        return "127.0.0.1:9"
    return address


@pytest.fixture(scope="session")
def users_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.htpasswd(tmp_path_factory.mktemp("users") / "users")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, dns: str) -> Iterator[world.Daemon]:
    """A usocksd without users."""
    with world.Daemon(tmp_path_factory.mktemp("usocksd") / "open", dns) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, dns: str, users_file: Path) -> Iterator[world.Daemon]:
    """A usocksd that wants a user and a password."""
    auth = f'[auth]\nusers_file = "{users_file}"\n'
    with world.Daemon(tmp_path_factory.mktemp("usocksd") / "guarded", dns, auth) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def lenient(tmp_path_factory: pytest.TempPathFactory, dns: str, users_file: Path) -> Iterator[world.Daemon]:
    """A usocksd that knows users, but lets others in too."""
    auth = f'[auth]\nusers_file = "{users_file}"\nrequired = false\n'
    with world.Daemon(tmp_path_factory.mktemp("usocksd") / "lenient", dns, auth) as daemon:
        yield daemon


@pytest.fixture
def clients(tmp_path: Path) -> world.Clients:
    """Runs clients in an empty home."""
    return world.Clients(tmp_path)

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import usocksd
from usocksd.net.limits import (
    Tally,
    clear_column,
    make_table,
    most_connections,
    most_name_sockets,
    most_pipes,
    most_spare,
    owner,
)

ROOT = Path(usocksd.__file__).parents[1]

SET_AND_RAISE = """
import resource, sys
from usocksd.net.limits import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(soft: int, hard: int) -> list[int]:
    """The limit in a process that starts with these."""
    code = SET_AND_RAISE.format(soft=soft, hard=hard)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_the_soft_limit_becomes_the_hard_one() -> None:
    assert raised(100, 200) == [200] * 3


def test_a_limit_that_is_raised_already() -> None:
    assert raised(200, 200) == [200] * 3


def test_an_endless_hard_limit_means_the_kernel_s_own() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    endless = hard == resource.RLIM_INFINITY
    # Without privileges no process may raise its hard limit, so it stays as it is, unless it is infinite.
    expected = int(Path("/proc/sys/fs/nr_open").read_text()) if endless else hard
    assert raised(100, hard) == [expected] * 3


def test_connections_that_fit() -> None:
    open_now = len(os.listdir("/proc/self/fd"))
    assert most_connections(1600) == (1600 - open_now - 48 - 2 * 50 - 50 - 100) // 2
    assert most_pipes(1600) == 50
    assert most_name_sockets(1600) == most_spare(1600) == 100


def test_open_descriptors_count() -> None:
    before = most_connections(1000)
    pipes = [os.pipe() for _ in range(10)]
    assert most_connections(1000) == before - 10
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_at_least_one() -> None:
    assert most_connections(3) == 1


# Limits over all workers


@pytest.fixture
def table() -> Iterator[int]:
    fd = make_table()
    yield fd
    os.close(fd)


def test_each_worker_sees_the_connections_of_the_others(table: int) -> None:
    one, two = (Tally(table, column, most=5, per_client=3) for column in (0, 255))
    here, there = one.row("192.0.2.1"), one.row("2001:db8::1")
    assert here != there
    assert two.row("192.0.2.1") == here
    one.add(here, 1)
    two.add(here, 1)
    assert one.exceeded(here) is None
    one.add(here, 1)
    for tally in (one, two):
        assert tally.exceeded(here) == "per_client"
        assert tally.exceeded(there) is None
    two.add(there, 1)
    one.add(there, 1)
    assert one.exceeded(there) == two.exceeded(there) == "connections"
    one.add(here, -1)
    assert two.exceeded(here) is None


def test_the_connections_of_an_ended_worker_do_not_count(table: int) -> None:
    one, two = (Tally(table, column, most=2, per_client=2) for column in (0, 1))
    row = one.row("192.0.2.1")
    one.add(row, 1)
    two.add(row, 1)
    assert two.exceeded(row) == "connections"
    clear_column(table, 0)
    assert two.exceeded(row) is None
    two.add(row, 1)
    assert two.exceeded(row) == "connections"


@pytest.mark.parametrize(("most", "per_client", "limit"), [(0, 2, "per_client"), (2, 0, "connections")])
def test_one_limit_alone(table: int, most: int, per_client: int, limit: str) -> None:
    tally = Tally(table, 0, most=most, per_client=per_client)
    row = tally.row("192.0.2.1")
    for _ in range(2):
        assert tally.exceeded(row) is None
        tally.add(row, 1)
    assert tally.exceeded(row) == limit


def test_without_limits_nothing_is_counted(table: int) -> None:
    tally = Tally(table, 0, most=0, per_client=0)
    row = tally.row("192.0.2.1")
    tally.add(row, 1000)
    assert tally.exceeded(row) is None
    empty = os.fstat(table).st_blocks
    assert empty <= 8  # the key's page
    clear_column(table, 0)
    assert os.fstat(table).st_blocks == empty


def test_clients_are_hashed_with_a_secret_key(table: int) -> None:
    """A client that knows which addresses share a row could use up the limit of another one."""
    clients = [f"192.0.2.{number}" for number in range(256)]
    other = make_table()
    try:
        here, again, there = (
            [Tally(fd, column, most=0, per_client=1).row(client) for client in clients]
            for fd, column in ((table, 0), (table, 1), (other, 0))
        )
    finally:
        os.close(other)
    assert here == again
    assert sum(a == b for a, b in zip(here, there, strict=True)) < 8
    # The key is not something that a worker's end clears.
    for column in range(64):
        clear_column(table, column)
    assert [Tally(table, 2, most=0, per_client=1).row(client) for client in clients] == here


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("fe80::1%eth0", "fe80::1%eth1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)
def test_addresses_that_count_as_one_client(table: int, one: str, other: str, same: bool) -> None:
    assert (owner(one) == owner(other)) is same
    tally = Tally(table, 0, most=0, per_client=1)
    assert not same or tally.row(one) == tally.row(other)

from __future__ import annotations

import logging
from pathlib import Path

import bcrypt
import pytest
import trio
import trio.testing

import usocksd.auth
from usocksd.auth import Users
from usocksd.errors import ConfigError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def hashed(password: str, prefix: str = "2b") -> str:
    text = bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=4)).decode()
    return f"${prefix}${text[4:]}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def users(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Users:
    monkeypatch.setattr(usocksd.auth, "FAILURE_TAKES", 0.0)
    file = tmp_path / "users"
    lines = [
        "# made by htpasswd -B",
        "",
        f"alice:{hashed('secret')}",
        f"bob:{hashed('hunter2', '2y')}",
        f"carol:{hashed('pass:word', '2a')}",
        f"dörte:{hashed('schlüssel')}",
        f"long:{hashed('x' * 72)}",
        f"empty:{hashed('')}",
    ]
    file.write_text("\n".join(lines), "utf-8")
    return Users(file, clock=clock)


class Checks:
    """Counts how often bcrypt is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.hashes: list[bytes] = []
        self._checkpw = bcrypt.checkpw
        monkeypatch.setattr(bcrypt, "checkpw", self)

    def __call__(self, password: bytes, hashed_password: bytes) -> bool:
        self.count += 1
        self.hashes.append(hashed_password)
        return self._checkpw(password, hashed_password)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("alice", "secret"),
        ("bob", "hunter2"),
        ("carol", "pass:word"),
        ("dörte", "schlüssel"),
        ("long", "x" * 72),
        ("long", "x" * 100),  # as htpasswd: bcrypt sees the first 72 bytes
        ("empty", ""),
    ],
)
async def test_the_right_password(users: Users, user: str, password: str) -> None:
    assert await users.verify(user, password, "10.0.0.1")


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("alice", "wrong"),
        ("alice", ""),
        ("alice", "secret\0"),
        ("alice", "secret\0more"),
        ("Alice", "secret"),
        ("bob", "secret"),
        ("long", "x" * 71),
        ("nobody", "secret"),
        ("nobody", ""),
        ("", ""),
        ("alice:secret", ""),
        ("#", "made"),
    ],
)
async def test_a_wrong_password(users: Users, user: str, password: str) -> None:
    assert not await users.verify(user, password, "10.0.0.1")


async def test_a_failure_takes_its_time(
    users: Users, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(usocksd.auth, "FAILURE_TAKES", 1.0)
    for user in ("alice", "nobody"):
        before = trio.current_time()
        assert not await users.verify(user, "wrong", "10.0.0.1")
        assert trio.current_time() - before >= 1


async def test_an_unknown_user_costs_what_a_known_one_does(users: Users, checks: Checks) -> None:
    await users.verify("nobody", "x", "10.0.0.1")
    assert checks.count == 1
    assert checks.hashes[0][4:6] == b"04"


async def test_unknown_users_cost_what_known_ones_do_where_these_differ(
    tmp_path: Path, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usocksd.auth, "FAILURE_TAKES", 0.0)
    file = tmp_path / "users"
    dear = bcrypt.hashpw(b"secret", bcrypt.gensalt(rounds=5)).decode()
    file.write_text(f"alice:{hashed('secret')}\nbob:{dear}\n")
    names = [f"nobody {n}" for n in range(60)]
    costs = []
    for _ in range(2):  # two workers
        users = Users(file)
        checks.hashes.clear()
        for number, name in enumerate(names):
            assert not await users.verify(name, "x", f"10.0.0.{number}")
        costs.append([each[4:6] for each in checks.hashes])
    assert costs[0] == costs[1]
    assert 10 <= costs[0].count(b"05") <= 50


async def test_a_success_is_remembered_for_a_while(users: Users, checks: Checks, clock: Clock) -> None:
    assert await users.verify("alice", "secret", "10.0.0.1")
    clock.now += 59
    assert await users.verify("alice", "secret", "10.0.0.2")
    assert checks.count == 1
    assert not await users.verify("alice", "Secret", "10.0.0.1")
    clock.now += 2
    assert await users.verify("alice", "secret", "10.0.0.1")
    assert checks.count == 3


async def test_neither_passwords_nor_unkeyed_hashes_are_kept(users: Users) -> None:
    assert await users.verify("alice", "secret", "10.0.0.1")
    other = Users.__new__(Users)
    other.__dict__.update(users.__dict__, _key=b"another", _remembered={})
    assert await other.verify("alice", "secret", "10.0.0.1")
    assert users._remembered.keys().isdisjoint(other._remembered)
    assert "secret" not in repr(vars(users))


async def test_equal_questions_at_once_are_one_check(users: Users, checks: Checks) -> None:
    results: list[bool] = []

    async def ask() -> None:
        results.append(await users.verify("alice", "secret", "10.0.0.1"))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
    assert results == [True] * 50
    assert checks.count == 1


async def test_who_waits_for_anothers_check_goes_on_when_that_one_is_cancelled(users: Users) -> None:
    results: list[bool] = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            results.append(await users.verify("alice", "secret", "10.0.0.1"))

    scopes = [trio.CancelScope() for _ in range(3)]
    users._limiter.total_tokens = 1
    # No thread is free: the first one waits for it, the others for the first.
    async with trio.open_nursery() as nursery, users._limiter:
        for scope in scopes:
            nursery.start_soon(ask, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert results == [True, True]


async def test_too_many_failures_of_a_client_are_not_looked_at(
    users: Users, checks: Checks, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(users.verify, "alice", f"guess {n}", "10.0.0.1")
    assert checks.count == 20
    assert not await users.verify("alice", "secret", "10.0.0.1")
    assert checks.count == 20
    assert caplog.text.count("too many failed logins") == 1
    assert await users.verify("alice", "secret", "10.0.0.2")  # the others are not locked out
    assert await users.verify("alice", "secret", "10.0.0.1")  # nor is who is known to know it
    clock.now += 61
    assert await users.verify("bob", "hunter2", "10.0.0.1")


async def test_who_knew_the_password_before_is_not_locked_out_by_others(
    users: Users, checks: Checks, clock: Clock
) -> None:
    assert await users.verify("bob", "hunter2", "10.0.0.1")
    clock.now += 3600
    for n in range(30):
        assert not await users.verify("alice", f"guess {n}", "10.0.0.1")
    assert checks.count == 21
    assert await users.verify("bob", "hunter2", "10.0.0.1")
    assert checks.count == 22  # it is long ago, so it is checked
    assert not await users.verify("bob", "hunter3", "10.0.0.1")
    assert checks.count == 22


async def test_successes_do_not_count_as_failures(users: Users, clock: Clock) -> None:
    for _ in range(50):
        assert await users.verify("alice", "secret", "10.0.0.1")
        assert not users._failures_of("10.0.0.1").count
        users._remembered.clear()


async def test_an_ipv6_client_is_its_network(users: Users, checks: Checks) -> None:
    for n in range(30):
        await users.verify("alice", f"guess {n}", f"2001:db8::{n:x}")
    assert checks.count == 20
    await users.verify("alice", "guess", "2001:db8:0:1::1%eth0")
    assert checks.count == 21


async def test_what_is_remembered_is_bounded(users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usocksd.auth, "_MOST_REMEMBERED", 2)
    for user, password in (("alice", "secret"), ("bob", "hunter2"), ("empty", ""), ("carol", "pass:word")):
        assert await users.verify(user, password, f"10.0.0.{len(user)}")
    assert len(users._remembered) == 2
    assert len(users._failures) == 2


def test_every_fault_of_the_file_is_reported_and_no_hash_shown(tmp_path: Path) -> None:
    file = tmp_path / "users"
    good = hashed("x")
    file.write_text(
        f"alice:{good}\nbob:$apr1$abcdefgh$0123456789abcdefghijkl\ncarol:{{SHA}}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n"
        f"dave:plaintext\n:{good}\nalice:{good}\njust-a-word\nerin:$2x${good[4:]}\nfrank:{good}:extra\n"
    )
    with pytest.raises(ConfigError) as caught:
        Users(file)
    assert [fault.path for fault in caught.value.faults] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7, 8, 9)]
    for secret in ("apr1", "W6ph5", "plaintext", good[10:], "just-a-word"):
        assert secret not in str(caught.value)
    assert "htpasswd -B" in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "users").write_bytes(b"\xef\xbb\xbfalice:" + hashed("x").encode() + b"\r\nbob:" + hashed("x").encode())
    assert Users(tmp_path / "users").names == {"alice", "bob"}


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Users(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        Users(tmp_path / "binary")

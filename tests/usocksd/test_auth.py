"""Users and passwords: who may log in, how long a refusal takes, and whose check comes first."""

from __future__ import annotations

import logging
from math import inf
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import trio
import trio.testing

from usocksd.auth import Rank, Users
from usocksd.errors import ConfigError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def hashed(password: str, prefix: str = "2b", cost: int = 4) -> str:
    text = bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=cost)).decode()
    return f"${prefix}${text[4:]}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
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
    return file


def impatient(file: Path, clock: Clock, **more: Any) -> Users:
    """Refusals come at once, and checks have all the time there is."""
    return Users(file, clock=clock, failure_takes=0.0, **({"waits": inf} | more))


@pytest.fixture
def users(file: Path, clock: Clock) -> Users:
    return impatient(file, clock)


class Checks:
    """Counts how often bcrypt is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashes: list[bytes] = []
        self._checkpw = bcrypt.checkpw
        monkeypatch.setattr(bcrypt, "checkpw", self)

    @property
    def count(self) -> int:
        return len(self.hashes)

    def __call__(self, password: bytes, hashed_password: bytes) -> bool:
        self.hashes.append(hashed_password)
        return self._checkpw(password, hashed_password)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(monkeypatch)


@pytest.mark.parametrize(
    ("user", "password", "right"),
    [
        ("alice", "secret", True),
        ("bob", "hunter2", True),
        ("carol", "pass:word", True),
        ("dörte", "schlüssel", True),
        ("long", "x" * 72, True),
        ("long", "x" * 100, True),  # as htpasswd: bcrypt sees the first 72 bytes
        ("empty", "", True),
        ("alice", "wrong", False),
        ("alice", "", False),
        ("alice", "secret\0", False),
        ("alice", "secret\0more", False),
        ("Alice", "secret", False),
        ("bob", "secret", False),
        ("long", "x" * 71, False),
        ("nobody", "secret", False),
        ("", "", False),
        ("alice:secret", "", False),
        ("#", "made", False),
    ],
)
async def test_passwords(users: Users, user: str, password: str, right: bool) -> None:
    assert await users.verify(user, password, "10.0.0.1") is right


# ---- refusals


async def refusal(users: Users, user: str, client: str, took: list[float]) -> None:
    before = trio.current_time()
    assert not await users.verify(user, "wrong", client)
    took.append(trio.current_time() - before)


async def test_every_refusal_takes_the_same_time(file: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Whether or not the user exists, others ask, or the password was checked at all."""
    users = Users(file)
    took: list[float] = []
    async with trio.open_nursery() as nursery:
        for number in range(40):
            for user in ("alice", "nobody"):
                nursery.start_soon(refusal, users, user, f"10.0.{number % 2}.1", took)
    async with users._turns.turn(Rank.USER), users._turns.turn(Rank.USER), trio.open_nursery() as nursery:
        for user in ("alice", "nobody"):
            nursery.start_soon(refusal, users, user, "10.0.0.2", took)
    assert took == pytest.approx([2.0] * 82)


async def test_in_a_crowd_refusals_take_longer(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """That leaves time for users with the right password; and it does not tell whether the others exist."""
    file = tmp_path / "users"
    file.write_text(f"alice:$2b$10${'.' * 53}\n")
    crowds = []
    for user in ("alice", "nobody"):
        users = Users(file)
        took: list[float] = []
        async with users._turns.turn(Rank.USER), users._turns.turn(Rank.USER), trio.open_nursery() as nursery:
            for number in range(400):
                nursery.start_soon(refusal, users, user, f"10.0.{number // 250}.{number % 250}", took)
        crowds.append(took)
    assert crowds[0] == pytest.approx(crowds[1])
    assert (min(crowds[0]), max(crowds[0])) == pytest.approx((2.0, 8.0))


def test_slow_hashes_give_a_refusal_more_time(tmp_path: Path) -> None:
    file = tmp_path / "users"
    for cost, takes in (("04", 2.0), ("12", 2.0), ("13", 3.2), ("15", 12.8)):
        file.write_text(f"alice:$2b${cost}${'.' * 53}\n")
        assert Users(file).failure_takes == pytest.approx(takes)


async def test_unknown_users_cost_what_known_ones_do(tmp_path: Path, clock: Clock, checks: Checks) -> None:
    file = tmp_path / "users"
    file.write_text(f"alice:{hashed('secret')}\nbob:{hashed('secret', cost=5)}\n")
    costs = []
    for _ in range(2):  # two workers
        users = impatient(file, clock)
        checks.hashes.clear()
        for number in range(60):
            assert not await users.verify(f"nobody {number}", "x", f"10.0.0.{number}")
        costs.append([each[4:6] for each in checks.hashes])
    assert costs[0] == costs[1]
    assert len(costs[0]) == 60
    assert 10 <= costs[0].count(b"05") <= 50


# ---- whose check comes first


async def test_guesses_do_not_keep_out_users_who_know_their_password(users: Users, checks: Checks) -> None:
    """First users who have logged in before, then users from clients with few failures; the newest first."""
    order: list[str] = []

    async def ask(user: str, password: str, client: str) -> None:
        await users.verify(user, password, client)
        order.append(user)

    assert await users.verify("alice", "secret", "10.0.0.1")
    users._remembered = dict.fromkeys(users._remembered, 0.0)  # long ago
    for number in range(4):
        await users.verify("bob", f"wrong {number}", "10.0.0.9")
    async with trio.open_nursery() as nursery:
        async with users._turns.turn(Rank.USER), users._turns.turn(Rank.USER):
            for number in range(3):
                nursery.start_soon(ask, f"nobody {number}", "wrong", f"10.0.1.{number}")
            await trio.testing.wait_all_tasks_blocked()
            for user, password, client in (
                ("bob", "hunter2", "10.0.0.9"),
                ("alice", "secret", "10.0.0.1"),
                ("carol", "pass:word", "10.0.0.3"),
                ("empty", "", "10.0.0.4"),
            ):
                nursery.start_soon(ask, user, password, client)
                await trio.testing.wait_all_tasks_blocked()
            # One at a time, so that the order can be seen.
            users._turns._free -= 1
        users._turns._free += 1
    assert order[:4] == ["alice", "empty", "carol", "bob"]
    assert len(order) == 7


async def test_a_line_is_bounded_and_its_oldest_are_refused(
    file: Path, checks: Checks, autojump_clock: trio.testing.MockClock
) -> None:
    users = Users(file, waits=inf, most_waiting=3)
    results: list[str] = []

    async def ask(number: int) -> None:
        await users.verify(f"nobody {number}", "wrong", f"10.0.0.{number}")
        results.append(f"nobody {number}")

    async with trio.open_nursery() as nursery:
        async with users._turns.turn(Rank.USER), users._turns.turn(Rank.USER):
            for number in range(9):
                nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
        while len(results) < 3:
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert sorted(results) == ["nobody 6", "nobody 7", "nobody 8"]
    assert checks.count == 3


async def test_a_cancelled_wait_leaves_no_gap(users: Users) -> None:
    turns = users._turns
    async with turns.turn(Rank.USER), turns.turn(Rank.USER):
        with trio.move_on_after(0):
            async with turns.turn(Rank.USER):
                raise AssertionError
    for _ in range(3):
        async with turns.turn(Rank.SUSPECT):
            pass


# ---- what is remembered


async def test_a_success_is_remembered_for_a_while(users: Users, checks: Checks, clock: Clock) -> None:
    assert await users.verify("alice", "secret", "10.0.0.1")
    clock.now += 59
    assert await users.verify("alice", "secret", "10.0.0.2")
    assert checks.count == 1
    assert not await users.verify("alice", "Secret", "10.0.0.1")
    clock.now += 2
    assert await users.verify("alice", "secret", "10.0.0.1")
    assert checks.count == 3


async def test_neither_passwords_nor_unkeyed_hashes_are_kept(file: Path, clock: Clock) -> None:
    users, other = impatient(file, clock), impatient(file, clock)
    for each in (users, other):
        assert await each.verify("alice", "secret", "10.0.0.1")
    assert users._remembered.keys().isdisjoint(other._remembered)
    assert "secret" not in repr(vars(users))


async def test_equal_questions_at_once_are_one_check(users: Users, checks: Checks) -> None:
    results: list[bool] = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            results.append(await users.verify("alice", "secret", "10.0.0.1"))

    scopes = [trio.CancelScope() for _ in range(50)]
    # No place is free: the first asker waits for one, and the others wait for the first.
    async with trio.open_nursery() as nursery, users._turns.turn(Rank.USER), users._turns.turn(Rank.USER):
        for scope in scopes:
            nursery.start_soon(ask, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()  # then another goes on with it
        await trio.testing.wait_all_tasks_blocked()
    assert results == [True] * 49
    assert checks.count == 1


async def test_too_many_failures_of_a_client_are_not_looked_at(
    users: Users, checks: Checks, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert await users.verify("bob", "hunter2", "10.0.0.1")
    clock.now += 3600  # the success has expired, and still says that it was right
    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(users.verify, "alice", f"guess {n}", "10.0.0.1")
    assert checks.count == 21
    assert not await users.verify("alice", "secret", "10.0.0.1")
    assert not await users.verify("bob", "hunter3", "10.0.0.1")
    assert checks.count == 21
    assert caplog.text.count("too many failed logins") == 1
    assert await users.verify("alice", "secret", "10.0.0.2")  # other clients are not locked out
    assert await users.verify("alice", "secret", "10.0.0.1")  # and neither is a user who has logged in before
    assert await users.verify("bob", "hunter2", "10.0.0.1")
    clock.now += 61
    assert await users.verify("carol", "pass:word", "10.0.0.1")


async def test_only_checks_that_have_failed_count_as_failures(file: Path, users: Users, clock: Clock) -> None:
    for _ in range(50):
        assert await users.verify("alice", "secret", "10.0.0.1")
        users._remembered.clear()
    assert not users._failures_of("10.0.0.1").count
    hasty = impatient(file, clock, waits=0.0)
    for _ in range(30):  # never looked at
        assert not await hasty.verify("alice", "secret", "10.0.0.1")
    assert not hasty._failures_of("10.0.0.1").count


async def test_an_ipv6_client_is_its_network(users: Users, checks: Checks) -> None:
    for n in range(30):
        await users.verify("alice", f"guess {n}", f"2001:db8::{n:x}")
    assert checks.count == 20
    await users.verify("alice", "guess", "2001:db8:0:1::1%eth0")
    assert checks.count == 21


async def test_memory_is_bounded(file: Path, clock: Clock) -> None:
    users = impatient(file, clock, most_remembered=2)
    for user, password in (("alice", "secret"), ("bob", "hunter2"), ("empty", ""), ("carol", "pass:word")):
        assert await users.verify(user, password, f"10.0.0.{len(user)}")
    assert (len(users._remembered), len(users._failures)) == (2, 2)


# ---- the file


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


def test_how_a_file_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "users").write_bytes(b"\xef\xbb\xbfalice:" + hashed("x").encode() + b"\r\nbob:" + hashed("x").encode())
    assert Users(tmp_path / "users").names == {"alice", "bob"}
    with pytest.raises(ConfigError, match="No such file"):
        Users(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        Users(tmp_path / "binary")

from __future__ import annotations

import logging
from math import inf
from pathlib import Path

import bcrypt
import pytest
import trio
import trio.testing

import usocksd.auth
from usocksd.auth import Rank, Users
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
def users(file: Path, clock: Clock) -> Users:
    """Who is wrong hears it at once, and everybody has all the time there is."""
    return Users(file, clock=clock, failure_takes=0.0, waits=inf)


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


async def test_every_refusal_takes_the_same_time(file: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Whether there is such a user or not, whoever else wants to know, and whether it was looked at at all."""
    users = Users(file)
    took: list[float] = []

    async def guess(user: str, client: str) -> None:
        before = trio.current_time()
        assert not await users.verify(user, "wrong", client)
        took.append(trio.current_time() - before)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            for user in ("alice", "nobody"):
                nursery.start_soon(guess, user, f"10.0.{number % 2}.1")
    async with users._line.turn(Rank.USER), users._line.turn(Rank.USER), trio.open_nursery() as nursery:
        for user in ("alice", "nobody"):
            nursery.start_soon(guess, user, "10.0.0.2")
    assert took == pytest.approx([2.0] * 82)


async def test_in_a_crowd_refusals_take_longer(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """There is more time for those who are right; and it says nothing about users who they were that came before."""
    file = tmp_path / "users"
    file.write_text(f"alice:$2b$10${'.' * 53}\n")
    crowds = []
    for user in ("alice", "nobody"):
        users = Users(file)
        took: list[float] = []

        async def guess(user: str, client: str, users: Users = users, took: list[float] = took) -> None:
            before = trio.current_time()
            assert not await users.verify(user, "wrong", client)
            took.append(trio.current_time() - before)

        async with users._line.turn(Rank.USER), users._line.turn(Rank.USER), trio.open_nursery() as nursery:
            for number in range(400):
                nursery.start_soon(guess, user, f"10.0.{number // 250}.{number % 250}")
        crowds.append(took)
    assert crowds[0] == pytest.approx(crowds[1])
    assert (min(crowds[0]), max(crowds[0])) == pytest.approx((2.0, 8.0))


def test_dear_hashes_give_a_refusal_more_time(tmp_path: Path) -> None:
    file = tmp_path / "users"
    for cost, takes in (("04", 2.0), ("12", 2.0), ("13", 3.2), ("15", 12.8)):
        file.write_text(f"alice:$2b${cost}${'.' * 53}\n")
        assert Users(file).failure_takes == pytest.approx(takes)


async def test_who_guesses_does_not_keep_out_who_knows(
    users: Users, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all wait: first who was right before, then who names a user and was not wrong often, and the last first."""
    order: list[str] = []
    secrets = {"alice": "secret", "bob": "hunter2", "carol": "pass:word", "empty": ""}

    async def ask(user: str, password: str, client: str) -> None:
        await users.verify(user, password, client)
        order.append(user)

    assert await users.verify("alice", "secret", "10.0.0.1")
    users._remembered = dict.fromkeys(users._remembered, 0.0)  # long ago
    for number in range(4):
        await users.verify("bob", f"wrong {number}", "10.0.0.9")
    async with trio.open_nursery() as nursery:
        async with users._line.turn(Rank.USER), users._line.turn(Rank.USER):
            for number in range(3):
                nursery.start_soon(ask, f"nobody {number}", "wrong", f"10.0.1.{number}")
            await trio.testing.wait_all_tasks_blocked()
            for user, client in (
                ("bob", "10.0.0.9"),
                ("alice", "10.0.0.1"),
                ("carol", "10.0.0.3"),
                ("empty", "10.0.0.4"),
            ):
                nursery.start_soon(ask, user, secrets[user], client)
                await trio.testing.wait_all_tasks_blocked()
            # One at a time, so that the order can be seen.
            users._line._free -= 1
        users._line._free += 1
    assert order[:4] == ["alice", "empty", "carol", "bob"]
    assert len(order) == 7


async def test_a_line_is_bounded_and_who_is_at_its_end_is_refused(
    file: Path, checks: Checks, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usocksd.auth, "_MOST_WAITING", 3)
    users = Users(file, waits=inf)
    results: list[str] = []

    async def ask(number: int) -> None:
        await users.verify(f"nobody {number}", "wrong", f"10.0.0.{number}")
        results.append(f"nobody {number}")

    async with trio.open_nursery() as nursery:
        async with users._line.turn(Rank.USER), users._line.turn(Rank.USER):
            for number in range(9):
                nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
        while len(results) < 3:
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert sorted(results) == ["nobody 6", "nobody 7", "nobody 8"]
    assert checks.count == 3


async def test_whoever_goes_while_waiting_leaves_no_gap(users: Users) -> None:
    line = users._line
    async with line.turn(Rank.USER), line.turn(Rank.USER):
        with trio.move_on_after(0):
            async with line.turn(Rank.USER):
                raise AssertionError
    for _ in range(3):
        async with line.turn(Rank.SUSPECT):
            pass


async def test_an_unknown_user_costs_what_a_known_one_does(users: Users, checks: Checks) -> None:
    await users.verify("nobody", "x", "10.0.0.1")
    assert checks.count == 1
    assert checks.hashes[0][4:6] == b"04"


async def test_unknown_users_cost_what_known_ones_do_where_these_differ(tmp_path: Path, checks: Checks) -> None:
    file = tmp_path / "users"
    dear = bcrypt.hashpw(b"secret", bcrypt.gensalt(rounds=5)).decode()
    file.write_text(f"alice:{hashed('secret')}\nbob:{dear}\n")
    names = [f"nobody {n}" for n in range(60)]
    costs = []
    for _ in range(2):  # two workers
        users = Users(file, failure_takes=0.0, waits=inf)
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
    # It is nobody's turn: the first one waits for it, the others for the first.
    async with trio.open_nursery() as nursery, users._line.turn(Rank.USER), users._line.turn(Rank.USER):
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


async def test_tries_that_nobody_has_looked_at_do_not_count(file: Path, clock: Clock) -> None:
    users = Users(file, clock=clock, failure_takes=0.0, waits=0.0)
    for _ in range(30):
        assert not await users.verify("alice", "secret", "192.0.2.1")
    users._waits = inf
    assert await users.verify("alice", "secret", "192.0.2.1")


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

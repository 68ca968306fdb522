"""Users and passwords, from an htpasswd file.

bcrypt is slow on purpose. Checks run in threads, a few at a time, and a success is remembered for a minute, as a keyed
hash whose key never leaves the process. Equal questions at the same time share one check, so a client that opens fifty
connections at once makes one attempt, not fifty.

Guessing must not keep out users who know their password. So checks wait in four queues, served in this order: a user
and password that were right before; an existing user, from a client with few recent failures; an existing user; anybody
else. In each queue the newest check is next: if there are more than time allows, the oldest would be too late anyway,
and are refused without a check.

Nobody learns which users exist: every refusal takes the same time, which depends only on the number of attempts at the
time of the question.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes

import bcrypt
import trio
from attrs import Factory, define

from usocksd.errors import ConfigError, Fault
from usocksd.net.limits import owner
from usocksd.settings.files import read_file

_logger = logging.getLogger("usocksd.auth")

_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_LONGEST_PASSWORD = 72  # bytes that bcrypt looks at; htpasswd cuts off the rest too
# Seconds that a refusal takes: with few attempts at a time, and at most.
_FAILURE_TAKES, _FAILURE_TAKES_AT_MOST = 2.0, 8.0
# The share of the shorter time that is kept for the check itself.
_FOR_THE_CHECK = 0.5
# Seconds of a check of cost 10 on a slow machine. A refusal takes at least _SLACK times as long.
_COST_10 = 0.1
_SLACK = 4

_REMEMBER_FOR = 60.0
_THREADS = 2
_MOST_FAILURES, _WITHIN = 20, 60.0  # of one client
_SUSPECT_AFTER = 4  # attempts of one client that have failed, or are under way


@define(eq=False)
class _Check:
    """One check under way. `success` stays None if its first asker was cancelled."""

    done: trio.Event = Factory(trio.Event)
    success: bool | None = None


@define
class _Failures:
    until: float
    count: int = 0
    logged: bool = False


class Rank(IntEnum):
    """The queue of a check; lower ones are served first."""

    WAS_RIGHT = 0
    """This user with this password was right before."""
    USER = 1
    """The user exists, and the client has few recent failures."""
    SUSPECT = 2
    """The user exists."""
    ANYBODY = 3


class _Turns:
    """A limited number of checks at a time: the lowest rank first, within a rank the newest. Ranks that may be guesses
    leave the last place free.
    """

    def __init__(self, places: int, most_waiting: int) -> None:
        self._free = places
        self._waiting = {rank: deque[trio.Event](maxlen=most_waiting) for rank in Rank}

    @asynccontextmanager
    async def turn(self, rank: Rank) -> AsyncIterator[None]:
        """Wait for a place. If too many wait in a rank, the oldest never get one."""
        if self._has_place(rank):
            self._free -= 1
        else:
            mine = trio.Event()
            self._waiting[rank].append(mine)
            try:
                await mine.wait()
            except trio.Cancelled:
                if mine.is_set():
                    self._end()
                with suppress(ValueError):
                    self._waiting[rank].remove(mine)
                raise
        try:
            yield
        finally:
            self._end()

    def _has_place(self, rank: Rank) -> bool:
        return self._free > (rank >= Rank.SUSPECT)

    def _end(self) -> None:
        self._free += 1
        for rank, waiting in self._waiting.items():
            if waiting and self._has_place(rank):
                self._free -= 1
                waiting.pop().set()
                return


class Users:
    """The users of an htpasswd file."""

    def __init__(
        self,
        path: Path,
        *,
        read: Callable[[Path], bytes] = read_file,
        clock: Callable[[], float] = time.monotonic,
        failure_takes: float | None = None,
        waits: float | None = None,
        most_waiting: int = 256,
        most_remembered: int = 10_000,
    ) -> None:
        """Takes the file, by `read`: in each line a user, a colon and a bcrypt hash, as `htpasswd -B` writes it.

        A refusal comes `failure_takes` seconds after the question, or later if there are many attempts; by default two
        seconds, more if hashes have costs beyond 12. A check begins within `waits` seconds or not at all; by default in
        time for the refusal. `most_waiting` may wait in each rank.
        Raises ConfigError with every line that has another hash, since those can't be checked, or not safely.
        """
        self._clock = clock
        self._hashes = _hashes_of(path, read)
        # The work is the same for users who exist and who do not, see `_nobodys_hash`. Every worker
        # must choose the same work for a name, also after a restart.
        self._costs = [hashed[4:6] for hashed in self._hashes.values()] or [b"10"]
        self._cost_key = blake2b(b"".join(self._hashes.values())).digest()
        self._key = token_bytes(32)
        # When a success expires. An expired entry only shows that the password was right once.
        self._remembered: dict[bytes, float] = {}
        self._checks: dict[bytes, _Check] = {}
        self._failures: dict[bytes, _Failures] = {}
        self._most_remembered = most_remembered
        self._turns = _Turns(_THREADS, most_waiting)
        self._check_takes = _COST_10 * 2.0 ** (max(map(int, self._costs)) - 10)
        slow = _SLACK * self._check_takes
        self.failure_takes = max(_FAILURE_TAKES, slow) if failure_takes is None else failure_takes
        """Seconds; more if many attempts wait."""
        self._waits = waits
        self._attempts = 0
        """How many attempts wait for an answer."""

    @property
    def names(self) -> frozenset[str]:
        """The users."""
        return frozenset(name.decode() for name in self._hashes)

    async def verify(self, username: str, password: str, client: str) -> bool:
        """Whether this is the password of this user. If not, the answer takes `failure_takes` seconds or more.

        `client` is the numeric address that asks. After too many failures within a minute, its attempts are refused
        without a check until the minute is over. Passwords that were right before are still accepted, so others at the
        same address can't lock a user out.
        """
        asked = trio.current_time()
        name, secret = username.encode(), password.encode()
        digest = blake2b(len(name).to_bytes(4, "big") + name + secret, key=self._key, digest_size=32).digest()
        until = self._remembered.get(digest)
        if until is not None and until > self._clock():
            return True
        takes = self._refusal_takes()
        success = False
        self._attempts += 1
        try:
            if until is not None or self._may_try(client):
                waits = takes - self.failure_takes * _FOR_THE_CHECK if self._waits is None else self._waits
                with trio.move_on_after(waits):
                    success = await self._shared_check(digest, name, secret, client)
            if not success:
                await trio.sleep_until(asked + takes)
        finally:
            self._attempts -= 1
        return success

    def _refusal_takes(self) -> float:
        """Seconds: time enough for the checks of all attempts, within bounds."""
        crowd = self._attempts * self._check_takes / _THREADS
        return max(min(crowd, _FAILURE_TAKES_AT_MOST), self.failure_takes)

    async def _shared_check(self, digest: bytes, name: bytes, secret: bytes, client: str) -> bool:
        while (check := self._checks.get(digest)) is not None:
            await check.done.wait()
            if check.success is not None:
                return check.success
        check = self._checks[digest] = _Check()
        failures = self._failures_of(client)
        if digest in self._remembered:
            rank = Rank.WAS_RIGHT
        elif name in self._hashes:
            rank = Rank.USER if failures.count < _SUSPECT_AFTER else Rank.SUSPECT
        else:
            rank = Rank.ANYBODY
        failures.count += 1  # before the answer is known, or many attempts at once would not count
        try:
            async with self._turns.turn(rank):
                check.success = await trio.to_thread.run_sync(self._check, name, secret)
        finally:
            if check.success is not False:  # right, or never checked
                failures.count -= 1
            del self._checks[digest]
            check.done.set()
        if check.success:
            self._remembered.pop(digest, None)
            self._make_room(self._remembered)
            self._remembered[digest] = self._clock() + _REMEMBER_FOR
        return check.success

    def _check(self, name: bytes, secret: bytes) -> bool:
        hashed = self._hashes.get(name)
        matches = bcrypt.checkpw(secret[:_LONGEST_PASSWORD], hashed or self._nobodys_hash(name))
        # bcrypt ends at a NUL, so a password with one would be as good as its beginning.
        return matches and hashed is not None and b"\0" not in secret

    def _nobodys_hash(self, name: bytes) -> bytes:
        """The hash against which to check the password of a user who does not exist.

        Costs occur as often as in the file, so the time of an attempt does not tell whether the user exists.
        """
        choice = int.from_bytes(blake2b(name, key=self._cost_key, digest_size=8).digest())
        return b"$2b$" + self._costs[choice % len(self._costs)] + b"$" + b"." * 53

    def _may_try(self, client: str) -> bool:
        failures = self._failures_of(client)
        if failures.count < _MOST_FAILURES:
            return True
        if not failures.logged:
            failures.logged = True
            _logger.warning("too many failed logins", extra={"fields": {"client_addr": client}})
        return False

    def _failures_of(self, client: str) -> _Failures:
        key = owner(client)
        now = self._clock()
        failures = self._failures.get(key)
        if failures is None or failures.until <= now:
            self._failures.pop(key, None)
            self._make_room(self._failures)
            failures = self._failures[key] = _Failures(now + _WITHIN)
        return failures

    def _make_room(self, remembered: dict[bytes, float] | dict[bytes, _Failures]) -> None:
        """Make room for one more entry: drop the oldest."""
        if len(remembered) >= self._most_remembered:
            del remembered[next(iter(remembered))]


def _hashes_of(path: Path, read: Callable[[Path], bytes]) -> dict[bytes, bytes]:
    try:
        lines = read(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Fault("users_file", "", f"expected a readable text file: {error}")]) from None
    hashes: dict[bytes, bytes] = {}
    faults: list[Fault] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        # Neither the hash nor what may be a password in the clear is shown.
        user, _, hashed = line.strip().partition(":")
        expected = None
        if not user or len(user.encode()) > 255:
            expected = "expected USER:HASH with a user of 1 to 255 bytes"
        elif not _BCRYPT.fullmatch(hashed):
            expected = "expected a bcrypt hash behind the user ($2y$...), as made by htpasswd -B"
        elif user.encode() in hashes:
            expected = "expected every user once"
        if expected is not None:
            faults.append(Fault(f"line {number}", repr(user[:255]) if hashed else "", expected))
        else:
            hashes[user.encode()] = hashed.encode()
    if faults:
        raise ConfigError(str(path), faults)
    return hashes

"""How upstreams are watched: what marks them down and up, what one worker tells the others, and when they are probed."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from transocks.config import HealthConfig
from transocks.upstreams.health import Health
from transocks.upstreams.probes import ProbeTimedOut
from transocks.upstreams.state import Answer, UpstreamState
from transocks.upstreams.upstream import UpstreamMetrics
from usocksd.errors import DialError, UpstreamError
from usocksd.log.metrics import Metrics
from usocksd.serve.service import Stopping

REFUSED = DialError(errno.ECONNREFUSED, "192.0.2.1:1080")


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> UpstreamState:
    return UpstreamState("socks5://192.0.2.1:1080", clock)


# ---- the state of one


def test_an_upstream_is_up_at_first(state: UpstreamState) -> None:
    assert (state.up, state.status()["since"]) == (True, None)


def test_after_a_failure_it_is_down_and_what_was_learned_is_forgotten(state: UpstreamState, clock: Clock) -> None:
    state.answered(Answer(0.1, ours=True, pipelines=True), clock.now)
    assert (state.ours, state.pipelines, state.latency) == (True, True, 0.1)
    clock.now += 1
    state.failed("refused")
    assert (state.up, state.why, state.ours, state.pipelines) == (False, "refused", None, None)
    assert state.status()["since"].endswith("Z")
    state.answered(Answer(0.2), clock.now)
    assert (state.up, state.why, state.ours) == (True, "", False)


def test_the_newer_finding_counts(state: UpstreamState, clock: Clock) -> None:
    began = clock.now
    clock.now += 1
    state.failed("refused")
    state.answered(Answer(0.1), began)  # asked before it failed
    assert not state.up
    state.answered(Answer(0.1), clock.now)
    assert state.up
    state.failed("no answer", began)  # has answered since
    assert state.up
    clock.now += 1
    state.heard = clock.now
    state.failed("no answer", clock.now - 0.5)
    assert state.up


def test_each_change_is_reported_once(state: UpstreamState, clock: Clock) -> None:
    told: list[bool] = []
    state.changed = lambda state: told.append(state.up)
    for _ in range(2):
        state.failed("refused")
    for _ in range(2):
        state.answered(Answer(0.1), clock.now)
    assert told == [False, True]


def test_pipelining_is_remembered(state: UpstreamState, clock: Clock) -> None:
    state.answered(Answer(0.1, ours=False, pipelines=True), clock.now)
    state.answered(Answer(0.1, ours=False, pipelines=None), clock.now)
    assert state.pipelines is True
    state.answered(Answer(0.1, ours=True, pipelines=True), clock.now)
    state.answered(Answer(0.1, ours=False, pipelines=None), clock.now)
    assert state.pipelines is None  # another program


def test_findings_of_the_keeper(state: UpstreamState, clock: Clock) -> None:
    keeper = UpstreamState(state.name, clock)
    keeper.answered(Answer(0.1, ours=True, pipelines=True), clock.now)
    shared = json.loads(json.dumps(keeper.as_json()))
    clock.now += 1
    state.failed("refused")
    state.take(shared)  # older
    assert not state.up
    clock.now += 1
    keeper.answered(Answer(0.2, ours=True, pipelines=True), clock.now)
    state.take(keeper.as_json())
    assert (state.up, state.ours, state.latency) == (True, True, 0.2)
    told: list[bool] = []
    state.changed = lambda state: told.append(state.up)
    clock.now += 1
    keeper.failed("no answer")
    state.take(keeper.as_json())
    assert (state.up, state.why, state.since) == (False, "no answer", keeper.since)
    assert told == []  # the keeper has shared it


def test_an_upstream_that_has_answered_since_is_not_down(state: UpstreamState, clock: Clock) -> None:
    keeper = UpstreamState(state.name, clock)
    began = clock.now
    clock.now += 3
    state.heard = clock.now
    clock.now += 2
    keeper.failed("no answer", began)
    state.take(keeper.as_json())
    assert state.up


# ---- probes


SILENT = ProbeTimedOut("192.0.2.1:1080", "waiting for the answer of", late=False)


class Upstream:
    """Answers probes as a test says."""

    def __init__(self, key: str = "one") -> None:
        self.key = key
        self.state = UpstreamState(key, trio.current_time)
        self.prober = self
        self.answer: Answer | Exception = Answer(0.01)
        self.once: list[Answer | Exception] = []
        """Its answers before that, in order."""
        self.probes: list[tuple[float, bool]] = []
        """When, and whether in order to learn."""

    async def probe(self, *, connect: float, answer: float, learn: bool) -> Answer:
        self.probes.append((trio.current_time(), learn))
        await trio.lowlevel.checkpoint()
        answer = self.once.pop(0) if self.once else self.answer
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """One upstream and its health, in one worker."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.upstream = Upstream()
        self.shared: list[Any] = []
        self.metrics = Metrics("transocks")
        self.health = Health(
            HealthConfig(interval=10),
            self.shared.append,
            UpstreamMetrics(self.metrics),
            clock=trio.current_time,
        )
        self.health.add(self.upstream)

    async def keep(self) -> None:
        """Be the worker that probes for all."""
        self.nursery.start_soon(self.health.keep)
        await wait_all_tasks_blocked()


@pytest.fixture
async def world(autojump_clock: MockClock) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        await nursery.start(world.health.run)
        yield world
        nursery.cancel_scope.cancel()


async def test_the_keeper_probes_and_shares(autojump_clock: MockClock, world: World) -> None:
    await world.keep()
    upstream = world.upstream
    assert len(upstream.probes) == 1  # at once
    await trio.sleep(30.5)
    assert [round(when, 1) for when, _ in upstream.probes] == [0, 10, 20, 30]
    assert all(learn for _, learn in upstream.probes)
    assert world.shared[-1]["one"]["up"]
    upstream.answer = REFUSED
    await trio.sleep(10)
    assert not world.shared[-1]["one"]["up"]
    assert world.shared[-1]["one"]["why"] == str(REFUSED)


@pytest.mark.parametrize("keeping", [False, True])
async def test_an_upstream_that_is_down_is_probed_with_growing_pauses(
    autojump_clock: MockClock, world: World, keeping: bool
) -> None:
    if keeping:
        await world.keep()
    upstream = world.upstream
    await trio.sleep(1)
    upstream.answer = REFUSED
    upstream.probes.clear()
    upstream.state.failed("refused")
    began = trio.current_time()
    await trio.sleep(40)
    after = [round(when - began, 1) for when, _ in upstream.probes]
    assert after == [0.5, 1.5, 3.5, 7.5, 15.5, 25.5, 35.5]
    upstream.answer = Answer(0.01)
    await trio.sleep(10)
    assert upstream.state.up
    assert bool(world.shared) is keeping


async def test_errors_of_this_host_mark_nothing_down(autojump_clock: MockClock, world: World) -> None:
    await world.keep()
    world.upstream.answer = DialError(errno.EMFILE, "192.0.2.1:1080", "socket")
    await trio.sleep(10.5)
    assert world.upstream.state.up
    world.upstream.answer = UpstreamError("the server refused the user name or password")
    await trio.sleep(10.5)
    assert not world.upstream.state.up


async def test_a_probe_that_ends_with_the_process_marks_nothing(autojump_clock: MockClock, world: World) -> None:
    """A worker that has drained for long enough ends all that is connected, and its tasks go on for a moment."""

    world.upstream.answer = Stopping()
    world.upstream.state.failed("refused")
    await trio.sleep(1)
    assert len(world.upstream.probes) == 1
    assert not world.upstream.state.up


async def test_changes_are_recorded(autojump_clock: MockClock, world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world.upstream.state.failed("refused")
    await trio.sleep(1)
    assert [(r.message, r.levelname) for r in caplog.records] == [
        ("upstream is down", "WARNING"),
        ("upstream is up again", "INFO"),
    ]


async def test_shared_findings_may_be_of_another_configuration(autojump_clock: MockClock, world: World) -> None:
    other = UpstreamState("two", trio.current_time)
    other.failed("refused")
    mine = UpstreamState("one", trio.current_time)
    await trio.sleep(1)
    mine.failed("refused")
    world.health.take({"one": mine.as_json(), "two": other.as_json()})
    assert not world.upstream.state.up
    await trio.sleep(1)  # found out by the keeper, and recovered here
    assert world.upstream.state.up


# ---- what one bad sample can do


async def test_one_late_answer_changes_nothing(autojump_clock: MockClock, world: World) -> None:
    """As if it was stopped for a while, and answers when it continues."""

    upstream = world.upstream
    upstream.once = [Answer(5.0, round_trip=0.001)]
    upstream.state.failed("no answer")
    upstream.probes.clear()
    await trio.sleep(1)
    assert len(upstream.probes) == 2
    assert (upstream.state.up, upstream.state.slow, upstream.state.latency) == (True, False, 0.01)


async def test_two_late_answers_make_it_slow(
    autojump_clock: MockClock, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await world.keep()
    upstream = world.upstream
    upstream.state.has_others = True
    upstream.answer = Answer(0.8, round_trip=0.001)
    await trio.sleep(10.5)
    assert (upstream.state.up, upstream.state.slow, upstream.state.well) == (True, True, False)
    assert world.shared[-1]["one"]["slow"]
    upstream.answer = Answer(0.01)
    await trio.sleep(10)
    assert upstream.state.well
    assert [record.message for record in caplog.records] == ["upstream is slow", "upstream is no longer slow"]


@pytest.mark.parametrize(("latency", "slow"), [(1.1, False), (2.2, True)])
async def test_far_is_not_slow(autojump_clock: MockClock, world: World, latency: float, slow: bool) -> None:
    await world.keep()
    world.upstream.answer = Answer(latency, round_trip=0.5)
    await trio.sleep(10.5)
    assert world.upstream.state.slow is slow


def test_one_long_round_trip_changes_nothing(state: UpstreamState, clock: Clock) -> None:
    for round_trip, believed in ((0.1, 0.1), (3.0, 0.1), (0.2, 0.2), (0.5, 0.2), (0.5, 0.5)):
        state.answered(Answer(1.0, round_trip=round_trip), clock.now)
        assert state.round_trip == believed


def test_shared_findings_are_complete(state: UpstreamState, clock: Clock) -> None:
    keeper = UpstreamState(state.name, clock)
    clock.now += 1
    keeper.answered(Answer(0.8, round_trip=0.1, slow=True), clock.now)
    state.take(json.loads(json.dumps(keeper.as_json())))
    assert (state.latency, state.round_trip, state.slow) == (0.8, 0.1, True)


# ---- upstreams that answer no probes


async def test_silence_counts_only_after_an_answer(autojump_clock: MockClock, world: World) -> None:
    await world.keep()
    upstream = world.upstream
    upstream.answer = SILENT
    await trio.sleep(30)
    assert not upstream.state.up  # it had answered the first one
    upstream.state.failed("refused", gone=True)
    upstream.state.worked_now()  # another program, by which a client got through
    assert upstream.state.up
    await trio.sleep(30)
    assert upstream.state.up


async def test_an_upstream_that_never_answered_probes_gets_a_client_now_and_then(
    autojump_clock: MockClock, world: World
) -> None:
    state = world.upstream.state
    world.upstream.answer = SILENT
    state.failed("neither probes nor clients hear of it")
    assert not state.well
    await trio.sleep(1)
    assert (state.up, state.well) == (False, True)
    state.worked_now()
    assert (state.up, state.trial) == (True, False)
    # One that is known to answer them has no such trial.
    state.answered(Answer(0.01), trio.current_time())
    await trio.sleep(1)
    state.failed("silent")
    await trio.sleep(20)
    assert (state.up, state.well) == (False, False)


async def test_an_upstream_that_refuses_connections_gets_no_trial(autojump_clock: MockClock, world: World) -> None:
    world.upstream.answer = REFUSED
    world.upstream.state.failed("refused")
    await trio.sleep(20)
    assert (world.upstream.state.up, world.upstream.state.well) == (False, False)

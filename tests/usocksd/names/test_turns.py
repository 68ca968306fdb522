"""The order of turns, on trio's mock clock, which moves when all tasks wait."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from usocksd.names.turns import Ticket, TooManyWaiting, Turns

A, B, C = b"a", b"b", b"c"


class Place:
    """Turns, and the names that want one."""

    def __init__(self, nursery: trio.Nursery, most: int, waiting: int) -> None:
        self.turns = Turns(most, waiting=waiting)
        self.running: list[str] = []
        self.gave_way: list[str] = []
        self.refused: list[str] = []
        self.tickets: dict[str, Ticket] = {}
        self._nursery = nursery
        nursery.start_soon(self.turns.run)

    async def want(self, name: str, owner: bytes) -> None:
        """A turn that never ends by itself."""
        self._nursery.start_soon(self._take, name, owner)
        await wait_all_tasks_blocked()

    async def _take(self, name: str, owner: bytes) -> None:
        ticket = self.tickets[name] = Ticket(owner)
        try:
            async with self.turns.turn(ticket):
                self.running.append(name)
                try:
                    await trio.sleep_forever()
                finally:
                    self.running.remove(name)
            self.gave_way.append(name)
        except TooManyWaiting:
            self.refused.append(name)


async def test_the_next_turn_goes_to_the_newest_name_of_the_client_with_the_fewest(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    place = Place(nursery, 2, 10)
    for name, owner in (("a1", A), ("a2", A), ("a3", A), ("a4", A), ("b1", B), ("b2", B)):
        await place.want(name, owner)
    assert place.running == ["a1", "a2"]
    for first, then in (("a1", "b2"), ("a2", "a4")):
        place.tickets[first].scope.cancel()
        await wait_all_tasks_blocked()
        assert place.running[-1] == then


async def test_turns_that_do_not_end_give_way(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Also if all are of one client: names without an answer do not hold up the others."""
    place = Place(nursery, 2, 10)
    for name in ("1", "2", "3"):
        await place.want(name, A)
    await trio.sleep(0.9)
    assert place.gave_way == []
    await trio.sleep(0.6)
    assert place.gave_way == ["1"]
    assert place.running == ["2", "3"]


async def test_clients_with_few_names_do_not_give_way_to_those_with_many(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    place = Place(nursery, 4, 100)
    await place.want("slow", B)
    for number in range(20):
        await place.want(f"a{number}", A)
    await trio.sleep(30)
    assert "slow" in place.running
    assert len(place.gave_way) > 10
    # And somebody else's comes next, however many of that one wait.
    await place.want("other", C)
    await trio.sleep(1.5)
    assert {"slow", "other"} <= set(place.running)


async def test_the_client_with_the_most_names_is_refused(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    place = Place(nursery, 1, 3)
    await place.want("running", B)
    for name, owner in (("a1", A), ("a2", A), ("b1", B), ("c1", C), ("a3", A)):
        await place.want(name, owner)
    assert place.refused == ["a1", "a2"]


async def test_a_shared_name_counts_for_the_client_with_fewer(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    place = Place(nursery, 1, 10)
    for number in range(5):
        await place.want(f"a{number}", A)
    place.turns.shared(place.tickets["a1"], B)
    place.turns.shared(place.tickets["a2"], A)
    place.tickets["a0"].scope.cancel()
    await wait_all_tasks_blocked()
    assert place.running == ["a1"]
    place.turns.shared(place.tickets["a1"], C)
    assert place.tickets["a1"].owner in {B, C}


async def test_names_that_are_given_up_leave_nothing_behind(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    place = Place(nursery, 1, 10)
    async with trio.open_nursery() as others:
        for number in range(5):
            others.start_soon(place._take, str(number), A if number % 2 else B)
        await wait_all_tasks_blocked()
        others.cancel_scope.cancel()
    assert (place.turns._free, place.turns._wait, place.turns._waiting) == (1, 0, {})
    assert not place.turns._of

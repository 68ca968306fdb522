"""Records that repeat; what access records say is tested with the sessions that write them."""

from __future__ import annotations

from transocks.access_log import Repeats


def test_a_record_that_repeats_is_written_now_and_then_with_its_count() -> None:
    now = 0.0
    repeats = Repeats(every=10.0, clock=lambda: now)
    assert [repeats.due("a"), repeats.due("a"), repeats.due("b"), repeats.due("a")] == [1, None, 1, None]
    now = 9.9
    assert repeats.due("a") is None
    now = 10.0
    assert [repeats.due("a"), repeats.due("a"), repeats.due("b")] == [4, None, 1]


def test_the_number_of_known_records_is_bounded() -> None:
    repeats = Repeats(clock=lambda: 0.0)
    assert all(repeats.due(number) == 1 for number in range(5000))
    assert (repeats.due(4999), repeats.due(0)) == (None, 1)

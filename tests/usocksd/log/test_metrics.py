from __future__ import annotations

import json
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.log.metrics import BYTES, OTHER, SECONDS, Histogram, Metrics, Snapshot, lasting, total


def sent(metrics: Metrics) -> Snapshot:
    """A snapshot as it arrives at the master."""
    snapshot: Snapshot = json.loads(json.dumps(metrics.snapshot()))
    return snapshot


def values(snapshot: Snapshot, name: str) -> dict[tuple[str, ...], list[float]]:
    return {tuple(labels): numbers for labels, numbers in snapshot[name]["values"]}


def test_names() -> None:
    metrics = Metrics("usocksd")
    metrics.counter("things_total", "Things").value += 2
    assert values(sent(metrics), "usocksd_things_total") == {(): [2]}
    with pytest.raises(ValueError, match="_total"):
        metrics.counter("others", "Others")
    with pytest.raises(ValueError, match="usocksd_things_total"):
        metrics.minimum("things_total", "Things")


def test_children_are_there_from_when_they_are_asked_for() -> None:
    metrics = Metrics("usocksd")
    family = metrics.counters("things_total", "Things", "colour", "size")
    red = family.labels("red", "big")
    family.labels("blue", "big")
    red.value += 1
    assert family.labels("red", "big") is red
    assert values(sent(metrics), "usocksd_things_total") == {("red", "big"): [1], ("blue", "big"): [0]}


def test_beyond_the_limit_children_share_one() -> None:
    metrics = Metrics("usocksd")
    family = metrics.counters("denied_total", "Denied", "rule", most=3)
    for number in range(10):
        family.labels(f"rule {number}").value += 1
    family.labels("rule 1").value += 1
    found = values(sent(metrics), "usocksd_denied_total")
    assert found == {("rule 0",): [1], ("rule 1",): [2], ("rule 2",): [1], (OTHER,): [7]}


def test_a_sum_has_no_more_children_than_its_parts_may_have() -> None:
    """Else every reload with other rules would add its own."""
    past: Snapshot = {}
    for generation in range(5):
        metrics = Metrics("usocksd")
        family = metrics.counters("denied_total", "Denied", "rule", most=3)
        for number in range(3):
            family.labels(f"rule {number} of {generation}").value += 1
        past = total([past, lasting(sent(metrics))], bounded=True)
    found = values(past, "usocksd_denied_total")
    assert found == {**{(f"rule {number} of 0",): [1] for number in range(3)}, (OTHER,): [12]}


def test_a_sum_of_live_workers_has_every_child() -> None:
    """With workers that have different children, no sum falls when a child is added, in whatever order."""
    workers = []
    for number, rules in enumerate((("one", "two", "three"), ("four",))):
        metrics = Metrics("usocksd")
        family = metrics.counters("denied_total", "Denied", "rule", most=3)
        for rule in rules:
            family.labels(rule).value += number + 1
        workers.append(sent(metrics))
    found = {("one",): [1], ("two",): [1], ("three",): [1], ("four",): [2]}
    assert values(total(workers), "usocksd_denied_total") == found
    assert values(total(workers[::-1]), "usocksd_denied_total") == found


@given(st.lists(st.one_of(st.floats(0, 1e12), st.sampled_from(BYTES + SECONDS))), st.sampled_from([BYTES, SECONDS]))
def test_a_histogram_counts_what_is_at_or_below_each_bound(observed: list[float], bounds: tuple[float, ...]) -> None:
    histogram = Histogram(bounds)
    for value in observed:
        histogram.observe(value)
    *counts, seen = histogram.dump()
    assert list(accumulate(counts)) == [*(sum(v <= bound for v in observed) for bound in bounds), len(observed)]
    assert seen == pytest.approx(sum(observed))


def worker(requests: int, live: int, headroom: float) -> Snapshot:
    metrics = Metrics("usocksd")
    by_result = metrics.counters("requests_total", "Requests", "result")
    by_result.labels("ok").value += requests
    by_result.labels("failed")
    metrics.gauge("live", "Live").value = live
    metrics.minimum("headroom", "Headroom").value = headroom
    seconds = metrics.histogram("seconds", "Seconds", (1.0, 10.0))
    for _ in range(requests):
        seconds.observe(5.0)
    return sent(metrics)


def test_a_sum_over_workers() -> None:
    found = total([worker(3, 10, 0.5), worker(4, 20, 0.25), worker(0, 0, 0.75)])
    assert values(found, "usocksd_requests_total") == {("ok",): [7], ("failed",): [0]}
    assert values(found, "usocksd_live") == {(): [30]}
    assert values(found, "usocksd_headroom") == {(): [0.25]}
    assert values(found, "usocksd_seconds") == {(): [0, 7, 0, 35.0]}
    assert total([found]) == found
    assert total([]) == {}


def test_counters_of_ended_workers_stay_and_gauges_go() -> None:
    retired = total([lasting(worker(3, 10, 0.1)), lasting(worker(4, 20, 0.1))])
    found = total([retired, worker(1, 5, 0.9)])
    assert values(found, "usocksd_requests_total")["ok",] == [8]
    assert values(found, "usocksd_seconds") == {(): [0, 8, 0, 40.0]}
    assert values(found, "usocksd_live") == {(): [5]}
    assert values(found, "usocksd_headroom") == {(): [0.9]}


def test_a_sum_leaves_its_parts_as_they_were() -> None:
    parts = [worker(3, 10, 0.5), worker(4, 20, 0.25)]
    before = json.dumps(parts)
    total(parts)
    assert json.dumps(parts) == before


def test_a_new_version_may_have_other_metrics() -> None:
    old, new = Metrics("usocksd"), Metrics("usocksd")
    old.histogram("seconds", "Seconds", (1.0, 10.0)).observe(1)
    new.histogram("seconds", "Seconds", (1.0, 10.0, 100.0)).observe(1)
    old.counters("requests_total", "Requests", "result").labels("ok").value += 5
    new.counters("requests_total", "Requests", "result", "by").labels("ok", "me").value += 1
    old.counter("gone_total", "Gone").value += 1
    old.counter("same_total", "As it was called").value += 1
    new.counter("same_total", "As it is called").value += 1
    found = total([lasting(sent(old)), sent(new)])
    assert values(found, "usocksd_seconds") == {(): [1, 0, 0, 0, 1.0]}
    assert found["usocksd_seconds"]["bounds"] == [1.0, 10.0, 100.0]
    assert values(found, "usocksd_requests_total") == {("ok", "me"): [1]}
    assert values(found, "usocksd_gone_total") == {(): [1]}
    assert values(found, "usocksd_same_total") == {(): [2]}
    assert found["usocksd_same_total"]["help"] == "As it is called"

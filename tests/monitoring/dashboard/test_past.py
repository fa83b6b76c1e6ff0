"""The columns of the charts."""

import pytest

from resilience_kit.monitoring.dashboard.past import COLUMNS, columns, row_of
from resilience_kit.monitoring.measures import Histogram, Reading, Sample


def second(at, *, name="chat", process="one", waits=(), **counters):
    gauges = {"tokens_per_minute": 600, "requests_per_minute": 60, "period": 60.0}
    reading = Reading("rate_limiters", name, counters, gauges, {"wait": Histogram.of(waits)})
    return Sample(at, 1.0, process, (reading,))


def test_counts_are_told_per_minute():
    found = columns([second(1, calls_admitted=2, tokens_admitted=30)], end=2, seconds=2, step=1)
    assert (found["requests"], found["tokens"]) == ([120, None], [1_800, None])


def test_a_step_that_has_just_begun_is_not_taken_for_a_slow_one():
    found = columns([second(at, calls_admitted=1) for at in (1, 2)], end=60, seconds=60, step=60)
    assert found["requests"] == [60]


def test_processes_are_added_up():
    samples = [second(1, calls_admitted=1, process=process) for process in ("one", "two")]
    assert columns(samples, end=1, seconds=1, step=1)["requests"] == [120]


def test_the_quotas_of_all_limits_are_added_up_but_those_of_processes_are_not():
    samples = [second(1, name=name, process=process) for name in ("a", "b") for process in ("one", "two")]
    assert columns(samples, end=1, seconds=1, step=1)["quota_tokens"] == [1_200]


def test_a_row_may_tell_of_more_than_its_step():
    found = columns([second(1, calls_admitted=6), second(2)], end=4, seconds=4, step=1, window=2)
    assert found["requests"] == [360, 180, 0, None]


def test_percentiles_are_those_of_all_calls_together():
    found = columns([second(1, waits=[0.5] * 9), second(2, waits=[5])], end=2, seconds=2, step=2)
    assert found["wait_p50"][0] == pytest.approx(0.5, rel=0.5)
    assert found["wait_p95"][0] == pytest.approx(5, rel=0.5)


def test_nothing_measured_is_a_gap():
    found = columns([], end=3, seconds=3, step=1)
    assert found["at"] == [1, 2, 3]
    assert {name: found[name] for name in COLUMNS} == dict.fromkeys(COLUMNS, [None] * 3)


def test_the_newest_row_tells_what_the_columns_tell():
    samples = [second(at, calls_admitted=at, waits=[at]) for at in (1, 2, 3)]
    found = columns(samples, end=3, seconds=1, step=1, window=3)
    assert {name: found[name][0] for name in COLUMNS} == row_of(samples)


def test_a_minute_of_the_history_says_the_same_of_each_of_its_steps():
    reading = Reading("rate_limiters", "chat", {"calls_admitted": 30}, {})
    found = columns([Sample(60, 60.0, "one", (reading,))], end=80, seconds=80, step=20)
    assert found["requests"] == [30, 30, 30, None]

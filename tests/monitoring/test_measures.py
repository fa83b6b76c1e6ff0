"""The data of monitoring: what adds up, and what is refused."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from resilience_kit import ConfigurationError
from resilience_kit.monitoring.measures import (
    BOUNDS,
    Histogram,
    Reading,
    Sample,
    merge,
    merge_by,
    packed,
    start_of,
    unpacked,
)

SECONDS = st.lists(st.floats(0, 5_000), max_size=30)


def sample(at=1.0, process="one", seconds=1.0, section="rate_limiters", name="chat", **reading):
    return Sample(at, seconds, process, (Reading(section, name, **reading),))


def only(sample):
    (reading,) = sample.readings
    return reading


# Histograms


def test_bounds_rise_by_less_than_a_factor_of_two():
    assert all(1 < high / low < 2 for low, high in pairwise(BOUNDS))


def test_what_is_as_long_as_a_bound_is_counted_below_it():
    assert Histogram.of([BOUNDS[3]]).counts.index(1) == 3


def test_what_is_longer_than_all_bounds_is_counted_last():
    assert Histogram.of([5_000]).counts[-1] == 1


@given(SECONDS, SECONDS)
def test_two_histograms_together_are_the_histogram_of_all(one, two):
    together = Histogram.of(one).add(Histogram.of(two))
    assert together.counts == Histogram.of(one + two).counts
    assert together.total == pytest.approx(sum(one) + sum(two))


@given(st.lists(st.floats(0.001, 999), min_size=1, max_size=30), st.sampled_from([0.01, 0.5, 0.95, 1]))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(seconds, share):
    true = sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)]
    bucket = Histogram.of([true]).counts.index(1)
    low, high = (BOUNDS[bucket - 1] if bucket else 0, BOUNDS[bucket])
    assert low <= Histogram.of(seconds).percentile(share) <= high


def test_there_is_no_percentile_and_no_mean_of_nothing():
    assert (Histogram().percentile(0.5), Histogram().mean) == (None, None)


def test_calls_that_did_not_wait_waited_for_no_time():
    assert Histogram.of([0, 0, 0, 3]).percentile(0.5) == 0


def test_a_percentile_beyond_all_bounds_is_the_last_bound():
    assert Histogram.of([5_000]).percentile(0.5) == BOUNDS[-1]


def test_the_mean_is_exact():
    assert Histogram.of([1, 2]).mean == 1.5


# Merging


def test_counters_add_up():
    merged = merge([sample(1, counters={"calls": 1, "usd": 0.5}), sample(2, counters={"calls": 2})])
    assert only(merged).counters == {"calls": 3, "usd": 0.5}


def test_histograms_add_up():
    one, two = Histogram.of([1]), Histogram.of([2, 3])
    merged = merge([sample(1, histograms={"wait": one}), sample(2, histograms={"wait": two, "answer": one})])
    assert only(merged).histograms == {"wait": Histogram.of([1, 2, 3]), "answer": one}


def test_gauges_of_one_process_are_the_latest_in_whatever_order_they_come():
    merged = merge([sample(2, gauges={"in_flight": 5}), sample(1, gauges={"in_flight": 3, "waiting": 1})])
    assert only(merged).gauges == {"in_flight": 5, "waiting": 1}


@pytest.mark.parametrize(
    ("gauge", "one", "two", "both"),
    [
        ("in_flight", 2, 3, 5),
        ("waiting", 2, 3, 5),
        ("trials_in_flight", 1, 1, 2),
        ("tokens_in_window", 700, 900, 900),
        ("tokens_per_minute", 1_000, 1_000, 1_000),
        ("budget_tokens", None, 1_000, 1_000),
        ("budget_tokens", 1_000, None, 1_000),
        ("budget_tokens", None, None, None),
        ("state", "CLOSED", "OPEN", "OPEN"),
        ("state", "OPEN", "HALF_OPEN", "OPEN"),
        ("state", "HALF_OPEN", "CLOSED", "HALF_OPEN"),
        ("state", "broken", "CLOSED", "CLOSED"),
        ("state", None, "CLOSED", "CLOSED"),
    ],
)
def test_gauges_of_two_processes_are_merged_by_what_they_mean(gauge, one, two, both):
    merged = merge([sample(1, "one", gauges={gauge: one}), sample(1, "two", gauges={gauge: two})])
    assert only(merged).gauges == {gauge: both}


def test_a_process_is_merged_over_time_before_processes_are():
    samples = [sample(at, process, gauges={"in_flight": at}) for at in (1, 2) for process in ("one", "two")]
    assert only(merge(samples)).gauges == {"in_flight": 4}


def test_a_merged_sample_spans_all_of_its_parts():
    merged = merge([sample(10, seconds=2), sample(14, seconds=1)])
    assert (merged.at, merged.seconds, merged.process) == (14, 6, "one")


def test_a_merged_sample_of_some_processes_is_of_none():
    assert merge([sample(process="one"), sample(process="two")]).process == ""


def test_names_of_different_sections_stay_apart():
    merged = merge([sample(section="agents", counters={"calls": 1}), sample(section="models", counters={"calls": 2})])
    assert merged.reading("agents", "chat").counter("calls") == 1
    assert merged.of("models").keys() == {"chat"}


def test_there_is_nothing_to_merge_of_nothing():
    with pytest.raises(ConfigurationError, match="at least one"):
        merge([])


def test_samples_are_merged_by_the_stretch_in_which_their_middle_lies():
    merged = merge_by([sample(at, counters={"calls": 1}) for at in (59.9, 60.3, 60.7, 61.0)], 60)
    assert [(it.at, only(it).counter("calls")) for it in merged] == [(60.3, 2), (61.0, 2)]


def test_a_sample_of_a_minute_begins_where_the_minute_does():
    assert start_of(sample(120, seconds=60), 60) == 60


# As JSON

WHOLE = Sample(
    1_700_000_000.5,
    1.0,
    "host-1",
    (
        Reading(
            "rate_limiters",
            'a "name"\n<script>',
            {"calls_admitted": 3, "seconds_waited": 0.25},
            {"in_flight": 2, "budget_usd": None, "state": "OPEN"},
            {"wait": Histogram.of([0, 0.2, 7_000])},
        ),
        Reading("agents", "A"),
    ),
)


def test_a_sample_comes_back_from_json_as_it_was():
    assert Sample.from_json(WHOLE.to_json()) == WHOLE


def test_a_sample_comes_back_from_a_dictionary_as_it_was():
    assert Sample.from_dict(json.loads(json.dumps(WHOLE.to_dict()))) == WHOLE


def test_a_packed_sample_comes_back_as_it_was():
    assert unpacked(packed(WHOLE)) == WHOLE


def changed(change):
    value = WHOLE.to_dict()
    change(value)
    return json.dumps(value)


def reading_with(**values):
    return lambda value: value["readings"][0].update(values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        b"\xff",
        changed(lambda value: value.pop("at")),
        changed(lambda value: value.update(at=-1)),
        changed(lambda value: value.update(at=1e300)),
        changed(lambda value: value.update(at=math.nan)),
        changed(lambda value: value.update(seconds=True)),
        changed(lambda value: value.update(process=3)),
        changed(lambda value: value.update(process="x" * 2_000)),
        changed(lambda value: value.update(readings={})),
        changed(lambda value: value.update(readings=[3])),
        changed(lambda value: value.update(readings=value["readings"] * 10_000)),
        changed(reading_with(section=3)),
        changed(reading_with(name=None)),
        changed(reading_with(name="x" * 2_000)),
        changed(reading_with(counters=[])),
        changed(reading_with(counters={"calls": "3"})),
        changed(reading_with(counters={"calls": -1})),
        changed(reading_with(counters={str(number): 1 for number in range(200)})),
        changed(reading_with(gauges={"in_flight": []})),
        changed(reading_with(gauges={"state": "x" * 2_000})),
        changed(reading_with(histograms={"wait": 3})),
        changed(reading_with(histograms={"wait": {"counts": {"99": 1}, "total": 1}})),
        changed(reading_with(histograms={"wait": {"counts": {"-1": 1}, "total": 1}})),
        changed(reading_with(histograms={"wait": {"counts": {"1": 1.5}, "total": 1}})),
        changed(reading_with(histograms={"wait": {"counts": {"1": 1}, "total": math.inf}})),
    ],
)
def test_what_is_no_sample_is_refused_without_being_told(text):
    with pytest.raises(ConfigurationError, match=r"^this is no \w+ of the kit's$"):
        Sample.from_json(text)


@pytest.mark.parametrize("data", [b"", b"garbage", None, 3, "text", packed(WHOLE)[:-20]])
def test_what_was_not_packed_is_refused(data):
    with pytest.raises(ConfigurationError):
        unpacked(data)

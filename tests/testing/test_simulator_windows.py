"""The arithmetic of the quota, without a clock."""

import math

import pytest
from hypothesis import given, strategies as st

from resilience_kit.testing.server_windows import FixedWindow, Refusal, ServerQuota, SlidingWindow

# Whole numbers as times keep sums exact, so that a test at a window's edge means what it says.
arrivals = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), max_size=60)


def quota(origin=0.0, **options):
    defaults = {
        "request_limit": math.inf,
        "token_limit": math.inf,
        "period": 60,
        "token_window": "sliding",
        "request_window": 10,
        "count_refused": False,
    }
    return ServerQuota(origin, **(defaults | options))


def admitted_by(server, steps):
    """Play (gap, tokens) pairs, and return the (time, tokens) pairs that were admitted."""
    now, admitted = 0, []
    for gap, tokens in steps:
        now += gap
        if server.admit(now, tokens) is None:
            admitted.append((now, tokens))
    return admitted


def test_a_fixed_window_starts_anew_at_its_turn():
    window = FixedWindow(limit=10, length=60, origin=5)
    window.add(64, 10)
    assert (window.used(64.9), window.used(65)) == (10, 0)


def test_a_fixed_window_makes_wait_until_its_turn():
    window = FixedWindow(limit=10, length=60, origin=5)
    window.add(6, 8)
    assert window.wait(25, 3) == 40


def test_a_fixed_window_is_reset_at_its_turn_if_anything_was_counted():
    window = FixedWindow(limit=10, length=60, origin=0)
    unused = window.reset(15)
    window.add(15, 1)
    assert (unused, window.reset(15)) == (0, 45)


def test_a_sliding_window_forgets_each_amount_one_length_after_it_came():
    window = SlidingWindow(limit=10, length=60)
    window.add(0, 4)
    window.add(30, 5)
    assert (window.used(59), window.used(60), window.used(90)) == (9, 5, 0)


def test_a_sliding_window_makes_wait_until_enough_has_left():
    window = SlidingWindow(limit=10, length=60)
    for now, amount in ((0, 4), (10, 4), (20, 2)):
        window.add(now, amount)
    assert (window.wait(30, 4), window.wait(30, 5)) == (30, 40)


def test_a_sliding_window_makes_wait_for_emptiness_if_the_amount_never_fits():
    window = SlidingWindow(limit=10, length=60)
    when_empty = window.wait(0, 11)
    window.add(0, 1)
    assert (when_empty, window.wait(20, 11)) == (60, 40)


@given(arrivals)
def test_a_sliding_quota_is_never_exceeded_in_any_window(steps):
    admitted = admitted_by(quota(token_limit=100), steps)
    assert all(sum(tokens for time, tokens in admitted if end - 60 < time <= end) <= 100 for end, _ in admitted)


@given(arrivals)
def test_a_fixed_quota_is_never_exceeded_in_any_of_its_minutes(steps):
    admitted = admitted_by(quota(token_limit=100, token_window="fixed"), steps)  # noqa: S106 - no secret
    assert all(sum(tokens for time, tokens in admitted if time // 60 == end // 60) <= 100 for end, _ in admitted)


@given(arrivals)
def test_requests_are_never_exceeded_in_the_minute_nor_in_ten_seconds_of_it(steps):
    times = [time for time, _ in admitted_by(quota(request_limit=12), steps)]
    assert all(
        sum(end - 60 < time <= end for time in times) <= 12 and sum(end - 10 < time <= end for time in times) <= 2
        for end in times
    )


@given(arrivals, st.sampled_from(["fixed", "sliding"]))
def test_retry_after_is_exactly_the_time_until_the_request_fits(steps, token_window):
    server, now = quota(token_limit=100, request_limit=12, token_window=token_window), 0
    for gap, tokens in steps:
        now += gap
        refusal = server.admit(now, tokens)
        while refusal is not None:
            assert server.admit(now + refusal.retry_after - 0.5, tokens) is not None
            now += refusal.retry_after
            refusal = server.admit(now, tokens)
            assert refusal is None


def test_600_requests_per_minute_refuse_the_11th_of_one_second():
    server = quota(request_limit=600, request_window=1)
    answers = [server.admit(index / 16, 0) for index in range(11)]
    assert answers == [None] * 10 + [Refusal("requests", retry_after=1 - 10 / 16)]


def test_a_small_quota_still_admits_one_request_in_each_evaluated_second():
    server = quota(request_limit=6, request_window=1)
    assert [server.admit(now, 0) is None for now in (0, 0.5, 1)] == [True, False, True]


def test_the_evaluated_seconds_scale_with_the_period():
    server = quota(request_limit=6, period=6)
    assert [server.admit(now, 0) is None for now in (0, 0.5, 1)] == [True, False, True]


def test_tokens_are_named_as_the_reason_when_only_they_do_not_fit():
    server = quota(token_limit=10)
    server.admit(0, 8)
    assert server.admit(20, 3) == Refusal("tokens", retry_after=40)


@pytest.mark.parametrize(("count_refused", "admitted"), [(False, True), (True, False)])
def test_refused_requests_count_only_if_they_shall(count_refused, admitted):
    server = quota(request_limit=6, count_refused=count_refused)
    server.admit(0, 0)
    server.admit(9, 0)
    assert (server.admit(10, 0) is None) is admitted


def test_a_new_limit_keeps_what_was_counted():
    server = quota(token_limit=10)
    server.admit(0, 8)
    server.token_limit = 20
    server.request_limit = 100
    level = server.level(0)
    assert (level.remaining_tokens, level.remaining_requests) == (12, 99)


def test_a_limit_below_what_was_counted_leaves_nothing_rather_than_less():
    server = quota(token_limit=10)
    server.admit(0, 8)
    server.token_limit = 5
    assert server.level(0).remaining_tokens == 0

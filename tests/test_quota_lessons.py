"""What answers and refusals teach the ledger: each rule on its own, and all of them under any words of the server."""

import itertools
import math
import time
from dataclasses import asdict

import pytest
from hypothesis import given, strategies as st

from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.quota_lessons import RULES
from resilience_kit.server_advice import ServerAdvice

REQUESTS, TOKENS, PERIOD = 600, 60_000, 60.0
NO_TOKENS, NO_REQUESTS = ServerAdvice(exhausted="tokens"), ServerAdvice(exhausted="requests")


def ledger(*rules, requests=REQUESTS, tokens=TOKENS, period=PERIOD):
    """A ledger of so much in which the named rules apply."""
    return WindowLedger(requests, tokens, period, frozenset(rules))


def send(quota, tokens, now):
    """Send a request as soon as it fits; returns it and the time."""
    for _ in range(1_000):
        seconds = quota.seconds_until_fits(tokens, now)
        if seconds == 0:
            return quota.commit(tokens, now), now
        now += seconds
    pytest.fail("it never fits")


def fill(quota, tokens, now=0.0, *, most=1_000):
    """Send requests at one moment until no more fits; returns them."""
    sent = []
    while len(sent) < most and quota.seconds_until_fits(tokens, now) == 0:
        sent.append(quota.commit(tokens, now))
    return sent


def refused_at(quota, held, *, now=120.0, tokens=1_000, advice=NO_TOKENS):
    """Have a request refused when requests of so many tokens together lie in the window."""
    for index in range(held // tokens):
        quota.commit(tokens, now - 20 + index / 100)
    quota.refused(advice, quota.commit(tokens, now), now + 0.05)


def reasons(quota):
    return [correction.reason for correction in quota.news()]


# "retry-after"


def test_nothing_is_sent_as_long_as_the_server_says():
    quota = ledger("retry-after")
    quota.refused(ServerAdvice(retry_after=7.0), quota.commit(10, 0.0), 1.0)

    assert quota.seconds_until_fits(10, 1.0) == 7.0


def test_the_pause_is_told_with_its_length():
    quota = ledger("retry-after")
    quota.refused(ServerAdvice(retry_after=7.0), quota.commit(10, 0.0), 1.0)

    assert [(correction.reason, correction.seconds) for correction in quota.news()] == [("retry-after", 7.0)]


def test_news_are_told_once():
    quota = ledger("retry-after")
    quota.refused(ServerAdvice(retry_after=7.0), quota.commit(10, 0.0), 1.0)
    quota.news()

    assert quota.news() == []


def test_a_shorter_pause_does_not_end_a_longer_one():
    quota = ledger("retry-after")
    first, second = quota.commit(10, 0.0), quota.commit(10, 0.1)
    quota.refused(ServerAdvice(retry_after=20.0), first, 1.0)
    quota.refused(ServerAdvice(retry_after=2.0), second, 1.0)

    assert quota.seconds_until_fits(10, 1.0) == 20.0


@pytest.mark.parametrize("seconds", [2.5 * PERIOD, 86_400.0, math.inf])
def test_a_pause_of_more_than_two_periods_speaks_of_something_else_and_holds_nobody_up(seconds):
    quota = ledger("retry-after")
    quota.refused(ServerAdvice(retry_after=seconds), quota.commit(10, 0.0), 1.0)

    assert quota.seconds_until_fits(10, 1.0) == 0


def test_a_refusal_without_a_word_pauses_half_a_second():
    quota = ledger("retry-after")
    quota.refused(ServerAdvice(), quota.commit(10, 0.0), 1.0)

    assert quota.seconds_until_fits(10, 1.0) == PERIOD / 120


def test_an_untold_pause_that_was_too_short_is_doubled_up_to_a_sixth_of_the_period():
    quota, now, pauses = ledger("retry-after", "slow start"), 0.0, []
    for _ in range(8):
        sent, now = send(quota, 10, now)
        quota.refused(ServerAdvice(), sent, now)
        pauses.append(quota.seconds_until_fits(10, now))

    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


def test_a_server_that_refuses_for_hours_without_a_word_can_be_asked_for_ever():
    quota, now = ledger("retry-after", "slow start"), 0.0
    for _ in range(1_100):
        sent, now = send(quota, 10, now)
        quota.refused(ServerAdvice(), sent, now)

    assert quota.seconds_until_fits(10, now) == 10.0


def test_a_refusal_of_a_request_that_is_unknown_by_now_is_taken_too():
    quota = ledger("retry-after")
    sent = quota.commit(10, 0.0)
    quota.refused(ServerAdvice(retry_after=7.0, exhausted="tokens"), sent, 300.0)

    assert quota.seconds_until_fits(10, 300.0) == 7.0


# "slow start"


def after_a_slow_start(quota, seconds):
    """How many requests are sent in so many seconds after a refusal."""
    quota.refused(ServerAdvice(), quota.commit(1, 0.0), 0.5)
    sent, now = 0, 0.5
    while now <= 0.5 + seconds:
        _, now = send(quota, 1, now)
        sent += 1
    return sent - 1


def test_after_a_refusal_what_is_sent_doubles_every_two_round_trips():
    # one at once, two after a round of a second, and then four
    assert after_a_slow_start(ledger("slow start"), 2.5) == 1 + 2 + 4


def test_a_slow_start_is_told_with_its_round():
    quota = ledger("slow start")
    quota.refused(ServerAdvice(), quota.commit(1, 0.0), 0.25)

    assert [(correction.reason, correction.seconds) for correction in quota.news()] == [("slow start", 0.5)]


def test_a_slow_start_begins_after_the_pause():
    quota = ledger("slow start", "retry-after")
    quota.refused(ServerAdvice(retry_after=9.0), quota.commit(1, 0.0), 0.5)
    send(quota, 1, 9.5)

    assert quota.seconds_until_fits(1, 9.5) == 1.0


def test_the_longest_round_is_a_sixtieth_of_the_period():
    quota = ledger("slow start")
    quota.refused(ServerAdvice(), quota.commit(1, 0.0), 30.0)

    assert quota.news()[0].seconds == PERIOD / 60


def test_a_slow_start_is_over_after_a_thousand_requests():
    quota = ledger("slow start", requests=6_000_000)
    quota.refused(ServerAdvice(), quota.commit(0, 0.0), 0.5)
    for _ in range(1_023):
        quota.commit(0, 30.0)

    assert quota.seconds_until_fits(0, 0.5) == 0


def test_requests_that_were_under_way_at_a_refusal_begin_no_slow_start_of_their_own():
    quota = ledger("slow start")
    first, second = quota.commit(1, 0.0), quota.commit(1, 0.1)
    quota.refused(ServerAdvice(), first, 0.5)
    quota.refused(ServerAdvice(), second, 0.6)

    assert reasons(quota) == ["slow start"]


# "remaining"


def test_tokens_that_only_the_server_has_seen_take_room():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(1_000, 0.0), 1.0)

    assert quota.used(1.0) == (1, TOKENS - 10_000)


def test_what_only_the_server_has_seen_is_kept_off_for_a_period():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(1_000, 0.0), 1.0)

    assert quota.seconds_until_fits(20_000, 1.0) == PERIOD


def test_a_request_larger_than_what_the_server_has_room_for_does_not_go_into_an_empty_window():
    quota = ledger("remaining")
    sent = quota.commit(1_000, 0.0)
    quota.answered(ServerAdvice(remaining_tokens=10_000), sent, 59.0)

    assert quota.seconds_until_fits(20_000, 62.0) == 57.0


def test_what_the_server_still_has_room_for_goes_at_once():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(1_000, 0.0), 1.0)

    assert quota.seconds_until_fits(8_000, 1.0) == 0


def test_what_only_the_server_has_seen_is_forgotten_when_its_window_turns():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000, reset_tokens=5.0), quota.commit(1_000, 0.0), 1.0)

    assert quota.seconds_until_fits(20_000, 1.0) == 5.0


def test_a_reset_later_than_a_period_is_not_waited_for():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000, reset_tokens=86_400.0), quota.commit(1_000, 0.0), 1.0)

    assert quota.seconds_until_fits(20_000, 1.0) == PERIOD


def test_requests_that_only_the_server_has_seen_take_room():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_requests=100), quota.commit(0, 0.0), 1.0)

    assert quota.used(1.0) == (500, 0)


def test_what_only_the_server_has_seen_is_told_once():
    quota = ledger("remaining")
    for now in (0.0, 1.0, 2.0):
        quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(0, now), now)

    assert [(correction.reason, correction.tokens) for correction in quota.news()] == [("remaining", 50_000)]


def test_an_answer_to_an_older_request_does_not_overwrite_a_newer_one():
    quota = ledger("remaining")
    older, newer = quota.commit(0, 0.0), quota.commit(0, 1.0)
    quota.answered(ServerAdvice(remaining_tokens=TOKENS), newer, 2.0)
    quota.answered(ServerAdvice(remaining_tokens=10), older, 3.0)

    assert quota.used(3.0) == (2, 0)


def test_a_newer_answer_takes_back_what_an_older_one_said():
    quota = ledger("remaining")
    older, newer = quota.commit(0, 0.0), quota.commit(0, 1.0)
    quota.answered(ServerAdvice(remaining_tokens=10), older, 2.0)
    quota.answered(ServerAdvice(remaining_tokens=TOKENS), newer, 3.0)

    assert quota.seconds_until_fits(TOKENS, 3.0) == 0


@pytest.mark.parametrize("remaining", [0, -1, -(10**9)])
def test_a_remaining_of_nothing_or_less_is_not_believed(remaining):
    quota = ledger("remaining", "limit")
    advice = ServerAdvice(remaining_requests=remaining, remaining_tokens=remaining)
    quota.answered(advice, quota.commit(0, 0.0), 1.0)

    assert quota.seconds_until_fits(TOKENS, 1.0) == 0


def test_requests_that_may_have_overtaken_the_answered_one_are_no_surprise():
    quota = ledger("remaining")
    first = quota.commit(1_000, 0.0)
    quota.commit(1_000, 0.05)
    quota.answered(ServerAdvice(remaining_tokens=TOKENS - 2_000), first, 1.0)

    assert quota.used(1.0) == (2, 2_000)


def test_a_request_that_may_have_overtaken_the_answered_one_is_not_counted_twice():
    quota = ledger("remaining")
    first = quota.commit(0, 0.0)
    quota.commit(0, 0.05)
    quota.answered(ServerAdvice(remaining_requests=REQUESTS - 2), first, 1.0)

    assert quota.used(1.0) == (2, 0)


def test_some_room_is_left_for_what_varies_in_others_use():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(1_000, 0.0), 1.0)

    assert quota.seconds_until_fits(10_000, 1.0) > 0


def test_requests_that_were_sent_long_after_the_answered_one_explain_nothing():
    quota = ledger("remaining")
    first = quota.commit(1_000, 0.0)
    quota.commit(1_000, 0.5)
    quota.answered(ServerAdvice(remaining_tokens=TOKENS - 2_000), first, 1.0)

    assert quota.used(1.0) == (2, 3_000)


def test_a_server_that_has_room_for_nothing_is_asked_again_after_a_period():
    quota = ledger("remaining")
    quota.answered(ServerAdvice(remaining_requests=1, remaining_tokens=1), quota.commit(0, 0.0), 1.0)

    assert quota.seconds_until_fits(TOKENS, 1.0) == PERIOD


# "limit"


def test_a_limit_below_the_users_is_kept_to():
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_requests=59, limit_requests=60), quota.commit(0, 0.0), 0.0)

    assert len(fill(quota, 0)) == 60 // 6 - 1


def test_a_limit_is_told():
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_tokens=3, limit_tokens=500), quota.commit(0, 0.0), 0.0)

    assert [(correction.reason, correction.tokens, correction.relaxes) for correction in quota.news()] == [
        ("limit", 500, False)
    ]


def test_a_limit_that_is_whole_again_is_kept_to_no_more():
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_tokens=3, limit_tokens=500), quota.commit(0, 0.0), 0.0)
    quota.answered(ServerAdvice(remaining_tokens=3, limit_tokens=10**9), quota.commit(0, 1.0), 1.0)

    assert [(correction.reason, correction.tokens, correction.relaxes) for correction in quota.news()][1:] == [
        ("limit", TOKENS, True)
    ]


@pytest.mark.parametrize("limit", [0, -1, -(10**9)])
def test_a_limit_of_nothing_or_less_is_not_believed(limit):
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_tokens=3, limit_tokens=limit), quota.commit(0, 0.0), 0.0)

    assert quota.seconds_until_fits(TOKENS, 0.0) == 0


def test_a_limit_that_is_told_no_more_is_forgotten_after_some_periods():
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_requests=1, limit_requests=1), quota.commit(0, 0.0), 0.0)
    now, sent = 0.0, 0
    while now < 16 * PERIOD:
        _, now = send(quota, 0, now)
        sent += 1
    assert sent <= 17

    assert len(fill(quota, 0, now + PERIOD)) == REQUESTS // 6


def test_that_a_limit_is_forgotten_is_told():
    quota = ledger("limit")
    quota.answered(ServerAdvice(remaining_requests=1, limit_requests=1), quota.commit(0, 0.0), 0.0)
    quota.news()
    quota.commit(0, 16 * PERIOD - 1)
    quota.seconds_until_fits(0, 16 * PERIOD)

    assert [(correction.reason, correction.requests, correction.relaxes) for correction in quota.news()] == [
        ("limit", REQUESTS, True)
    ]


# "margin"


def at_the_edge(quota):
    """Fill the quota of tokens, and have the first request after a window refused for a moment."""
    quota.commit(TOKENS, 0.0)
    sent, now = send(quota, 1_000, 1.0)
    quota.refused(ServerAdvice(retry_after=0.0, exhausted="tokens"), sent, now)
    return sent


def test_the_first_answer_lengthens_the_windows_a_little():
    quota = ledger("margin")
    quota.answered(ServerAdvice(), quota.commit(TOKENS, 0.0), 1.0)

    assert quota.seconds_until_fits(1, 1.0) == pytest.approx(PERIOD + 0.1 - 1)


def test_a_refusal_at_the_edge_of_a_window_lengthens_the_windows():
    quota = ledger("margin")
    at_the_edge(quota)

    assert [(correction.reason, correction.seconds) for correction in quota.news()] == [("margin", 0.1)]


def test_each_refusal_at_the_edge_doubles_the_margin_up_to_the_most():
    quota, margins = ledger("margin"), []
    for window in range(4):
        now = window * 10 * PERIOD
        quota.commit(TOKENS, now)
        sent = quota.commit(1_000, now + PERIOD + 0.01)
        quota.refused(ServerAdvice(retry_after=0.0, exhausted="tokens"), sent, now + PERIOD + 0.05)
        margins += [correction.seconds for correction in quota.news()]

    assert margins == pytest.approx([0.1, 0.2, 0.4])


def test_a_refusal_that_the_widest_margin_does_not_explain_lowers_the_ceiling():
    quota = ledger("margin", "ceiling")
    for window in range(4):
        now = window * 10 * PERIOD
        quota.commit(TOKENS // 2, now)
        quota.commit(TOKENS // 2, now + 1)
        sent = quota.commit(1_000, now + PERIOD + 0.01)
        quota.refused(ServerAdvice(retry_after=0.0, exhausted="tokens"), sent, now + PERIOD + 0.05)

    assert reasons(quota)[-1] == "ceiling"


def test_a_second_refusal_at_the_same_edge_teaches_nothing_more():
    quota = ledger("margin", "ceiling")
    quota.commit(TOKENS, 0.0)
    first, second = quota.commit(1_000, PERIOD + 0.01), quota.commit(1_000, PERIOD + 0.02)
    for sent in (first, second):
        quota.refused(ServerAdvice(retry_after=0.0, exhausted="tokens"), sent, PERIOD + 0.05)

    assert reasons(quota) == ["margin"]


def test_a_refusal_of_requests_at_the_edge_of_the_short_window_lengthens_the_windows():
    quota = ledger("margin", "ceiling")
    fill(quota, 0, 0.0)
    sent, now = send(quota, 0, 0.0)
    quota.refused(ServerAdvice(retry_after=0.0, exhausted="requests"), sent, now)

    assert reasons(quota) == ["margin"]


def test_a_second_refusal_of_requests_at_the_same_edge_teaches_nothing_more():
    quota = ledger("margin", "ceiling")
    fill(quota, 0, 0.0)
    first, now = send(quota, 0, 0.0)
    second = quota.commit(0, now + 0.01)
    for sent in (first, second):
        quota.refused(ServerAdvice(retry_after=0.0, exhausted="requests"), sent, now + 0.05)

    assert reasons(quota) == ["margin"]


def test_a_long_wait_is_not_explained_by_the_edge_of_a_window():
    quota = ledger("margin", "ceiling")
    quota.commit(TOKENS, 0.0)
    sent = quota.commit(1_000, PERIOD + 0.01)
    quota.refused(ServerAdvice(retry_after=30.0, exhausted="tokens"), sent, PERIOD + 0.05)

    assert "margin" not in reasons(quota)


# "one-second window"


def burst_refused(quota, sent=10, *, retry_after=0.5, now=0.0):
    """Have the request after a small burst refused for a moment."""
    for _ in range(sent):
        quota.commit(0, now)
    quota.refused(ServerAdvice(retry_after=retry_after, exhausted="requests"), quota.commit(0, now), now + 0.05)


def sent_within(quota, seconds, now):
    """How many requests are sent in so many seconds, each as soon as it fits."""
    end, times = now + seconds, []
    while now < end:
        _, now = send(quota, 0, now)
        times.append(now)
    return sum(at < end for at in times)


def test_a_refused_burst_of_a_seconds_requests_shows_a_window_of_a_second():
    quota = ledger("one-second window", "ceiling")
    burst_refused(quota)

    assert sent_within(quota, 1.0, 30.0) == REQUESTS / 60


def test_the_requests_of_a_second_are_sent_apart_and_in_less_than_the_second():
    quota = ledger("one-second window", "ceiling")
    burst_refused(quota)
    times = [send(quota, 0, 30.0)[1] for _ in range(10)]

    assert [after - before for before, after in itertools.pairwise(times)] == pytest.approx([1 / 11] * 9)


def test_no_more_than_a_tenth_of_a_seconds_requests_are_sent_at_once():
    quota = ledger("one-second window", "ceiling", requests=60_000)
    burst_refused(quota, 1_000)

    assert len(fill(quota, 0, 30.0)) == 100


def test_a_burst_whose_requests_overtook_each_other_teaches_nothing_but_the_window_of_a_second():
    quota = ledger("one-second window", "ceiling", "margin")
    burst = [quota.commit(0, 120.0 + index / 1_000) for index in range(16)]
    # the fourth came after ten others, so less lay in the window when it was sent than when it came
    for late in (burst[11], burst[3], burst[12]):
        quota.refused(ServerAdvice(retry_after=0.9, exhausted="requests"), late, 120.1)

    assert reasons(quota) == ["one-second window"]


def widened_by_full_seconds(*times):
    """The margins of a second that refusals at these times teach, each in a full second."""
    quota = ledger("one-second window", "margin")
    burst_refused(quota)
    quota.answered(ServerAdvice(), quota.commit(0, 20.0), 20.1)
    quota.news()
    for now in times:
        burst_refused(quota, now=now)
    return [round(correction.seconds, 6) for correction in quota.news()]


def test_full_seconds_that_are_refused_soon_after_each_other_lengthen_them_to_the_most():
    assert widened_by_full_seconds(30.0, 50.0, 70.0) == [0.05, 0.075]


def test_a_hiccup_now_and_then_lengthens_seconds_once():
    assert widened_by_full_seconds(30.0, 100.0, 170.0) == [0.05]


def test_a_window_of_a_second_is_told():
    quota = ledger("one-second window", "ceiling")
    burst_refused(quota)

    assert [(correction.reason, correction.seconds, correction.requests) for correction in quota.news()] == [
        ("one-second window", 1.0, 10)
    ]


def test_a_refused_burst_that_has_to_wait_for_longer_shows_no_window_of_a_second():
    quota = ledger("one-second window", "ceiling")
    burst_refused(quota, retry_after=30.0)

    assert len(fill(quota, 0, 90.0)) == REQUESTS / 6


def test_less_than_a_seconds_requests_show_no_window_of_a_second():
    quota = ledger("one-second window", "ceiling")
    burst_refused(quota, 5)

    assert len(fill(quota, 0, 90.0)) == REQUESTS / 6


def test_a_full_second_that_is_refused_again_lengthens_the_windows():
    quota = ledger("one-second window", "ceiling", "margin")
    burst_refused(quota)
    burst_refused(quota, now=30.0)

    assert reasons(quota) == ["one-second window", "margin"]


def test_a_refusal_in_a_second_that_is_not_full_does_not_lengthen_the_windows():
    quota = ledger("one-second window", "ceiling", "margin")
    burst_refused(quota)
    burst_refused(quota, 5, now=30.0)

    assert "margin" not in reasons(quota)


# "ceiling"


def test_what_lay_in_the_window_at_a_refusal_is_taken_for_all_that_fits():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)

    assert [(correction.reason, correction.tokens, correction.relaxes) for correction in quota.news()] == [
        ("ceiling", 29_400, False)
    ]


def test_nothing_above_a_ceiling_is_sent():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    refused_at(quota, 30_000, now=62.0)
    refused_at(quota, 30_000)

    assert sum(sent.tokens for sent in fill(quota, 100, 200.0)) == 29_400


def test_a_request_larger_than_a_ceiling_waits_for_an_empty_window():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000, now=62.0)
    refused_at(quota, 30_000)
    quota.commit(1, 200.0)

    assert quota.seconds_until_fits(40_000, 201.0) == pytest.approx(59.0)


def test_a_request_larger_than_a_ceiling_goes_in_an_empty_window():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)

    assert quota.seconds_until_fits(40_000, 200.0) == 0


def test_those_under_way_at_a_refusal_lower_the_ceiling_to_what_was_held_and_no_further():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    sent = [quota.commit(1_000, 120.0 + index / 1_000) for index in range(40)]
    for request in sent[30:]:
        quota.refused(NO_TOKENS, request, 120.2)

    # 39,000 lay there at first, and 30,000 as the last refusal has shown
    assert sum(request.tokens for request in fill(quota, 500, 200.0)) == 30_000


def test_a_ceiling_of_requests_holds_in_the_short_window_too():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    for index in range(300):
        quota.commit(0, 80.0 + index / 10)
    quota.refused(ServerAdvice(retry_after=20.0, exhausted="requests"), quota.commit(0, 125.0), 125.0)
    quota.news()

    assert len(fill(quota, 0, 300.0)) == 294 // 6


def test_a_ceiling_is_tried_upwards_after_so_many_requests_and_a_period():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    for index in range(300):
        quota.commit(0, 125.0 + index / 5)

    assert sum(sent.tokens for sent in fill(quota, 990, 190.0)) == 29_700


def test_a_ceiling_is_not_tried_upwards_before_so_many_requests_were_sent():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000, now=62.0)
    refused_at(quota, 30_000)
    for index in range(100):
        quota.commit(0, 125.0 + index / 5)

    assert sum(sent.tokens for sent in fill(quota, 990, 190.0)) == 28_710


def test_a_ceiling_is_tried_upwards_after_so_many_periods_by_who_sends_little():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)

    assert sum(sent.tokens for sent in fill(quota, 300, 120.1 + 16 * PERIOD)) == 29_400 + 300


def test_a_spurious_refusal_at_half_the_quota_holds_nobody_up_for_much_longer_than_a_period():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    for second in range(8):
        fill(quota, 300, 120.1 + PERIOD + second)

    assert quota.news()[-1].tokens == TOKENS


def test_a_refusal_of_the_trial_confirms_the_first_one_and_puts_the_next_trial_off_for_long():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    fill(quota, 300, 120.1 + PERIOD)
    refused_at(quota, 30_000, now=300.0)
    quota.news()
    for window in range(2, 16):
        fill(quota, 300, 300.0 + window * PERIOD, most=20)
        fill(quota, 15_000, 301.0 + window * PERIOD)

    assert quota.news() == []


def test_a_refusal_soon_after_a_trial_that_went_well_is_believed_for_long():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    for second in range(8):
        fill(quota, 300, 120.1 + PERIOD + second)
    refused_at(quota, 30_000, now=300.0)
    quota.news()
    for window in range(2, 16):
        fill(quota, 15_000, 300.0 + window * PERIOD)

    assert quota.news() == []


def test_a_trial_is_told_as_a_relaxation():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    fill(quota, 300, 120.1 + 16 * PERIOD)

    assert [(correction.reason, correction.tokens, correction.relaxes) for correction in quota.news()] == [
        ("ceiling", 29_700, True)
    ]


def test_a_trial_below_a_limit_of_the_servers_is_not_told():
    quota = ledger("ceiling", "limit")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    now = 120.1 + 16 * PERIOD
    sent, _ = send(quota, 0, now)
    quota.answered(ServerAdvice(remaining_tokens=1_000, limit_tokens=20_000), sent, now)
    quota.news()
    fill(quota, 5_000, now)

    assert quota.news() == []


def test_the_steps_of_a_trial_double_up_to_the_quota():
    quota = ledger("ceiling", requests=6_000)
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    now = 120.1 + 16 * PERIOD
    for second in range(20):
        fill(quota, 300, now + second)
    steps = [correction.tokens for correction in quota.news()]

    assert steps == [29_700, 30_300, 31_500, 33_900, 38_700, 48_300, 60_000]


def test_nobody_tries_upwards_who_has_no_need_to():
    quota = ledger("ceiling")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    fill(quota, 300, 120.1 + 16 * PERIOD, most=3)

    assert quota.news() == []


def test_a_refusal_in_the_first_period_is_tried_again_at_its_end():
    quota = ledger("ceiling")
    quota.commit(0, 10.0)
    refused_at(quota, 30_000, now=40.0)

    assert quota.seconds_until_fits(300, 69.0) == pytest.approx(1.0)


def test_a_single_refusal_far_below_the_quota_lowers_nothing():
    quota = ledger("ceiling")
    quota.refused(NO_TOKENS, quota.commit(10, 120.0), 120.0)

    assert sum(sent.tokens for sent in fill(quota, 1_000, 200.0)) == TOKENS


def test_a_single_refusal_far_below_the_quota_pauses():
    quota = ledger("ceiling", "retry-after")
    quota.refused(ServerAdvice(retry_after=3.0, exhausted="tokens"), quota.commit(10, 120.0), 120.0)

    assert quota.seconds_until_fits(10, 120.0) == 3.0


def surprised_twice(quota, seconds=30.0):
    """Have two requests refused far below the quota, one a while after the other."""
    quota.commit(10, 0.0)
    for now in (120.0, 120.0 + seconds):
        for _ in range(4):
            quota.commit(10, now - 5)
        quota.refused(NO_TOKENS, quota.commit(10, now), now)


def test_two_refusals_far_below_the_quota_soon_after_each_other_are_believed():
    quota = ledger("ceiling")
    surprised_twice(quota)

    assert [(correction.reason, correction.requests) for correction in quota.news()] == [("ceiling", 7)]


def test_two_refusals_far_below_the_quota_long_after_each_other_are_not_believed():
    quota = ledger("ceiling")
    surprised_twice(quota, 2.5 * PERIOD)

    assert quota.news() == []


def test_two_refusals_of_requests_under_way_together_are_one_surprise():
    quota = ledger("ceiling")
    quota.commit(10, 0.0)
    sent = [quota.commit(10, 120.0), quota.commit(10, 120.1)]
    for request in sent:
        quota.refused(NO_TOKENS, request, 121.0)

    assert quota.news() == []


def test_as_many_requests_as_were_charged_for_so_much_are_sent_and_no_more():
    quota = ledger("ceiling")
    surprised_twice(quota)

    assert len(fill(quota, 10, 215.0)) <= 14


def test_two_spurious_refusals_hold_up_a_user_with_low_traffic_for_no_longer_than_a_period():
    quota, now, waits = WindowLedger(REQUESTS, TOKENS, PERIOD), 0.0, []
    for index in range(300):
        arrival = index * 6.0
        sent, now = send(quota, 100, max(now, arrival))
        waits.append(now - arrival)
        if index in (21, 26):
            quota.refused(ServerAdvice(retry_after=1.0, exhausted="tokens"), sent, now + 0.05)

    assert max(waits) <= PERIOD


@pytest.mark.parametrize("refusals", [(0, 1), (5, 6), (5, 6, 9), (2, 3, 4, 5, 6)])
def test_spurious_refusals_of_the_first_requests_starve_nobody(refusals):
    quota, now, waits = WindowLedger(REQUESTS, TOKENS, PERIOD), 0.0, []
    for index in range(60):
        arrival = index * 12.0
        sent, now = send(quota, 100, max(now, arrival))
        waits.append(now - arrival)
        if index in refusals:
            quota.refused(ServerAdvice(retry_after=1.0, exhausted="tokens"), sent, now + 0.05)

    assert max(waits) <= 3 * PERIOD
    assert waits[-1] == 0


def test_trials_far_below_the_quota_that_are_refused_become_rare():
    quota, now, taken_at, refused = ledger("ceiling", "retry-after"), 0.0, -math.inf, []
    while now < 40 * PERIOD:
        # the server has room for one request a minute
        sent, now = send(quota, 10, now)
        if now >= taken_at + PERIOD:
            taken_at = now
        else:
            quota.refused(NO_TOKENS, sent, now + 0.1)
            refused.append(now)
        now += 0.1

    assert sum(at > PERIOD for at in refused) <= 6


def test_a_trial_asks_for_no_more_than_twice_as_much():
    quota = ledger("ceiling")
    quota.commit(10, 0.0)
    for now in (120.0, 150.0):
        quota.refused(NO_TOKENS, quota.commit(10, now), now)
    fill(quota, 10, 215.0)

    assert [correction.requests for correction in quota.news()] == [1, 2]


def test_the_servers_word_of_room_raises_a_ceiling_at_once():
    quota = ledger("ceiling", "remaining")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    quota.answered(ServerAdvice(remaining_tokens=20_000), quota.commit(0, 121.0), 121.0)

    assert ("ceiling", 50_000, True) in [(news.reason, news.tokens, news.relaxes) for news in quota.news()]


def test_a_word_of_room_without_much_in_the_window_raises_nothing():
    quota = ledger("ceiling", "remaining")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.news()
    sent, now = send(quota, 0, 300.0)
    quota.answered(ServerAdvice(remaining_tokens=59_000), sent, now)

    assert all(not news.relaxes for news in quota.news())


def test_the_servers_word_that_nothing_more_fits_puts_a_trial_off():
    quota = ledger("ceiling", "remaining")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    for index in range(300):
        quota.commit(0, 125.0 + index / 5)
    fill(quota, 990, 186.0, most=29)
    quota.answered(ServerAdvice(remaining_tokens=700), quota.commit(0, 186.0), 186.0)
    quota.seconds_until_fits(990, 187.0)

    assert all(not news.relaxes for news in quota.news())


def test_the_servers_word_that_nothing_more_fits_does_not_put_trials_off_for_ever():
    quota, now, most = WindowLedger(REQUESTS, TOKENS, PERIOD), 200.0, 0
    surprised_twice(quota)
    # headers that speak of another quota than this one: always one request's
    for _ in range(4_000):
        sent, now = send(quota, 10, now)
        quota.answered(ServerAdvice(remaining_tokens=TOKENS // 9, reset_tokens=0.0), sent, now + 0.1)
        most = max(most, quota.used(now)[0])
        now += 0.2

    assert most >= 100


def relaxed_by_plenty_of_tokens(*rules):
    """What an answer that leaves nearly all tokens raises, after refusals have lowered how many requests fit."""
    quota = ledger("ceiling", *rules)
    surprised_twice(quota)
    quota.news()
    quota.answered(ServerAdvice(remaining_tokens=TOKENS - 50), quota.commit(10, 151.0), 151.0)
    return [correction.reason for correction in quota.news() if correction.relaxes]


def test_the_servers_word_of_tokens_raises_the_ceiling_of_requests_that_were_charged_for_much():
    assert relaxed_by_plenty_of_tokens("remaining") == ["ceiling"]


def test_with_remaining_switched_off_the_servers_word_of_tokens_raises_nothing():
    assert relaxed_by_plenty_of_tokens() == []


def test_headers_that_promised_room_and_were_wrong_are_distrusted_for_a_while():
    quota = ledger("ceiling", "remaining")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.answered(ServerAdvice(remaining_tokens=20_000), quota.commit(0, 121.0), 121.0)
    refused_at(quota, 10_000, now=141.0)
    quota.news()
    quota.answered(ServerAdvice(remaining_tokens=20_000), quota.commit(0, 142.0), 142.0)

    assert all(not news.relaxes for news in quota.news())


def test_headers_that_were_wrong_are_believed_again_after_some_periods():
    quota = ledger("ceiling", "remaining")
    quota.commit(0, 0.0)
    refused_at(quota, 30_000)
    quota.answered(ServerAdvice(remaining_tokens=20_000), quota.commit(0, 121.0), 121.0)
    refused_at(quota, 10_000, now=141.0)
    fill(quota, 300, 500.0)
    quota.news()
    quota.answered(ServerAdvice(remaining_tokens=20_000), quota.commit(0, 501.0), 501.0)

    assert any(news.relaxes for news in quota.news())


def test_a_ceiling_below_one_request_is_one_request():
    quota = ledger("ceiling", requests=1)
    for now in (100.0, 180.0, 260.0):
        quota.refused(NO_REQUESTS, quota.commit(0, now), now)

    assert quota.news() == []


def test_refused_requests_in_the_window_do_not_close_a_ceiling_of_one_for_longer_than_a_period():
    quota, now = WindowLedger(REQUESTS, TOKENS, PERIOD), 0.0
    for _ in range(30):
        sent, now = send(quota, 10, now)
        quota.refused(NO_TOKENS, sent, now + 0.1)
        now += 0.1

    assert quota.seconds_until_fits(10, now) <= 1.01 * PERIOD


# all together


@pytest.mark.parametrize("rule", sorted(RULES - {"latency"}))
def test_a_rule_that_is_switched_off_says_nothing(rule):
    quota = WindowLedger(REQUESTS, TOKENS, PERIOD, RULES - {rule})
    for act in (at_the_edge, burst_refused, surprised_twice, lambda quota: refused_at(quota, 30_000, now=400.0)):
        act(quota)
    for now in range(500, 520):
        advice = ServerAdvice(remaining_requests=50, remaining_tokens=500, limit_requests=100, limit_tokens=2_000)
        quota.answered(advice, quota.commit(10, float(now)), float(now))

    assert rule not in reasons(quota)


def test_without_rules_nothing_is_learnt_but_that_what_was_refused_took_no_tokens():
    quota = ledger()
    for act in (at_the_edge, burst_refused, surprised_twice, lambda quota: refused_at(quota, 30_000, now=400.0)):
        act(quota)
    advice = ServerAdvice(remaining_requests=50, remaining_tokens=500, limit_requests=100, limit_tokens=2_000)
    quota.answered(advice, quota.commit(10, 500.0), 500.0)

    assert quota.news() == []
    assert sum(sent.tokens for sent in fill(quota, 1_000, 600.0)) == TOKENS


def test_what_a_refused_request_was_counted_for_is_free_again():
    quota = ledger()
    quota.refused(NO_TOKENS, quota.commit(50_000, 0.0), 1.0)

    assert quota.used(1.0) == (1, 0)


def test_a_refusal_for_lack_of_capacity_keeps_the_request_counted():
    quota = ledger()
    quota.refused(ServerAdvice(), quota.commit(50_000, 0.0), 1.0)

    assert quota.used(1.0) == (1, 50_000)


def test_a_reset_forgets_all_that_was_learnt():
    quota = WindowLedger(REQUESTS, TOKENS, PERIOD)
    quota.answered(ServerAdvice(remaining_tokens=10, limit_tokens=1_000), quota.commit(10, 0.0), 1.0)
    refused_at(quota, 30_000, advice=ServerAdvice(retry_after=60.0, exhausted="tokens"))
    quota.reset()

    assert (quota.seconds_until_fits(TOKENS, 121.0), quota.news(), quota.used(121.0)) == (0, [], (0, 0))


def test_what_a_copy_learns_the_original_does_not_know():
    quota = WindowLedger(REQUESTS, TOKENS, PERIOD)
    quota.answered(ServerAdvice(remaining_tokens=TOKENS), quota.commit(0, 0.0), 0.0)
    quota.news()
    twin = quota.copy()
    twin.answered(ServerAdvice(remaining_tokens=10, remaining_requests=5, limit_tokens=50), twin.commit(0, 1.0), 1.0)
    refused_at(twin, 30_000, advice=ServerAdvice(retry_after=60.0, exhausted="tokens"))

    assert (quota.used(1.0), quota.seconds_until_fits(TOKENS, 1.0), quota.news()) == ((1, 0), 0, [])


def test_a_ceiling_of_a_copy_is_not_the_originals():
    quota = ledger("ceiling")
    quota.refused(ServerAdvice(), quota.commit(0, 0.0), 0.0)
    refused_at(quota.copy(), 30_000)

    assert len(fill(quota, TOKENS // 2, 200.0)) == 2


def test_a_copy_knows_what_the_original_has_learnt():
    quota = WindowLedger(REQUESTS, TOKENS, PERIOD)
    quota.answered(ServerAdvice(remaining_tokens=10_000), quota.commit(0, 0.0), 0.0)
    refused_at(quota, 30_000)
    twin = quota.copy()

    assert twin.seconds_until_fits(1_000, 125.0) == quota.seconds_until_fits(1_000, 125.0) > 0


def test_a_copy_counts_refused_requests_as_the_original_does():
    quota = ledger("remaining")
    quota.refused(NO_TOKENS, quota.commit(0, 0.0), 0.1)
    quota.commit(0, 1.0)
    twin = quota.copy()

    assert asdict(twin.commit(0, 2.0)) == asdict(quota.commit(0, 2.0))


def test_a_clock_that_is_far_behind_the_one_before_holds_nobody_up():
    quota = ledger("retry-after", requests=1)
    quota.refused(ServerAdvice(retry_after=30.0), quota.commit(10, 1e6), 1e6)

    assert quota.seconds_until_fits(10, 0.0) == 0


def test_an_answer_costs_no_more_where_a_hundred_thousand_requests_are_in_the_window():
    quota = ledger("remaining", requests=100_000, tokens=10**9)
    sent = [quota.commit(1, index * 6e-4) for index in range(100_000)]
    advice = ServerAdvice(remaining_requests=10, remaining_tokens=10)
    started = time.process_time()
    for request in sent[-30_000:-29_900]:
        quota.answered(advice, request, 60.0)

    # a walk over all that were sent since takes 2 ms an answer, and to find its place in them a tenth of that
    assert time.process_time() - started < 0.15


figures = st.one_of(st.none(), st.integers(-(10**12), 10**12), st.integers(-2, 150))
seconds = st.one_of(st.none(), st.floats(), st.floats(-1, 90))
advices = st.builds(
    ServerAdvice,
    retry_after=seconds,
    remaining_requests=figures,
    remaining_tokens=figures,
    limit_requests=figures,
    limit_tokens=figures,
    reset_requests=seconds,
    reset_tokens=seconds,
    exhausted=st.sampled_from([None, "requests", "tokens"]),
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "answered", "refused", "give back", "back in time"]),
        st.floats(0, 40, allow_nan=False),
        st.integers(0, 100),
        st.integers(0, 5),
        advices,
    ),
    max_size=40,
)


class Strict:
    """What the user's limits have room for, after what was sent, as a plain list tells."""

    def __init__(self, requests, tokens, period):
        self.requests, self.tokens, self.period = requests, tokens, period
        self.sent = []

    def has_room(self, tokens, now):
        in_period = [sent for sent in self.sent if sent[0] > now - self.period]
        in_short = [sent for sent in self.sent if sent[0] > now - self.period / 6]
        is_few = len(in_period) < self.requests and len(in_short) < max(1, self.requests // 6)
        return is_few and sum(sent[1] for sent in in_period) + tokens <= self.tokens


def play(quota, strict, script):
    """Play a script, and yield the time after each step; what is sent is sent only where the ledger says so."""
    now, sent = 1_000.0, []
    for what, gap, tokens, which, advice in script:
        now = now + gap * strict.period / 60 if what != "back in time" else now - 0.005
        request = sent[-1 - which % len(sent)] if sent else None
        if what == "send" and quota.seconds_until_fits(min(tokens, strict.tokens), now) == 0:
            tokens = min(tokens, strict.tokens)  # noqa: PLW2901 - no request is larger than the quota
            assert strict.has_room(tokens, now)
            sent.append(quota.commit(tokens, now))
            strict.sent.append((now, tokens, sent[-1]))
        elif what == "answered" and request:
            quota.answered(advice, request, now)
        elif what == "refused" and request:
            quota.refused(advice, request, now)
            if advice.exhausted:
                strict.sent = [(at, 0 if its is request else its_tokens, its) for at, its_tokens, its in strict.sent]
        elif what == "give back" and request and quota.used(now)[0]:
            quota.give_back(sent.pop())
            strict.sent = [entry for entry in strict.sent if entry[2] in sent or not entry[1]]
        yield now


shapes = st.sampled_from([(12, 100, 60.0), (1, 100, 60.0), (6, 10, 60.0), (600, 1_000, 0.1), (120, 1, 1.0)])


@given(shapes, steps)
def test_whatever_the_server_says_no_more_is_sent_than_the_user_allows(shape, script):
    for _ in play(WindowLedger(*shape), Strict(*shape), script):
        pass


@given(shapes, steps)
def test_whatever_the_server_says_the_next_wait_is_finite(shape, script):
    quota = WindowLedger(*shape)
    for now in play(quota, Strict(*shape), script):
        assert 0 <= quota.copy().seconds_until_fits(shape[1], now) <= 4 * shape[2]


@given(shapes, steps)
def test_whatever_the_server_has_said_each_request_is_sent_in_the_end(shape, script):
    quota, now = WindowLedger(*shape), 1_000.0
    for at in play(quota, Strict(*shape), script):
        now = at
    started = now
    for _ in range(5):
        _, now = send(quota, shape[1], now)

    assert now - started <= 5 * 4 * shape[2]


@given(shapes, steps)
def test_whatever_the_server_has_said_is_forgotten_in_the_end(shape, script):
    quota, now = WindowLedger(*shape), 1_000.0
    for at in play(quota, Strict(*shape), script):
        now = at
    now += 20 * shape[2]
    for _ in range(60):
        fill(quota, 0, now)
        now += shape[2] / 3

    assert len(fill(quota, 0, now + 2 * shape[2])) >= max(1, shape[0] // 60)

"""The ledger and the limit under any traffic: never above the quota in any window, never idle while a call fits."""

import asyncio
import math

import looptime
import pytest
from aiolimiter import AsyncLimiter
from hypothesis import given, strategies as st

from resilience_kit import get_all_resilience_stats, rate_limited
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.testing import isolated

REQUESTS, TOKENS, PERIOD = 12, 100, 60.0
SHORT_REQUESTS, SHORT_PERIOD = REQUESTS // 6, PERIOD / 6

arrivals = st.lists(
    st.tuples(st.floats(0, 40, allow_nan=False), st.integers(0, TOKENS), st.floats(0, 30, allow_nan=False)),
    max_size=40,
)


def run_in_virtual_time(coroutine):
    loop = looptime.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


async def traffic(calls, *, max_concurrent=1_000):
    """Send calls of (gap, tokens, duration), and note when each arrives, starts and ends."""
    loop, calls_made = asyncio.get_running_loop(), []

    @rate_limited(
        "any",
        requests_per_minute=REQUESTS,
        tokens_per_minute=TOKENS,
        max_concurrent=max_concurrent,
        min_interval=0,
        tokens=lambda record, _: record["tokens"],
    )
    async def ask(record, duration):
        record["start"] = loop.time()
        await asyncio.sleep(duration)
        record["end"] = loop.time()

    async with asyncio.TaskGroup() as group:
        for gap, tokens, duration in calls:
            await asyncio.sleep(gap)
            record = {"arrival": loop.time(), "tokens": tokens}
            calls_made.append(record)
            group.create_task(ask(record, duration))
    return calls_made


def room_at(moment, sent):
    """Whether one more request fits at a moment, and how many tokens do, after those that were sent."""
    fresh = [call for call in sent if call["start"] + PERIOD > moment]
    short = [call for call in sent if call["start"] + SHORT_PERIOD > moment]
    fits = len(fresh) < REQUESTS and len(short) < SHORT_REQUESTS
    return fits, TOKENS - sum(call["tokens"] for call in fresh)


@given(arrivals)
def test_no_window_ever_holds_more_than_the_quota(calls):
    with isolated():
        sent = run_in_virtual_time(traffic(calls))

    for call in sent:
        start = call["start"]
        in_period = [other for other in sent if start <= other["start"] < start + PERIOD - 1e-6]
        in_sixth = [other for other in sent if start <= other["start"] < start + SHORT_PERIOD - 1e-6]
        assert len(in_period) <= REQUESTS
        assert len(in_sixth) <= SHORT_REQUESTS
        assert sum(other["tokens"] for other in in_period) <= TOKENS


@given(arrivals)
def test_nobody_waits_while_the_first_in_the_queue_could_be_served(calls):
    with isolated():
        sent = run_in_virtual_time(traffic(calls))

    served = []
    for call in sent:
        earliest = max([call["arrival"], *(other["start"] for other in served)])
        if call["start"] > earliest + 1e-3:
            fits, tokens = room_at(call["start"] - 1e-3, served)
            assert not fits or call["tokens"] > tokens
        served.append(call)


@given(arrivals, st.integers(1, 3))
def test_no_more_than_max_concurrent_calls_are_ever_under_way_and_none_is_left(calls, max_concurrent):
    with isolated():
        sent = run_in_virtual_time(traffic(calls, max_concurrent=max_concurrent))

    for call in sent:
        under_way = [other for other in sent if other["start"] <= call["start"] < other["end"]]
        assert len(under_way) <= max_concurrent
    assert all("end" in call for call in sent)


@given(arrivals, st.lists(st.floats(0, 90, allow_nan=False), max_size=40), st.integers(1, 3))
def test_whoever_is_cancelled_wherever_it_is_leaves_nothing_behind_and_holds_nobody_up(calls, cancellations, most):
    async def cancelled_traffic():
        loop, tasks = asyncio.get_running_loop(), []

        @rate_limited(
            "any", tokens_per_minute=TOKENS, max_concurrent=most, min_interval=1, tokens=lambda tokens, _: tokens
        )
        async def ask(tokens, duration):
            await asyncio.sleep(duration)
            return "answer"

        for gap, tokens, duration in calls:
            await asyncio.sleep(gap)
            tasks.append(loop.create_task(ask(tokens, duration)))
        for task, seconds in zip(tasks, cancellations, strict=False):
            loop.call_later(seconds, task.cancel)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes, get_all_resilience_stats()["rate_limiters"].get("any", {"in_flight": 0, "waiting": 0})

    with isolated():
        outcomes, left = run_in_virtual_time(cancelled_traffic())

    assert all(outcome == "answer" or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert outcomes[len(cancellations) :] == ["answer"] * len(outcomes[len(cancellations) :])
    assert (left["in_flight"], left["waiting"]) == (0, 0)


@given(arrivals)
def test_calls_of_one_priority_start_in_the_order_of_their_arrival(calls):
    with isolated():
        sent = run_in_virtual_time(traffic(calls))

    starts = [call["start"] for call in sent]
    assert starts == sorted(starts)


@given(arrivals)
def test_a_bucket_of_aiolimiter_behind_the_ledger_would_never_be_full(calls):
    """So the kit has none: what keeps to every window keeps to the leaking bucket of the same size as well."""
    with isolated():
        sent = run_in_virtual_time(traffic(calls))

    async def refill():
        requests, tokens, loop = (
            AsyncLimiter(REQUESTS, PERIOD),
            AsyncLimiter(TOKENS, PERIOD),
            asyncio.get_running_loop(),
        )
        for call in sent:
            await asyncio.sleep(call["start"] + 1e-3 - loop.time())
            before = loop.time()
            await requests.acquire()
            await tokens.acquire(call["tokens"])
            assert loop.time() - before < 1e-2

    run_in_virtual_time(refill())


def test_a_request_that_was_not_sent_is_counted_no_more():
    ledger = WindowLedger(REQUESTS, TOKENS, PERIOD)
    first = ledger.commit(60, 1.0)
    ledger.commit(40, 2.0)
    ledger.give_back(first)

    assert ledger.used(3.0) == (1, 40)


def test_giving_back_what_has_left_the_window_changes_nothing():
    ledger = WindowLedger(REQUESTS, TOKENS, PERIOD)
    sent = ledger.commit(60, 1.0)
    assert ledger.used(100.0) == (0, 0)
    ledger.give_back(sent)

    assert ledger.used(100.0) == (0, 0)


def test_a_copy_can_be_filled_without_the_original():
    ledger = WindowLedger(REQUESTS, TOKENS, PERIOD)
    ledger.commit(70, 0.0)
    twin = ledger.copy()
    twin.commit(30, 0.0)

    assert (ledger.used(0.0), twin.used(0.0)) == ((1, 70), (2, 100))
    assert twin.seconds_until_fits(1, 0.0) == PERIOD


def test_what_is_above_the_quota_never_fits():
    assert WindowLedger(REQUESTS, TOKENS, PERIOD).seconds_until_fits(TOKENS + 1, 0.0) == math.inf


@pytest.mark.parametrize(("requests", "in_a_sixth"), [(1, 1), (5, 1), (6, 1), (11, 1), (12, 2), (600, 100)])
def test_a_sixth_of_the_period_takes_a_sixth_of_the_requests_and_at_least_one(requests, in_a_sixth):
    ledger = WindowLedger(requests, TOKENS, PERIOD)
    sent = 0
    while ledger.seconds_until_fits(0, 0.0) == 0:
        ledger.commit(0, 0.0)
        sent += 1

    assert sent == in_a_sixth

"""`retry_budget=`: an outage is not multiplied by retries, and no answer is lost to it that the server has promised."""

import asyncio

import pytest

from resilience_kit import (
    RateLimitTimeoutError,
    explain,
    get_all_resilience_stats,
    reset_all,
    resilient,
    retry_on_429,
)
from resilience_kit.events import RetriesExhausted
from resilience_kit.retry_budgets import NothingDeclared, RetryBudget
from resilience_kit.testing import isolated

pytestmark = pytest.mark.looptime

UNPACED = {"requests_per_minute": 1_000_000, "max_concurrent": 10_000, "min_interval": 0}
# A circuit would end an outage for its callers sooner: here the budget alone is looked at. And retries follow at once
# where a test is about few of them, so that none is forgotten before the last.
WITHOUT_CIRCUIT = {"failure_threshold": 1_000_000}
AT_ONCE = {"max_retries": 10, "initial_backoff": 0}
ALWAYS_ALLOWED = 10


class FailureError(Exception):
    """What an HTTP client raises for a status."""

    def __init__(self, status_code, **headers):
        super().__init__(f"status {status_code}")
        self.status_code = status_code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """Fails as it is told to, and counts what reaches it."""

    def __init__(self, failure=None):
        self.requests = 0
        self.failure = failure

    async def __call__(self):
        self.requests += 1
        if self.failure is not None:
            raise self.failure()
        return "answer"


def outage(**headers):
    return Service(lambda: FailureError(503, **headers))


async def outcomes_of(ask, calls):
    return await asyncio.gather(*(ask() for _ in range(calls)), return_exceptions=True)


def put_around(service, **options):
    return resilient("chat", **{**UNPACED, **WITHOUT_CIRCUIT, **options})(service)


async def requests_of_another_call(ask, service):
    before = service.requests
    await outcomes_of(ask, 1)
    return service.requests - before


def window():
    (counters,) = get_all_resilience_stats()["retries"].values()
    return counters


# An outage


async def test_an_outage_that_many_callers_meet_at_once_is_multiplied_by_at_most_a_fifth():
    service = outage()
    await outcomes_of(put_around(service), 500)

    assert service.requests == 1.2 * 500


async def test_an_outage_that_lasts_is_multiplied_by_at_most_a_fifth():
    service, calls = outage(), 1_000
    ask = put_around(service)
    async with asyncio.TaskGroup() as group:
        for _ in range(calls):
            group.create_task(outcomes_of(ask, 1))
            await asyncio.sleep(0.3)

    assert service.requests <= 1.2 * calls + ALWAYS_ALLOWED


async def test_a_failing_server_that_names_a_wait_is_counted_all_the_same():
    service = outage(retry_after="1")
    await outcomes_of(put_around(service), 500)

    assert service.requests == 1.2 * 500


async def test_without_a_budget_an_outage_is_multiplied_by_all_retries():
    service = outage()
    await outcomes_of(put_around(service, retry_budget=None, max_retries=3), 100)

    assert service.requests == 4 * 100


async def test_the_bare_decorator_has_no_budget():
    service = outage()
    await outcomes_of(retry_on_429(retry_transient=True, max_retries=3)(service), 100)

    assert service.requests == 4 * 100


async def test_what_is_refused_a_retry_gets_its_own_error_at_once_with_a_note_and_an_event(heard):
    service = outage()
    ask = retry_on_429(retry_transient=True, retry_budget=0.1, **AT_ONCE)(service)
    await outcomes_of(ask, 1)
    started = asyncio.get_running_loop().time()
    mine = FailureError(503)
    service.failure = lambda: mine
    with pytest.raises(FailureError) as raised:
        await ask()

    assert raised.value is mine
    assert asyncio.get_running_loop().time() == started
    assert mine.__notes__ == ["resilience_kit: gave up after 1 attempts in 0.0 s (retry_budget=0.1)"]
    given_up = [(event.attempts, event.reason) for event in heard if isinstance(event, RetriesExhausted)]
    assert given_up == [(11, "max_retries"), (1, "retry_budget")]


# What must not be lost to it


async def test_rate_limits_for_which_the_server_names_the_wait_lose_no_answer():
    refused = 0

    async def at_the_edge_of_the_quota():
        nonlocal refused
        await asyncio.sleep(0.1)
        if asyncio.get_running_loop().time() < 30:
            refused += 1
            raise FailureError(429, retry_after="31")
        return "answer"

    ask = put_around(at_the_edge_of_the_quota)
    assert await outcomes_of(ask, 64) == ["answer"] * 64
    assert refused == 64


async def test_rate_limits_without_a_word_lose_no_answer_where_a_limit_makes_all_callers_wait():
    async def at_the_edge_of_the_quota():
        await asyncio.sleep(0.1)
        if asyncio.get_running_loop().time() < 5:
            raise FailureError(429)
        return "answer"

    assert await outcomes_of(put_around(at_the_edge_of_the_quota, max_retries=10), 64) == ["answer"] * 64


async def test_rate_limits_that_are_waited_out_leave_the_budget_to_failures():
    service = Service(lambda: FailureError(429, retry_after="1"))
    await outcomes_of(put_around(service, max_retries=2), 20)

    assert (window()["retries"], window()["retries_in_window"]) == (40, 0)


async def test_a_rate_limit_without_a_word_is_counted_where_no_limit_is_beneath():
    service = Service(lambda: FailureError(429))
    await outcomes_of(retry_on_429(retry_budget=0.2, **AT_ONCE)(service), 500)

    assert service.requests == 1.2 * 500


async def test_a_lonely_caller_has_all_its_retries():
    service = outage()
    await outcomes_of(put_around(service, **{**AT_ONCE, "max_retries": 25}), 1)

    assert service.requests == 1 + 25


async def test_few_calls_have_ten_retries_in_a_minute():
    service = outage()
    await outcomes_of(put_around(service), 8)

    assert service.requests == 8 + ALWAYS_ALLOWED


# The window


async def test_retries_come_back_a_minute_after_they_were_taken():
    service = outage()
    ask = put_around(service, **AT_ONCE)
    await outcomes_of(ask, 1)
    assert await requests_of_another_call(ask, service) == 1
    await asyncio.sleep(61)

    assert await requests_of_another_call(ask, service) == 11


async def test_calls_of_more_than_a_minute_ago_allow_no_retries():
    service = Service()
    ask = put_around(service)
    await outcomes_of(ask, 1_000)
    await asyncio.sleep(61)
    service.failure = outage().failure
    service.requests = 0
    await outcomes_of(ask, 20)

    assert service.requests == 20 + ALWAYS_ALLOWED


async def test_calls_that_an_open_circuit_refuses_allow_no_retries():
    service = outage()
    ask = resilient("chat", failure_threshold=1, max_retries=1, **UNPACED)(service)
    await outcomes_of(ask, 1)
    await outcomes_of(ask, 1_000)

    assert window()["calls_in_window"] == 1


async def test_a_call_that_was_refused_after_a_longer_wait_than_the_window_is_not_taken_back_twice():
    ask = resilient("chat", **{**UNPACED, "max_concurrent": 1}, max_wait=70)(asyncio.sleep)
    holder = asyncio.create_task(ask(100))
    assert isinstance(*await outcomes_of(lambda: ask(1), 1), RateLimitTimeoutError)
    await holder

    assert window()["calls_in_window"] == 0


async def test_a_call_that_was_refused_after_a_reset_takes_back_none_of_the_calls_since():
    ask = resilient("chat", **{**UNPACED, "max_concurrent": 1}, max_wait=5)(asyncio.sleep)
    calls = asyncio.gather(ask(10), ask(10), return_exceptions=True)
    await asyncio.sleep(1)
    reset_all()
    await asyncio.sleep(1)
    late = asyncio.create_task(outcomes_of(lambda: ask(1), 1))
    await calls
    await late

    assert window()["calls_in_window"] == 0


async def test_the_window_takes_no_more_room_for_many_calls_than_a_minute_has_seconds():
    budget = RetryBudget("chat", NothingDeclared())
    for second in range(10_000):
        budget.count_call(second + 0.5)

    assert len(budget._seconds) == 60
    assert budget._calls == 60


async def test_a_thread_that_counts_a_moment_late_loses_nothing():
    budget = RetryBudget("chat", NothingDeclared())
    for time in (100.1, 99.9, 100.2):
        budget.count_call(time)

    assert budget._calls == 3


async def test_the_clock_of_another_event_loop_starts_the_window_anew():
    budget = RetryBudget("chat", NothingDeclared())
    budget.count_call(1_000_000.0)
    budget.count_call(5.0)
    budget.count_call(70.0)

    assert budget._calls == 1


# Whose it is


async def test_a_method_has_one_budget_for_all_objects():
    class Agent:
        requests = 0

        @retry_on_429(retry_transient=True, retry_budget=0.2, **AT_ONCE)
        async def ask(self):
            Agent.requests += 1
            raise FailureError(503)

    for _ in range(5):
        await outcomes_of(Agent().ask, 1)

    assert Agent.requests == 5 + ALWAYS_ALLOWED


async def test_one_name_may_have_two_shares():
    def decorated(share):
        @retry_on_429(retry_budget=share)
        async def ask():
            return "answer"

        return ask

    assert [await decorated(share)() for share in (0.1, 0.5)] == ["answer", "answer"]
    assert window()["calls_in_window"] == 2


async def test_reset_all_forgets_the_window():
    service = outage()
    ask = put_around(service, **AT_ONCE)
    await outcomes_of(ask, 1)
    reset_all()

    assert await requests_of_another_call(ask, service) == 11


async def test_a_test_in_isolation_has_a_window_of_its_own():
    service = outage()
    ask = put_around(service, **AT_ONCE)
    await outcomes_of(ask, 1)
    with isolated():
        assert await requests_of_another_call(ask, service) == 11
    assert await requests_of_another_call(ask, service) == 1


async def test_the_window_is_shown_beside_the_functions_retries():
    service = outage()
    await outcomes_of(put_around(service, max_retries=2), 1)

    assert window() == {
        "calls_in_window": 1,
        "retries_in_window": 2,
        "retries": 2,
        "calls_recovered": 0,
        "calls_given_up": 1,
        "seconds_waited": pytest.approx(window()["seconds_waited"]),
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "0.2 (default)"),
        ({"retry_budget": 0.5}, "0.5 (argument)"),
        ({"retry_budget": None}, "None (argument)"),
    ],
    ids=str,
)
def test_explain_tells_the_budget_of_resilient(options, told):
    assert str(explain(resilient(**options)(lambda: "answer")).layers[1].parameters["retry_budget"]) == told


def test_explain_tells_that_the_bare_decorator_has_none():
    assert str(explain(retry_on_429(lambda: "answer")).layers[0].parameters["retry_budget"]) == "None (default)"

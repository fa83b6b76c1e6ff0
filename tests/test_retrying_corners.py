"""@retry_on_429 in its corners: what no argument makes it retry, exactly where its bounds lie, and what it tells."""

import asyncio

import pytest
from retry_helpers import RefusalError, Service

from resilience_kit import (
    CircuitOpenError,
    RateLimitTimeoutError,
    TokenBudgetExceededError,
    retry_on_429,
)
from resilience_kit.events import RetriesExhausted, RetriesRecovered, Retrying

pytestmark = pytest.mark.looptime


async def times_of(service, **arguments):
    """When a service was called until it answered, or no more was tried."""
    await asyncio.gather(retry_on_429(**arguments)(service)(), return_exceptions=True)
    return service.times


# --- what is retried -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RefusalError("insufficient_quota"),
        ConnectionError("insufficient_quota"),
        ValueError("content_filter"),
        CircuitOpenError("open", name="chat", retry_after=1.0),
        RateLimitTimeoutError("rate limit 'chat'", name="chat", retry_after=1.0),
        TokenBudgetExceededError("rate limit", agent="a", limit=1, requested=2, remaining=1),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
async def test_what_no_wait_helps_is_not_retried_whatever_the_arguments_say(error):
    service = Service(error)
    with pytest.raises(type(error)):
        await retry_on_429(retry_transient=True, retry_if=lambda _: True)(service)()

    assert len(service.times) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RefusalError(), "rate limit"), (ConnectionError(), "transient"), (LookupError(), "retry_if")],
)
async def test_each_retry_is_told_with_its_reason(error, reason, heard):
    await retry_on_429(retry_transient=True, retry_if=lambda _: True)(Service(error))()

    assert [event.reason for event in heard if isinstance(event, Retrying)] == [reason]


async def test_each_attempt_is_told_with_the_reason_for_the_one_after_it(heard):
    errors = [RefusalError(), ConnectionError(), LookupError()]
    await retry_on_429(retry_transient=True, retry_if=lambda _: True)(Service(*errors))()

    reasons = [event.reason for event in heard if isinstance(event, Retrying)]
    assert reasons == ["rate limit", "transient", "retry_if"]


# --- bounds ----------------------------------------------------------------------------------------------------------


async def test_a_wait_of_just_max_retry_after_is_waited_for():
    assert await times_of(Service(RefusalError(retry_after="5")), max_retry_after=5) == pytest.approx([0, 5])


async def test_a_last_attempt_that_starts_just_at_max_elapsed_is_made():
    errors = [RefusalError(retry_after="5")] * 3

    assert await times_of(Service(*errors), max_elapsed=10) == pytest.approx([0, 5, 10])


async def test_max_elapsed_counts_from_the_start_of_the_call_itself():
    await asyncio.sleep(100)
    errors = [RefusalError(retry_after="5")] * 3

    assert await times_of(Service(*errors), max_elapsed=5) == pytest.approx([100, 105])


async def test_a_computed_backoff_is_not_bound_by_max_retry_after():
    service = Service(RefusalError())

    assert await times_of(service, max_retry_after=1, initial_backoff=5, jitter=False) == pytest.approx([0, 5])


async def test_with_jitter_the_backoff_grows_too():
    services = [Service(*[RefusalError()] * 4) for _ in range(30)]
    bounds = {"max_retries": 4, "initial_backoff": 1, "backoff_multiplier": 10, "max_backoff": 500}
    times = await asyncio.gather(*(times_of(service, **bounds) for service in services))

    longest = [max(late[retry + 1] - late[retry] for late in times) for retry in range(4)]
    assert [wait <= bound for wait, bound in zip(longest, [1, 10, 100, 500], strict=True)] == [True] * 4
    assert longest[3] > 100


async def test_a_budget_counts_no_retry_for_which_the_server_named_the_wait():
    services = [Service(RefusalError(retry_after="1"), RefusalError(retry_after="1")) for _ in range(20)]
    times = await asyncio.gather(*(times_of(service, retry_budget=0.01, max_retries=2) for service in services))

    assert times == [pytest.approx([0, 1, 2])] * 20


# --- what is told ----------------------------------------------------------------------------------------------------


async def ask(service):
    return await service()


NAME = f"{__name__}.ask"


async def test_a_call_that_recovers_is_told_from_retry_to_answer(heard):
    await retry_on_429(initial_backoff=2, jitter=False)(ask)(Service(RefusalError(), RefusalError(retry_after="1")))

    assert heard == [
        Retrying(name=NAME, attempt=1, seconds=2.0, reason="rate limit", error="RefusalError", told=False),
        Retrying(name=NAME, attempt=2, seconds=1.0, reason="rate limit", error="RefusalError", told=True),
        RetriesRecovered(name=NAME, attempts=3),
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_retries": 0}, "max_retries"),
        ({"max_retry_after": 4}, "max_retry_after"),
        ({"max_elapsed": 4}, "max_elapsed"),
    ],
)
async def test_a_call_that_gives_up_is_told_with_the_bound_that_it_reached(arguments, reason, heard):
    error = RefusalError(retry_after="5")
    with pytest.raises(RefusalError):
        await retry_on_429(**arguments)(ask)(Service(error))

    assert heard == [RetriesExhausted(name=NAME, attempts=1, reason=reason, error="RefusalError")]
    assert error.__notes__ == [
        f"resilience_kit: gave up after 1 attempts in 0.0 s ({reason}={arguments[reason]!r})",
    ]


@pytest.mark.parametrize(
    ("errors", "note"),
    [
        ([RefusalError(retry_after="5")] * 2, "resilience_kit: gave up after 2 attempts in 5.0 s (max_retries=1)"),
        ([RefusalError(retry_after="5"), LookupError()], "resilience_kit: attempt 2, 5.0 s after the first"),
    ],
    ids=["given up", "not retried"],
)
async def test_a_note_tells_the_seconds_of_this_call_alone(errors, note):
    await asyncio.sleep(100)
    with pytest.raises((RefusalError, LookupError)) as raised:
        await retry_on_429(max_retries=1)(Service(*errors))()

    assert raised.value.__notes__ == [note]


async def test_an_error_that_ends_the_retries_is_told_as_none_that_was_given_up(heard):
    with pytest.raises(LookupError):
        await retry_on_429(ask)(Service(RefusalError(retry_after="1"), LookupError()))

    assert [type(event) for event in heard] == [Retrying]

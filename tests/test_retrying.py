"""@retry_on_429: one loop that listens to the server, and raises the function's own error at the end."""

import asyncio

import openai
import pytest
import tenacity
from retry_helpers import RefusalError, Service

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    ResilienceSettings,
    TokenBudgetExceededError,
    configure,
    get_all_resilience_stats,
    retry_on_429,
)
from resilience_kit.events import RetriesExhausted, RetriesRecovered, Retrying
from resilience_kit.testing import AzureOpenAISimulator, Fault, no_waiting

pytestmark = pytest.mark.looptime


def forever(error):
    return Service(*[error] * 100)


async def test_a_rate_limit_is_retried_until_there_is_an_answer():
    service = Service(RefusalError(), RefusalError())

    assert await retry_on_429(service)() == "answer"
    assert len(service.times) == 3


async def test_row_12_nothing_of_tenacity_runs_where_nothing_fails(monkeypatch):
    monkeypatch.setattr(tenacity, "AsyncRetrying", None)

    assert await retry_on_429(Service())() == "answer"


async def test_row_12_the_first_attempt_counts_among_the_attempts():
    service = forever(RefusalError())
    with pytest.raises(RefusalError):
        await retry_on_429(max_retries=2)(service)()

    assert len(service.times) == 3


async def test_row_10_a_generator_is_retried_where_tenacity_does_not():
    def service(starts):
        starts.append(1)
        if len(starts) < 3:
            raise RefusalError
        yield "answer"

    naive, ours = [], []
    with pytest.raises(RefusalError):
        list(tenacity.retry(stop=tenacity.stop_after_attempt(3))(service)(naive))
    with no_waiting():
        assert list(retry_on_429(service)(ours)) == ["answer"]

    assert (len(naive), len(ours)) == (1, 3)


async def test_row_10_a_stream_is_not_retried_once_its_first_item_is_out():
    starts = 0

    @retry_on_429
    async def stream():
        nonlocal starts
        starts += 1
        yield "first"
        raise RefusalError

    reading = stream()
    received = [await anext(reading)]
    with pytest.raises(RefusalError):
        await anext(reading)

    assert (received, starts) == (["first"], 1)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RefusalError(retry_after="7"), 7),
        (RefusalError(retry_after_ms="250"), 0.25),
        (RefusalError(x_ms_retry_after_ms="1500"), 1.5),
        (RefusalError(x_ratelimit_reset_requests="1m30s"), 90),
        (RefusalError("Rate limit is exceeded. Try again in 50 seconds."), 50),
    ],
    ids=lambda value: str(getattr(value, "headers", value) or value),
)
async def test_the_servers_word_beats_the_computed_backoff(error, seconds):
    service = Service(error)
    await retry_on_429(max_backoff=1)(service)()

    assert service.times == [0, pytest.approx(seconds)]


async def test_without_a_word_of_the_server_the_backoff_grows_up_to_its_maximum():
    service = forever(RefusalError())
    with pytest.raises(RefusalError):
        await retry_on_429(max_retries=5, initial_backoff=1, backoff_multiplier=3, max_backoff=10, jitter=False)(
            service
        )()

    waits = [later - earlier for earlier, later in zip(service.times, service.times[1:], strict=False)]
    assert waits == pytest.approx([1, 3, 9, 10, 10])


async def test_with_jitter_callers_do_not_come_back_together():
    services = [Service(RefusalError()) for _ in range(20)]
    await asyncio.gather(*(retry_on_429(initial_backoff=10)(service)() for service in services))

    second_attempts = [service.times[1] for service in services]
    assert len({round(time, 3) for time in second_attempts}) > 10
    assert max(second_attempts) <= 10


async def test_a_longer_wait_than_max_retry_after_is_not_waited_for():
    service = Service(RefusalError("Please retry after 86400 seconds"))
    with pytest.raises(RefusalError) as raised:
        await retry_on_429(service)()

    assert service.times == [0]
    assert "max_retry_after=120.0" in raised.value.__notes__[0]


async def test_max_elapsed_bounds_the_start_of_the_last_attempt():
    service = forever(RefusalError(retry_after="4"))
    with pytest.raises(RefusalError) as raised:
        await retry_on_429(max_retries=100, max_elapsed=10)(service)()

    assert service.times == pytest.approx([0, 4, 8])
    assert "gave up after 3 attempts in 8.0 s (max_elapsed=10)" in raised.value.__notes__[0]


@pytest.mark.parametrize("status_of", ["status_code", "status", "response"])
async def test_a_429_of_any_client_is_a_rate_limit(status_of):
    error, response = RuntimeError("from any client"), RuntimeError()
    response.status = 429
    setattr(error, status_of, response if status_of == "response" else 429)
    service = Service(error)

    assert await retry_on_429(service)() == "answer"


@pytest.mark.parametrize("message", ["Rate limit reached", "HTTP 429: Too Many Requests", "exceeded token rate limit"])
async def test_a_message_of_a_cause_at_any_depth_tells_a_rate_limit(message):
    error = RuntimeError("outermost")
    error.__cause__ = LookupError("in between")
    error.__cause__.__cause__ = ValueError(message)

    assert await retry_on_429(Service(error))() == "answer"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError(),
        ValueError("the user's own"),
        RefusalError("insufficient_quota"),
        CircuitOpenError("open", name="chat", retry_after=1.0),
        RateLimitTimeoutError("rate limit 'chat'", name="chat", retry_after=1.0),
        TokenBudgetExceededError("rate limit", agent="a", limit=1, requested=2, remaining=1),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_nothing_but_a_rate_limit_is_retried(error):
    service = Service(error)
    with pytest.raises(type(error)) as raised:
        await retry_on_429(service)()

    assert raised.value is error
    assert service.times == [0]


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError()], ids=repr)
async def test_retry_transient_adds_connection_errors_and_timeouts(error):
    assert await retry_on_429(retry_transient=True)(Service(error))() == "answer"


@pytest.mark.parametrize(("status", "retried"), [(408, True), (500, True), (503, True), (400, False), (404, False)])
async def test_retry_transient_adds_the_statuses_408_and_5xx(status, retried):
    error = RuntimeError("from any client")
    error.status_code = status
    service = Service(error)
    outcome = await asyncio.gather(retry_on_429(retry_transient=True)(service)(), return_exceptions=True)

    assert (outcome == ["answer"]) is retried


async def test_retry_if_adds_what_it_says_yes_to():
    service = Service(LookupError(), LookupError())

    assert await retry_on_429(retry_if=lambda error: isinstance(error, LookupError))(service)() == "answer"


async def test_a_retry_if_that_raises_reaches_the_caller_with_the_error_that_it_was_asked_about():
    def broken(error):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        await retry_on_429(retry_if=broken)(Service(LookupError()))()
    assert isinstance(raised.value.__context__, LookupError)


async def test_retry_if_is_asked_once_about_each_error():
    asked = []

    def retry_if(error):
        asked.append(str(error))
        return True

    service = Service(KeyError(1), KeyError(2))
    await retry_on_429(retry_if=retry_if)(service)()

    assert asked == ["1", "2"]


async def test_a_bad_setting_stops_the_first_call_and_does_not_wait_for_a_failure(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "many")
    service = Service()

    with pytest.raises(ConfigurationError, match="MAX_RETRIES='many'"):
        await retry_on_429(service)()
    assert service.times == []


async def test_settings_are_not_read_where_all_is_said(monkeypatch):
    monkeypatch.setenv("MAX_RETRIES", "many")
    ask = retry_on_429(max_retries=1, initial_backoff=1, max_backoff=1, backoff_multiplier=1)(Service())

    assert await ask() == "answer"


async def test_configured_settings_count_from_the_next_call_on():
    service = Service(*[RefusalError()] * 5)
    ask = retry_on_429(initial_backoff=0)(service)
    configure(ResilienceSettings(max_retries=0))
    with pytest.raises(RefusalError):
        await ask()
    configure(ResilienceSettings(max_retries=4))

    assert await ask() == "answer"


async def test_the_error_at_the_end_is_the_last_one_of_the_function_with_a_note():
    errors = [RefusalError(str(number), retry_after="1") for number in range(4)]
    with pytest.raises(RefusalError) as raised:
        await retry_on_429(max_retries=3)(Service(*errors))()

    assert raised.value is errors[-1]
    assert raised.value.__notes__ == ["resilience_kit: gave up after 4 attempts in 3.0 s (max_retries=3)"]


async def test_an_error_that_is_not_retried_ends_the_retries_with_a_note():
    with pytest.raises(ValueError, match="bad") as raised:
        await retry_on_429(Service(RefusalError(retry_after="2"), ValueError("bad")))()

    assert raised.value.__notes__ == ["resilience_kit: attempt 2, 2.0 s after the first"]


async def test_cancellation_ends_the_wait_for_the_next_attempt():
    service = forever(RefusalError(retry_after="100"))
    task = asyncio.create_task(retry_on_429(service)())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert len(service.times) == 1


async def test_row_11_concurrent_calls_have_counts_of_their_own_where_tenacity_mixes_them():
    async def fails(times, log):
        log.append(1)
        if len(log) <= times:
            raise RefusalError(retry_after="1")

    naive = tenacity.retry(stop=tenacity.stop_after_attempt(9), wait=tenacity.wait_fixed(1))(fails)
    await asyncio.gather(*(naive(times, []) for times in (0, 2, 3)))
    await asyncio.gather(*(retry_on_429(max_retries=9)(fails)(times, []) for times in (0, 2, 3)))

    (ours,) = get_all_resilience_stats()["retries"].values()
    assert naive.statistics["attempt_number"] != 1 + 3 + 4
    assert (ours["retries"], ours["calls_recovered"], ours["seconds_waited"]) == (5, 2, pytest.approx(5))


async def test_each_decision_is_told_to_listeners(heard):
    with pytest.raises(RefusalError):
        await retry_on_429(max_retries=1)(Service(RefusalError(retry_after="1"), RefusalError()))()
    await retry_on_429(Service(RefusalError(retry_after="1")))()

    assert [type(event) for event in heard] == [Retrying, RetriesExhausted, Retrying, RetriesRecovered]
    assert (heard[0].attempt, heard[0].seconds, heard[0].reason, heard[0].told) == (1, 1.0, "rate limit", True)


async def test_a_sync_function_waits_in_its_thread():
    errors = [RefusalError(retry_after="5"), RefusalError(retry_after="5")]

    @retry_on_429
    def ask():
        if errors:
            raise errors.pop()
        return "answer"

    with no_waiting():
        assert ask() == "answer"
    (counters,) = get_all_resilience_stats()["retries"].values()
    assert counters["seconds_waited"] == 10


@pytest.mark.looptime(False)
async def test_row_14_a_client_without_retries_of_its_own_is_called_once_an_attempt():
    async def ask(client):
        return await client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "?"}])

    with AzureOpenAISimulator() as azure:
        attempts = []
        for retries in (2, 0):
            async with openai.AsyncAzureOpenAI(**azure.client_options(), max_retries=retries) as client:
                before = azure.stats.requests
                azure.inject(Fault.insufficient_quota(), times=20)
                with pytest.raises(openai.RateLimitError):
                    await retry_on_429(max_retries=2)(ask)(client)
                attempts.append(azure.stats.requests - before)

    assert attempts == [3, 1], "the SDK's own default retries what no wait helps"


@pytest.mark.looptime(False)
async def test_an_answer_that_the_simulator_refused_first_comes_at_the_second_attempt():
    with AzureOpenAISimulator(faults=[Fault.rate_limit(retry_after=0.01)]) as azure:
        async with openai.AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:

            @retry_on_429
            async def ask():
                return await client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "?"}])

            assert (await ask()).choices[0].message.content
        assert azure.stats.requests == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"initial_backoff": -1},
        {"max_backoff": float("nan")},
        {"backoff_multiplier": 0.5},
        {"max_elapsed": -1},
        {"max_retry_after": "120"},
        {"retry_budget": 0},
        {"retry_budget": 1.5},
        {"retry_if": LookupError()},
    ],
    ids=str,
)
def test_an_argument_that_cannot_work_is_refused_when_it_is_written(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        retry_on_429(**arguments)


@pytest.mark.parametrize("what", [5, "text", Service], ids=repr)
def test_what_is_not_a_function_is_not_decorated(what):
    with pytest.raises(ConfigurationError, match="retry_on_429"):
        retry_on_429(what)

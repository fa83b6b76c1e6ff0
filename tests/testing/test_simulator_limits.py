"""What the simulator charges and refuses, and what it says about it."""

import asyncio
import math
import time
from email.utils import parsedate_to_datetime

import openai
import pytest
from openai import AsyncAzureOpenAI, AzureOpenAI

from resilience_kit.errors import ConfigurationError
from resilience_kit.testing.faults import Fault
from resilience_kit.testing.simulator import AzureOpenAISimulator
from resilience_kit.testing.simulator_stats import Admission, Books

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!!!"}]}  # 2 tokens by length


def client_of(azure):
    return AzureOpenAI(**azure.client_options(), max_retries=0, timeout=5)


def headers_of_answers(azure, count=1):
    with client_of(azure) as client:
        return [client.chat.completions.with_raw_response.create(**HELLO, max_tokens=10).headers for _ in range(count)]


def refusal_of(azure, **options):
    """Return the error of the first request that is refused."""
    with client_of(azure) as client:
        while True:
            try:
                client.chat.completions.create(**(HELLO | options))
            except openai.RateLimitError as error:
                return error


def tokens_charged(azure, **options):
    with client_of(azure) as client:
        client.chat.completions.create(**(HELLO | options))
    return azure.stats.tokens_charged


@pytest.mark.parametrize(
    ("options", "charged"),
    [
        ({}, 2 + 16),
        ({"max_tokens": 10}, 2 + 10),
        ({"max_completion_tokens": 10}, 2 + 10),
        ({"max_tokens": 10, "n": 3}, 2 + 30),
        ({"max_tokens": 10, "n": 2, "extra_body": {"best_of": 4}}, 2 + 40),
        ({"max_tokens": 10, "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 40}]}]}, 10 + 10),
        ({"max_tokens": 10, "tools": [{"type": "function", "function": {"name": "look_up"}}]}, 16 + 10),
    ],
)
def test_a_request_is_charged_its_prompt_and_its_maximum_for_each_choice(options, charged):
    with AzureOpenAISimulator() as azure:
        assert tokens_charged(azure, **options) == charged


@pytest.mark.parametrize(
    ("options", "charged"),
    [
        ({"absent_max_tokens": "dear"}, 128_002),
        ({"absent_max_tokens": "dear", "tpm": 500}, 500),
        ({"absent_max_tokens": 7}, 9),
    ],
)
def test_the_charge_without_a_maximum_is_an_option(options, charged):
    with AzureOpenAISimulator(**options) as azure:
        assert tokens_charged(azure) == charged


def test_a_dear_charge_leaves_room_for_each_choice():
    with AzureOpenAISimulator(absent_max_tokens="dear", tpm=500) as azure:
        assert tokens_charged(azure, n=2) == 500


def test_the_prompt_is_counted_by_the_given_function():
    with AzureOpenAISimulator(count_prompt=len) as azure:
        assert tokens_charged(azure, max_tokens=1) == len("Hello!!!") + 1


def test_the_responses_api_is_charged_by_its_own_maximum():
    with AzureOpenAISimulator() as azure, client_of(azure) as client:
        client.responses.create(model="gpt-4o", instructions="Be kind.", input="Hello!!!", max_output_tokens=10)
        assert azure.stats.tokens_charged == 4 + 10


@pytest.mark.parametrize(
    ("given", "charged"), [("12345678", 2), (["1234", "5678"], 2), ([1, 2, 3], 3), ([[1], [2]], 2)]
)
def test_embeddings_are_charged_for_their_input_alone(given, charged):
    with AzureOpenAISimulator() as azure, client_of(azure) as client:
        client.embeddings.create(model="embedding", input=given)
        assert azure.stats.tokens_charged == charged


def test_tokens_above_the_quota_are_refused():
    with AzureOpenAISimulator(tpm=40) as azure:
        assert "exceeded token rate limit" in refusal_of(azure, max_tokens=10).message
        assert (azure.stats.admitted, dict(azure.stats.refused_by)) == (3, {"tokens": 1})


def test_each_refusal_is_remembered_with_its_time_and_what_it_would_have_cost():
    with AzureOpenAISimulator(tpm=40) as azure:
        before = time.monotonic()
        refusal_of(azure, max_tokens=10)
        (rejection,) = azure.stats.rejections

    assert (rejection.reason, rejection.tokens) == ("tokens", 12)
    assert before <= rejection.time <= time.monotonic()
    assert rejection.time >= max(admission.time for admission in azure.stats.admissions)


def test_requests_above_the_quota_are_refused():
    with AzureOpenAISimulator(rpm=12) as azure:
        assert "exceeded call rate limit" in refusal_of(azure).message
        assert (azure.stats.admitted, dict(azure.stats.refused_by)) == (2, {"requests": 1})


def test_a_request_that_waits_as_it_is_told_is_admitted():
    with AzureOpenAISimulator(tpm=20, period=0.3) as azure, client_of(azure) as client:
        retry_after = float(refusal_of(azure).response.headers["retry-after-ms"]) / 1000
        time.sleep(retry_after)
        client.chat.completions.create(**HELLO)
        assert azure.stats.admitted == 2


async def test_concurrent_requests_never_get_more_than_a_sliding_quota():
    async with (
        AzureOpenAISimulator(tpm=100, period=0.3, token_window="sliding") as azure,  # noqa: S106 - no secret
        AsyncAzureOpenAI(**azure.client_options(), max_retries=0, timeout=5) as client,
    ):

        async def ask_until_admitted():
            while True:
                try:
                    return await client.chat.completions.create(**HELLO, max_tokens=18)
                except openai.RateLimitError as error:
                    await asyncio.sleep(float(error.response.headers["retry-after-ms"]) / 1000)

        await asyncio.gather(*(ask_until_admitted() for _ in range(12)))
        assert (azure.stats.admitted, azure.stats.peak_tokens(0.3)) == (12, 100)


def test_the_quota_can_change_while_it_runs():
    with AzureOpenAISimulator(rpm=6) as azure, client_of(azure) as client:
        refusal_of(azure)
        azure.set_quota(rpm=None)
        client.chat.completions.create(**HELLO)
        azure.set_quota(tpm=1)
        assert "token rate limit" in refusal_of(azure).message


def test_a_reset_forgets_what_was_counted_and_injected():
    with AzureOpenAISimulator(rpm=6) as azure, client_of(azure) as client:
        refusal_of(azure)
        azure.inject(Fault.internal_error())
        azure.reset()
        client.chat.completions.create(**HELLO)
        assert (azure.stats.requests, azure.stats.admitted, azure.stats.refused) == (1, 1, 0)


def test_a_reset_keeps_a_changed_quota():
    with AzureOpenAISimulator() as azure:
        azure.set_quota(rpm=6)
        azure.reset()
        assert refusal_of(azure).status_code == 429


def test_full_headers_tell_limits_what_remains_and_when_it_comes_back():
    with AzureOpenAISimulator(rpm=600, tpm=1000, period=0.5, token_window="sliding") as azure:  # noqa: S106 - no secret
        (headers,) = headers_of_answers(azure)
    assert {name: value for name, value in headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-remaining-requests": "599",
        "x-ratelimit-remaining-tokens": "988",
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-reset-requests": "500ms",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-reset-tokens": "500ms",
    }


def test_headers_can_tell_only_what_remains():
    with AzureOpenAISimulator(tpm=1000, headers="remaining") as azure:
        (headers,) = headers_of_answers(azure)
    assert [name for name in headers if name.startswith("x-ratelimit")] == ["x-ratelimit-remaining-tokens"]


@pytest.mark.parametrize("options", [{"headers": "off", "rpm": 600}, {}])
def test_headers_tell_nothing_when_they_are_off_or_nothing_is_limited(options):
    with AzureOpenAISimulator(**options) as azure:
        (headers,) = headers_of_answers(azure)
    assert not [name for name in headers if name.startswith("x-ratelimit")]


def test_headers_lag_by_the_given_number_of_admissions():
    with AzureOpenAISimulator(tpm=1000, header_lag=2) as azure:
        answers = headers_of_answers(azure, count=4)
    assert [headers["x-ratelimit-remaining-tokens"] for headers in answers] == ["988", "988", "988", "976"]


def test_the_responses_api_may_say_that_what_remains_is_unknown():
    with AzureOpenAISimulator(tpm=1000, responses_remaining_unknown=True) as azure, client_of(azure) as client:
        headers = client.responses.with_raw_response.create(model="gpt-4o", input="Hello").headers
    assert headers["x-ratelimit-remaining-tokens"] == "-1"


def test_a_refusal_tells_what_remains():
    with AzureOpenAISimulator(tpm=20) as azure:
        assert refusal_of(azure).response.headers["x-ratelimit-remaining-tokens"] == "2"


@pytest.mark.parametrize(
    ("spelling", "seconds", "name", "value"),
    [
        ("retry-after-ms", 1.2345, "retry-after-ms", "1235"),
        ("x-ms-retry-after-ms", 1.2345, "x-ms-retry-after-ms", "1235"),
        ("retry-after", 1.2, "retry-after", "2"),
        ("x-ratelimit-reset", 13, "x-ratelimit-reset-tokens", "13s"),
        ("x-ratelimit-reset", 0.25, "x-ratelimit-reset-tokens", "250ms"),
        ("x-ratelimit-reset", 361.5, "x-ratelimit-reset-tokens", "6m1.5s"),
        ("x-rate-limit-reset", 13, "x-rate-limit-reset-tokens", "13s"),
    ],
)
def test_retry_after_has_the_chosen_spelling(spelling, seconds, name, value):
    with AzureOpenAISimulator(retry_after_spelling=spelling, faults=[Fault.rate_limit(retry_after=seconds)]) as azure:
        assert refusal_of(azure).response.headers[name] == value


def test_retry_after_can_be_a_date():
    spelled = {"retry_after_spelling": "retry-after-date", "faults": [Fault.rate_limit(retry_after=30)]}
    with AzureOpenAISimulator(**spelled) as azure:
        date = parsedate_to_datetime(refusal_of(azure).response.headers["retry-after"])
    assert 25 < date.timestamp() - time.time() <= 31


@pytest.mark.parametrize(("spelling", "told"), [("message", True), ("none", False)])
def test_retry_after_can_be_left_to_the_message_or_out_altogether(spelling, told):
    with AzureOpenAISimulator(retry_after_spelling=spelling, faults=[Fault.rate_limit(retry_after=1)]) as azure:
        error = refusal_of(azure)
    assert ("Please retry after 1 second." in error.message) is told
    assert not [name for name in error.response.headers if "retry" in name or "reset" in name]


def test_api_management_has_its_own_words():
    with AzureOpenAISimulator(error_style="api_management", faults=[Fault.rate_limit(retry_after=50)]) as azure:
        assert refusal_of(azure).body == {
            "code": "429",
            "message": "Rate limit is exceeded. Try again in 50 seconds.",
        }


def test_the_message_names_the_operation_and_the_version():
    with AzureOpenAISimulator(rpm=0) as azure:
        message = refusal_of(azure).message
    assert "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21" in message


@pytest.mark.parametrize(
    "options",
    [
        {"token_window": "slidng"},
        {"request_window": 5},
        {"headers": "some"},
        {"retry_after_spelling": "later"},
        {"error_style": "gcp"},
        {"absent_max_tokens": "free"},
        {"period": 0},
        {"header_lag": -1},
        {"fault_rate": 0.5},
        {"fault_rate": 2, "faults": [None]},
    ],
)
def test_an_impossible_option_is_named_at_once(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        AzureOpenAISimulator(**options)


def test_peaks_look_at_every_window():
    books = Books(admissions=[Admission(time, tokens) for time, tokens in ((0, 5), (0.5, 1), (1, 2), (1.4, 2))])
    stats = books.snapshot()
    assert (stats.peak_requests(1), stats.peak_tokens(1), stats.peak_tokens(math.inf)) == (3, 6, 10)

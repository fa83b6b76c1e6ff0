"""What goes wrong on demand, as the openai SDK sees it."""

import asyncio
import itertools
import threading
import time

import openai
import pytest
from openai import AsyncAzureOpenAI, AzureOpenAI

from resilience_kit.testing.faults import Fault
from resilience_kit.testing.simulator import AzureOpenAISimulator

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}


def client_of(azure, timeout=5.0):
    return AzureOpenAI(**azure.client_options(), max_retries=0, timeout=timeout)


@pytest.fixture
def azure():
    with AzureOpenAISimulator(retry_after_spelling="retry-after") as simulator:
        yield simulator


@pytest.fixture
def client(azure):
    with client_of(azure) as client:
        yield client


def outcomes(client, count):
    """Return the status of each of so many requests."""
    statuses = []
    for _ in range(count):
        try:
            client.chat.completions.create(**HELLO)
            statuses.append(200)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)
    return statuses


@pytest.mark.parametrize(
    ("fault", "status", "code", "words"),
    [
        (Fault.rate_limit(), 429, "429", "exceeded token rate limit"),
        (Fault.capacity(), 429, "429", "high demand"),
        (Fault.insufficient_quota(), 429, "insufficient_quota", "current quota"),
        (Fault.token_quota(), 403, "403", "Token quota is exceeded"),
        (Fault.internal_error(), 500, "500", "server had an error"),
        (Fault.unavailable(), 503, "503", "temporarily unable"),
        (Fault.content_filter(), 400, "content_filter", "content management policy"),
    ],
)
def test_an_error_response_has_its_status_code_and_words(fault, status, code, words):
    with (
        AzureOpenAISimulator(faults=[fault]) as azure,
        client_of(azure) as client,
        pytest.raises(openai.APIStatusError, match=words) as caught,
    ):
        client.chat.completions.create(**HELLO)
    assert (caught.value.status_code, caught.value.code) == (status, code)


@pytest.mark.parametrize("make", [Fault.rate_limit, Fault.capacity, Fault.unavailable])
def test_an_error_response_says_when_to_come_back_if_it_shall(azure, client, make):
    azure.inject(make(retry_after=86_400))
    with pytest.raises(openai.APIStatusError, match="Please retry after 86400 seconds") as caught:
        client.chat.completions.create(**HELLO)
    assert caught.value.response.headers["retry-after"] == "86400"


def test_a_rate_limit_can_come_without_advice(azure, client):
    azure.inject(Fault.rate_limit())
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**HELLO)
    assert "retry" not in caught.value.message
    assert "retry-after" not in caught.value.response.headers


def test_a_content_filter_names_the_policy(azure, client):
    azure.inject(Fault.content_filter())
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**HELLO)
    assert caught.value.body["innererror"]["code"] == "ResponsibleAIPolicyViolation"


def test_an_output_filter_is_an_answer_without_content(azure, client):
    azure.inject(Fault.output_filter())
    choice = client.chat.completions.create(**HELLO).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("content_filter", None)


def test_an_output_filter_makes_a_streamed_response_incomplete(azure, client):
    azure.inject(Fault.output_filter())
    *_, last = client.responses.create(model="gpt-4o", input="Hello", stream=True)
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "content_filter")


def test_a_reset_connection_is_reset_on_the_wire(azure, client):
    azure.inject(Fault.connection_reset())
    with pytest.raises(openai.APIConnectionError) as caught:
        client.chat.completions.create(**HELLO)
    assert "reset by peer" in str(caught.value.__cause__)


def test_a_request_that_is_never_answered_times_out(azure):
    azure.inject(Fault.time_out())
    with client_of(azure, timeout=0.1) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**HELLO)


def test_a_cut_stream_breaks_on_the_wire(azure, client):
    azure.inject(Fault.cut_mid_stream(after=3))
    with pytest.raises(openai.APIConnectionError) as caught:
        list(client.chat.completions.create(**HELLO, stream=True))
    assert "incomplete chunked read" in str(caught.value.__cause__)
    assert azure.stats.streams_cut == 1


@pytest.mark.parametrize(("after", "received"), [(0, 0), (3, 3), (1000, 7)])
def test_a_cut_comes_at_the_latest_before_the_last_event(azure, client, after, received):
    azure.inject(Fault.cut_mid_stream(after=after))
    chunks = client.chat.completions.create(**HELLO, stream=True)
    assert len(list(until_broken(chunks))) == received


def until_broken(chunks):
    with pytest.raises(openai.APIConnectionError):
        yield from chunks


def test_a_body_that_is_not_streamed_breaks_after_its_headers(azure, client):
    azure.inject(Fault.cut_mid_stream())
    with pytest.raises(openai.APIConnectionError) as caught:
        client.chat.completions.create(**HELLO)
    assert "incomplete chunked read" in str(caught.value.__cause__)


def test_a_slow_stream_takes_its_time_before_each_event(azure, client):
    azure.inject(Fault.slow_stream(delay=0.02))
    start = time.monotonic()
    chunks = list(client.chat.completions.create(**HELLO, stream=True))
    assert time.monotonic() - start >= 0.02 * len(chunks)


def test_a_script_is_played_one_entry_per_request_and_then_ends():
    script = [Fault.internal_error(), None, Fault.unavailable()]
    with AzureOpenAISimulator(faults=script) as azure, client_of(azure) as client:
        assert outcomes(client, 5) == [500, 200, 503, 200, 200]
        assert azure.stats.faults == 2


def test_a_script_may_be_endless():
    with AzureOpenAISimulator(faults=itertools.cycle([Fault.unavailable(), None])) as azure, client_of(azure) as client:
        assert outcomes(client, 4) == [503, 200, 503, 200]


def test_injected_faults_come_before_the_script():
    with AzureOpenAISimulator(faults=[Fault.internal_error()]) as azure, client_of(azure) as client:
        azure.inject(Fault.unavailable(), times=2)
        assert outcomes(client, 4) == [503, 503, 500, 200]


def test_random_faults_repeat_with_the_same_seed():
    def statuses(seed):
        choices = [Fault.internal_error(), Fault.unavailable()]
        with AzureOpenAISimulator(faults=choices, fault_rate=0.5, seed=seed) as azure, client_of(azure) as client:
            return outcomes(client, 20)

    first = statuses(seed=1)
    assert set(first) == {200, 500, 503}
    assert (first == statuses(seed=1), first == statuses(seed=2)) == (True, False)


def test_refusals_by_faults_are_counted_by_their_kind(azure, client):
    azure.inject(Fault.insufficient_quota())
    azure.inject(Fault.capacity(), times=2)
    outcomes(client, 3)
    assert dict(azure.stats.refused_by) == {"insufficient_quota_429": 1, "capacity_429": 2}
    assert (azure.stats.refused, azure.stats.admitted) == (3, 0)


def test_a_fault_of_an_answer_is_charged_and_one_instead_of_it_is_not(azure, client):
    azure.inject(Fault.output_filter())
    azure.inject(Fault.internal_error())
    outcomes(client, 2)
    assert azure.stats.admitted == 1


async def test_a_client_that_leaves_ends_the_work_for_it():
    answering, ended = threading.Event(), threading.Event()

    async def never(_):
        answering.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with (
        AzureOpenAISimulator(responder=never) as azure,
        AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client,
    ):
        asking = asyncio.create_task(client.chat.completions.create(**HELLO))
        assert await asyncio.to_thread(answering.wait, 5)
        asking.cancel()
        assert await asyncio.to_thread(ended.wait, 5)

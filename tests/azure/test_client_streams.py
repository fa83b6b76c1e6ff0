"""A stream holds its slot, and decides the circuit's verdict, until it is read, closed, broken or dropped."""

import asyncio
import gc
import sys

import httpx2
import openai
import pytest
from azure_helpers import CLIENTS, GREETING, HELLO, UNPACED, Entered, connection, finished, items_of

from resilience_kit import StackOrderWarning, agent, get_all_resilience_stats, resilient
from resilience_kit.testing import AzureOpenAISimulator, Fault

STREAMED = {**HELLO, "stream": True}
USED = {**STREAMED, "stream_options": {"include_usage": True}}


def circuit():
    return get_all_resilience_stats()["circuit_breakers"]["default"]


def tokens_used(name="default"):
    return get_all_resilience_stats()["token_budgets"][name]["tokens_used"]


async def first_of(stream):
    return await anext(aiter(stream)) if hasattr(stream, "__aiter__") else next(iter(stream))


async def until(condition):
    """Give the event loop its turns; the test's time limit is the bound."""
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.001)


@pytest.fixture
async def stream(client):
    return await finished(client.chat.completions.create(**STREAMED))


async def test_a_stream_is_the_sdks_own(stream, kind, slots_taken):
    assert type(stream) is (openai.AsyncStream if "Async" in kind else openai.Stream)
    chunks = await items_of(stream)
    assert type(chunks[0]) is openai.types.chat.ChatCompletionChunk
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING


async def test_a_stream_that_is_read_frees_its_slot(stream, slots_taken):
    assert slots_taken() == 1
    await items_of(stream)
    assert slots_taken() == 0
    assert stream.response.is_closed


async def test_a_stream_can_be_read_item_by_item(stream, slots_taken):
    step = (lambda: anext(stream)) if hasattr(stream, "__anext__") else (lambda: next(stream))
    for _ in range(3):
        assert (await finished(step())).id
    assert slots_taken() == 1
    await finished(stream.close())
    assert slots_taken() == 0


async def test_a_stream_that_is_closed_frees_its_slot(stream, slots_taken):
    await finished(stream.close())
    assert slots_taken() == 0


async def test_a_stream_that_is_left_half_way_frees_its_slot(stream, slots_taken):
    async with Entered(stream):
        await first_of(stream)
        assert slots_taken() == 1
    assert slots_taken() == 0


async def test_a_stream_that_is_dropped_without_being_read_frees_its_slot_and_closes_its_connection(
    make_client, kind, slots_taken, azure
):
    client = make_client(kind)
    gc.disable()  # what is shown is that nothing has to wait for it
    try:
        stream = await finished(client.chat.completions.create(**STREAMED))
        response = stream.response
        del stream
        assert slots_taken() == 0
    finally:
        gc.enable()
    pool = client._client._transport._pool
    await until(lambda: not any(connection.is_available() is False for connection in pool.connections))
    assert response.is_stream_consumed is False


async def test_a_stream_that_is_dropped_half_way_frees_its_slot(make_client, kind, slots_taken):
    client = make_client(kind)
    stream = await finished(client.chat.completions.create(**STREAMED))
    await first_of(stream)
    del stream
    await until(lambda: slots_taken() == 0)


async def test_a_broken_stream_frees_its_slot_and_counts_as_a_failure(make_client, kind, azure, slots_taken):
    azure.inject(Fault.cut_mid_stream(after=2))
    stream = await finished(make_client(kind).chat.completions.create(**STREAMED))
    with pytest.raises(openai.APIConnectionError):
        await items_of(stream)
    assert slots_taken() == 0
    assert circuit()["failure_count"] == 1


async def test_a_stream_that_is_read_is_a_success(make_client, kind, azure):
    client = make_client(kind, max_retries=0)
    azure.inject(Fault.internal_error())
    with pytest.raises(openai.InternalServerError):
        await finished(client.chat.completions.create(**STREAMED))
    stream = await finished(client.chat.completions.create(**STREAMED))
    assert circuit()["failure_count"] == 1
    await items_of(stream)
    assert circuit()["failure_count"] == 0


async def test_a_reader_that_is_cancelled_frees_the_slot_and_counts_as_no_failure(make_client, azure, slots_taken):
    azure.inject(Fault.slow_stream(delay=30))
    stream = await make_client(timeout=60).chat.completions.create(**STREAMED)
    reader = asyncio.create_task(items_of(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert slots_taken() == 0
    assert circuit()["failure_count"] == 0


async def test_a_stream_that_is_refused_is_retried(make_client, kind, azure):
    azure.inject(Fault.rate_limit(retry_after=0), times=1)
    stream = await finished(make_client(kind).chat.completions.create(**STREAMED))
    assert len(await items_of(stream)) > 3
    assert azure.stats.requests == 2


# What a stream used


async def test_usage_of_the_last_chunk_settles_the_budget(make_client, kind):
    client = make_client(kind, budget_tokens=1_000)
    await items_of(await finished(client.chat.completions.create(**USED, max_tokens=500)))
    assert tokens_used() == 9


async def test_what_was_streamed_is_counted_where_no_usage_comes(make_client, kind):
    client = make_client(kind, budget_tokens=1_000)
    await items_of(await finished(client.chat.completions.create(**STREAMED, max_tokens=500)))
    assert 9 <= tokens_used() <= 20


async def test_what_was_streamed_is_counted_where_the_reader_leaves(make_client, kind):
    client = make_client(kind, budget_tokens=1_000)
    stream = await finished(client.chat.completions.create(**STREAMED, max_tokens=500))
    async with Entered(stream):
        step = (lambda: anext(stream)) if hasattr(stream, "__anext__") else (lambda: next(stream))
        for _ in range(3):
            await finished(step())
    assert 2 < tokens_used() < 30


async def test_the_usage_of_a_response_stream_settles_the_budget(make_client, kind):
    client = make_client(kind, budget_tokens=1_000)
    stream = await finished(client.responses.create(model="gpt-4o", input="Hello", stream=True))
    assert (await items_of(stream))[-1].type == "response.completed"
    assert tokens_used() == 9


async def test_a_stream_counts_for_the_agent_in_whose_block_it_was_opened(make_client):
    with agent("MathAgent"):
        stream = await make_client().chat.completions.create(**USED)
    await items_of(stream)
    assert get_all_resilience_stats()["agents"]["MathAgent"]["completion_tokens"] == 7


async def test_the_headers_of_a_stream_are_believed_when_it_is_opened(kind):
    with AzureOpenAISimulator(rpm=100, tpm=10_000) as azure:
        client = CLIENTS[kind](**connection(kind, azure), requests_per_minute=150, tokens_per_minute=20_000)
        stream = await finished(client.chat.completions.create(**STREAMED))
        assert get_all_resilience_stats()["rate_limiters"]["default"]["tightened_by_server"] == 2
        await items_of(stream)
        await finished(client.close())


# The SDK's helpers


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_stream_of_the_helpers_holds_its_slot_until_it_is_read(client, api, slots_taken):
    manager = (
        client.chat.completions.stream(**HELLO)
        if api == "chat"
        else client.responses.stream(model="gpt-4o", input="Hello")
    )
    async with Entered(manager) as stream:
        assert slots_taken() == 1
        await items_of(stream)
        assert slots_taken() == 0
        if api == "chat":
            final = (await finished(stream.get_final_completion())).choices[0].message.content
        else:
            final = (await finished(stream.get_final_response())).output_text
    assert final == GREETING


async def test_a_stream_of_the_helpers_that_is_left_frees_its_slot(client, slots_taken):
    async with Entered(client.chat.completions.stream(**HELLO)) as stream:
        await first_of(stream)
        assert slots_taken() == 1
    assert slots_taken() == 0


async def test_a_raw_stream_holds_its_slot_until_what_it_is_parsed_to_is_read(make_client, kind, slots_taken):
    client = make_client(kind, budget_tokens=1_000)
    raw = await finished(client.chat.completions.with_raw_response.create(**USED))
    assert slots_taken() == 1
    assert len(await items_of(raw.parse())) > 3
    assert slots_taken() == 0
    assert tokens_used() == 9


async def test_a_raw_stream_that_is_dropped_frees_its_slot(make_client, kind, slots_taken):
    client = make_client(kind)
    raw = await finished(client.chat.completions.with_raw_response.create(**STREAMED))
    del raw
    gc.collect()
    assert slots_taken() == 0


async def test_a_streaming_response_holds_its_slot_until_it_is_read(make_client, kind, slots_taken):
    client = make_client(kind, budget_tokens=1_000)
    async with Entered(client.chat.completions.with_streaming_response.create(**HELLO)) as response:
        assert slots_taken() == 1
        completion = await finished(response.parse())
        assert slots_taken() == 0
    assert completion.choices[0].message.content == GREETING
    assert tokens_used() == 9


async def test_the_lines_of_a_streaming_response_can_be_read(make_client, kind, slots_taken):
    client = make_client(kind, budget_tokens=1_000)
    async with Entered(client.chat.completions.with_streaming_response.create(**USED)) as response:
        assert (await items_of(response.iter_lines()))[-2:] == ["data: [DONE]", ""]
        assert slots_taken() == 0
    assert tokens_used() == 9


async def test_a_streaming_response_that_is_left_frees_its_slot(client, slots_taken):
    async with Entered(client.chat.completions.with_streaming_response.create(**HELLO)):
        assert slots_taken() == 1
    assert slots_taken() == 0


# A plain client in a function of the user's own


async def test_a_function_that_returns_a_stream_of_a_plain_client_holds_its_slot(azure, slots_taken):
    async with openai.AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:

        @resilient
        async def ask(messages):
            return await client.chat.completions.create(**USED)

        stream = await ask(HELLO["messages"])
        assert isinstance(stream, openai.AsyncStream)
        assert slots_taken() == 1
        await items_of(stream)
        assert slots_taken() == 0
        assert get_all_resilience_stats()["agents"]["default"]["completion_tokens"] == 7


def test_a_plain_function_that_returns_a_stream_of_a_plain_client_holds_its_slot(azure, slots_taken):
    with openai.AzureOpenAI(**azure.client_options(), max_retries=0) as client:

        @resilient
        def ask(messages):
            return client.chat.completions.create(**USED)

        with ask(HELLO["messages"]) as stream:
            assert slots_taken() == 1
            assert sys.getrefcount(stream) < 5
        assert slots_taken() == 0


async def test_a_decorated_function_may_return_a_stream_of_a_resilient_client(make_client, kind, slots_taken):
    client = make_client(kind)

    async def ask(messages):
        return await finished(client.chat.completions.create(**USED))

    with pytest.warns(StackOrderWarning, match="resilient-client"):
        ask = resilient("function", **UNPACED)(ask)

    stream = await ask(HELLO["messages"])
    gc.collect()
    assert (slots_taken(), slots_taken("function")) == (1, 1)
    assert len(await items_of(stream)) > 3
    assert (slots_taken(), slots_taken("function")) == (0, 0)
    stream = await ask(HELLO["messages"])
    del stream
    assert (slots_taken(), slots_taken("function")) == (0, 0)


async def test_a_connection_that_stays_open_after_the_answer_takes_nothing_back():
    events = b'data: {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 30}}\n\ndata: [DONE]\n\n'

    class LingeringBody(httpx2.AsyncByteStream):
        async def __aiter__(self):
            yield events
            await asyncio.Event().wait()

    transport = httpx2.MockTransport(
        lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=LingeringBody())
    )
    http_client = httpx2.AsyncClient(transport=transport)
    client = CLIENTS["AsyncOpenAI"](api_key="KEY", http_client=http_client, **UNPACED, budget_tokens=1_000)
    async with client:
        await items_of(await client.chat.completions.create(**USED))
    assert tokens_used() == 50
    assert circuit()["failure_count"] == 0

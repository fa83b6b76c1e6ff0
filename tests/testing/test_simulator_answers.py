"""What the openai SDK gets from the simulator when nothing goes wrong, or when the request itself is wrong."""

import json

import httpx2
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

from resilience_kit.testing.simulator import AzureOpenAISimulator, SimulatedAnswer

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}
GREETING = "A simulated answer to: Hello"
WEATHER = SimulatedAnswer(tool_calls=(("get_weather", {"city": "Bern", "days": 3}), ("get_time", {})))
BOTH = SimulatedAnswer(content="Let me look.", tool_calls=(("get_time", {}),))


def client_of(azure):
    return AzureOpenAI(**azure.client_options(), max_retries=0, timeout=5)


@pytest.fixture(scope="module")
def azure():
    with AzureOpenAISimulator() as simulator:
        yield simulator


@pytest.fixture
def client(azure):
    with client_of(azure) as client:
        yield client


def test_a_chat_completion_is_answered(client):
    completion = client.chat.completions.create(**HELLO)
    choice = completion.choices[0]
    assert (choice.message.content, choice.finish_reason, completion.model) == (GREETING, "stop", "gpt-4o")


def test_usage_adds_up(client):
    usage = client.chat.completions.create(**HELLO).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 7, 9)


def test_as_many_choices_come_as_were_asked_for(client):
    completion = client.chat.completions.create(**HELLO, n=3)
    assert [choice.message.content for choice in completion.choices] == [GREETING] * 3
    assert completion.usage.completion_tokens == 21


def test_a_streamed_chat_completion_is_the_same_text(client):
    chunks = list(client.chat.completions.create(**HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len(chunks) > 3


def test_a_stream_ends_with_its_usage_if_that_was_asked_for(client):
    chunks = list(client.chat.completions.create(**HELLO, stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 9)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_tool_calls_are_answered():
    with AzureOpenAISimulator(responder=lambda _: WEATHER) as azure, client_of(azure) as client:
        choice = client.chat.completions.create(**HELLO).choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert (tuple(calls), choice.finish_reason) == (WEATHER.tool_calls, "tool_calls")


def test_streamed_tool_calls_come_in_pieces_that_the_sdk_joins():
    with (
        AzureOpenAISimulator(responder=lambda _: WEATHER) as azure,
        client_of(azure) as client,
        client.chat.completions.stream(**HELLO) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert tuple(calls) == WEATHER.tool_calls


def test_a_response_is_answered(client):
    response = client.responses.create(model="gpt-4o", input="Hello", instructions="Be kind.")
    assert (response.output_text, response.status, response.usage.input_tokens) == (GREETING, "completed", 4)


def test_a_response_to_a_list_of_messages_is_answered(client):
    response = client.responses.create(model="gpt-4o", input=HELLO["messages"])
    assert response.output_text == GREETING


def test_a_streamed_response_is_the_same_text(client):
    with client.responses.stream(model="gpt-4o", input="Hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert (text, response.output_text, response.usage.total_tokens) == (GREETING, GREETING, 9)


def test_raw_events_of_a_response_are_numbered_from_its_creation_to_its_completion(client):
    events = list(client.responses.create(model="gpt-4o", input="Hello", stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("answer", [WEATHER, BOTH])
def test_function_calls_of_a_response_are_the_same_whole_and_streamed(answer):
    with AzureOpenAISimulator(responder=lambda _: answer) as azure, client_of(azure) as client:
        whole = client.responses.create(model="gpt-4o", input="Hello")
        with client.responses.stream(model="gpt-4o", input="Hello") as stream:
            streamed = stream.get_final_response()
    for response in (whole, streamed):
        calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
        assert (response.output_text, tuple(calls)) == (answer.content, answer.tool_calls)


def test_a_response_cut_by_its_maximum_is_incomplete():
    short = SimulatedAnswer("Well", finish_reason="length")
    with AzureOpenAISimulator(responder=lambda _: short) as azure, client_of(azure) as client:
        response = client.responses.create(model="gpt-4o", input="Hello")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_embeddings_are_the_same_for_the_same_text(client):
    first, second, other = client.embeddings.create(model="embedding", input=["a", "a", "b"]).data
    assert first.embedding == second.embedding != other.embedding


def test_embeddings_are_the_same_in_base64_and_in_numbers(client):
    in_base64 = client.embeddings.create(model="embedding", input="a").data[0].embedding
    in_numbers = client.embeddings.create(model="embedding", input="a", encoding_format="float").data[0].embedding
    assert in_base64 == pytest.approx(in_numbers)


def test_embeddings_have_length_1_and_the_wanted_dimensions(client):
    (data,) = client.embeddings.create(model="embedding", input="a", dimensions=5).data
    assert len(data.embedding) == 5
    assert sum(coordinate**2 for coordinate in data.embedding) == pytest.approx(1)


def test_the_plain_openai_client_is_answered(azure):
    with OpenAI(base_url=f"{azure.endpoint}/v1", api_key="any", max_retries=0) as client:
        assert client.chat.completions.create(**HELLO).choices[0].message.content == GREETING


async def test_the_async_clients_are_answered(azure):
    async with AsyncOpenAI(base_url=f"{azure.endpoint}/openai/v1/", api_key="any", max_retries=0) as client:
        assert (await client.responses.create(model="gpt-4o", input="Hello")).output_text == GREETING
    async with AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:
        assert (await client.chat.completions.create(**HELLO)).choices[0].message.content == GREETING


def test_a_responder_sees_the_request():
    seen = []

    def remember(request):
        seen.append(request)
        return "Noted."

    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    with AzureOpenAISimulator(responder=remember) as azure, client_of(azure) as client:
        client.chat.completions.create(**HELLO, tools=tools, user="me", extra_headers={"X-Agent": "math"})
    (request,) = seen
    assert (request.operation, request.model, request.deployment) == ("chat.completions", "gpt-4o", "gpt-4o")
    assert request.path == "/openai/deployments/gpt-4o/chat/completions"
    assert (list(request.messages), list(request.tools)) == (HELLO["messages"], tools)
    assert (request.body["user"], request.headers["x-agent"]) == ("me", "math")


async def test_a_responder_may_be_a_coroutine_function():
    async def answer(request):
        return SimulatedAnswer(f"{request.last_user_text}, you.", completion_tokens=42)

    async with (
        AzureOpenAISimulator(responder=answer) as azure,
        AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client,
    ):
        completion = await client.chat.completions.create(**HELLO)
    assert (completion.choices[0].message.content, completion.usage.completion_tokens) == ("Hello, you.", 42)


def test_a_conversation_without_a_user_has_no_last_user_text(client):
    completion = client.chat.completions.create(model="gpt-4o", messages=[{"role": "system", "content": "Be kind."}])
    assert completion.choices[0].message.content == "A simulated answer to: "


def post(azure, path="/v1/chat/completions", *, headers=None, **options):
    with httpx2.Client(base_url=azure.endpoint, headers=headers or {"api-key": "any"}) as client:
        return client.post(path, **options)


def test_a_request_without_a_key_is_unauthorized(azure):
    assert post(azure, headers={"accept": "*/*"}, json=HELLO).status_code == 401


def test_an_unknown_path_is_not_found(azure, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/nowhere", cast_to=object)
    assert caught.value.body == {"code": "404", "message": "Resource not found"}


def test_only_post_is_served(azure):
    with httpx2.Client(base_url=azure.endpoint, headers={"api-key": "any"}) as client:
        assert client.get("/v1/chat/completions").status_code == 404


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", b'{"messages": "Hello"}', b'{"messages": ["Hello"]}', b'{"tools": {"a": 1}}']
)
def test_a_body_that_cannot_be_read_is_a_bad_request(azure, content):
    response = post(azure, content=content)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")

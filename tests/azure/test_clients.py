"""The drop-in clients do what the SDK's do, and each metered request goes through the layers, once."""

import asyncio
import inspect
import json

import httpx2
import openai
import pytest
from azure_helpers import CLIENTS, GREETING, HELLO, UNPACED, connection, finished
from pydantic import BaseModel

import resilience_kit.azure
from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    TokenBudgetExceededError,
    agent,
    explain,
    get_all_resilience_stats,
)
from resilience_kit.azure import client_options
from resilience_kit.events import Retrying
from resilience_kit.testing import AzureOpenAISimulator, Fault, SimulatedAnswer, disabled, no_waiting


class Square(BaseModel):
    number: int


def limit(name="default"):
    return get_all_resilience_stats()["rate_limiters"][name]


def account(name="default"):
    return get_all_resilience_stats()["agents"][name]


async def greet(client, **options):
    return (await finished(client.chat.completions.create(**{**HELLO, **options}))).choices[0].message.content


def mocked(kind, answer, **options):
    """A client on a transport of the test's own, and the requests that it has sent."""
    sent = []

    def handle(request):
        sent.append(request)
        return answer(len(sent))

    http_client = (httpx2.AsyncClient if "Async" in kind else httpx2.Client)(transport=httpx2.MockTransport(handle))
    endpoint = (
        {"azure_endpoint": "https://example.test", "api_version": "2024-10-21"}
        if "Azure" in kind
        else {"base_url": "https://example.test/v1"}
    )
    client = CLIENTS[kind](**endpoint, http_client=http_client, **{"api_key": "KEY", **UNPACED, **options})
    return client, sent


# What comes back is what the SDK's own client returns


async def test_a_chat_completion_is_answered(client):
    completion = await finished(client.chat.completions.create(**HELLO))
    assert type(completion) is openai.types.chat.ChatCompletion
    assert completion.choices[0].message.content == GREETING
    assert completion._request_id.startswith("simulated-")


async def test_a_response_is_answered(client):
    response = await finished(client.responses.create(model="gpt-4o", input="Hello"))
    assert response.output_text == GREETING


async def test_embeddings_come_as_numbers(client):
    answer = await finished(client.embeddings.create(model="text-embedding-3-small", input=["one", "two"]))
    assert [type(each.embedding[0]) for each in answer.data] == [float, float]


async def test_a_chat_completion_is_parsed_into_a_model(kind):
    with AzureOpenAISimulator(responder=lambda _: '{"number": 4}') as azure:
        client = CLIENTS[kind](**connection(kind, azure), **UNPACED)
        completion = await finished(client.chat.completions.parse(**HELLO, response_format=Square))
        assert completion.choices[0].message.parsed == Square(number=4)
        response = await finished(client.responses.parse(model="gpt-4o", input="2 + 2?", text_format=Square))
        assert response.output_parsed == Square(number=4)
        await finished(client.close())


async def test_a_raw_response_has_headers_and_is_parsed_by_the_caller(client, slots_taken):
    raw = await finished(client.chat.completions.with_raw_response.create(**HELLO))
    assert raw.headers["x-request-id"] == "simulated-1"
    assert raw.parse().choices[0].message.content == GREETING
    assert slots_taken() == 0


async def test_a_raw_response_settles_the_usage_that_it_holds(client):
    await finished(client.chat.completions.with_raw_response.create(**HELLO))
    assert (account()["prompt_tokens"], account()["completion_tokens"]) == (2, 7)


async def test_an_http_response_can_be_asked_for(client):
    response = await finished(client.post("/chat/completions", cast_to=httpx2.Response, body=HELLO))
    assert response.json()["choices"][0]["message"]["content"] == GREETING


async def test_errors_are_those_of_the_sdk(client, azure):
    azure.inject(Fault.content_filter())
    with pytest.raises(openai.BadRequestError):
        await greet(client)


# What the layers do


async def test_each_metered_request_takes_its_quota(client):
    await greet(client, max_tokens=100)
    await finished(client.responses.create(model="gpt-4o", input="Hello", max_output_tokens=200))
    await finished(client.embeddings.create(model="text-embedding-3-small", input="Hello"))
    assert limit()["requests_in_window"] == 3
    assert 300 < limit()["tokens_admitted"] < 340


@pytest.mark.parametrize(
    "call", [lambda it: it.beta.responses.create, lambda it: it.responses.compact], ids=["beta", "compact"]
)
async def test_the_beta_of_responses_and_their_compaction_take_their_quota(kind, call):
    client, sent = mocked(kind, lambda _: httpx2.Response(200, json={}), max_retries=0)
    await finished(call(client)(model="gpt-4o", input="Hello"))
    assert len(sent) == limit()["requests_in_window"] == 1
    await finished(client.close())


async def test_a_429_is_retried_in_one_place(make_client, kind, azure, heard):
    azure.inject(Fault.rate_limit(retry_after=1), times=2)
    with no_waiting():
        assert await greet(make_client(kind, max_retries=2)) == GREETING
    assert azure.stats.requests == 3
    assert [event.seconds for event in heard if isinstance(event, Retrying)] == [1.0, 1.0]


async def test_retries_are_told_by_the_client_and_its_name(make_client, kind, azure):
    azure.inject(Fault.rate_limit(retry_after=0))
    await greet(make_client(kind, name="east"))
    assert list(get_all_resilience_stats()["retries"]) == [f"resilience_kit.azure.clients.Resilient{kind}('east')"]


async def test_no_attempt_is_made_beyond_those_of_the_kit(make_client, kind, azure):
    azure.inject(Fault.rate_limit(), times=10)
    with no_waiting(), pytest.raises(openai.RateLimitError):
        await greet(make_client(kind, max_retries=1))
    assert azure.stats.requests == 2


async def test_a_request_cannot_bring_the_retries_of_the_sdk_back(make_client, azure):
    azure.inject(Fault.internal_error(), times=10)
    client = make_client(max_retries=0)
    with pytest.raises(openai.InternalServerError):
        await client.post("/chat/completions", cast_to=object, body=HELLO, options={"max_retries": 5})
    assert azure.stats.requests == 1


async def test_the_circuit_opens_on_500s(make_client, kind, azure):
    azure.inject(Fault.internal_error(), times=3)
    client = make_client(kind, failure_threshold=3, max_retries=0)
    for _ in range(3):
        with pytest.raises(openai.InternalServerError):
            await greet(client)
    with pytest.raises(CircuitOpenError):
        await greet(client)
    assert azure.stats.requests == 3


async def test_a_fallback_is_given_the_request(make_client, azure):
    azure.inject(Fault.internal_error())
    client = make_client(failure_threshold=1, max_retries=0, fallback=lambda messages, model, **_: (model, messages))
    with pytest.raises(openai.InternalServerError):
        await greet(client)
    assert await client.chat.completions.create(**HELLO) == ("gpt-4o", HELLO["messages"])


async def test_tokens_can_be_counted_by_a_function_of_the_request(make_client, kind):
    await greet(make_client(kind, tokens=lambda messages, **_: 100 * len(messages)))
    assert limit()["tokens_in_window"] == 100


async def test_tokens_can_be_a_number(make_client):
    await greet(make_client(tokens=50))
    assert limit()["tokens_in_window"] == 50


async def test_a_prompt_above_the_maximum_is_not_sent(make_client, kind, azure):
    with pytest.raises(TokenBudgetExceededError):
        await greet(make_client(kind, agent="MathAgent", max_tokens=3))
    assert azure.stats.requests == 0


async def test_a_truncated_prompt_reaches_the_wire_and_the_callers_own_stays_whole(kind):
    client, sent = mocked(kind, lambda _: httpx2.Response(200, json={}), max_tokens=50, on_exceed="truncate")
    system, last = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    messages = [system, *({"role": "user", "content": "word " * 40} for _ in range(3)), last]
    whole = json.dumps(messages)
    await finished(client.chat.completions.create(model="gpt-4o", messages=messages, extra_body={"seed": 1}))
    assert json.loads(sent[0].content) == {"model": "gpt-4o", "messages": [system, last], "seed": 1}
    assert json.dumps(messages) == whole
    await finished(client.close())


async def test_a_prompt_in_extra_body_is_truncated_as_well():
    client, sent = mocked("AsyncOpenAI", lambda _: httpx2.Response(200, json={}), max_tokens=10, on_exceed="truncate")
    await client.responses.create(model="gpt-4o", extra_body={"input": "word " * 40})
    assert len(json.loads(sent[0].content)["input"]) < 60
    await client.close()


async def test_extra_body_counts_towards_the_quota(make_client):
    await greet(make_client(), extra_body={"max_completion_tokens": 500})
    assert limit()["tokens_in_window"] > 500


async def test_the_model_counts_where_a_deployment_says_nothing_and_the_deployment_is_asked():
    client, sent = mocked("AsyncAzureOpenAI", lambda _: httpx2.Response(200, json={}), model="gpt-4o-mini")
    await client.chat.completions.create(model="team-7", messages=HELLO["messages"])
    assert sent[0].url.path == "/openai/deployments/team-7/chat/completions"
    assert json.loads(sent[0].content)["model"] == "team-7"
    await client.close()


async def test_usage_settles_the_account_of_the_agent(make_client, kind):
    client = make_client(kind, agent="MathAgent", budget_tokens=1_000)
    await greet(client, max_tokens=500)
    assert get_all_resilience_stats()["token_budgets"]["MathAgent"]["tokens_used"] == 9
    assert account("MathAgent")["completion_tokens"] == 7


async def test_all_answers_that_are_asked_for_are_reserved(make_client, kind, azure):
    client = make_client(kind, budget_tokens=500)
    with pytest.raises(TokenBudgetExceededError):
        await greet(client, n=4, max_tokens=200)
    assert azure.stats.requests == 0


async def test_the_agent_of_the_block_is_accounted(make_client, kind):
    client = make_client(kind, agent="MathAgent")
    with agent("ADXAgent"):
        await greet(client)
    await greet(client)
    assert (account("ADXAgent")["calls"], account("MathAgent")["calls"]) == (1, 1)


async def test_the_headers_of_a_success_are_believed(kind):
    with AzureOpenAISimulator(rpm=100, tpm=10_000) as azure:
        client = CLIENTS[kind](**connection(kind, azure), requests_per_minute=150, tokens_per_minute=20_000)
        await greet(client)
        await finished(client.close())
    assert limit()["requests_in_window"] == 1
    assert limit()["tightened_by_server"] == 2, "150 requests to 100, and 20,000 tokens to 10,000"


async def test_disabled_is_the_client_without_layers(client):
    with disabled():
        assert await greet(client) == GREETING
    assert get_all_resilience_stats()["rate_limiters"] == {}


async def test_an_answer_that_cannot_be_parsed_is_paid_for(make_client, kind):
    cut_off = SimulatedAnswer('{"num', finish_reason="length", completion_tokens=100)
    with AzureOpenAISimulator(responder=lambda _: cut_off) as azure:
        client = CLIENTS[kind](**connection(kind, azure), **UNPACED, budget_tokens=1_000)
        with pytest.raises(openai.LengthFinishReasonError):
            await finished(client.chat.completions.parse(**HELLO, response_format=Square))
        assert get_all_resilience_stats()["token_budgets"]["default"]["tokens_used"] == 102
        await finished(client.close())


async def test_tool_calls_come_through(make_client):
    weather = SimulatedAnswer(tool_calls=(("get_weather", {"city": "Bern"}),))
    with AzureOpenAISimulator(responder=lambda _: weather) as azure:
        async with CLIENTS["AsyncAzureOpenAI"](**azure.client_options(), **UNPACED) as client:
            completion = await client.chat.completions.create(**HELLO)
    assert completion.choices[0].message.tool_calls[0].function.name == "get_weather"


# Names are shared


async def test_clients_of_one_name_share_the_quota(make_client):
    await greet(make_client("AsyncAzureOpenAI"))
    await greet(make_client("OpenAI"))
    assert limit()["requests_in_window"] == 2


async def test_clients_of_two_names_do_not_share_the_quota(make_client):
    await greet(make_client(name="east"))
    await greet(make_client(name="west"))
    assert (limit("east")["requests_in_window"], limit("west")["requests_in_window"]) == (1, 1)


async def test_two_configurations_of_one_name_are_an_error(make_client):
    make_client(requests_per_minute=100)
    with pytest.raises(ConfigurationError, match="two configurations"):
        make_client(requests_per_minute=200)


async def test_concurrent_calls_keep_to_the_slots(kind):
    with AzureOpenAISimulator(latency=0.01) as azure:
        client = CLIENTS[kind](**connection(kind, azure), **UNPACED, max_concurrent=2)
        if "Async" in kind:
            await asyncio.gather(*(greet(client) for _ in range(6)))
        else:
            await asyncio.gather(*(asyncio.to_thread(client.chat.completions.create, **HELLO) for _ in range(6)))
        assert azure.stats.max_in_flight == 2
        await finished(client.close())


# Copies


@pytest.mark.parametrize("way", ["copy", "with_options"])
async def test_a_copy_is_protected_and_shares_state(client, way, azure):
    copied = getattr(client, way)(timeout=3)
    assert type(copied) is type(client)
    assert copied.timeout == 3
    await greet(copied)
    await greet(client)
    assert limit()["requests_in_window"] == 2


async def test_a_copy_of_a_copy_keeps_what_it_was_not_given(make_client, kind, azure):
    client = (
        make_client(kind, agent="MathAgent", max_retries=1).copy(timeout=3).with_options(default_headers={"a": "b"})
    )
    azure.inject(Fault.internal_error(), times=2)
    with no_waiting(), pytest.raises(openai.InternalServerError):
        await greet(client)
    assert azure.stats.requests == 2
    await greet(client)
    assert account("MathAgent")["calls"] == 1


async def test_a_copy_can_have_other_parameters_of_the_kit(make_client, kind, azure):
    client = make_client(kind, agent="MathAgent", max_retries=5)
    azure.inject(Fault.internal_error())
    with pytest.raises(openai.InternalServerError):
        await greet(client.with_options(max_retries=0))
    await greet(client.with_options(agent="ADXAgent", name="other"))
    assert account("ADXAgent")["calls"] == 1
    assert limit("other")["requests_in_window"] == 1


async def test_a_copy_keeps_to_the_retry_budget_that_its_original_has_used(make_client, kind, azure):
    client = make_client(kind, max_retries=10, initial_backoff=0, failure_threshold=100)
    azure.inject(Fault.internal_error(), times=100)
    with no_waiting():
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                await greet(client.with_options(timeout=3))
    assert azure.stats.requests == 3 + 10


async def test_a_copy_of_an_azure_client_keeps_its_deployment():
    client, sent = mocked("AsyncAzureOpenAI", lambda _: httpx2.Response(200, json={}), azure_deployment="team-7")
    await client.with_options(timeout=3).chat.completions.create(**HELLO)
    assert sent[0].url.path == "/openai/deployments/team-7/chat/completions"
    await client.close()


# What is not metered


async def test_other_requests_pass_unmetered_with_as_many_retries_as_max_retries_says(kind):
    client, sent = mocked(kind, lambda _: httpx2.Response(503, headers={"retry-after-ms": "1"}), max_retries=1)
    with pytest.raises(openai.InternalServerError):
        await finished(client.models.retrieve("gpt-4o"))
    assert len(sent) == 2
    assert get_all_resilience_stats()["rate_limiters"] == {}
    await finished(client.close())


async def test_other_requests_have_the_sdks_own_retries_by_default(kind):
    client, sent = mocked(kind, lambda _: httpx2.Response(503, headers={"retry-after-ms": "1"}))
    with pytest.raises(openai.InternalServerError):
        await finished(client.batches.retrieve("batch"))
    assert len(sent) == 1 + openai.DEFAULT_MAX_RETRIES
    await finished(client.close())


async def test_other_requests_may_say_their_own_retries():
    client, sent = mocked("AsyncOpenAI", lambda _: httpx2.Response(503))
    with pytest.raises(openai.InternalServerError):
        await client.get("/models", cast_to=object, options={"max_retries": 0})
    assert len(sent) == 1
    await client.close()


async def test_a_list_at_a_metered_path_is_unmetered():
    client, sent = mocked("AsyncOpenAI", lambda _: httpx2.Response(200, json={"data": []}))
    assert (await client.chat.completions.list()).data == []
    assert (sent[0].method, sent[0].url.path) == ("GET", "/v1/chat/completions")
    assert get_all_resilience_stats()["rate_limiters"] == {}
    await client.close()


async def test_a_stored_response_is_read_unmetered():
    client, _ = mocked("AsyncOpenAI", lambda _: httpx2.Response(200, json={"id": "resp"}))
    assert (await client.responses.retrieve("resp")).id == "resp"
    assert get_all_resilience_stats()["rate_limiters"] == {}
    await client.close()


# The SDK's own ways


async def test_a_client_of_httpx_of_the_users_own_is_used_and_its_hooks_run(azure):
    seen = []

    async def note(response):
        seen.append(response.status_code)

    async with httpx2.AsyncClient(event_hooks={"response": [note]}) as http_client:
        client = CLIENTS["AsyncAzureOpenAI"](**azure.client_options(), http_client=http_client, **UNPACED)
        assert await greet(client) == GREETING
    assert seen == [200]


async def test_cancellation_frees_the_slot_and_counts_as_no_failure(azure, slots_taken):
    azure.inject(Fault.time_out())
    async with CLIENTS["AsyncAzureOpenAI"](**azure.client_options(), **UNPACED) as client:
        call = asyncio.create_task(greet(client))
        while not azure.stats.requests:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.001)
        assert slots_taken() == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert slots_taken() == 0
        assert get_all_resilience_stats()["circuit_breakers"]["default"]["failure_count"] == 0


async def test_a_closed_client_sends_nothing(client, azure):
    await finished(client.close())
    assert client.is_closed()
    with pytest.raises((RuntimeError, openai.APIConnectionError)):
        await greet(client.with_options(max_retries=0))
    assert azure.stats.requests == 0


async def test_a_token_provider_is_asked_for_each_request():
    tokens = iter(["first", "second"])
    client, sent = mocked(
        "AsyncAzureOpenAI",
        lambda _: httpx2.Response(200, json={}),
        api_key=None,
        azure_ad_token_provider=lambda: next(tokens),
    )
    await client.chat.completions.create(**HELLO)
    await client.chat.completions.create(**HELLO)
    assert [request.headers["authorization"] for request in sent] == ["Bearer first", "Bearer second"]
    await client.close()


def test_a_wrong_parameter_fails_where_the_client_is_made():
    with pytest.raises(ConfigurationError, match="requests_per_minute"):
        CLIENTS["OpenAI"](api_key="KEY", requests_per_minute=0)


def test_a_misspelt_argument_fails_where_the_client_is_made():
    with pytest.raises(TypeError, match="requests_per_minuet"):
        CLIENTS["OpenAI"](api_key="KEY", requests_per_minuet=1)


@pytest.mark.parametrize("kind", CLIENTS)
def test_type_checkers_know_all_arguments_of_the_sdk(kind):
    declared = getattr(client_options, f"{kind}Options").__annotations__
    taken = inspect.signature(getattr(openai, kind).__init__).parameters
    assert {name for name in taken if not name.startswith("_")} - {"self"} <= declared.keys()


# The package


def test_the_package_loads_its_names_lazily_and_tells_them():
    assert set(resilience_kit.azure.__all__) <= set(dir(resilience_kit.azure))
    assert resilience_kit.azure.get_all_resilience_stats is get_all_resilience_stats
    with pytest.raises(AttributeError, match="no attribute 'ResilientClient'"):
        resilience_kit.azure.ResilientClient  # noqa: B018 - asking is what raises


async def test_explain_tells_the_layers_of_a_clients_method(make_client):
    report = explain(make_client("AsyncAzureOpenAI", max_retries=7).chat.completions.create)

    layers = ["token_budget", "retry_on_429", "circuit_protected", "rate_limited"]
    assert [layer.kind for layer in report.layers] == layers
    assert report.layers[1].parameters["max_retries"].value == 7


async def test_a_client_has_the_retry_budget_of_resilient_unless_it_is_told_otherwise(make_client, kind):
    def budget(**options):
        layers = explain(make_client(kind, **options).chat.completions.create).layers
        return str(layers[1].parameters["retry_budget"])

    assert budget() == "0.2 (default)"
    assert budget(retry_budget=0.5) == "0.5 (argument)"
    assert budget(retry_budget=None) == "None (argument)"

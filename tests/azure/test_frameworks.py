"""Frameworks that take an openai client work on the kit's: each call is counted once, and retried in one place.

Seen with pydantic-ai 2.68, openai-agents 0.24 and langchain-openai 1.7; those that are not installed are left out.
"""

import pytest
from azure_helpers import GREETING

from resilience_kit import get_all_resilience_stats
from resilience_kit.testing import Fault


@pytest.fixture
def one_call(azure, slots_taken):
    """Let the next request be refused once, and check what came of it: two attempts, one call, and no slot taken."""
    azure.inject(Fault.rate_limit(retry_after=0))
    yield
    stats = get_all_resilience_stats()
    assert azure.stats.requests == stats["rate_limiters"]["default"]["calls_admitted"] == 2
    assert [counters["retries"] for counters in stats["retries"].values()] == [1]
    assert stats["agents"]["default"]["calls"] == 1
    assert slots_taken() == 0


@pytest.fixture(params=["chat", "responses"])
def api(request):
    return request.param


@pytest.fixture
def pydantic_agent(make_client, api):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    model = models.OpenAIChatModel if api == "chat" else models.OpenAIResponsesModel
    return pydantic_ai.Agent(model("gpt-4o", provider=providers.OpenAIProvider(openai_client=make_client())))


async def test_pydantic_ai_runs(pydantic_agent, one_call):
    assert (await pydantic_agent.run("Hello")).output == GREETING


async def test_pydantic_ai_streams(pydantic_agent, one_call):
    async with pydantic_agent.run_stream("Hello") as result:
        assert "".join([text async for text in result.stream_text(delta=True)]) == GREETING


async def test_pydantic_ai_may_leave_its_stream(pydantic_agent, one_call):
    async with pydantic_agent.run_stream("Hello") as result:
        await anext(aiter(result.stream_text(delta=True)))


@pytest.fixture
def openai_agents(make_client, api):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    agents.set_default_openai_client(make_client(), use_for_tracing=False)
    agents.set_default_openai_api("chat_completions" if api == "chat" else "responses")
    return agents


async def test_openai_agents_run(openai_agents, one_call):
    result = await openai_agents.Runner.run(openai_agents.Agent("Writer", model="gpt-4o"), "Hello")
    assert result.final_output == GREETING


async def test_openai_agents_stream(openai_agents, one_call):
    result = openai_agents.Runner.run_streamed(openai_agents.Agent("Writer", model="gpt-4o"), "Hello")
    assert len([event async for event in result.stream_events()]) > 3
    assert result.final_output == GREETING


@pytest.fixture
def langchain_model(make_client, api):
    langchain_openai = pytest.importorskip("langchain_openai")
    client = make_client()
    return langchain_openai.ChatOpenAI(
        model="gpt-4o",
        api_key="simulated",
        use_responses_api=api == "responses",
        async_client=client.chat.completions,
        root_async_client=client,
    )


async def test_langchain_invokes(langchain_model, one_call):
    assert (await langchain_model.ainvoke("Hello")).text == GREETING


async def test_langchain_streams(langchain_model, one_call):
    assert "".join([chunk.text async for chunk in langchain_model.astream("Hello")]) == GREETING

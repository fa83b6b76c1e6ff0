"""Semantic Kernel's chat service on the resilient client: one quota for all services, and an account an agent."""

import sys
from contextlib import AsyncExitStack

import pytest
from azure_helpers import GREETING, UNPACED

from resilience_kit import ConfigurationError, agent, explain, get_all_resilience_stats
from resilience_kit.azure import ResilientAsyncAzureOpenAI, create_resilient_azure_service
from resilience_kit.testing import Fault, no_waiting

# semantic-kernel 1.45 calls what pydantic 2.11 deprecates, while it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")


def connection(azure):
    options = azure.client_options()
    return {"endpoint": options["azure_endpoint"], "api_key": options["api_key"], "deployment_name": "gpt-4o"}


@pytest.fixture
async def make_service(azure):
    """Make a service on the simulator; its client is closed at the end of the test."""
    async with AsyncExitStack() as stack:

        def make(service_id="math", agent_name="MathAgent", **options):
            given = {**connection(azure), **UNPACED, **options}
            service = create_resilient_azure_service(service_id, agent_name=agent_name, **given)
            stack.push_async_callback(service.client.close)
            return service

        yield make


async def ask(service):
    from semantic_kernel.connectors.ai.open_ai import AzureChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory

    history = ChatHistory()
    history.add_user_message("Hello")
    return str(await service.get_chat_message_content(history, AzureChatPromptExecutionSettings()))


async def test_a_service_answers_through_a_kernel(make_service):
    from semantic_kernel import Kernel
    from semantic_kernel.connectors.ai.open_ai import AzureChatCompletion

    kernel = Kernel()
    kernel.add_service(make_service())
    service = kernel.get_service("math")
    assert isinstance(service, AzureChatCompletion)
    assert isinstance(service.client, ResilientAsyncAzureOpenAI)
    assert GREETING in str(await kernel.invoke_prompt("Hello"))


async def test_services_share_one_quota_and_have_accounts_of_their_own(make_service):
    await ask(make_service("math", "MathAgent"))
    await ask(make_service("adx", "ADXAgent"))
    statistics = get_all_resilience_stats()
    assert statistics["rate_limiters"]["default"]["requests_in_window"] == 2
    assert {name: account["calls"] for name, account in statistics["agents"].items()} == {"MathAgent": 1, "ADXAgent": 1}


async def test_services_of_two_names_have_quotas_of_their_own(make_service):
    await ask(make_service("math", name="east"))
    await ask(make_service("adx", name="west"))
    assert get_all_resilience_stats()["rate_limiters"].keys() == {"east", "west"}


async def test_a_block_decides_whose_call_it_is(make_service):
    with agent("CoordinatorAgent"):
        await ask(make_service())
    assert get_all_resilience_stats()["agents"].keys() == {"CoordinatorAgent"}


async def test_a_429_is_waited_out(make_service, azure):
    azure.inject(Fault.rate_limit(retry_after=1), times=2)
    with no_waiting():
        assert await ask(make_service()) == GREETING
    assert azure.stats.requests == 3


async def test_a_service_has_the_retry_budget_of_resilient(make_service):
    layers = explain(make_service().client.chat.completions.create).layers
    assert str(layers[1].parameters["retry_budget"]) == "0.2 (default)"


async def test_a_stream_of_a_service_holds_its_slot_until_it_is_read(make_service, slots_taken):
    from semantic_kernel.connectors.ai.open_ai import AzureChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory

    history = ChatHistory()
    history.add_user_message("Hello")
    taken, texts = [], []
    async for message in make_service().get_streaming_chat_message_content(history, AzureChatPromptExecutionSettings()):
        taken.append(slots_taken())
        texts.append(str(message))
    assert "".join(texts) == GREETING
    assert taken[0] == 1
    assert slots_taken() == 0


@pytest.mark.parametrize("credential", ["ad_token", "ad_token_provider"])
async def test_a_token_of_entra_id_takes_the_place_of_the_key(make_service, credential):
    given = {"ad_token": "token", "ad_token_provider": lambda: "token"}
    assert await ask(make_service(api_key=None, **{credential: given[credential]})) == GREETING


async def test_a_key_and_a_token_exclude_each_other(azure):
    with pytest.raises(ConfigurationError, match="leave out api_key, or ad_token"):
        create_resilient_azure_service("math", **connection(azure), ad_token="token")  # noqa: S106 - no secret


def test_a_missing_extra_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "semantic_kernel.connectors.ai.open_ai", None)
    with pytest.raises(ImportError, match=r"pip install 'resilience-kit\[semantic-kernel\]'"):
        create_resilient_azure_service("math", "KEY", "https://example.test", "gpt-4o", "MathAgent")

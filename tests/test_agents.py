"""`with agent(...)`: whose account a call goes to, under which maximum and with which priority."""

import asyncio
import contextvars

import pytest

from resilience_kit import (
    ConfigurationError,
    TokenBudgetExceededError,
    agent,
    get_all_resilience_stats,
    rate_limited,
    token_budget,
)
from resilience_kit.agents import current_agent

pytestmark = pytest.mark.looptime

ANSWER = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}


@token_budget
async def ask(messages="?"):
    await asyncio.sleep(0)
    return ANSWER


def calls():
    return {name: counters["calls"] for name, counters in get_all_resilience_stats()["agents"].items()}


async def test_calls_inside_are_accounted_to_the_agent():
    with agent("MathAgent"):
        await ask()
    await ask()

    assert calls() == {"MathAgent": 1, "default": 1}


async def test_the_innermost_agent_counts_and_the_outer_one_is_back_after_it():
    with agent("Coordinator"):
        with agent("MathAgent"):
            await ask()
        await ask()

    assert calls() == {"MathAgent": 1, "Coordinator": 1}


async def test_concurrent_tasks_keep_to_their_own_agents():
    async def work(name):
        with agent(name):
            for _ in range(3):
                await ask()

    await asyncio.gather(work("MathAgent"), work("ADXAgent"))

    assert calls() == {"MathAgent": 3, "ADXAgent": 3}


async def test_a_task_that_is_started_inside_belongs_to_the_agent():
    with agent("MathAgent"):
        task = asyncio.create_task(ask())
    await task

    assert calls() == {"MathAgent": 1}


async def test_an_async_generator_that_is_left_inside_the_block_ends_without_an_error():
    async def write():
        with agent("Writer"):
            yield "It"
            yield "is"

    failed = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    words = write()
    assert await anext(words) == "It"
    await asyncio.create_task(words.aclose())
    assert failed == []


def test_a_generator_may_be_run_in_a_context_of_its_own_for_each_item():
    def write():
        with agent("Writer"):
            yield "It"
            yield "is"

    words = write()
    assert [contextvars.copy_context().run(next, words, None) for _ in range(3)] == ["It", "is", None]


def test_an_agent_cannot_be_put_on_a_function_which_would_run_outside_of_the_block():
    with pytest.raises(TypeError, match="not callable"):

        @agent("MathAgent")
        async def work():
            await ask()


async def test_a_function_with_an_agent_of_its_own_keeps_it():
    own = token_budget("MathAgent")(ask.__wrapped__)
    with agent("Coordinator"):
        await own()

    assert calls() == {"MathAgent": 1}


async def test_a_shared_function_takes_the_agent_of_the_block_and_keeps_its_budget():
    shared = token_budget("service", budget_tokens=1_000, shared=True)(ask.__wrapped__)
    with agent("MathAgent"):
        await shared()

    assert calls() == {"MathAgent": 1}
    assert get_all_resilience_stats()["token_budgets"]["service"]["tokens_used"] == 7


async def test_the_agents_own_maximum_holds(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "5")
    with agent("WriterAgent"), pytest.raises(TokenBudgetExceededError, match="WriterAgent"):
        await ask("one two three four five six seven")

    assert await ask("one two three four five six seven") == ANSWER


async def test_the_agents_priority_takes_the_place_of_the_decorators():
    served = []

    @rate_limited("chat", requests_per_minute=6, max_concurrent=10, min_interval=0, priority=1)
    async def call(label):
        served.append(label)

    async def urgently():
        with agent("Urgent", priority=0):
            await call("urgent")

    await asyncio.gather(call("first"), call("background"), urgently())

    assert served == ["first", "urgent", "background"]


async def test_a_block_that_is_entered_again_elsewhere_has_the_context_of_there():
    block = agent("MathAgent")
    with agent("Coordinator", context="nightly-report"), block as inside:
        pass
    with block as outside:
        pass

    assert (inside.context, outside.context) == ("nightly-report", None)


async def test_an_agent_without_a_priority_leaves_the_decorators():
    with agent("MathAgent") as entered:
        assert entered.priority is None
    assert current_agent() is None


@pytest.mark.parametrize("name", ["", None, 5], ids=repr)
def test_an_agent_has_a_name(name):
    with pytest.raises(ConfigurationError, match="name"), agent(name):
        pass


def test_a_priority_is_a_number():
    with pytest.raises(ConfigurationError, match="priority"), agent("MathAgent", priority="high"):
        pass

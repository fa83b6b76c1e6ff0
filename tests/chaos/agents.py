"""Scenarios of the multi-agent example: its agents ask the simulator, while everything goes wrong."""

import asyncio
import functools
from contextlib import ExitStack
from contextvars import ContextVar

from openai import AsyncAzureOpenAI

from examples.multi_agent.system import MultiAgentSystem
from examples.multi_agent.telemetry import open_telemetry
from resilience_kit import ResilienceSettings, configure

_open = ExitStack()
_asking: ContextVar[int] = ContextVar("asking")


@functools.cache
def telemetry():
    """The sample table, which a process opens once."""
    return _open.enter_context(open_telemetry({}))


def question_of(order):
    """One for the agent that computes, one for the agent that queries, or one for both."""
    product = f"What is {order.number + 2} times 17?"
    query = "What is the error rate by region?"
    return (product, query, f"{product} {query}")[order.number % 3]


def is_answer(order, text):
    """Whether a text may be the answer to an order's question: what was filtered is missing, and nothing is wrong."""
    sums = [sentence for sentence in text.split(".") if " = " in sentence]
    return all(sentence.split(" = ")[1].startswith(str((order.number + 2) * 17)) for sentence in sums)


def settings_of(scenario):
    """What the example takes from its environment."""
    given = scenario.resilience
    return ResilienceSettings(
        max_retries=given.max_retries,
        initial_backoff_seconds=given.backoff,
        max_backoff_seconds=4 * given.backoff,
        circuit_breaker_failure_threshold=given.failure_threshold,
        circuit_breaker_recovery_timeout=given.recovery_timeout,
        circuit_breaker_success_threshold=given.success_threshold,
    )


def system_of(world, azure):
    """The example's agents, whose calls of the model are witnessed."""
    configure(settings_of(world.scenario))
    client = AsyncAzureOpenAI(**azure.client_options(), timeout=world.scenario.client_timeout, max_retries=0)
    create = client.chat.completions.create

    async def witnessed(**request):
        with world.witness.function(_asking.get()):
            completion = await create(**request)
            world.witness.use("agents", completion.usage.total_tokens)
            return completion

    client.chat.completions.create = witnessed
    limits = world.scenario.limits
    return MultiAgentSystem(
        client,
        "gpt-4o",
        telemetry(),
        limits={
            "requests_per_minute": limits.requests,
            "tokens_per_minute": limits.tokens,
            "period": limits.period,
            "max_concurrent": limits.max_concurrent,
            "min_interval": limits.min_interval,
            "max_wait": limits.max_wait,
            "adaptive": limits.adaptive,
        },
    )


async def ask(order, system):
    """Ask the agents an order's question."""
    _asking.set(order.number)
    answer = await system.ask(question_of(order))
    return answer.text


async def ask_all(world, azure, drive, end_stragglers, patience):
    """Ask all questions, as each order says."""
    async with system_of(world, azure) as system:
        tasks = [asyncio.create_task(drive(world, order, system, ask)) for order in world.orders]
        await asyncio.wait(tasks, timeout=patience)
        await end_stragglers(world)

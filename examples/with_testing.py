"""Tests of your own program (extra `testing`): a simulated Azure OpenAI, a real HTTP server with quotas and faults.

pip install 'resilience-kit[testing]'
python examples/with_testing.py
"""

import asyncio

from resilience_kit.azure import ResilientAsyncAzureOpenAI
from resilience_kit.testing import AzureOpenAISimulator, Fault, isolated


async def program(client: ResilientAsyncAzureOpenAI, question: str) -> str | None:
    """Stand here for the program that is tested."""
    completion = await client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": question}])
    return completion.choices[0].message.content


async def test_an_answer_comes_although_the_service_refuses_and_fails() -> None:
    """Let the first two requests fail: the kit asks again, and no sooner than it was told."""
    faults = [Fault.rate_limit(retry_after=0.2), Fault.internal_error()]
    with isolated(), AzureOpenAISimulator(rpm=600, faults=faults) as azure:
        async with ResilientAsyncAzureOpenAI(initial_backoff=0.1, **azure.client_options()) as client:
            answer = await program(client, "Will it rain?")

    assert answer == "A simulated answer to: Will it rain?"  # noqa: S101 - a test asserts
    assert (azure.stats.requests, azure.stats.faults) == (3, 2)  # noqa: S101 - a test asserts
    print(f"{azure.stats.requests} requests, {azure.stats.faults} of which failed; the answer was: {answer}")


if __name__ == "__main__":
    asyncio.run(test_an_answer_comes_although_the_service_refuses_and_fails())

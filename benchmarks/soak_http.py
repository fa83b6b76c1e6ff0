"""The soak's calls over real HTTP: a client of the kit's against the simulator, which fails in one request of 100."""

import itertools
from asyncio import gather
from collections.abc import Iterator
from typing import Any

import httpx2
import openai

from benchmarks.soak_traffic import FAULT_EVERY, QUESTIONS, STACK, Books
from resilience_kit import ResilienceError
from resilience_kit.azure import ResilientAsyncAzureOpenAI
from resilience_kit.testing import AzureOpenAISimulator
from resilience_kit.testing.faults import Fault

NAME, AGENT = "soak HTTP", "SoakHTTP"
_FUNCTION = f"{ResilientAsyncAzureOpenAI.__module__}.{ResilientAsyncAzureOpenAI.__qualname__}({NAME!r})"
# Seconds. Where a request without a fault takes longer, it is sent again, and the server may not have seen it before.
_TIMEOUT = 2.0
_CALLERS = 10
_STREAM_EVERY = 5
_OPTIONS: Any = {**STACK, "timeout": _TIMEOUT, "budget_tokens": 10**12}
_FAULTS = (
    Fault.rate_limit(retry_after=0.001),
    Fault.internal_error(),
    Fault.time_out(),
    Fault.connection_reset(),
    Fault.insufficient_quota(),
)


def simulator() -> AzureOpenAISimulator:
    """Return a server that is not yet started."""
    script = itertools.chain.from_iterable(
        (fault, *itertools.repeat(None, FAULT_EVERY - 1)) for fault in itertools.cycle(_FAULTS)
    )
    return AzureOpenAISimulator(faults=script, headers="remaining")


async def call_over_http(azure: AzureOpenAISimulator, numbers: Iterator[int]) -> Books:
    """Ask from many tasks; each fifth answer is streamed. What the client sent and was told is in the books too."""
    books = Books()

    async def count_request(request: httpx2.Request) -> None:
        books["rate_limiters", NAME, "calls_admitted"] += 1

    async def count_response(response: httpx2.Response) -> None:
        # the other 429 says that no wait helps
        is_rate_limit = response.status_code == httpx2.codes.TOO_MANY_REQUESTS and "retry-after-ms" in response.headers
        books["rate_limiters", NAME, "calls_rate_limited"] += is_rate_limit

    hooks: Any = {"request": [count_request], "response": [count_response]}

    async def call(client: ResilientAsyncAzureOpenAI) -> None:
        for number in numbers:
            books["program", "", "calls"] += 1
            try:
                used = await _ask(client, number)
            except (openai.OpenAIError, ResilienceError):
                books["program", "", "failures"] += 1
                continue
            books["program", "", "successes"] += 1
            books["agents", AGENT, "calls"] += 1
            books["agents", AGENT, "prompt_tokens"] += used.prompt_tokens
            books["agents", AGENT, "completion_tokens"] += used.completion_tokens
            books["token_budgets", AGENT, "tokens_used"] += used.total_tokens

    http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
    async with ResilientAsyncAzureOpenAI(
        name=NAME, agent=AGENT, http_client=http, **_OPTIONS, **azure.client_options()
    ) as client:
        await gather(*(call(client) for _ in range(_CALLERS)))
    # else it keeps a record of each request
    azure.reset()
    sent = books["rate_limiters", NAME, "calls_admitted"]
    books["retries", _FUNCTION, "retries"] = sent - books["program", "", "calls"]
    return books


async def _ask(client: ResilientAsyncAzureOpenAI, number: int) -> Any:
    request: Any = {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": f"Question {number % QUESTIONS}: how many were sold?"}],
        "max_tokens": 20,
    }
    if number % _STREAM_EVERY:
        return (await client.chat.completions.create(**request)).usage
    used = None
    async for chunk in await client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        used = chunk.usage or used
    return used

"""Who takes part in the quota benchmark: the kit and its peers, each as its own documentation recommends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pybreaker
import stamina
import tenacity
from aiolimiter import AsyncLimiter
from openai import AsyncAzureOpenAI, RateLimitError

from benchmarks.agents import AGENTS, MODEL, Ask, Limits, Order, asking, kit
from resilience_kit.testing import AzureOpenAISimulator

# Enough for all windows of the benchmark: who loses answers does so for other reasons.
_ATTEMPTS = 20

Entrant = Callable[[AzureOpenAISimulator, Limits], AbstractAsyncContextManager[Ask]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: Short, for the picture.
        parameters: What it was given.
        enter: Makes its clients, and what asks through them.
    """

    name: str
    parameters: str
    enter: Entrant


def contestants() -> list[Contestant]:
    """Return those that can take part here."""
    entered = [
        Contestant("openai SDK, default", "`max_retries=2`", _sdk(max_retries=2)),
        Contestant("openai SDK, 20 retries", "`max_retries=20`", _sdk(max_retries=_ATTEMPTS)),
        Contestant(
            "tenacity",
            f"`wait_random_exponential(min=1, max=60)` as OpenAI's guide has it, {_ATTEMPTS} attempts",
            _tenacity,
        ),
        Contestant("stamina", f"a backoff hook that obeys `retry-after`, {_ATTEMPTS} attempts, no timeout", _stamina),
        Contestant(
            "naive composition",
            "tenacity as above, pybreaker, a semaphore, two `AsyncLimiter`s at the quota",
            _naive(),
        ),
        Contestant(
            "naive, 429s excluded",
            "the same, with `CircuitBreaker(exclude=[RateLimitError])`",
            _naive(exclude=[RateLimitError]),
        ),
    ]
    if find_spec("langchain_openai") is not None:
        entered.append(
            Contestant("LangChain", "`InMemoryRateLimiter` at the quota of requests, `max_retries=2`", _langchain)
        )
    limits = "both quotas, `max_concurrent=16`, `min_interval=0`, else its defaults"
    return [*entered, Contestant("resilience_kit", f"`ResilientAsyncAzureOpenAI`: {limits}", kit)]


def _sdk(*, max_retries: int) -> Entrant:
    @asynccontextmanager
    async def enter(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
        async with AsyncAzureOpenAI(**azure.client_options(), max_retries=max_retries) as client:
            yield asking(client)

    return enter


@asynccontextmanager
async def _tenacity(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
    async with AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:
        yield _retrying(asking(client))


@asynccontextmanager
async def _stamina(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
    def as_told(error: Exception) -> float | bool:
        if not isinstance(error, RateLimitError):
            return False
        seconds = error.response.headers.get("retry-after")
        milliseconds = error.response.headers.get("retry-after-ms")
        return float(milliseconds) / 1_000 if milliseconds else float(seconds) if seconds else True

    # Its own log of retries prints every prompt.
    stamina.instrumentation.set_on_retry_hooks([])
    async with AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:
        yield stamina.retry(on=as_told, attempts=_ATTEMPTS, timeout=None)(asking(client))


def _naive(**breaker_options: Any) -> Entrant:
    @asynccontextmanager
    async def enter(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
        breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=limits.period, **breaker_options)
        semaphore = asyncio.Semaphore(AGENTS)
        requests, tokens = AsyncLimiter(limits.requests, limits.period), AsyncLimiter(limits.tokens, limits.period)
        async with AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as client:
            send = asking(client)

            async def ask(order: Order) -> object:
                with breaker.calling():
                    async with semaphore:
                        await requests.acquire()
                        await tokens.acquire(order.tokens)
                        return await send(order)

            yield _retrying(ask)

    return enter


@asynccontextmanager
async def _langchain(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
    from langchain_core.rate_limiters import InMemoryRateLimiter
    from langchain_openai import AzureChatOpenAI

    a_second = limits.requests / limits.period
    options: dict[str, Any] = {**azure.client_options()}
    model: Any = AzureChatOpenAI(
        azure_deployment=MODEL,
        rate_limiter=InMemoryRateLimiter(requests_per_second=a_second, max_bucket_size=a_second),
        max_retries=2,
        **options,
    )

    async def ask(order: Order) -> object:
        return await model.ainvoke(order.messages, max_tokens=order.max_tokens)

    yield ask
    await model.root_async_client.close()


def _retrying(ask: Ask) -> Ask:
    # What OpenAI's guide to rate limits shows, but for the number of attempts, which is 6 there.
    retrying: Any = tenacity.retry(
        wait=tenacity.wait_random_exponential(min=1, max=60), stop=tenacity.stop_after_attempt(_ATTEMPTS)
    )
    retried: Ask = retrying(ask)
    return retried

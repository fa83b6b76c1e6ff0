"""What the benchmarks of quotas have in common: seeded requests of mixed sizes, agents that ask them, and the kit."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from resilience_kit import count_tokens
from resilience_kit.azure import ResilientAsyncAzureOpenAI
from resilience_kit.testing import AzureOpenAISimulator, SimulatedRequest

AGENTS = 16
MODEL = "gpt-4o"

# Each is one token, with the blank before it.
_WORDS = ("the", "sales", "of", "north", "and", "south", "grew", "in", "May", "while", "costs", "fell", "again", "so")


@dataclass(frozen=True, slots=True)
class Limits:
    """A quota: so many requests and tokens in each window of so many seconds."""

    requests: int = 600
    tokens: int = 150_000
    period: float = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """One request; `tokens` is what the server charges for it."""

    prompt: str
    max_tokens: int | None
    tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat."""
        return [{"role": "user", "content": self.prompt}]


Ask = Callable[[Order], Awaitable[object]]


@dataclass(slots=True)
class Outcome:
    """What became of the orders that were taken: answers, and errors by their type's name."""

    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def mixed_orders(seed: int = 1) -> Iterator[Order]:
    """Yield questions of 100 to 900 tokens for answers of 200 to 1,200: together 1,150 on average."""
    chance = random.Random(seed)  # noqa: S311 - no secret: every contestant is asked the same
    while True:
        yield order(chance, words=chance.randint(100, 900), max_tokens=chance.choice((200, 400, 800, 1_200)))


def order(chance: random.Random, *, words: int, max_tokens: int | None, absent: int = 16) -> Order:
    """Return a request with a prompt of so many words, which are as many tokens; `absent` stands for no maximum."""
    prompt = " ".join(chance.choices(_WORDS, k=words))
    return Order(prompt, max_tokens, count_tokens(prompt) + (absent if max_tokens is None else max_tokens))


def seconds_to_answer(max_tokens: int | None, period: float) -> float:
    """Return how long the simulated model takes: 0.75 to 2 seconds of a minute for the mixed orders."""
    return (0.5 + (max_tokens or 400) / 800) * period / 60


def simulated_latency(period: float) -> Callable[[SimulatedRequest], float]:
    """Return the same as a simulator's `latency`, under each of the names that clients send the maximum by."""

    def latency(request: SimulatedRequest) -> float:
        return seconds_to_answer(request.body.get("max_tokens") or request.body.get("max_completion_tokens"), period)

    return latency


@asynccontextmanager
async def kit(azure: AzureOpenAISimulator, limits: Limits) -> AsyncIterator[Ask]:
    """Enter the kit; each endpoint is a limit of its own."""
    async with ResilientAsyncAzureOpenAI(
        name=f"quota of {azure.endpoint}",
        requests_per_minute=limits.requests,
        tokens_per_minute=limits.tokens,
        period=limits.period,
        max_concurrent=AGENTS,
        min_interval=0,
        **azure.client_options(),
    ) as client:
        yield asking(client)


def asking(client: Any) -> Ask:
    """Return what sends an order through an openai client."""

    async def ask(order: Order) -> object:
        maximum = {} if order.max_tokens is None else {"max_tokens": order.max_tokens}
        return await client.chat.completions.create(model=MODEL, messages=order.messages, **maximum)

    return ask


async def work_off(orders: Iterator[Order], ask: Ask, *, seconds: float) -> Outcome:
    """Let the agents take orders until there are none, or for so many seconds; what is under way then is given up."""
    outcome = Outcome()

    async def agent() -> None:
        for taken in orders:
            try:
                await ask(taken)
            except Exception as error:  # noqa: BLE001 - whatever a contestant lets through is an answer that is lost
                outcome.errors[type(error).__name__] += 1
            else:
                outcome.answered += 1

    working = [asyncio.create_task(agent()) for _ in range(AGENTS)]
    _, late = await asyncio.wait(working, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    return outcome

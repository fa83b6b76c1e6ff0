"""The whole stack around a coroutine that does nothing, beside the naive composition of the same libraries."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import pybreaker
import tenacity
from aiolimiter import AsyncLimiter

from resilience_kit import resilient

_CALLS = 2_000
_ROUNDS = 15
_BOUND = 0.5


async def _nothing(question: str) -> str:
    return question


def _naive_stack() -> Callable[[str], Awaitable[str]]:
    """Compose tenacity around pybreaker.calling around a semaphore and two AsyncLimiters, as their names suggest."""
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)
    semaphore = asyncio.Semaphore(100)
    requests, tokens = AsyncLimiter(10**9, 60), AsyncLimiter(10**9, 60)

    @tenacity.retry(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_random_exponential(max=30))
    async def ask(question: str) -> str:
        with breaker.calling():
            async with semaphore:
                await requests.acquire()
                await tokens.acquire(10)
                return await _nothing(question)

    return ask


def _kit_stack() -> Callable[[str], Awaitable[str]]:
    return resilient(
        "overhead",
        requests_per_minute=10**9,
        tokens_per_minute=10**12,
        max_concurrent=100,
        min_interval=0,
        tokens=10,
        # entries are forgotten after a period: a short one keeps the ledger at the size that real traffic has
        period=0.05,
    )(_nothing)


async def _microseconds_a_call(ask: Callable[[str], Awaitable[str]]) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        await ask("?")
    return (time.perf_counter() - started) / _CALLS * 1e6


async def _measure() -> tuple[float, float, float]:
    naive, kit = _naive_stack(), _kit_stack()
    bare_times, naive_times, kit_times = [], [], []
    for _ in range(_ROUNDS):
        bare_times.append(await _microseconds_a_call(_nothing))
        naive_times.append(await _microseconds_a_call(naive))
        kit_times.append(await _microseconds_a_call(kit))
    return statistics.median(bare_times), statistics.median(naive_times), statistics.median(kit_times)


def main() -> None:
    """Print the overhead of both in microseconds a call, and their ratio."""
    bare, naive, kit = asyncio.run(_measure())
    naive, kit = naive - bare, kit - bare
    print(f"overhead a call: naive {naive:.1f} µs, kit {kit:.1f} µs, ratio {kit / naive:.2f} (at most {_BOUND})")

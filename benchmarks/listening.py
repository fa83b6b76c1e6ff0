"""What a running `Sampler` costs a call: a decorated function that does nothing, with one and without."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from resilience_kit import rate_limited, resilient
from resilience_kit.monitoring.sampler import Sampler

_CALLS = 1_000
_ROUNDS = 25
_BOUND = 2.0

# Limits that hold nobody up, as in `overhead`.
_LIMIT: Any = {
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "max_concurrent": 100,
    "min_interval": 0,
    "tokens": 10,
    "period": 0.05,
}


async def _nothing(question: str) -> str:
    return question


async def _microseconds_a_call(ask: Callable[[str], Awaitable[str]]) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        await ask("?")
    return (time.perf_counter() - started) / _CALLS * 1e6


async def _compare(label: str, ask: Callable[[str], Awaitable[str]]) -> None:
    alone, listened_to = [], []
    for _ in range(_ROUNDS):
        alone.append(await _microseconds_a_call(ask))
        sampler = Sampler()
        sampler.start()
        listened_to.append(await _microseconds_a_call(ask))
        # until its last sample is taken, which is not a call's cost
        await asyncio.to_thread(sampler.stop)
    before, after = statistics.median(alone), statistics.median(listened_to)
    print(
        f"listening to {label}: alone {before:.2f} µs, with a sampler {after:.2f} µs, "
        f"{after - before:.2f} µs more (at most {_BOUND:g})"
    )


def main() -> None:
    """Print the cost of a call with and without a sampler in microseconds, and the difference."""
    asyncio.run(_compare("the whole stack", resilient("listened to", **_LIMIT)(_nothing)))
    asyncio.run(_compare("@rate_limited", rate_limited("listened to alone", **_LIMIT)(_nothing)))


if __name__ == "__main__":
    main()

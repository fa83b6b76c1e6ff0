"""What the decorators cost around a function that does nothing, beside the same libraries put together by hand."""

import asyncio
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pybreaker
import tenacity
from aiolimiter import AsyncLimiter

from resilience_kit import circuit_protected, rate_limited, resilient, retry_on_429

_CALLS = 1_000
_ROUNDS = 25

# Limits that hold nobody up: the cost is that of asking.
_PLENTY = 10**9
_LIMIT: Any = {
    "requests_per_minute": _PLENTY,
    "tokens_per_minute": 10**12,
    "max_concurrent": 100,
    "min_interval": 0,
    "tokens": 10,
    # entries are forgotten after a period: a short one keeps the ledger at the size that real traffic has
    "period": 0.05,
}

AsyncFunction = Callable[[str], Awaitable[str]]
Function = Callable[[str], str]


async def _nothing(question: str) -> str:
    return question


def _nothing_sync(question: str) -> str:
    return question


def _by_hand(function: AsyncFunction) -> AsyncFunction:
    """Put two AsyncLimiters and a semaphore around a function: for requests, for tokens and for concurrency."""
    semaphore, requests, tokens = asyncio.Semaphore(100), AsyncLimiter(_PLENTY, 60), AsyncLimiter(_PLENTY, 60)

    async def ask(question: str) -> str:
        async with semaphore:
            await requests.acquire()
            await tokens.acquire(10)
            return await function(question)

    return ask


def _broken_by_hand(function: AsyncFunction) -> AsyncFunction:
    """Put pybreaker's context manager around a function: its decorator counts no failure of a coroutine."""
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)

    async def ask(question: str) -> str:
        with breaker.calling():
            return await function(question)

    return ask


class _TokenBucket:
    """A token bucket for threads, as AsyncLimiter is one for tasks: aiolimiter has none."""

    def __init__(self, rate: float, period: float) -> None:
        self._rate, self._capacity, self._level = rate / period, rate, 0.0
        self._lock, self._last = threading.Lock(), time.monotonic()

    def acquire(self, amount: float = 1) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                self._level = max(0.0, self._level - (now - self._last) * self._rate)
                self._last = now
                excess = self._level + amount - self._capacity
                if excess <= 0:
                    self._level += amount
                    return
            time.sleep(excess / self._rate)


def _by_hand_sync(function: Function) -> Function:
    """Put two buckets and a semaphore around a function."""
    semaphore, requests, tokens = threading.BoundedSemaphore(100), _TokenBucket(_PLENTY, 60), _TokenBucket(_PLENTY, 60)

    def ask(question: str) -> str:
        with semaphore:
            requests.acquire()
            tokens.acquire(10)
            return function(question)

    return ask


def _broken_by_hand_sync(function: Function) -> Function:
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60)

    def ask(question: str) -> str:
        result: str = breaker.call(function, question)
        return result

    return ask


@dataclass(frozen=True)
class _Case:
    """What is compared: around the same function that does nothing, by hand and by the kit."""

    label: str
    bound: float
    by_hand: Any
    kit: Any


_RETRIED = tenacity.retry(stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_random_exponential(max=30))
_CASES = (
    _Case(
        "the whole stack",
        0.25,
        lambda: _RETRIED(_broken_by_hand(_by_hand(_nothing))),
        lambda: resilient("overhead", **_LIMIT)(_nothing),
    ),
    _Case("@rate_limited", 1.5, lambda: _by_hand(_nothing), lambda: rate_limited("limit", **_LIMIT)(_nothing)),
    _Case("@circuit_protected", 1.5, lambda: _broken_by_hand(_nothing), lambda: circuit_protected("circuit")(_nothing)),
    _Case("@retry_on_429", 0.25, lambda: _RETRIED(_nothing), lambda: retry_on_429(_nothing)),
)
_SYNC_CASES = (
    _Case(
        "the whole stack, sync",
        0.25,
        lambda: _RETRIED(_broken_by_hand_sync(_by_hand_sync(_nothing_sync))),
        lambda: resilient("overhead", **_LIMIT)(_nothing_sync),
    ),
    _Case(
        "@rate_limited, sync",
        1.5,
        lambda: _by_hand_sync(_nothing_sync),
        lambda: rate_limited("limit", **_LIMIT)(_nothing_sync),
    ),
    _Case(
        "@circuit_protected, sync",
        1.5,
        lambda: _broken_by_hand_sync(_nothing_sync),
        lambda: circuit_protected("circuit")(_nothing_sync),
    ),
    _Case("@retry_on_429, sync", 0.25, lambda: _RETRIED(_nothing_sync), lambda: retry_on_429(_nothing_sync)),
)


async def _microseconds_a_call(ask: AsyncFunction) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        await ask("?")
    return (time.perf_counter() - started) / _CALLS * 1e6


def _microseconds_a_call_sync(ask: Function) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        ask("?")
    return (time.perf_counter() - started) / _CALLS * 1e6


def _report(case: _Case, bare: list[float], by_hand: list[float], kit: list[float]) -> None:
    hand_cost, kit_cost = (statistics.median(times) - statistics.median(bare) for times in (by_hand, kit))
    print(
        f"overhead of {case.label}: by hand {hand_cost:.2f} µs, kit {kit_cost:.2f} µs, "
        f"ratio {kit_cost / hand_cost:.2f} (at most {case.bound})"
    )


async def _compare(case: _Case) -> None:
    functions = (_nothing, case.by_hand(), case.kit())
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(_ROUNDS):
        for function, measured in zip(functions, times, strict=True):
            measured.append(await _microseconds_a_call(function))
    _report(case, *times)


def _compare_sync(case: _Case) -> None:
    functions = (_nothing_sync, case.by_hand(), case.kit())
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(_ROUNDS):
        for function, measured in zip(functions, times, strict=True):
            measured.append(_microseconds_a_call_sync(function))
    _report(case, *times)


def main() -> None:
    """Print the cost of a call by hand and by the kit in microseconds, without that of the function, and their ratio.

    By hand, the stack is tenacity around pybreaker around a semaphore and two AsyncLimiters, for requests and tokens.
    The sync one has threading's semaphore and two token buckets of the same algorithm, since aiolimiter is async.
    """
    for case in _CASES:
        asyncio.run(_compare(case))
    for case in _SYNC_CASES:
        _compare_sync(case)


if __name__ == "__main__":
    main()

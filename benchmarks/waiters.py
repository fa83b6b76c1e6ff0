"""A long queue of callers: what one more admitted call costs, how much memory a caller takes, and cancelling all."""

import asyncio
import gc
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from resilience_kit import get_all_resilience_stats, rate_limited
from resilience_kit.testing import isolated

_SHORT, _LONG = 100, 100_000
_ADMITTED = 10_000
_ROUNDS = 3
_MOST_GROWTH = 1.5
_MOST_BYTES = 2_048
_MOST_SECONDS = 1.0
_SLOTS = 10
_LIMIT: Any = {"requests_per_minute": 10**9, "max_concurrent": _SLOTS, "min_interval": 0, "tokens": 10}


@contextmanager
def _without_collector() -> Iterator[None]:
    """Measure the kit, and not how the garbage collector walks over 100,000 tasks while they are made."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _held_limit() -> tuple[Callable[[], Awaitable[None]], asyncio.Event]:
    """A limited function, and what its first calls wait for while they hold all slots."""
    gate = asyncio.Event()

    @rate_limited("waiters", **_LIMIT)
    async def ask() -> None:
        if not gate.is_set():
            await gate.wait()

    return ask, gate


async def _fill(ask: Callable[[], Awaitable[None]], callers: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.ensure_future(ask()) for _ in range(callers)]
    await asyncio.sleep(0)
    return tasks


async def _cancel(tasks: list[asyncio.Task[None]]) -> float:
    started = time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return time.perf_counter() - started


async def _seconds_a_call(callers: int) -> float:
    """The time of an admitted call while so many others wait, as each that was served comes again."""
    ask, gate = _held_limit()
    served = 0
    done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def come_again() -> None:
        nonlocal served
        while True:
            await ask()
            served += 1
            if served == _ADMITTED:
                done.set_result(time.perf_counter())

    tasks = await _fill(come_again, callers)
    with _without_collector():
        started = time.perf_counter()
        gate.set()
        stopped = await done
    await _cancel(tasks)
    return (stopped - started) / _ADMITTED


async def _bytes_a_caller(wait: Callable[[], Awaitable[None]]) -> float:
    gc.collect()
    tracemalloc.start()
    tasks = await _fill(wait, _LONG)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await _cancel(tasks)
    return size / _LONG


async def _seconds_to_cancel(wait: Callable[[], Awaitable[None]]) -> float:
    with _without_collector():
        return await _cancel(await _fill(wait, _LONG))


async def _wait_bare() -> None:
    """Wait as little as a task can."""
    await asyncio.get_running_loop().create_future()


def _limited() -> Callable[[], Awaitable[None]]:
    return _held_limit()[0]


def main() -> None:
    """Print what a long queue costs, beside a short one or beside tasks that wait for nothing."""
    growth, short_times, long_times = [], [], []
    for _ in range(_ROUNDS):
        with isolated():
            short_times.append(asyncio.run(_seconds_a_call(_SHORT)))
        with isolated():
            long_times.append(asyncio.run(_seconds_a_call(_LONG)))
        growth.append(long_times[-1] / short_times[-1])
    print(
        f"waiters: an admitted call with {_SHORT:,} waiting {statistics.median(short_times) * 1e6:.1f} µs, with "
        f"{_LONG:,} {statistics.median(long_times) * 1e6:.1f} µs, ratio {statistics.median(growth):.2f} "
        f"(at most {_MOST_GROWTH})"
    )
    with isolated():
        bare, kit = asyncio.run(_bytes_a_caller(_wait_bare)), asyncio.run(_bytes_a_caller(_limited()))
    print(
        f"waiters: memory of each {kit:.0f} bytes (at most {_MOST_BYTES}); of a bare task {bare:.0f} bytes, "
        f"the kit's part {kit - bare:.0f} bytes"
    )
    bare_times, kit_times = [], []
    for _ in range(_ROUNDS):
        bare_times.append(asyncio.run(_seconds_to_cancel(_wait_bare)))
        with isolated():
            kit_times.append(asyncio.run(_seconds_to_cancel(_limited())))
            left = get_all_resilience_stats()["rate_limiters"]["waiters"]
    print(
        f"waiters: cancelling {_LONG:,} {statistics.median(kit_times):.2f} s (at most {_MOST_SECONDS}), bare tasks "
        f"{statistics.median(bare_times):.2f} s; left {left['waiting']} waiting, {left['in_flight']} in flight, "
        f"{left['requests_in_window'] - _SLOTS} in the ledger beside the {_SLOTS} that were sent"
    )


if __name__ == "__main__":
    main()

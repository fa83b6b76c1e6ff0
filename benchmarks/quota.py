"""The quota benchmark: the kit and its peers at the edge of a quota, each against a server of its own.

    python -m benchmarks.quota            # real windows of a minute, all contestants at once: about six minutes
    python -m benchmarks.quota --quick    # windows of 6 seconds, and one and a half of them: does it run at all?

It prints the table that the README shows, and draws docs/quota.png.
"""

import argparse
import asyncio
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.agents import AGENTS, Limits, Order, mixed_orders, work_off
from benchmarks.conditions import CONDITIONS, Condition, simulator
from benchmarks.contestants import Contestant, contestants
from benchmarks.oracle import best_possible, server_of

PICTURE = Path(__file__).parent.parent / "docs" / "quota.png"

_WINDOWS, _QUICK_WINDOWS = 3.5, 1.5
_QUICK_PERIOD = 6.0
# A contestant that needs more is stopped, and what it has not answered by then is lost.
_MOST_WINDOWS = 9
_PACKAGES = (
    "openai",
    "tenacity",
    "stamina",
    "pybreaker",
    "aiolimiter",
    "langchain-core",
    "langchain-openai",
    "resilience-kit",
)


@dataclass(frozen=True, slots=True)
class Result:
    """How a contestant did; times are seconds since its start."""

    name: str
    lost: int
    requests: int
    seconds: float
    admitted_at: Sequence[float]
    refused_at: Sequence[float]


async def contend(
    contestant: Contestant, condition: Condition, limits: Limits, orders: Sequence[Order], delay: float
) -> Result:
    """Let a contestant work the orders off against a fresh server."""
    await asyncio.sleep(delay)
    async with (
        simulator(condition, limits) as azure,
        contestant.enter(azure, limits) as ask,
    ):
        azure.reset()
        started = time.monotonic()
        outcome = await work_off(iter(orders), ask, seconds=_MOST_WINDOWS * limits.period)
        seconds = time.monotonic() - started
        seen = azure.stats
    result = Result(
        contestant.name,
        len(orders) - outcome.answered,
        seen.requests,
        seconds,
        [admission.time - started for admission in seen.admissions],
        [rejection.time - started for rejection in seen.rejections],
    )
    errors = ", ".join(f"{count} {name}" for name, count in outcome.errors.items()) or "no error"
    print(
        f"  {contestant.name}, {condition.name}: {seconds:.0f} s, {len(result.refused_at)} refusals, {errors}",
        flush=True,
    )
    return result


async def compete(limits: Limits, orders: Sequence[Order]) -> dict[Condition, list[Result]]:
    """Let all of them work at once, which is next to no load; their windows begin one after another, not together."""
    entries = [(condition, contestant) for condition in CONDITIONS for contestant in contestants()]
    results = await asyncio.gather(
        *(
            contend(contestant, condition, limits, orders, number * limits.period / len(entries))
            for number, (condition, contestant) in enumerate(entries)
        )
    )
    return {
        condition: [result for (of, _), result in zip(entries, results, strict=True) if of == condition]
        for condition in CONDITIONS
    }


def oracle(limits: Limits, orders: Sequence[Order]) -> Result:
    """Return the best that is possible, whatever the server says."""
    best = best_possible(server_of(limits), iter(orders), period=limits.period)
    admitted_at = [admission.time for admission in best.admissions]
    return Result("best possible, computed", 0, len(orders), best.finished, admitted_at, [])


def table(best: Result, results: dict[Condition, list[Result]]) -> str:
    """Return the table in Markdown: a contestant a row, and beside each other what the server says."""
    of_condition = "lost | 429s | requests | time"
    heading = " | ".join(f"{condition.name}: {of_condition}" for condition in CONDITIONS)
    lines = [f"| | {heading} |", "|---" * (1 + 4 * len(CONDITIONS)) + "|"]
    for same in zip(*([best, *results[condition]] for condition in CONDITIONS), strict=True):
        cells = (
            f"{result.lost} | {len(result.refused_at)} | {result.requests} | {_time(result, best)}" for result in same
        )
        lines.append(f"| {same[0].name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(result: Result, best: Result) -> str:
    # Who loses answers is done sooner: that time is no achievement.
    return f"{result.seconds:.0f} s" + ("" if result.lost else f", {result.seconds / best.seconds:.2f}")


def circumstances() -> str:
    """Say when this was measured, and with what."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{datetime.now(UTC):%d %B %Y}, Python {platform.python_version()}, {', '.join(versions)}"


def main(arguments: Sequence[str] = ()) -> None:
    """Run the benchmark, print the table and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quota", description="Contestants at a quota's edge.")
    parser.add_argument("--quick", action="store_true", help="short windows, and few; no picture")
    quick = parser.parse_args(arguments).quick
    # Here, as a missing matplotlib is better told before the minutes than after them.
    from benchmarks.quota_picture import draw

    limits = Limits(period=_QUICK_PERIOD) if quick else Limits()
    orders = orders_of((_QUICK_WINDOWS if quick else _WINDOWS) * limits.tokens)
    best = oracle(limits, orders)
    print(f"quota: {len(orders)} requests by {AGENTS} agents, best possible {best.seconds:.0f} s", flush=True)
    results = asyncio.run(compete(limits, orders))
    print(f"\n{table(best, results)}\n\n{circumstances()}")
    for contestant in contestants():
        print(f"- {contestant.name}: {contestant.parameters}")
    if not quick:
        draw(PICTURE, limits, best, results)
        print(f"drawn: docs/{PICTURE.name}")


def orders_of(tokens: float) -> list[Order]:
    """Return as many of the mixed orders as so many tokens are enough for."""
    orders = []
    for order in mixed_orders():
        tokens -= order.tokens
        if tokens < 0:
            break
        orders.append(order)
    return orders


if __name__ == "__main__":
    main(sys.argv[1:])

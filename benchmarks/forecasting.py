"""The forecast beside naive ones, and whether slowing down ahead of a peak helps.

    python -m benchmarks.forecasting m-small.csv

takes a trace that `benchmarks.serving_trace` has summed up; without one, the traffic is made up, and proves little.
"""

import asyncio
import heapq
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import looptime

from benchmarks import serving_trace
from resilience_kit import rate_limited
from resilience_kit.events import BudgetSettled
from resilience_kit.monitoring.forecast import Forecaster
from resilience_kit.testing import isolated

_DAY = 86_400
# The pacing question is asked of these minutes: three days to learn from, then a day of traffic.
_LEARNT, _PACED = 3 * 1_440, 1_440
# Of the quota, what one request uses; of the requests, how many may wait for others; of the minutes, how many fit.
_REQUEST, _PATIENT, _FITTING = 0.1, 0.3, 0.9
# Of the quota, from where on requests are slowed. At the quota itself none would be: more than it is never used.
_FULL = 0.9


@dataclass(slots=True)
class _Errors:
    """Absolute errors of one horizon, in tokens per minute, and how often the band held."""

    forecast: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    yesterday: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)


def _settled(tokens: float) -> BudgetSettled:
    return BudgetSettled(name="all", reserved=0, prompt_tokens=round(tokens), completion_tokens=0, usd=None)


def _microseconds_a_value(values: list[float], interval: int, horizons: tuple[int, ...]) -> float:
    """What a value costs in `listen`, for one model: all agents and the one that there is have one for each horizon."""
    moment = 0.0
    forecaster = Forecaster(interval=interval, horizons=horizons, clock=lambda: moment)
    started = time.perf_counter()
    for number, value in enumerate(values):
        moment = number * interval
        forecaster.listen(_settled(value))
    return (time.perf_counter() - started) / len(values) / len(horizons) / 2 * 1e6


def _forecast_all(values: list[float], interval: int, horizons: tuple[int, ...]) -> dict[int, _Errors]:
    """Go through values in tokens per minute; errors by horizon."""
    moment = 0.0
    forecaster = Forecaster(interval=interval, horizons=horizons, clock=lambda: moment)
    errors = {seconds: _Errors() for seconds in horizons}
    day = _DAY // interval
    for number, value in enumerate(values):
        moment = number * interval
        forecaster.listen(_settled(value * interval / 60))
        moment += interval
        for forecast in forecaster.forecasts():
            meant = number + int(forecast.seconds) // interval
            if forecast.agent is None and meant < len(values):
                found = errors[int(forecast.seconds)]
                found.forecast.append(abs(values[meant] - forecast.expected))
                found.last.append(abs(values[meant] - forecast.last_value))
                found.yesterday.append(abs(values[meant] - values[meant - day]))
                found.held.append(forecast.low <= values[meant] <= forecast.high)
    return errors


def _print_errors(title: str, values: list[float], interval: int, horizons: tuple[int, ...]) -> None:
    errors = _forecast_all(values, interval, horizons)
    print(f"{title}; {_microseconds_a_value(values, interval, horizons):.0f} µs to learn a value, at each horizon")
    print("  ahead     river  last value  yesterday   river/last value  band holds (80 %)")
    for seconds, found in errors.items():
        forecast, last, yesterday = (statistics.fmean(it) for it in (found.forecast, found.last, found.yesterday))
        print(
            f"  {seconds // 60:2} min {forecast:10,.0f} {last:11,.0f} {yesterday:10,.0f} {forecast / last:18.2f} "
            f"{statistics.fmean(found.held):18.0%}"
        )


@dataclass(slots=True)
class _Waits:
    """What callers waited, in seconds, and the moments at which the service would have refused one."""

    urgent: list[float] = field(default_factory=list)
    patient: list[float] = field(default_factory=list)
    refused: int = 0
    slowed: int = 0


def _arrivals(values: list[float], tokens: float) -> Iterator[tuple[float, bool]]:
    """Moments of requests of so many tokens each, evenly through each minute; every so many may wait for others."""
    counts = accumulate((value / tokens for value in values), initial=0.0)
    patient = 0.0
    for minute, (before, after) in enumerate(pairwise(counts)):
        requests = int(after) - int(before)
        for number in range(requests):
            patient += _PATIENT
            yield (minute + number / requests) * 60, patient >= 1
            patient %= 1


def _served(values: list[float], quota: float) -> Iterator[float]:
    """What a limit lets through of such a demand: never more than the quota, and the rest later."""
    backlog = 0.0
    for value in values:
        backlog += value
        served = min(backlog, quota)
        backlog -= served
        yield served


def _share(forecaster: Forecaster, quota: float, guide: str) -> float:
    """The share of their pace that patient requests are let go at."""
    if guide == "the forecast":
        return forecaster.pacing(quota)
    now = forecaster.forecast(seconds=300) if guide == "the last value" else None
    return 1.0 if now is None else min(1.0, quota / max(1.0, now.last_value))


async def _serve(values: list[float], quota: float, guide: str, priority: int) -> _Waits:
    """Send the traffic through the kit's limiter in virtual time, and slow what may wait as the guide says."""
    loop = asyncio.get_running_loop()
    tokens = quota * _REQUEST
    moment = 0.0
    forecaster = Forecaster(horizons=(300, 900, 3_600), clock=lambda: moment)
    for minute, value in enumerate(_served(values[:_LEARNT], quota)):
        moment = minute * 60
        forecaster.listen(_settled(value))
    start = loop.time()
    waits, sent = _Waits(), deque[float]()

    async def send() -> None:
        nonlocal moment
        moment = _LEARNT * 60 + loop.time() - start
        forecaster.listen(_settled(tokens))
        sent.append(loop.time())
        # the service's own count, of the last minute; the clock of virtual time has its roundings
        while sent[0] <= loop.time() - 59.999:
            sent.popleft()
        waits.refused += len(sent) * tokens > quota * 1.001

    limit = partial(
        rate_limited,
        "quota",
        tokens=round(tokens),
        tokens_per_minute=round(quota),
        requests_per_minute=10**6,
        max_concurrent=10**6,
        min_interval=0,
    )
    urgent, patient = limit(priority=0)(send), limit(priority=priority)(send)

    async def ask(arrived: float, release: float, *, may_wait: bool) -> None:
        await asyncio.sleep(start + release - loop.time())
        await (patient if may_wait else urgent)()
        (waits.patient if may_wait else waits.urgent).append(loop.time() - start - arrived)

    tasks = []
    arrived_before = released = 0.0
    for arrived, may_wait in _arrivals(values[_LEARNT : _LEARNT + _PACED], tokens):
        await asyncio.sleep(start + arrived - loop.time())
        release = arrived
        if may_wait:
            share = _share(forecaster, quota * _FULL, guide)
            if share < 1:
                # at this share of the pace at which they come: the gap to the one before grows
                waits.slowed += 1
                release = max(arrived, released + (arrived - arrived_before) / share)
            arrived_before, released = arrived, release
        tasks.append(asyncio.create_task(ask(arrived, release, may_wait=may_wait)))
    await asyncio.gather(*tasks)
    return waits


def _simulate(values: list[float], guide: str, priority: int) -> _Waits:
    quota = sorted(values[_LEARNT : _LEARNT + _PACED])[int(_PACED * _FITTING)]
    loop = asyncio.SelectorEventLoop()
    looptime.patch_event_loop(loop)
    try:
        with isolated():
            return loop.run_until_complete(_serve(values, quota, guide, priority))
    finally:
        loop.close()


def _worst(waits: list[float]) -> float:
    return statistics.fmean(heapq.nlargest(max(1, len(waits) // 20), waits))


def _print_pacing(values: list[float]) -> None:
    print(f"slowing three of ten requests for a day, with a quota that {_FITTING:.0%} of the minutes fit into; seconds")
    print("  guided by       priority  429s  urgent wait: mean, worst 5 %  patient wait: mean, worst 5 %  slowed")
    for guide, priority in (("nothing", 1), ("the last value", 1), ("the forecast", 1), ("nothing", 20)):
        waits = _simulate(values, guide, priority)
        urgent, patient = statistics.fmean(waits.urgent), statistics.fmean(waits.patient)
        print(
            f"  {guide:14} {priority:9} {waits.refused:5} {urgent:18.1f} {_worst(waits.urgent):10.1f}"
            f" {patient:19.1f} {_worst(waits.patient):10.1f} {waits.slowed:7}"
        )


def main(trace: str | None = None) -> None:
    """Print errors as recorded and by the minute, and what pacing did."""
    windows = serving_trace.read(Path(trace)) if trace else serving_trace.made_up()
    source = f"recorded traffic, {Path(trace).stem}" if trace else "MADE-UP traffic"
    values = serving_trace.minutes(windows)
    print(f"forecasts of {source}, {len(values) // 1_440} days; mean absolute errors in tokens per minute")
    _print_errors("ten minutes together", [it.tokens for it in windows], 600, (600, 1_200, 3_600))
    _print_errors("minutes, drawn within each ten", values, 60, (60, 300, 900, 3_600))
    _print_pacing(values)


if __name__ == "__main__":
    main(*sys.argv[1:2])

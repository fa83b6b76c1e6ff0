"""What plan() foresees beside what the same agents get from the simulator, over HTTP and in minutes of ten seconds."""

import asyncio
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from resilience_kit import Plan, plan, subscribe
from resilience_kit.azure import ResilientAsyncAzureOpenAI
from resilience_kit.events import Admitted, Event
from resilience_kit.testing import AzureOpenAISimulator

_BOUND = 0.05
_PERIOD = 10.0
_MINUTES = 3
# Seconds to the first request: a client loads its certificates.
_START_UP = 0.5
# In minutes: calls come in bursts at the start of the quota's windows, and what is counted begins and ends before one.
_FIRST_MINUTE = 0.9

# In the terms of plan(): seconds are those of a real minute. Calls are so few that this machine has time for all.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 600, 400
WORKLOADS: dict[str, dict[str, Any]] = {
    "token-bound": {"requests_per_minute": 600, "tokens_per_minute": 60_000, "agents": 12, "latency": (6, 10)},
    "request-bound": {"requests_per_minute": 60, "tokens_per_minute": 10**6, "agents": 12, "latency": (4, 8)},
    "concurrency-bound": {
        "requests_per_minute": 600,
        "tokens_per_minute": 10**6,
        "agents": 12,
        "latency": (6, 10),
        "max_concurrent": 6,
    },
    "latency-bound": {"requests_per_minute": 600, "tokens_per_minute": 10**6, "agents": 8, "latency": (6, 10)},
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Calls a minute of one workload."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """What was planned, as a share of what was measured."""
        return self.planned / self.measured


async def compare(name: str, workload: dict[str, Any], period: float = _PERIOD, minutes: int = _MINUTES) -> Comparison:
    """Measure a workload, and plan for it with the latency that its calls had, HTTP and this machine included."""
    slots = workload.get("max_concurrent") or int(_planned(workload).settings["MAX_CONCURRENT_REQUESTS"])
    calls, seconds = await _measured(name, workload, slots, period, minutes)
    least, most = workload["latency"]
    longer = seconds / statistics.mean(workload["latency"])
    had = {**workload, "max_concurrent": slots, "latency": (least * longer, most * longer)}
    return Comparison(_planned(had).requests_per_minute, calls)


def _planned(workload: dict[str, Any]) -> Plan:
    return plan(**workload, prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS)


async def _measured(
    name: str, workload: dict[str, Any], slots: int, period: float, minutes: int
) -> tuple[float, float]:
    """Calls a minute after the first one, and their mean latency."""
    rpm, tpm = workload["requests_per_minute"], workload["tokens_per_minute"]
    scale = period / 60
    least, most = workload["latency"]
    latencies: list[float] = []
    sent: dict[asyncio.Task[Any] | None, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, Admitted) and event.name == name:
            sent[asyncio.current_task()] = time.monotonic()

    simulator = AzureOpenAISimulator(
        rpm=rpm,
        tpm=tpm,
        period=period,
        # a prompt is the number of its tokens
        count_prompt=int,
        latency=(least * scale, most * scale),
    )
    async with (
        simulator as azure,
        ResilientAsyncAzureOpenAI(
            name=name,
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            max_concurrent=slots,
            min_interval=0,
            period=period,
            tokens=_PROMPT_TOKENS + _OUTPUT_TOKENS,
            **azure.client_options(),
        ) as client,
    ):

        async def agent() -> None:
            while True:
                await client.chat.completions.create(
                    model="gpt-4o",
                    messages=[{"role": "user", "content": str(_PROMPT_TOKENS)}],
                    max_tokens=_OUTPUT_TOKENS,
                )
                latencies.append(time.monotonic() - sent[asyncio.current_task()])

        stop = subscribe(note)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_START_UP + period * (1 + minutes)):
                    await asyncio.gather(*(agent() for _ in range(workload["agents"])))
        finally:
            stop()
        times = [admission.time for admission in azure.stats.admissions]
    start = times[0] + period * _FIRST_MINUTE
    calls = sum(start < time <= start + period * minutes for time in times) / minutes
    return calls, statistics.mean(latencies) / scale


async def _compare_all() -> None:
    found = await asyncio.gather(*(compare(name, workload) for name, workload in WORKLOADS.items()))
    for name, calls in zip(WORKLOADS, found, strict=True):
        print(
            f"planning: {name}, planned {calls.planned:.1f} calls a minute, measured {calls.measured:.1f}, "
            f"ratio {calls.ratio:.3f} (within {_BOUND:.0%})"
        )


def main() -> None:
    """Print both throughputs of each workload, and their ratio."""
    asyncio.run(_compare_all())


if __name__ == "__main__":
    main()

"""How much of a quota the kit gets, and how seldom it is refused, in each way in which a server may count.

    python -m benchmarks.reach                      # real windows of a minute, all modes at once: seven minutes
    python -m benchmarks.reach sliding              # only those modes whose names contain it
    python -m benchmarks.reach sliding --period 6   # the same in a tenth of the time, two modes at once

The shorter the window, the more its result says of this machine: what takes a millisecond counts ten times as much.

Each mode has a server of its own. Beside the kit stands the oracle, which knows the server's books, its windows and
what will change. The promise is checked for what comes after the first window, in which the kit has yet to learn.
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from openai import AsyncAzureOpenAI

from benchmarks.agents import (
    AGENTS,
    Ask,
    Limits,
    Order,
    asking,
    kit,
    mixed_orders,
    order,
    simulated_latency,
    work_off,
)
from benchmarks.oracle import QuotaChange, best_possible
from resilience_kit import count_tokens
from resilience_kit.testing import AzureOpenAISimulator
from resilience_kit.testing.server_windows import RequestWindow, ServerQuota, TokenWindow
from resilience_kit.testing.simulator import AbsentMaxTokens
from resilience_kit.testing.simulator_stats import Admission, Rejection
from resilience_kit.testing.wire_errors import Headers

_WINDOWS = 6
# A mode sends about 130 requests a window; with one more for so many seconds of it, a core is used to a quarter.
_SECONDS_A_MODE = 3
_LEAST_OF_THE_ORACLE = 0.95
_MOST_REFUSED_BESIDE_OTHERS = 0.01
# When the quota is halved, and when it is doubled again: as a window turns, so that knowing it before is worth little.
_HALVED, _DOUBLED = 2, 4
# What the simulator charges for a completion without a maximum when it is dear.
_DEAR_COMPLETION = 128_000


# What other programs ask: larger than any of the mixed orders, so that the server's books tell whose a request was.
_ANOTHERS = order(random.Random(0), words=500, max_tokens=2_000)  # noqa: S311 - no secret


def _small_orders() -> Iterator[Order]:
    chance = random.Random(1)  # noqa: S311 - no secret
    while True:
        yield order(chance, words=5, max_tokens=8)


def _orders_with_a_large_one() -> Iterator[Order]:
    chance = random.Random(1)  # noqa: S311 - no secret
    for number, mixed in enumerate(mixed_orders()):
        yield order(chance, words=59_000, max_tokens=1_000) if number % 100 == 20 else mixed  # noqa: PLR2004 - one a window


def _orders_without_maximum(absent: int) -> Callable[[], Iterator[Order]]:
    def orders() -> Iterator[Order]:
        chance = random.Random(1)  # noqa: S311 - no secret
        while True:
            yield order(chance, words=chance.randint(100, 3_000), max_tokens=None, absent=absent)

    return orders


@dataclass(frozen=True, slots=True)
class Mode:
    """How the server counts and what it says; what it is asked, and what else happens.

    Attributes:
        name: For the table.
        token_window: As the simulator's.
        request_window: As the simulator's.
        headers: As the simulator's.
        header_lag: As the simulator's.
        absent_max_tokens: As the simulator's.
        orders: Makes the requests.
        used_before: The share of the quota that somebody used before the kit began, in the middle of a window.
        used_beside: The share of the quota that another program uses all the time.
        changes: Whether the quota is halved for some windows.
        has_large_ones: Whether it matters that the oracle lets small requests pass large ones. The kit serves first
            come, first served, so it is compared with an oracle that does so too.
    """

    name: str
    token_window: TokenWindow = "fixed"  # noqa: S105 - tokens of text, no secret
    request_window: RequestWindow = 10
    headers: Headers = "full"
    header_lag: int = 0
    absent_max_tokens: AbsentMaxTokens = "cheap"
    orders: Callable[[], Iterator[Order]] = mixed_orders
    used_before: float = 0.0
    used_beside: float = 0.0
    changes: bool = False
    has_large_ones: bool = False

    @property
    def most_refused(self) -> float:
        """The share of requests that may be refused after the first window."""
        return _MOST_REFUSED_BESIDE_OTHERS if self.used_beside else 0.0

    def quotas(self, limits: Limits) -> list[QuotaChange]:
        """Return the quotas that follow the first, and when, since the start of the server's first window."""
        if not self.changes:
            return []
        return [
            QuotaChange(_HALVED * limits.period, limits.requests / 2, limits.tokens / 2),
            QuotaChange(_DOUBLED * limits.period, limits.requests, limits.tokens),
        ]


def modes() -> list[Mode]:
    """Return all modes."""
    told = [
        Mode("full headers"),
        Mode("only remaining-*", headers="remaining"),
        Mode("no headers", headers="off"),
        Mode("headers lag by 8", header_lag=8),
        Mode("requests over 1 s", request_window=1),
    ]
    every = [
        replace(mode, name=f"{window} window, {mode.name}", token_window=window)
        for window in ("fixed", "sliding")
        for mode in told
    ]
    return [
        *every,
        Mode("small requests, over 10 s", orders=_small_orders),
        Mode("small requests, over 1 s", orders=_small_orders, request_window=1),
        Mode("no max_tokens, cheap", orders=_orders_without_maximum(16)),
        Mode("no max_tokens, dear", orders=_orders_without_maximum(_DEAR_COMPLETION), absent_max_tokens="dear"),
        Mode("one of 40 % among small ones", orders=_orders_with_a_large_one, has_large_ones=True),
        Mode("60 % used before", used_before=0.6),
        Mode("60 % used before, no headers", used_before=0.6, headers="off"),
        Mode("another program's third", used_beside=1 / 3),
        Mode("another program's third, no headers", used_beside=1 / 3, headers="off"),
        Mode("halved, doubled back", changes=True),
    ]


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the kit came in a mode; `share` is of the oracle's tokens, after the first window and in all."""

    mode: Mode
    name: str
    refused_at_first: int
    refused_later: int
    refused_share: float
    lost: int
    share: float
    share_in_all: float

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return self.refused_share <= self.mode.most_refused and self.share >= _LEAST_OF_THE_ORACLE and self.lost == 0


@dataclass(frozen=True, slots=True)
class Run:
    """What happened in a mode, on one clock: what was admitted of others and of the kit, and what of it was refused."""

    origin: float
    start: float
    end: float
    others: Sequence[Admission]
    admitted: Sequence[Admission]
    refused: Sequence[Rejection]
    errors: Counter[str]


async def run(mode: Mode, limits: Limits, windows: int) -> Run:
    """Let the kit ask as much as it can for some windows."""
    async with (
        AzureOpenAISimulator(
            rpm=limits.requests,
            tpm=limits.tokens,
            period=limits.period,
            token_window=mode.token_window,
            request_window=mode.request_window,
            headers=mode.headers,
            header_lag=mode.header_lag,
            absent_max_tokens=mode.absent_max_tokens,
            retry_after_spelling="none" if mode.headers == "off" else "retry-after-ms",
            count_prompt=count_tokens,
            latency=simulated_latency(limits.period),
        ) as azure,
        AsyncAzureOpenAI(**azure.client_options(), max_retries=0) as plain,
        kit(azure, limits) as ask,
    ):
        azure.reset()
        origin = time.monotonic()
        if mode.used_before:
            await asyncio.sleep(limits.period * 0.35)
            await _use(mode.used_before, asking(plain), limits, seconds=limits.period * 0.1)
        start = time.monotonic()
        end = start + windows * limits.period
        besides = [asyncio.create_task(_use(mode.used_beside * windows, asking(plain), limits, seconds=end - start))]
        besides += [
            asyncio.create_task(_change_quota(azure, change, origin + change.at)) for change in mode.quotas(limits)
        ]
        outcome = await work_off(mode.orders(), ask, seconds=end - start)
        seen = azure.stats
        await asyncio.gather(*besides)
    return Run(
        origin,
        start,
        end,
        others=[one for one in seen.admissions if one.tokens == _ANOTHERS.tokens],
        admitted=[one for one in seen.admissions if one.tokens != _ANOTHERS.tokens],
        refused=[one for one in seen.rejections if one.tokens != _ANOTHERS.tokens],
        errors=outcome.errors,
    )


async def _use(share: float, ask: Ask, limits: Limits, *, seconds: float) -> None:
    """Use a share of a window's quota, evenly over some time, without a look at what becomes of it."""
    number = round(share * limits.tokens / _ANOTHERS.tokens)
    sent = []
    for _ in range(number):
        await asyncio.sleep(seconds / (number + 1))
        sent.append(asyncio.ensure_future(ask(_ANOTHERS)))
    await asyncio.gather(*sent, return_exceptions=True)


async def _change_quota(azure: AzureOpenAISimulator, change: QuotaChange, at: float) -> None:
    await asyncio.sleep(at - time.monotonic())
    azure.set_quota(rpm=change.requests, tpm=change.tokens)


def oracle(mode: Mode, limits: Limits, seen: Run, *, in_turn: bool = False) -> tuple[Admission, ...]:
    """Return what was possible at best, after the same beginning, and with what another program left."""
    used_beside = _tokens(one for one in seen.others if one.time >= seen.start)
    left = 1 - used_beside * limits.period / (seen.end - seen.start) / limits.tokens
    quota = ServerQuota(
        0.0,
        request_limit=limits.requests * left,
        token_limit=limits.tokens * left,
        period=limits.period,
        token_window=mode.token_window,
        request_window=mode.request_window,
        count_refused=False,
    )
    for admission in seen.others:
        if admission.time < seen.start:
            quota.admit(admission.time - seen.origin, admission.tokens)
    start, end = seen.start - seen.origin, seen.end - seen.origin
    orders, quotas = mode.orders(), mode.quotas(limits)
    return best_possible(
        quota, orders, period=limits.period, start=start, until=end, changes=quotas, in_turn=in_turn
    ).admissions


def judge(mode: Mode, limits: Limits, seen: Run, *, in_turn: bool = False) -> Reach:
    """Compare what was with what was possible, or with what was possible first come, first served."""
    later = seen.start + limits.period
    possible = oracle(mode, limits, seen, in_turn=in_turn)
    possible_later = [one for one in possible if seen.origin + one.time >= later]
    refused_later = [one for one in seen.refused if one.time >= later]
    admitted_later = [one for one in seen.admitted if one.time >= later]
    return Reach(
        mode,
        f"{mode.name}; an oracle that serves in turn" if in_turn else mode.name,
        refused_at_first=len(seen.refused) - len(refused_later),
        refused_later=len(refused_later),
        refused_share=len(refused_later) / max(1, len(refused_later) + len(admitted_later)),
        lost=seen.errors.total(),
        share=_tokens(admitted_later) / _tokens(possible_later),
        share_in_all=_tokens(seen.admitted) / _tokens(possible),
    )


def _tokens(admissions: Iterable[Admission]) -> float:
    return sum(admission.tokens for admission in admissions)


def table(reaches: Iterable[Reach]) -> str:
    """Return the table in Markdown."""
    columns = "mode, 429s at first, 429s later, share, promised, answers lost, of the oracle, later, promised, kept"
    lines = [f"| {columns.replace(', ', ' | ')} |", "|---" * 10 + "|"]
    lines += (
        f"| {reach.name} | {reach.refused_at_first} | {reach.refused_later} | {reach.refused_share:.1%} "
        f"| {f'{reach.mode.most_refused:.0%}' if reach.mode.most_refused else '0'} | {reach.lost} "
        f"| {reach.share_in_all:.3f} | {reach.share:.3f} | {_LEAST_OF_THE_ORACLE} | {'yes' if reach.kept else 'no'} |"
        for reach in reaches
    )
    return "\n".join(lines)


async def measure(chosen: Sequence[Mode], limits: Limits, windows: int) -> list[Reach]:
    """Run as many modes at once as are next to no load; their windows begin one after another, not together."""
    at_once = max(1, round(limits.period / _SECONDS_A_MODE))
    places = asyncio.Semaphore(at_once)

    async def after(delay: float, mode: Mode) -> list[Reach]:
        await asyncio.sleep(delay)
        async with places:
            seen = await run(mode, limits, windows)
        reach = judge(mode, limits, seen)
        reasons = dict(Counter(rejection.reason for rejection in seen.refused))
        print(f"  {mode.name}: {reach.share:.3f}, refused for {reasons}, errors {dict(seen.errors)}", flush=True)
        return [reach, *(judge(mode, limits, seen, in_turn=True) for _ in range(mode.has_large_ones))]

    delays = (number * limits.period / at_once for number in itertools.count())
    reaches = await asyncio.gather(*itertools.starmap(after, zip(delays, chosen, strict=False)))
    return list(itertools.chain.from_iterable(reaches))


def main(arguments: Sequence[str] = ()) -> None:
    """Run the modes and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description="The kit beside an oracle.")
    parser.add_argument("name", nargs="?", default="", help="only the modes whose names contain this")
    parser.add_argument("--period", type=float, default=60.0, help="seconds that a window lasts")
    parser.add_argument("--windows", type=int, default=_WINDOWS, help="how many of them")
    options = parser.parse_args(arguments)
    chosen = [mode for mode in modes() if options.name in mode.name]
    limits = Limits(period=options.period)
    print(f"reach: {len(chosen)} modes, {AGENTS} agents, {options.windows} windows of {limits.period:g} s", flush=True)
    print(f"\n{table(asyncio.run(measure(chosen, limits, options.windows)))}")


if __name__ == "__main__":
    main(sys.argv[1:])

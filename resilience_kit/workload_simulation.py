"""Agents that call a service through the kit's own limiter and retries, against Azure's arithmetic, in virtual time.

A simulation has a thread, an event loop, a clock and a limit of its own: nothing of the process is touched, and no
listener hears of it.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from resilience_kit.events import Admitted, Event, heard_only_by
from resilience_kit.rate_limiting import rate_limited
from resilience_kit.rate_limits import rate_limits
from resilience_kit.retrying import retry_on_429
from resilience_kit.testing.server_windows import RequestWindow, ServerQuota, TokenWindow
from resilience_kit.testing.wire_errors import Dialect, WireError, level_headers, rate_limited as refused
from resilience_kit.virtual_time import VirtualTimeLoop

Range = tuple[float, float]

MINUTE = 60.0
# Seconds that a request takes to the server, part of its latency: no two take the same, so that calls do not arrive
# as far apart as they were sent.
_WAY_TO_SERVER = (0.005, 0.08)
_LONGEST_WAY_IN_LATENCIES = 0.5

_DIALECT = Dialect("full", "retry-after-ms", "azure", responses_remaining_unknown=False)

_numbers = count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the agents do; the two numbers of a range are its least and its most.

    Attributes:
        agents: So many, each with one call at a time.
        calls_per_minute: Calls that each starts at random times; None starts the next with the answer.
        prompt_tokens: Tokens of a call's prompt.
        output_tokens: Tokens of its answer.
        max_tokens: What it asks for as its answer's maximum, and is charged for.
        latency: Seconds from the sending of a call to its answer.
    """

    agents: int
    calls_per_minute: float | None
    prompt_tokens: Range
    output_tokens: Range
    max_tokens: int
    latency: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is kept to: the quota, by server and kit alike, and by the kit also the slots and the seconds between calls.

    Attributes:
        requests_per_minute: The quota's requests.
        tokens_per_minute: The quota's tokens.
        token_window: How the server counts tokens.
        request_window: Over how many seconds of a minute the server evaluates requests too.
        max_concurrent: Calls under way at once.
        min_interval: Seconds between the starts of two calls.
    """

    requests_per_minute: int
    tokens_per_minute: int
    token_window: TokenWindow
    request_window: RequestWindow
    max_concurrent: int
    min_interval: float


@dataclass(slots=True)
class Outcome:
    """What was seen after the warm-up; refusals also in it.

    Attributes:
        calls: Calls that the server admitted.
        tokens: Tokens of their prompts and answers.
        charged_tokens: Tokens that they were charged for.
        refusals: Calls that the server refused, from the start on.
        waits: Seconds that each call was in the kit's queue.
        latencies: Seconds from each call's start, wait and retries included, to its answer.
    """

    calls: int = 0
    tokens: float = 0.0
    charged_tokens: float = 0.0
    refusals: int = 0
    waits: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer as a client returns it, as far as the limit reads it."""

    headers: dict[str, str]


class _RefusedError(Exception):
    """Azure's 429, as its client raises it."""

    def __init__(self, refusal: WireError) -> None:
        super().__init__(refusal.body["error"]["message"])
        self.status_code = refusal.status
        self.headers = refusal.headers


def simulate(workload: Workload, limits: Limits, *, warm_up: float, seconds: float, seed: int) -> Outcome:
    """Let the agents work for so many seconds after a warm-up of so many, and tell what came of it."""
    simulation = _Simulation(workload, limits, warm_up, seed)
    # the caller's thread may run a loop already
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(simulation.run, warm_up + seconds).result()


class _Simulation:
    def __init__(self, workload: Workload, limits: Limits, warm_up: float, seed: int) -> None:
        self._workload = workload
        self._limits = limits
        self._warm_up = warm_up
        self._random = random.Random(seed)  # noqa: S311 - no secret: the same seed must give the same outcome
        self._quota = ServerQuota(
            # where in a fixed window the agents start
            -self._random.uniform(0, MINUTE),
            request_limit=limits.requests_per_minute,
            token_limit=limits.tokens_per_minute,
            period=MINUTE,
            token_window=limits.token_window,
            request_window=limits.request_window,
            count_refused=False,
        )
        self._outcome = Outcome()

    def run(self, seconds: float) -> Outcome:
        name = f"{__name__} {next(_numbers)}"
        with (
            heard_only_by(self._hear),
            rate_limits.private(name),
            asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
        ):
            self._now: Callable[[], float] = runner.get_loop().time
            runner.run(self._work(name, seconds))
        return self._outcome

    async def _work(self, name: str, seconds: float) -> None:
        limits = self._limits

        @retry_on_429(max_retries=3, initial_backoff=1, max_backoff=30, backoff_multiplier=2)
        @rate_limited(
            name,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            max_concurrent=limits.max_concurrent,
            min_interval=limits.min_interval,
            tokens=self._charged,
        )
        async def ask(prompt: int, output: int) -> _Answer:
            return await self._serve(prompt, output)

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(self._agent(ask) for _ in range(self._workload.agents)))

    async def _agent(self, ask: Callable[[int, int], Coroutine[None, None, _Answer]]) -> None:
        due = 0.0
        while True:
            if self._workload.calls_per_minute is not None:
                due += self._random.expovariate(self._workload.calls_per_minute / MINUTE)
                await asyncio.sleep(due - self._now())
            started = self._now()
            with suppress(_RefusedError):
                await ask(self._draw(self._workload.prompt_tokens), self._draw(self._workload.output_tokens))
                if self._now() > self._warm_up:
                    self._outcome.latencies.append(self._now() - started)

    async def _serve(self, prompt: int, output: int) -> _Answer:
        latency = self._random.uniform(*self._workload.latency)
        way = min(self._random.uniform(*_WAY_TO_SERVER), latency * _LONGEST_WAY_IN_LATENCIES)
        await asyncio.sleep(way)
        charged = self._charged(prompt, output)
        refusal = self._quota.admit(self._now(), charged)
        if refusal is not None:
            self._outcome.refusals += 1
            raise _RefusedError(refused(_DIALECT, "chat.completions", "", refusal))
        headers = level_headers(_DIALECT, "chat.completions", self._quota.level(self._now()))
        if self._now() > self._warm_up:
            self._outcome.calls += 1
            self._outcome.tokens += prompt + output
            self._outcome.charged_tokens += charged
        await asyncio.sleep(latency - way)
        return _Answer(headers)

    def _charged(self, prompt: int, output: int) -> int:
        return prompt + self._workload.max_tokens

    def _hear(self, event: Event) -> None:
        if isinstance(event, Admitted) and self._now() > self._warm_up:
            self._outcome.waits.append(event.waited)

    def _draw(self, tokens: Range) -> int:
        return round(self._random.uniform(*tokens))

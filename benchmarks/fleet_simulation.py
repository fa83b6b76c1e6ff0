"""One quota for 1 to 1,000 processes, in virtual time: how refusals, fairness and the store's load grow.

    python -m benchmarks.fleet_simulation            # some minutes
    python -m benchmarks.fleet_simulation --quick    # few processes, and for a short time

The limits are the kit's own, and so is the script, on a real server that is told the virtual time. Only the clock, the
ways over the network, the model's server and the two threads of each process are simulated.
"""

import argparse
import asyncio
import gc
import random
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import redis

from benchmarks.agents import Limits, seconds_to_answer
from benchmarks.fleet import circumstances, store
from benchmarks.oracle import server_of
from resilience_kit import configure
from resilience_kit.fleet.connection import Argument, Connection, Script
from resilience_kit.fleet.fleets import Fleet
from resilience_kit.fleet.membership import Member
from resilience_kit.layers import Call, Parameters
from resilience_kit.rate_limit_parameters import RateLimitConfiguration
from resilience_kit.rate_limits import RateLimit
from resilience_kit.registry import mode
from resilience_kit.server_advice import ServerAdvice
from resilience_kit.settings import current_settings
from resilience_kit.testing import isolated
from resilience_kit.virtual_time import VirtualTimeLoop
from resilience_kit.waiting import TaskWaiting, Waiting

if TYPE_CHECKING:
    from pydantic import SecretStr

# Seconds that a message takes to the store or back, and a request to the model's server: no two take the same, so
# that they do not arrive as far apart as they were sent.
_WAY_TO_STORE, _WAY_TO_SERVER = (0.0002, 0.002), (0.005, 0.08)
_BEAT = (0.8, 1.0)
# the store's clock when a simulation begins, in microseconds
_EPOCH = 1_700_000_000_000_000
_MAXIMA = (200, 400, 800, 1_200)
_CALLERS = 16
_QUOTA, _LARGE_QUOTA = Limits(), Limits(requests=60_000, tokens=15_000_000)
# The quota, for how many of its periods, and for how many processes; few cannot use the large one.
_RUNS = ((_QUOTA, 5, (1, 4, 16, 64, 256, 1_000)), (_LARGE_QUOTA, 2, (64, 256, 1_000)))
_QUICK_RUNS = ((_QUOTA, 0.5, (1, 4)), (_LARGE_QUOTA, 0.1, (1, 4)))

_names = (f"simulation {number} {time.time_ns()}" for number in count())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one simulation; the store's time is its own, and all else is virtual.

    Attributes:
        admitted: Calls that the server admitted, for each process.
        tokens: Their tokens, of all processes.
        refused_at: When it refused one.
        commands: What the store was asked, signs of life and news included.
        store_seconds: Seconds that it was busy with the limit's script.
        store_bytes: What it held in the end.
        took: Real seconds.
    """

    admitted: Sequence[int]
    tokens: int
    refused_at: Sequence[float]
    commands: int
    store_seconds: float
    store_bytes: int
    took: float


class _SimulatedConnection(Connection):
    """The way to a real server that lives in virtual time, and takes some of it."""

    def __init__(self, url: str, chance: random.Random, loop: VirtualTimeLoop) -> None:
        super().__init__(url, deadline=60)
        self.commands = 0
        self._chance, self._loop = chance, loop

    async def run(
        self, waiting: Waiting, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()
    ) -> Any:
        await asyncio.sleep(self._chance.uniform(*_WAY_TO_STORE))
        reply = self.run_blocking(script, keys, arguments)
        await asyncio.sleep(self._chance.uniform(*_WAY_TO_STORE))
        return reply

    def run_blocking(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        self.commands += 1
        # what comes first is the time, -1 for the server's own
        return super().run_blocking(script, keys, [_EPOCH + round(self._loop.time() * 1e6), *arguments[1:]])

    def later(self, function: Callable[[], object]) -> None:
        """Call a function when a message has come to the store."""
        self._loop.call_later(self._chance.uniform(*_WAY_TO_STORE), function)


class _SimulatedMember(Member):
    """A process among the others, as far as a limit knows it: in one loop with them, where the real one has threads."""

    def __init__(self, number: int, connection: _SimulatedConnection, everyone: "list[_SimulatedMember]") -> None:
        super().__init__(connection)
        self.id = f"{number:016x}"
        self._store = connection
        self._everyone = everyone
        everyone.append(self)

    def start(self) -> None:
        """Begin no thread: `beat` is called from outside."""

    def soon(self, function: Callable[[], object]) -> None:
        self._store.later(function)

    def tell_news(self, kind: str, name: str, **values: Any) -> None:
        self._store.commands += 1
        for other in self._everyone:
            if other is not self:
                for function in other._at_news.get(kind, ()):  # noqa: SLF001 - its own class
                    self._store.later(partial(function, {**values, "name": name}))

    def beat(self) -> None:
        """Do what the worker does each second; the sign of life itself is counted and not sent."""
        self.live = len(self._everyone)
        self._store.commands += 1
        for function in self._at_beat:
            function()


class Simulation:
    """One quota and its processes, each with callers that ask as soon as they are answered."""

    def __init__(self, url: str, processes: int, quota: Limits, periods: float, seed: int = 1) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - no secret: the same seed must give the same outcome
        self._url = url
        self._processes = processes
        self._quota = quota
        self._periods = periods
        self._server = server_of(quota, -self._chance.uniform(0, quota.period))
        self._loop = VirtualTimeLoop()
        self._connection = _SimulatedConnection(url, self._chance, self._loop)
        self.admitted = [0] * processes
        self.tokens = 0
        self.refused_at: list[float] = []

    def run(self) -> Outcome:
        """Let time pass, and look at what the store says of itself."""
        started = time.perf_counter()
        with redis.Redis.from_url(self._url) as client:
            client.flushall()
            client.config_resetstat()
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._live())
            used: Any = client.info("commandstats")
            keys: Any = list(client.scan_iter())
            sizes = [cast("int", client.memory_usage(key, samples=0)) for key in keys]
        self._connection.close()
        return Outcome(
            self.admitted,
            self.tokens,
            self.refused_at,
            self._connection.commands,
            used["cmdstat_evalsha"]["usec"] / 1e6,
            sum(sizes),
            time.perf_counter() - started,
        )

    async def _live(self) -> None:
        name = next(_names)
        everyone: list[_SimulatedMember] = []
        members = [_SimulatedMember(number, self._connection, everyone) for number in range(self._processes)]
        limits = [self._joined(name, member) for member in members]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._periods * self._quota.period), asyncio.TaskGroup() as group:
                for number, (limit, member) in enumerate(zip(limits, members, strict=True)):
                    group.create_task(self._beat(member))
                    for _ in range(_CALLERS):
                        group.create_task(self._ask(number, limit))

    def _joined(self, name: str, member: _SimulatedMember) -> RateLimit:
        """A process's limit."""
        settings = current_settings()
        fleet = Fleet(self._connection, member)
        key = (cast("SecretStr", settings.resilience_store), settings.resilience_store_prefix)
        mode.fleets[(*key, settings.resilience_store_deadline_seconds)] = fleet
        slots = self._processes * _CALLERS
        return RateLimit(
            name, RateLimitConfiguration(self._quota.requests, self._quota.tokens, slots, 0, self._quota.period)
        )

    async def _beat(self, member: _SimulatedMember) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(*_BEAT))
            member.beat()

    async def _ask(self, process: int, limit: RateLimit) -> None:
        # not all in one moment
        await asyncio.sleep(self._chance.uniform(0, 1))
        while True:
            maximum = self._chance.choice(_MAXIMA)
            tokens = self._chance.randint(100, 900) + maximum
            ticket = limit.acquire(Call((), {}, Parameters(), TaskWaiting()), tokens, 0, None)
            if isinstance(ticket, Coroutine):
                ticket = await ticket
            await asyncio.sleep(self._chance.uniform(*_WAY_TO_SERVER))
            refusal = self._server.admit(self._loop.time(), tokens)
            if refusal is None:
                self.admitted[process] += 1
                self.tokens += tokens
                await asyncio.sleep(seconds_to_answer(maximum, self._quota.period))
            else:
                self.refused_at.append(self._loop.time())
                limit.refused(ticket, ServerAdvice(retry_after=refusal.retry_after, exhausted=refusal.reason))
            limit.release(ticket, sent=True)


def line(processes: int, quota: Limits, periods: float, outcome: Outcome) -> str:
    """A row of the table, in Markdown."""
    seconds = periods * quota.period
    steady = sum(at > quota.period for at in outcome.refused_at)
    calls = outcome.admitted
    fairness = sum(calls) ** 2 / (len(calls) * sum(number**2 for number in calls) or 1)
    return (
        f"| {processes:,} | {quota.requests:,} | {len(outcome.refused_at)}, {steady} | "
        f"{outcome.tokens / (quota.tokens * max(1, periods)):.2f} | {min(calls)} to {max(calls)}, {fairness:.2f} | "
        f"{outcome.commands / seconds:,.0f} | {100 * outcome.store_seconds / seconds:.2f} % | "
        f"{outcome.store_bytes / 1_000:.0f} kB |"
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Run all simulations, and print the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet_simulation", description="Up to 1,000 processes.")
    parser.add_argument("--quick", action="store_true", help="few processes, and for a short time")
    quick = parser.parse_args(arguments).quick
    print(
        "| processes | requests a minute | 429s, after the first minute | of the quota | calls a process, Jain | "
        "store commands a second | store busy | store holds |\n|---|---|---|---|---|---|---|---|"
    )
    with store() as url, isolated():
        configure(store=url)
        for quota, periods, fleets in _QUICK_RUNS if quick else _RUNS:
            for processes in fleets:
                outcome = Simulation(url, processes, quota, periods).run()
                print(line(processes, quota, periods, outcome), f"{outcome.took:.0f} s", flush=True)
                gc.collect()
        print(f"\n{circumstances(url)}")


if __name__ == "__main__":
    main(sys.argv[1:])

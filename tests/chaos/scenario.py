"""What one seed stands for: who calls, under which limits, what goes wrong at the service, and what disturbs the calls.

All of it is drawn before anything runs, so that a seed gives the same plan on every machine. What the plan does not
hold is how the scheduler interleaves threads and tasks: only the scenarios in virtual time repeat to the last step.
"""

import random
from dataclasses import dataclass, fields

from resilience_kit.testing import Fault

# How many of a hundred seeds each kind of scenario gets; what is dear to run gets few.
KINDS = {
    "virtual": 20,  # tasks in virtual time, on a service without a network: exact to the step
    "tasks": 22,  # decorated coroutine functions and async generators over the openai SDK
    "threads": 13,  # decorated functions and generators in threads
    "async client": 10,  # ResilientAsyncAzureOpenAI and ResilientAsyncOpenAI
    "sync client": 9,  # ResilientAzureOpenAI and ResilientOpenAI in threads
    "cancellation": 9,  # one call, cancelled at each of its await points in turn
    "loops": 5,  # event loops that are closed over calls under way, and others beside and after them
    "agents": 4,  # examples/multi_agent
    "store": 4,  # a fleet of one whose store is killed, stopped and started anew
    "processes": 4,  # a fleet whose processes are killed, and its store too
}

# How many a fleet has.
PROCESSES = 3

# Every fault that the simulator has, with arguments for a test that is short.
FAULTS = {
    "rate_limit": lambda chance: Fault.rate_limit(retry_after=chance.choice((None, 0.02, 0.1))),
    "capacity": lambda chance: Fault.capacity(retry_after=chance.choice((0.05, 0.2, 300.0))),
    "insufficient_quota": lambda chance: Fault.insufficient_quota(),
    "token_quota": lambda chance: Fault.token_quota(),
    "internal_error": lambda chance: Fault.internal_error(),
    "unavailable": lambda chance: Fault.unavailable(retry_after=chance.choice((None, 0.05))),
    "content_filter": lambda chance: Fault.content_filter(),
    "output_filter": lambda chance: Fault.output_filter(),
    "connection_reset": lambda chance: Fault.connection_reset(),
    "time_out": lambda chance: Fault.time_out(),
    "cut_mid_stream": lambda chance: Fault.cut_mid_stream(after=chance.randrange(6)),
    "slow_stream": lambda chance: Fault.slow_stream(delay=chance.choice((0.005, 0.02))),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The quota that the kit is to keep to."""

    requests: int
    tokens: int
    period: float
    max_concurrent: int
    min_interval: float
    max_wait: float | None
    adaptive: bool | str


@dataclass(frozen=True, slots=True)
class Service:
    """How the simulator is set up: `quota` is the share of the kit's limits that it admits; None is all that comes."""

    quota: float | None
    token_window: str
    request_window: int
    headers: str
    spelling: str
    latency: tuple[float, float]
    fault_rate: float
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Resilience:
    """Retries, circuit and budget."""

    max_retries: int
    backoff: float
    failure_threshold: int
    recovery_timeout: float
    success_threshold: int
    half_open_max_calls: int
    budget_tokens: int | None


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What happens to calls and to what is around them. Shares are of the calls, and `at` is in seconds.

    Attributes:
        cancelled: Share that is cancelled at a random moment.
        timed_out: Share that has a time-out around it.
        dying: Share whose thread dies in the call, or whose function raises what is no Exception.
        left: Share of streams that are broken off or dropped before their end.
        clock_jumps: When the wall clock jumps, and by how many seconds; the service's clock does not.
        interruptions: When a store or a process is killed, stopped or started anew, or a loop is closed.
    """

    cancelled: float
    timed_out: float
    dying: float
    left: float
    clock_jumps: tuple[tuple[float, float], ...]
    interruptions: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One seed's plan."""

    seed: int
    kind: str
    calls: int
    callers: int
    streams: float
    client_timeout: float
    limits: Limits
    service: Service
    resilience: Resilience
    disturbances: Disturbances

    def __str__(self) -> str:
        return "\n    ".join(f"{field.name}: {getattr(self, field.name)!r}" for field in fields(self))


@dataclass(frozen=True, slots=True)
class Order:
    """One call of a scenario: when it starts, what it asks, and what is done to it.

    Attributes:
        is_stream: Whether the answer is streamed.
        items: A stream is left after so many items; None reads it to its end.
        is_dropped: Whether a stream that is left is dropped instead of closed.
        pause: Seconds that a stream's reader takes for each of the first three items.
        cancelled_after: Seconds after its start.
        timeout: Seconds that it may take.
        dies: Whether the thread or the function dies in the call.
    """

    number: int
    start: float
    prompt: str
    max_tokens: int
    is_stream: bool
    items: int | None
    is_dropped: bool
    pause: float
    cancelled_after: float | None
    timeout: float | None
    dies: bool

    @property
    def tokens(self) -> int:
        """What the simulator charges: a token for each four characters begun, and the most that the answer may have."""
        return -(-len(self.prompt) // 4) + self.max_tokens


def draw(seed: int) -> Scenario:
    """Return the plan of a seed."""
    chance = random.Random(seed)
    kind = chance.choices(tuple(KINDS), weights=tuple(KINDS.values()))[0]
    calls = chance.randint(4, 9) if kind in ("agents", "cancellation") else chance.randint(8, 24)
    return Scenario(
        seed=seed,
        kind=kind,
        calls=calls,
        callers=chance.randint(2, 6),
        streams=chance.choice((0.0, 0.3, 0.7)),
        client_timeout=chance.uniform(0.12, 0.3),
        limits=_draw_limits(chance, kind, calls),
        service=_draw_service(chance, kind),
        resilience=_draw_resilience(chance, kind, calls),
        disturbances=_draw_disturbances(chance, kind),
    )


def orders_of(scenario: Scenario) -> list[Order]:
    """Return the calls of a scenario, drawn from its seed."""
    chance = random.Random(f"orders of {scenario.seed}")
    shares = scenario.disturbances
    return [
        Order(
            number=number,
            start=chance.uniform(0, 0.25),
            prompt=f"question {number:03}" + " and" * chance.randrange(12),
            max_tokens=chance.choice((8, 16, 40)),
            is_stream=chance.random() < scenario.streams,
            items=chance.randrange(1, 5) if chance.random() < shares.left else None,
            is_dropped=chance.random() < 0.5,
            pause=chance.choice((0.0, 0.0, 0.03)),
            cancelled_after=chance.uniform(0, 0.4) if chance.random() < shares.cancelled else None,
            timeout=chance.uniform(0.001, 0.4) if chance.random() < shares.timed_out else None,
            dies=chance.random() < shares.dying,
        )
        for number in range(scenario.calls)
    ]


def _draw_limits(chance: random.Random, kind: str, calls: int) -> Limits:
    # of a size that lets all calls through in a few periods, and still makes most of them wait
    is_slow = kind in ("store", "processes", "agents")
    period = chance.uniform(0.8, 1.2) if is_slow else chance.uniform(0.2, 0.6)
    # Without its store each process of a fleet has a part of each window's quota, and at least one request: of a quota
    # that is smaller than their number there is no such part.
    least = 6 * PROCESSES if kind == "processes" else 6
    return Limits(
        requests=chance.randint(max(least, calls // 2), max(least, 3 * calls)) if kind != "cancellation" else 6_000,
        tokens=chance.randint(25, 60) * calls if kind not in ("agents", "cancellation") else 50_000,
        period=period,
        max_concurrent=chance.randint(1, 6),
        min_interval=chance.choice((0.0, 0.0, 0.003)),
        max_wait=chance.choice((None, None, chance.uniform(0.0, 2 * period))),
        adaptive=chance.choice((True, True, "latency", False)),
    )


def _draw_service(chance: random.Random, kind: str) -> Service:
    chosen = chance.sample(tuple(FAULTS), chance.randint(2, len(FAULTS)))
    least = chance.uniform(0, 0.03)
    return Service(
        quota=chance.choice((None, None, 1.0, 0.7)) if kind != "cancellation" else None,
        token_window=chance.choice(("fixed", "sliding")),
        request_window=chance.choice((1, 10, 10)),
        headers=chance.choice(("full", "full", "remaining", "off")),
        # "retry-after" is in whole seconds, and so is a date: seldom, or all scenarios would wait for them
        spelling=chance.choices(
            ("retry-after-ms", "x-ms-retry-after-ms", "x-ratelimit-reset", "none", "message", "retry-after-date"),
            weights=(5, 3, 3, 3, 1, 1),
        )[0],
        latency=(least, least + chance.uniform(0, 0.05)),
        fault_rate=chance.choice((0.0, 0.1, 0.3, 0.6)) if kind != "cancellation" else 0.0,
        faults=tuple(FAULTS[name](chance) for name in chosen),
    )


def _draw_resilience(chance: random.Random, kind: str, calls: int) -> Resilience:
    return Resilience(
        max_retries=chance.randint(0, 3),
        backoff=chance.uniform(0.005, 0.05),
        failure_threshold=chance.randint(1, 5),
        recovery_timeout=chance.uniform(0.02, 0.3),
        success_threshold=chance.randint(1, 3),
        half_open_max_calls=chance.randint(1, 2),
        # that of several processes counts what all of them use, and no one of them knows what that is
        budget_tokens=chance.choice((None, 1_000_000, 40 * calls)) if kind != "processes" else None,
    )


def _draw_disturbances(chance: random.Random, kind: str) -> Disturbances:
    is_cut = kind != "cancellation"
    jumps = chance.choice((0, 0, 1, 3)) if kind not in ("virtual", "cancellation", "processes") else 0
    return Disturbances(
        cancelled=chance.choice((0.0, 0.2, 0.6)) if is_cut else 0.0,
        timed_out=chance.choice((0.0, 0.2)) if is_cut else 0.0,
        dying=chance.choice((0.0, 0.0, 0.2)) if is_cut else 0.0,
        left=chance.choice((0.0, 0.3, 0.6)),
        clock_jumps=tuple(
            (chance.uniform(0, 0.4), chance.choice((-1, 1)) * chance.uniform(60, 86_400)) for _ in range(jumps)
        ),
        interruptions=tuple(
            (chance.uniform(0, 0.6), chance.choice(("kill", "stop", "restart"))) for _ in range(chance.randint(1, 3))
        ),
    )

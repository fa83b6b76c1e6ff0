"""The same questions with the bare client and with the kit: how each run went, side by side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from examples.multi_agent.model_calls import QUOTA
from examples.multi_agent.service import Service
from examples.multi_agent.system import Answer, LostAnswer, MultiAgentSystem
from examples.multi_agent.telemetry import OPERATIONS, REGIONS, Telemetry
from examples.multi_agent.traffic import Traffic

QUESTIONS = (
    "How many requests failed, and what is 2**64 - 1?",
    "Which region has the most errors?",
    "What is sqrt(2) * sqrt(8)?",
    "What was the p95 latency of each operation?",
    *(f"What was the error rate in {region}, and how much is 15% of 4,200?" for region in REGIONS),
    *(f"What was the average latency of {operation} by region?" for operation in OPERATIONS),
    *(f"What is {number}**{number} - {number}?" for number in range(11, 19)),
    *(f"How many requests for {operation} were there, and what is 1/3 - 1/7?" for operation in OPERATIONS),
    *(f"What was the slowest operation in {region}?" for region in REGIONS),
)

_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Run:
    """How one run went. What only the kit counts is None for the bare client."""

    answers: Sequence[Answer | LostAnswer]
    requests: int
    refused: int
    tokens: int
    retries: int
    seconds: float
    seconds_waited: float | None = None
    circuit: str | None = None

    @property
    def lost(self) -> list[LostAnswer]:
        """The questions without an answer."""
        return [answer for answer in self.answers if isinstance(answer, LostAnswer)]


async def run(
    service: Service,
    telemetry: Telemetry,
    questions: Sequence[str],
    *,
    protected: bool,
    on_answer: Callable[[Answer | LostAnswer], None] = lambda _: None,
) -> Run:
    """Ask all questions, with the kit or with the bare client."""
    traffic = Traffic()
    client = service.client(traffic, protected=protected)
    system = MultiAgentSystem(client, service.deployment, telemetry, limits=service.limits, protected=protected)
    started = time.monotonic()
    async with system:
        answers = await system.ask_all(questions, concurrency=_CONCURRENCY, on_answer=on_answer)
    seconds = time.monotonic() - started
    requests, refused, tokens = _as_the_service_saw_it(service, traffic)
    if not protected:
        return Run(answers, requests, refused, tokens, traffic.retries, seconds)
    stats = system.get_resilience_stats()
    retries = stats["retries"].values()
    return Run(
        answers,
        requests,
        refused,
        tokens,
        retries=sum(counters["retries"] for counters in retries),
        seconds=seconds,
        seconds_waited=stats["rate_limiters"][QUOTA]["seconds_waited"]
        + sum(counters["seconds_waited"] for counters in retries),
        circuit=stats["global_resilience"]["circuit_breaker"]["state"],
    )


def side_by_side(runs: dict[str, Run]) -> Table:
    """Return a table with a column for each run."""
    table = Table("", *runs, title="The same questions, the same quota")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Callable[[Run], str]] = {
        "questions": lambda run: f"{len(run.answers)}",
        "lost answers": lambda run: f"{len(run.lost)}",
        "requests": lambda run: f"{run.requests}",
        "refused with 429": lambda run: f"{run.refused}",
        "retries": lambda run: f"{run.retries}",
        "tokens used": lambda run: f"{run.tokens:,}",
        "calls waited, together": lambda run: (
            "not told" if run.seconds_waited is None else f"{run.seconds_waited:.1f} s"
        ),
        "circuit": lambda run: run.circuit or "none",
        "time": lambda run: f"{run.seconds:.1f} s",
    }
    for name, text in rows.items():
        table.add_row(name, *map(text, runs.values()))
    return table


def _or_unknown(seconds: float | None) -> str:
    return "not told" if seconds is None else f"{seconds:.1f} s"


def _as_the_service_saw_it(service: Service, traffic: Traffic) -> tuple[int, int, int]:
    """Return requests, refusals and tokens: what the simulator counted; on Azure what the client did."""
    if service.simulator is None:
        return traffic.requests, traffic.refused, traffic.tokens
    stats = service.simulator.stats
    return stats.requests, stats.refused, stats.prompt_tokens + stats.completion_tokens

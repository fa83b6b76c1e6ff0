"""What is exported, under which names: the one place where they are written.

A metric has one base for both worlds: "calls_admitted" is `resilience_kit_calls_admitted_total` for Prometheus and
`resilience_kit.calls_admitted` for OpenTelemetry. All but the `gen_ai` names are the kit's own.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "seconds", "tokens", "usd"]

PREFIX = "resilience_kit"

# What tells the names of a section apart.
LABELS: Mapping[str, str] = {
    "rate_limiters": "limit",
    "circuit_breakers": "circuit",
    "retries": "function",
    "token_budgets": "agent",
    "agents": "agent",
    "models": "model",
}

# Names may be the users' of a program: what comes after so many is added up under one, and what is longer is cut.
MOST_VALUES = 1_000
LONGEST_VALUE = 100
OTHER = "other"
_HASH = 8

STATES = ("CLOSED", "HALF_OPEN", "OPEN")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        base: Its name without prefix, unit and suffix.
        kind: What it is: a counter only rises.
        section: The section of `get_all_resilience_stats()` that has it.
        sources: Its value there: the key; or the keys, by the value of one more label that tells them apart.
        text: What it means.
        unit: What it is counted in; "" for a number of things.
        label: The name of that label.
    """

    base: str
    kind: Kind
    section: str
    sources: Mapping[str, str]
    text: str
    unit: Unit = ""
    label: str | None = None

    @property
    def prometheus(self) -> str:
        """The name of its family in Prometheus; samples of a counter have "_total" after it."""
        return "_".join(part for part in (PREFIX, self.base, self.unit) if part)

    @property
    def opentelemetry(self) -> str:
        """Its name in OpenTelemetry, where the unit of a time stands beside it."""
        return ".".join((PREFIX, self.base, *([self.unit] if self.unit in ("tokens", "usd") else [])))

    @property
    def opentelemetry_unit(self) -> str:
        """Its unit, in the spelling of UCUM."""
        return {"": "1", "seconds": "s", "tokens": "{token}", "usd": "USD"}[self.unit]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""
        return (LABELS[self.section], *([self.label] if self.label else []))

    def values(self, section: Mapping[str, Mapping[str, Any]], names: "Names") -> dict[tuple[str, ...], float]:
        """Its values by those of its labels; what is shown under one name is added up."""
        found: dict[tuple[str, ...], float] = {}
        for name, stats in section.items():
            for source, value in self.sources.items():
                amount = stats.get(source)
                # a budget without a bound has None
                if amount is not None:
                    key = (names.shown(name), value) if self.label else (names.shown(name),)
                    found[key] = found.get(key, 0) + amount
        return found


@dataclass(slots=True)
class Names:
    """The names of one section as they are shown: of bounded number and length, and each always the same."""

    _shown: dict[str, str] = field(default_factory=dict)

    def shown(self, name: str) -> str:
        """What is shown of a name."""
        shown = self._shown.get(name)
        if shown is None:
            if len(self._shown) >= MOST_VALUES:
                return OTHER
            shown = self._shown[name] = _cut(name)
        return shown


def sendable(text: str) -> str:
    """A text without half surrogate pairs, which no text that is sent can have."""
    return text.encode("utf-8", "replace").decode()


def _cut(name: str) -> str:
    text = sendable(name)
    if len(text) <= LONGEST_VALUE:
        return text
    # the start alone might be another one's too
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]
    return f"{text[: LONGEST_VALUE - _HASH - 1]}~{digest}"


def _metrics(section: str, *rows: tuple[str, Kind, str, str] | tuple[str, Kind, str, str, Unit]) -> Iterator[Metric]:
    for base, kind, source, text, *unit in rows:
        yield Metric(base, kind, section, {source: ""}, text, *unit)


def _tokens(base: str, section: str, whose: str) -> Metric:
    sources = {"prompt_tokens": "prompt", "completion_tokens": "completion"}
    return Metric(base, "counter", section, sources, f"Tokens that {whose} used.", "tokens", "kind")


METRICS: tuple[Metric, ...] = (
    *_metrics(
        "rate_limiters",
        ("calls_admitted", "counter", "calls_admitted", "Calls that got a slot and quota."),
        ("calls_delayed", "counter", "calls_delayed", "Calls that waited for it."),
        ("calls_refused", "counter", "calls_refused", "Calls that would have waited too long, and were not sent."),
        ("calls_rate_limited", "counter", "calls_rate_limited", "Calls that the server refused with a 429."),
        ("admitted", "counter", "tokens_admitted", "Tokens that admitted calls were estimated at.", "tokens"),
        ("quota_tightened", "counter", "tightened_by_server", "Times that the server said that there is less room."),
        ("quota_relaxed", "counter", "relaxed_again", "Times that a part of it was tried again."),
        ("calls_in_flight", "gauge", "in_flight", "Calls under way now."),
        ("calls_in_flight_limit", "gauge", "max_concurrent", "Most calls under way at once."),
        ("calls_waiting", "gauge", "waiting", "Calls that wait now."),
        ("window_requests", "gauge", "requests_in_window", "Requests in the quota's window now."),
        ("window_requests_limit", "gauge", "requests_per_minute", "The quota of requests in a window."),
        ("window_used", "gauge", "tokens_in_window", "Tokens in the quota's window now.", "tokens"),
        ("window_limit", "gauge", "tokens_per_minute", "The quota of tokens in a window.", "tokens"),
        ("window", "gauge", "period", "The length of the quota's window.", "seconds"),
    ),
    *_metrics(
        "circuit_breakers",
        ("circuit_opened", "counter", "times_opened", "Times that the circuit opened."),
        ("circuit_closed", "counter", "times_closed", "Times that the circuit closed."),
        ("circuit_calls_refused", "counter", "calls_refused", "Calls that the open circuit refused."),
        ("circuit_failures", "gauge", "failure_count", "Failures in a row."),
        ("circuit_trials_in_flight", "gauge", "trials_in_flight", "Trials of the half-open circuit under way now."),
    ),
    *_metrics(
        "retries",
        ("retries", "counter", "retries", "Attempts after the first."),
        ("retry_wait", "counter", "seconds_waited", "Time that calls waited before them.", "seconds"),
        ("calls_recovered", "counter", "calls_recovered", "Calls that succeeded after a retry."),
        ("calls_given_up", "counter", "calls_given_up", "Calls that failed after all retries."),
    ),
    *_metrics(
        "token_budgets",
        ("budget_calls_refused", "counter", "calls_refused", "Calls that the budget refused."),
        ("budget_calls_delayed", "counter", "calls_delayed", "Calls that waited for the budget's next period."),
        ("budget_wait", "counter", "seconds_waited", "Time that they waited.", "seconds"),
        ("budget_limit", "gauge", "budget_tokens", "The budget of a period.", "tokens"),
        ("budget_used", "gauge", "tokens_used", "What of it is used.", "tokens"),
        ("budget_reserved", "gauge", "tokens_reserved", "What of it is held for calls under way.", "tokens"),
        ("budget_limit", "gauge", "budget_usd", "The budget of a period.", "usd"),
        ("budget_used", "gauge", "usd_used", "What of it is used.", "usd"),
        ("budget_reserved", "gauge", "usd_reserved", "What of it is held for calls under way.", "usd"),
        ("budget_period_left", "gauge", "seconds_left", "Time until the budget's next period.", "seconds"),
    ),
    *_metrics(
        "agents",
        ("agent_calls", "counter", "calls", "Calls of the agent that ended well."),
        ("agent_reserved", "counter", "tokens_reserved", "Tokens that were reserved for its calls.", "tokens"),
        ("agent_cost", "counter", "usd", "What its calls cost, where their price is known.", "usd"),
        ("agent_calls_of_unknown_price", "counter", "calls_of_unknown_price", "Calls whose price is not known."),
        ("agent_truncations", "counter", "truncations", "Prompts that were cut."),
        ("agent_truncated", "counter", "tokens_truncated", "Tokens that were cut off.", "tokens"),
    ),
    _tokens("agent", "agents", "the agent's calls"),
    *_metrics(
        "models",
        ("model_calls", "counter", "calls", "Calls that the model answered."),
        ("model_cost", "counter", "usd", "What they cost, where the price is known.", "usd"),
        ("model_calls_of_unknown_price", "counter", "calls_of_unknown_price", "Calls whose price is not known."),
    ),
    _tokens("model", "models", "the model's calls"),
)

# Of one metric there are three series, and the one of the state in which the circuit is has the value 1.
CIRCUIT_STATE = Metric(
    "circuit_state",
    "gauge",
    "circuit_breakers",
    {"state": ""},
    "Whether the circuit is in this state: 1 or 0.",
    "",
    "state",
)
WAIT = Metric("wait", "histogram", "rate_limiters", {"wait": ""}, "Time until calls were admitted.", "seconds")
ANSWER = Metric(
    "answer", "histogram", "rate_limiters", {"answer": ""}, "Time from there to the end of their answers.", "seconds"
)
HISTOGRAMS = (WAIT, ANSWER)


def states(section: Mapping[str, Mapping[str, Any]], names: Names) -> dict[tuple[str, ...], float]:
    """The values of `CIRCUIT_STATE`; circuits that are shown under one name are in each of their states."""
    found: dict[tuple[str, ...], float] = {}
    for name, stats in section.items():
        for state in STATES:
            key = (names.shown(name), state)
            found[key] = max(found.get(key, 0), float(stats.get("state") == state))
    return found


def names_by_section(sections: Iterable[str] = LABELS) -> dict[str, Names]:
    """An empty book of names for each section."""
    return {section: Names() for section in sections}


# OpenTelemetry's semantic conventions for generative AI: names, attributes and the bounds of buckets.
TOKEN_USAGE = "gen_ai.client.token.usage"  # noqa: S105 - no secret
OPERATION_DURATION = "gen_ai.client.operation.duration"
OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
AGENT_NAME = "gen_ai.agent.name"
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - no secret
TOKEN_USAGE_BOUNDS = tuple(float(4**power) for power in range(14))
OPERATION_DURATION_BOUNDS = tuple(0.01 * 2**power for power in range(14))

# What a span is told of, by the name of the event's type.
SPAN_EVENTS: Mapping[str, str] = {
    "Waiting": f"{PREFIX}.waiting",
    "WaitRefused": f"{PREFIX}.wait_refused",
    "RateLimited": f"{PREFIX}.rate_limited",
    "Retrying": f"{PREFIX}.retrying",
    "RetriesRecovered": f"{PREFIX}.retries_recovered",
    "RetriesExhausted": f"{PREFIX}.retries_exhausted",
    "CircuitOpened": f"{PREFIX}.circuit_opened",
    "CircuitHalfOpened": f"{PREFIX}.circuit_half_opened",
    "CircuitClosed": f"{PREFIX}.circuit_closed",
    "CircuitRefused": f"{PREFIX}.circuit_refused",
    "BudgetWaiting": f"{PREFIX}.budget_waiting",
    "BudgetRefused": f"{PREFIX}.budget_refused",
    "Truncated": f"{PREFIX}.truncated",
}
WAIT_SPAN = f"{PREFIX}.wait"

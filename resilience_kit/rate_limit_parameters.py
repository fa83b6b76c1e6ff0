"""What is declared of a limit, what it is made of by that and by the settings, and what it tells of itself."""

from dataclasses import dataclass

from resilience_kit.quota_lessons import Adaptive
from resilience_kit.registry import Value, effective

PERIOD = 60.0


@dataclass(frozen=True, slots=True)
class RateLimitConfiguration:
    """What a decorator says of a limit; None for what it leaves to the settings."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    min_interval: float | None = None
    period: float | None = None
    adaptive: Adaptive | None = None


@dataclass(frozen=True, slots=True)
class RateLimitStatistics:
    """Where a limit stands now: counts of calls and tokens, and of its quota's window; `paused` is 1 or 0.

    Those that were admitted are the ones that no event told of.
    """

    in_flight: int
    max_concurrent: int
    paused: int
    waiting: int
    requests_in_window: int
    requests_per_minute: int
    tokens_in_window: int
    tokens_per_minute: int
    period: float
    calls_admitted: int
    tokens_admitted: int


def effective_parameters(configuration: RateLimitConfiguration) -> dict[str, Value]:
    """What a limit is made of, from what was declared and from the settings."""
    interval = effective(configuration.min_interval, setting="min_request_interval_ms")
    if interval.source != "argument":
        interval = Value(interval.value / 1000, interval.source)
    return {
        "requests_per_minute": effective(configuration.requests_per_minute, setting="requests_per_minute"),
        "tokens_per_minute": effective(configuration.tokens_per_minute, setting="tokens_per_minute"),
        "max_concurrent": effective(configuration.max_concurrent, setting="max_concurrent_requests"),
        "min_interval": interval,
        "period": effective(configuration.period, PERIOD),
        "adaptive": effective(configuration.adaptive, default=True),
    }

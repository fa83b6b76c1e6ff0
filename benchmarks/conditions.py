"""The server of the benchmarks of quotas, and what it says of its limits."""

from dataclasses import dataclass

from benchmarks.agents import Limits, simulated_latency
from resilience_kit import count_tokens
from resilience_kit.testing import AzureOpenAISimulator
from resilience_kit.testing.wire_errors import Headers, RetryAfterSpelling


@dataclass(frozen=True, slots=True)
class Condition:
    """What the server says of its limits."""

    name: str
    meaning: str
    headers: Headers
    retry_after_spelling: RetryAfterSpelling


CONDITIONS = (
    Condition("with headers", "x-ratelimit-*, and retry-after-ms in a 429", "full", "retry-after-ms"),
    Condition("without", "a 429 says nothing but that", "off", "none"),
)


def simulator(condition: Condition, limits: Limits) -> AzureOpenAISimulator:
    """Return a server that is not yet started; its answers take as long as those of a model."""
    return AzureOpenAISimulator(
        rpm=limits.requests,
        tpm=limits.tokens,
        period=limits.period,
        token_window="fixed",  # noqa: S106 - tokens of text, no secret
        request_window=10,
        count_prompt=count_tokens,
        latency=simulated_latency(limits.period),
        headers=condition.headers,
        retry_after_spelling=condition.retry_after_spelling,
    )

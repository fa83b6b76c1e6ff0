"""What a simulated server says of its limits in the benchmarks of quotas."""

from dataclasses import dataclass

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

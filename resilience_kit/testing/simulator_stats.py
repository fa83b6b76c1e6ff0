"""What a simulator saw: the books that it keeps, and the frozen snapshot that a test reads."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Admission:
    """One request that the quota admitted.

    Attributes:
        time: When it was admitted, in seconds of `time.monotonic()`.
        tokens: What it was charged.
    """

    time: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Rejection:
    """One request that was answered with 429.

    Attributes:
        time: When it was refused, in seconds of `time.monotonic()`.
        tokens: What it would have been charged.
        reason: "requests" or "tokens" (the quota), or the fault's kind.
    """

    time: float
    tokens: float
    reason: str


@dataclass(frozen=True, slots=True)
class SimulatorStats:
    """A snapshot of what a simulator saw since its start or its last reset.

    Attributes:
        requests: All requests, also those that were malformed or without a key.
        admitted: Those that the quota admitted.
        refused: Those that were answered with 429, by the quota or by a fault.
        refused_by: How many were refused for each reason: "requests" or "tokens" (the quota), or the fault's kind.
        faults: Faults that happened.
        tokens_charged: Tokens charged to the quota.
        prompt_tokens: What `usage` said of prompts.
        completion_tokens: What `usage` said of completions.
        streams_cut: Bodies that were cut by a fault.
        in_flight: Requests that are being answered, or whose stream is being read.
        max_in_flight: The most that `in_flight` has been.
        admissions: The admitted requests, oldest first.
        rejections: The refused requests, oldest first.

    Example:
        >>> from resilience_kit.azure import ResilientAzureOpenAI
        >>> from resilience_kit.testing import AzureOpenAISimulator
        >>> with AzureOpenAISimulator() as azure:
        ...     client = ResilientAzureOpenAI(**azure.client_options())
        ...     response = client.responses.create(model="gpt-4o", input="Hello!")
        ...     client.close()
        >>> azure.stats.admitted, azure.stats.peak_requests(seconds=60)
        (1, 1)
    """

    requests: int
    admitted: int
    refused: int
    refused_by: Mapping[str, int]
    faults: int
    tokens_charged: float
    prompt_tokens: int
    completion_tokens: int
    streams_cut: int
    in_flight: int
    max_in_flight: int
    admissions: tuple[Admission, ...]
    rejections: tuple[Rejection, ...]

    def peak_requests(self, seconds: float) -> int:
        """Return the most requests that were admitted within any while.

        Args:
            seconds: The length of the while.
        """
        return int(_peak([(admission.time, 1) for admission in self.admissions], seconds))

    def peak_tokens(self, seconds: float) -> float:
        """Return the most tokens that were charged within any while.

        Args:
            seconds: The length of the while.
        """
        return _peak([(admission.time, admission.tokens) for admission in self.admissions], seconds)


@dataclass(slots=True)
class Books:
    """The counters behind the snapshot; whoever shares them between threads holds a lock."""

    requests: int = 0
    faults: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    streams_cut: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    admissions: list[Admission] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)

    def snapshot(self) -> SimulatorStats:
        """Return what the counters say now."""
        return SimulatorStats(
            requests=self.requests,
            admitted=len(self.admissions),
            refused=len(self.rejections),
            refused_by=MappingProxyType(dict(Counter(rejection.reason for rejection in self.rejections))),
            faults=self.faults,
            tokens_charged=sum(admission.tokens for admission in self.admissions),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            streams_cut=self.streams_cut,
            in_flight=self.in_flight,
            max_in_flight=self.max_in_flight,
            admissions=tuple(self.admissions),
            rejections=tuple(self.rejections),
        )


def _peak(amounts: list[tuple[float, float]], seconds: float) -> float:
    """Return the largest sum within any window of so many seconds, its start excluded and its end included."""
    inside: deque[tuple[float, float]] = deque()
    total = peak = 0.0
    for time, amount in amounts:
        inside.append((time, amount))
        total += amount
        while time - inside[0][0] >= seconds:
            total -= inside.popleft()[1]
        peak = max(peak, total)
    return peak

"""What can go wrong at the service, as records that a simulator plays."""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from resilience_kit.errors import ConfigurationError

FaultKind = Literal[
    "rate_limit_429",
    "capacity_429",
    "insufficient_quota_429",
    "token_quota_403",
    "internal_error_500",
    "unavailable_503",
    "content_filter_400",
    "output_filter",
    "connection_reset",
    "time_out",
    "cut_mid_stream",
    "slow_stream",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong for one request. Make it with the class method of its name.

    An output filter, a cut and a slow stream happen to an answer: the request is charged to the quota first, and the
    fault is lost if the quota refuses it. All other faults come instead of an answer, and charge nothing.

    Attributes:
        kind: What goes wrong.
        retry_after: Seconds that the service asks to wait for; None if it doesn't say.
        after: How many pieces of the body go out before the cut.
        delay: Seconds before each piece of a slow body.

    Example:
        >>> Fault.rate_limit(retry_after=2.5)
        Fault(kind='rate_limit_429', retry_after=2.5, after=0, delay=0.0)
    """

    kind: FaultKind
    retry_after: float | None = None
    after: int = 0
    delay: float = 0.0

    @classmethod
    def rate_limit(cls, *, retry_after: float | None = None) -> Self:
        """429, as if the quota were used up.

        Args:
            retry_after: Seconds that the service asks to wait for; None if it doesn't say.
        """
        return cls("rate_limit_429", retry_after=retry_after)

    @classmethod
    def capacity(cls, *, retry_after: float | None = 20.0) -> Self:
        """429 because the whole service is busy, whatever the caller's quota.

        Args:
            retry_after: Seconds that the service asks to wait for; None if it doesn't say.
        """
        return cls("capacity_429", retry_after=retry_after)

    @classmethod
    def insufficient_quota(cls) -> Self:
        """429 that no wait helps: the account has nothing left to spend."""
        return cls("insufficient_quota_429")

    @classmethod
    def token_quota(cls) -> Self:
        """403, as API Management answers when a token quota is used up."""
        return cls("token_quota_403")

    @classmethod
    def internal_error(cls) -> Self:
        """500."""
        return cls("internal_error_500")

    @classmethod
    def unavailable(cls, *, retry_after: float | None = None) -> Self:
        """503.

        Args:
            retry_after: Seconds that the service asks to wait for; None if it doesn't say.
        """
        return cls("unavailable_503", retry_after=retry_after)

    @classmethod
    def content_filter(cls) -> Self:
        """400: the prompt is refused."""
        return cls("content_filter_400")

    @classmethod
    def output_filter(cls) -> Self:
        """200 with `finish_reason` "content_filter" and no content."""
        return cls("output_filter")

    @classmethod
    def connection_reset(cls) -> Self:
        """The connection is reset before the first byte of a response."""
        return cls("connection_reset")

    @classmethod
    def time_out(cls) -> Self:
        """No response ever; the connection stays open until the client leaves."""
        return cls("time_out")

    @classmethod
    def cut_mid_stream(cls, *, after: int = 2) -> Self:
        """200, then the connection breaks after so many events, at the latest before the last one.

        A response that isn't streamed breaks between its headers and its body.

        Args:
            after: How many events go out before.
        """
        return cls("cut_mid_stream", after=after)

    @classmethod
    def slow_stream(cls, *, delay: float = 0.1) -> Self:
        """200, with a wait before each event.

        Args:
            delay: Seconds before each.
        """
        return cls("slow_stream", delay=delay)


class FaultPlan:
    """Which fault comes next: injected ones first, then the script's, or a random one of them.

    Args:
        faults: The script, consumed one per request; None in it means that nothing goes wrong. With `rate`, the
            choices.
        rate: The share of requests, from 0 to 1, that a random one of the faults happens to. None plays the script.
        seed: Makes the random choices repeat.

    Raises:
        ConfigurationError: If the rate is not from 0 to 1, or there is nothing to choose from.
    """

    __slots__ = ("_choices", "_injected", "_random", "_rate", "_script")

    def __init__(self, faults: Iterable[Fault | None], rate: float | None, seed: int) -> None:
        self._injected: deque[Fault] = deque()
        self._random = random.Random(seed)  # noqa: S311 - no secret: the same seed must give the same faults
        self._rate = rate
        # A script may be endless, as itertools.cycle is: only choices are read at once.
        self._choices = () if rate is None else tuple(faults)
        self._script = iter(faults)
        if rate is not None and not (0 <= rate <= 1 and self._choices):
            raise ConfigurationError(
                f"fault_rate={rate!r} needs a rate from 0 to 1, and faults=[...] to choose from, "
                "such as [Fault.internal_error()]"
            )

    def inject(self, fault: Fault, times: int) -> None:
        """Let the fault happen to the next requests, before all others."""
        self._injected.extend([fault] * times)

    def forget_injected(self) -> None:
        """Drop the injected faults that did not happen yet."""
        self._injected.clear()

    def next(self) -> Fault | None:
        """Return what goes wrong with the next request."""
        if self._injected:
            return self._injected.popleft()
        if self._rate is None:
            return next(self._script, None)
        return self._random.choice(self._choices) if self._random.random() < self._rate else None

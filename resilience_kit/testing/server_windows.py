"""The quota as the service counts it: requests and tokens in fixed or sliding windows.

Nothing here looks at a clock: every method takes `now`, in seconds of any clock that never goes back.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

TokenWindow = Literal["fixed", "sliding"]
RequestWindow = Literal[1, 10]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the quota refuses a request, and for how long.

    Attributes:
        reason: "requests" or "tokens".
        retry_after: Seconds until the same request would fit, if nothing else is admitted.
    """

    reason: Literal["requests", "tokens"]
    retry_after: float


@dataclass(frozen=True, slots=True)
class QuotaLevel:
    """What the quota still admits; limits of `math.inf` are unlimited.

    Attributes:
        request_limit: Requests per period.
        token_limit: Tokens per period.
        remaining_requests: Requests that the period still has room for.
        remaining_tokens: Tokens that the period still has room for.
        reset_requests: Seconds until all requests are available again.
        reset_tokens: Seconds until all tokens are available again.
    """

    request_limit: float
    token_limit: float
    remaining_requests: float
    remaining_tokens: float
    reset_requests: float
    reset_tokens: float


class FixedWindow:
    """A count that starts anew every `length` seconds, counted from `origin`."""

    __slots__ = ("_count", "_index", "_length", "_origin", "limit")

    def __init__(self, limit: float, length: float, origin: float) -> None:
        self.limit = limit
        self._length = length
        self._origin = origin
        self._index = 0
        self._count = 0.0

    def add(self, now: float, amount: float) -> None:
        """Count an amount, whether it fits or not."""
        self._count = self.used(now) + amount

    def used(self, now: float) -> float:
        """Return the amount that counts now."""
        index = math.floor((now - self._origin) / self._length)
        if index != self._index:
            self._index, self._count = index, 0.0
        return self._count

    def wait(self, now: float, amount: float) -> float:
        """Return the seconds until the amount fits: 0 if it does now; until the window is empty if it never will."""
        if self.used(now) + amount <= self.limit:
            return 0.0
        return self._until_turn(now)

    def reset(self, now: float) -> float:
        """Return the seconds until the window is empty."""
        return self._until_turn(now) if self.used(now) else 0.0

    def _until_turn(self, now: float) -> float:
        return self._origin + (self._index + 1) * self._length - now


class SlidingWindow:
    """What was counted in the last `length` seconds; an amount leaves exactly `length` seconds after it came."""

    __slots__ = ("_entries", "_length", "_total", "limit")

    def __init__(self, limit: float, length: float) -> None:
        self.limit = limit
        self._length = length
        self._entries: deque[tuple[float, float]] = deque()
        self._total = 0.0

    def add(self, now: float, amount: float) -> None:
        """Count an amount, whether it fits or not."""
        self._entries.append((now, amount))
        self._total += amount

    def used(self, now: float) -> float:
        """Return the amount that counts now."""
        while self._entries and now - self._entries[0][0] >= self._length:
            self._total -= self._entries.popleft()[1]
        return self._total

    def wait(self, now: float, amount: float) -> float:
        """Return the seconds until the amount fits: 0 if it does now; until the window is empty if it never will."""
        excess = self.used(now) + amount - self.limit
        if excess <= 0:
            return 0.0
        for time, entry in self._entries:
            excess -= entry
            if excess <= 0:
                return time + self._length - now
        return self.reset(now) or self._length

    def reset(self, now: float) -> float:
        """Return the seconds until the window is empty."""
        return self._entries[-1][0] + self._length - now if self.used(now) else 0.0


class ServerQuota:
    """Requests per minute and tokens per minute, where a minute lasts `period` seconds.

    Requests are counted in sliding windows over the period and over 1 or 10 sixtieths of it, tokens in a window of
    the chosen kind over the period.
    """

    __slots__ = ("_burst", "_count_refused", "_request_window", "_requests", "_tokens")

    def __init__(
        self,
        origin: float,
        *,
        request_limit: float,
        token_limit: float,
        period: float,
        token_window: TokenWindow,
        request_window: RequestWindow,
        count_refused: bool,
    ) -> None:
        self._request_window = request_window
        self._count_refused = count_refused
        self._requests = SlidingWindow(request_limit, period)
        self._burst = SlidingWindow(request_limit, period * request_window / 60)
        self._tokens: FixedWindow | SlidingWindow
        if token_window == "fixed":  # noqa: S105 - tokens of text, no secret
            self._tokens = FixedWindow(token_limit, period, origin)
        else:
            self._tokens = SlidingWindow(token_limit, period)
        self.request_limit = request_limit

    @property
    def request_limit(self) -> float:
        """Requests per period, `math.inf` if unlimited; what was counted stays counted when it changes."""
        return self._requests.limit

    @request_limit.setter
    def request_limit(self, limit: float) -> None:
        self._requests.limit = limit
        self._burst.limit = max(1.0, limit * self._request_window / 60)

    @property
    def token_limit(self) -> float:
        """Tokens per period, `math.inf` if unlimited; what was counted stays counted when it changes."""
        return self._tokens.limit

    @token_limit.setter
    def token_limit(self, limit: float) -> None:
        self._tokens.limit = limit

    def admit(self, now: float, tokens: float) -> Refusal | None:
        """Count the request if it fits in all windows, and say why if it doesn't."""
        request_wait = max(self._requests.wait(now, 1), self._burst.wait(now, 1))
        token_wait = self._tokens.wait(now, tokens)
        refused = request_wait > 0 or token_wait > 0
        if not refused:
            self._tokens.add(now, tokens)
        if not refused or self._count_refused:
            self._requests.add(now, 1)
            self._burst.add(now, 1)
        if not refused:
            return None
        return Refusal("requests" if request_wait > 0 else "tokens", max(request_wait, token_wait))

    def level(self, now: float) -> QuotaLevel:
        """Return what is left in the period."""
        return QuotaLevel(
            request_limit=self._requests.limit,
            token_limit=self._tokens.limit,
            remaining_requests=max(0.0, self._requests.limit - self._requests.used(now)),
            remaining_tokens=max(0.0, self._tokens.limit - self._tokens.used(now)),
            reset_requests=self._requests.reset(now),
            reset_tokens=self._tokens.reset(now),
        )

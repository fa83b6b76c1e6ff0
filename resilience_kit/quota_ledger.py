"""What lies in the server's windows now: who asks here before sending never goes above the quota in any of them.

It is bookkeeping, not a limiter: it says how long until a request fits, and is told what was sent and what the
server said. Azure counts tokens over a minute, and requests over a minute and over ten seconds of it. Whether its
windows are fixed or sliding is not documented, so the ledger keeps to every window that ends now: right for both.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from resilience_kit.server_advice import ServerAdvice

# Azure evaluates the requests per minute over ten seconds too.
_SHORT_WINDOWS = 6
# A server that names a longer pause than this many periods speaks of something else than this quota (a day's, say):
# its error goes to the caller, and nobody else is held up.
_LONGEST_PAUSE_IN_PERIODS = 2


@dataclass(frozen=True, slots=True)
class Correction:
    """How the server's word tightened a ledger: what else it counts now, and for how many seconds."""

    reason: str
    seconds: float
    requests: int = 0
    tokens: int = 0


class QuotaLedger(Protocol):
    """What a limit asks about its quota, be it kept in this process or for a fleet."""

    def seconds_until_fits(self, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens fits into every window; infinite if it never will."""
        ...

    def commit(self, tokens: int, now: float) -> None:
        """Count a request that is sent now."""

    def give_back(self, tokens: int, at: float) -> None:
        """Count a request of that time no more: it was not sent."""

    def believe(self, advice: ServerAdvice, now: float) -> Correction | None:
        """Count what the server knows and the ledger does not; never count less than before."""
        ...

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now."""
        ...

    def copy(self) -> "QuotaLedger":
        """A ledger with the same content, to look ahead in."""
        ...

    def reset(self) -> None:
        """Forget everything."""


class WindowLedger:
    """The ledger of one process, exact to the request: it remembers each that was sent in the last period.

    Args:
        requests: Most requests in any window of `period` seconds; in a sixth of it a sixth of them, rounded down,
            but at least one.
        tokens: Most tokens in any window of `period` seconds.
        period: The length of the quota's window in seconds.
    """

    __slots__ = (
        "_foreign",
        "_foreign_until",
        "_paused_until",
        "_period",
        "_requests",
        "_sent_requests",
        "_sent_tokens",
        "_short_requests",
        "_tokens",
        "_tokens_in_window",
    )

    def __init__(self, requests: int, tokens: int, period: float) -> None:
        self._requests = requests
        self._short_requests = max(1, requests // _SHORT_WINDOWS)
        self._tokens = tokens
        self._period = period
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sent_requests: deque[float] = deque()
        self._sent_tokens: deque[tuple[float, int]] = deque()
        self._tokens_in_window = 0
        # requests and tokens that only the server has seen: somebody else's, or estimated too low
        self._foreign = (0, 0)
        self._foreign_until = -math.inf
        self._paused_until = -math.inf

    def copy(self) -> "WindowLedger":
        """A ledger with the same content, to look ahead in."""
        twin = WindowLedger(self._requests, self._tokens, self._period)
        twin._sent_requests = self._sent_requests.copy()
        twin._sent_tokens = self._sent_tokens.copy()
        twin._tokens_in_window = self._tokens_in_window
        twin._foreign = self._foreign
        twin._foreign_until = self._foreign_until
        twin._paused_until = self._paused_until
        return twin

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now, those that only the server has seen included."""
        self._forget_old(now)
        return len(self._sent_requests) + self._foreign[0], self._tokens_in_window + self._foreign[1]

    def seconds_until_fits(self, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens fits into every window; infinite if it never will."""
        self._forget_old(now)
        at = self._fits_at(tokens, now, self._requests, self._tokens)
        if self._foreign != (0, 0):
            beside_foreign = self._fits_at(
                tokens, now, self._requests - self._foreign[0], self._tokens - self._foreign[1]
            )
            at = min(beside_foreign, max(at, self._foreign_until))
        return max(at, self._paused_until) - now

    def commit(self, tokens: int, now: float) -> None:
        """Count a request that is sent now."""
        self._sent_requests.append(now)
        if tokens:
            self._sent_tokens.append((now, tokens))
            self._tokens_in_window += tokens

    def give_back(self, tokens: int, at: float) -> None:
        """Count a request of that time no more: it was not sent."""
        if at in self._sent_requests:
            self._sent_requests.remove(at)
        if (at, tokens) in self._sent_tokens:
            self._sent_tokens.remove((at, tokens))
            self._tokens_in_window -= tokens

    def believe(self, advice: ServerAdvice, now: float) -> Correction | None:
        """Count what the server knows and the ledger does not; never count less than before.

        A remaining of 0 is not believed: Azure's Responses API was seen to send it where it means "unknown", and
        a server that has nothing left says so with its next answer, a 429.
        """
        if advice.retry_after is not None:
            return self._pause(advice.retry_after, now)
        requests, tokens = self.used(now)
        more_requests = max(0, self._requests - requests - (advice.remaining_requests or self._requests))
        more_tokens = max(0, self._tokens - tokens - (advice.remaining_tokens or self._tokens))
        if not more_requests and not more_tokens:
            return None
        resets = [reset for reset in (advice.reset_requests, advice.reset_tokens) if reset is not None]
        seconds = min(max(resets, default=self._period), self._period)
        self._foreign = (self._foreign[0] + more_requests, self._foreign[1] + more_tokens)
        self._foreign_until = max(self._foreign_until, now + seconds)
        return Correction("remaining", seconds, more_requests, more_tokens)

    def _pause(self, seconds: float, now: float) -> Correction | None:
        if seconds > _LONGEST_PAUSE_IN_PERIODS * self._period or now + seconds <= self._paused_until:
            return None
        self._paused_until = now + seconds
        return Correction("retry-after", seconds)

    def _fits_at(self, tokens: int, now: float, most_requests: int, most_tokens: int) -> float:
        if most_requests <= 0 or tokens > most_tokens:
            return math.inf
        at = now
        sent = self._sent_requests
        if len(sent) >= self._short_requests:
            at = max(at, sent[-self._short_requests] + self._period / _SHORT_WINDOWS)
        if len(sent) >= most_requests:
            at = max(at, sent[-most_requests] + self._period)
        excess = self._tokens_in_window + tokens - most_tokens
        for entered, amount in self._sent_tokens:
            if excess <= 0:
                break
            excess -= amount
            at = max(at, entered + self._period)
        return at

    def _forget_old(self, now: float) -> None:
        while self._sent_requests and self._sent_requests[0] + self._period <= now:
            self._sent_requests.popleft()
        while self._sent_tokens and self._sent_tokens[0][0] + self._period <= now:
            self._tokens_in_window -= self._sent_tokens.popleft()[1]
        if self._foreign_until <= now:
            self._foreign = (0, 0)

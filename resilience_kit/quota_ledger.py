"""What lies in the server's windows now: who asks here before sending never goes above the quota in any of them.

It is bookkeeping, not a limiter: it says how long until a request fits, and is told what was sent and what the
server said. Azure counts tokens over a minute, and requests over a minute and over ten seconds of it. Whether its
windows are fixed or sliding is not documented, so the ledger keeps to every window that ends now: right for both.

Where the server refuses what should have fitted, the ledger learns why, and is stricter from then on: requests arrive
closer together than they were sent, they are evaluated over one second, or tokens are counted higher than here.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from resilience_kit.server_advice import ServerAdvice

# Azure evaluates the requests per minute over ten seconds too.
_SHORT_WINDOWS = 6
# Some deployments evaluate them over one second.
_FINE_WINDOWS = 60
# A refused request learns that they do if no more than this share of the ten seconds' requests was used.
_CLEARLY_LESS = 0.8
# How much longer than the server's the windows are, in periods: nothing before a refusal, then this, and twice as much
# with each further one, up to the most. A minute's are 60 ms and 0.3 s, as times on the way to a server differ.
_FIRST_MARGIN, _MOST_MARGIN = 1 / 1000, 1 / 200
# A refusal for tokens that is over in less than this, in periods, came too early at the end of a window.
_AT_THE_EDGE = 1 / 60
# Tokens are taken for at most so many times what was said.
_MOST_TOKENS_CHARGED = 2.0
# A server that names a longer pause than this many periods speaks of something else than this quota (a day's, say):
# its error goes to the caller, and nobody else is held up.
_LONGEST_PAUSE_IN_PERIODS = 2


@dataclass(frozen=True, slots=True)
class Correction:
    """How the server's word tightened a ledger.

    Attributes:
        reason: "retry-after": nothing for some seconds. "remaining": requests and tokens that only the server has seen,
            for some seconds. For good: "margin", windows that are longer by some seconds; "one-second window", so many
            requests in any window of some seconds; "undercounted", so many tokens for each thousand.
        seconds: As the reason says.
        requests: As the reason says.
        tokens: As the reason says.
    """

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

    def refused(self, advice: ServerAdvice, sent_at: float, now: float) -> list[Correction]:
        """Learn from the refusal of a request that was committed at that time; never become less strict."""
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
        "_fine_requests",
        "_foreign",
        "_foreign_until",
        "_learnt_at",
        "_margin",
        "_paused_until",
        "_period",
        "_requests",
        "_sent_requests",
        "_sent_tokens",
        "_short_requests",
        "_tokens",
        "_tokens_charged",
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
        # when, tokens as they are charged, and as they were said
        self._sent_tokens: deque[tuple[float, int, int]] = deque()
        self._tokens_in_window = 0
        # requests and tokens that only the server has seen: somebody else's, or estimated too low
        self._foreign = (0, 0)
        self._foreign_until = -math.inf
        self._paused_until = -math.inf
        self._margin = 0.0
        self._fine_requests: int | None = None
        self._tokens_charged = 1.0
        self._learnt_at = -math.inf

    def copy(self) -> "WindowLedger":
        """A ledger with the same content, to look ahead in."""
        twin = WindowLedger(self._requests, self._tokens, self._period)
        twin._sent_requests = self._sent_requests.copy()
        twin._sent_tokens = self._sent_tokens.copy()
        twin._tokens_in_window = self._tokens_in_window
        twin._foreign = self._foreign
        twin._foreign_until = self._foreign_until
        twin._paused_until = self._paused_until
        twin._margin = self._margin
        twin._fine_requests = self._fine_requests
        twin._tokens_charged = self._tokens_charged
        return twin

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now, those that only the server has seen included."""
        self._forget_old(now)
        return len(self._sent_requests) + self._foreign[0], self._tokens_in_window + self._foreign[1]

    def seconds_until_fits(self, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens fits into every window; infinite if it never will."""
        self._forget_old(now)
        tokens = self._charged(tokens)
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
            charged = self._charged(tokens)
            self._sent_tokens.append((now, charged, tokens))
            self._tokens_in_window += charged

    def give_back(self, tokens: int, at: float) -> None:
        """Count a request of that time no more: it was not sent."""
        if at in self._sent_requests:
            self._sent_requests.remove(at)
        for entry in self._sent_tokens:
            if (entry[0], entry[2]) == (at, tokens):
                self._sent_tokens.remove(entry)
                self._tokens_in_window -= entry[1]
                break

    def believe(self, advice: ServerAdvice, now: float) -> Correction | None:
        """Count what the server knows and the ledger does not; never count less than before.

        A remaining of 0 is not believed: Azure's Responses API was seen to send it where it means "unknown", and
        a server that has nothing left says so with its next answer, a 429.
        """
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

    def refused(self, advice: ServerAdvice, sent_at: float, now: float) -> list[Correction]:
        """Learn from the refusal of a request that was committed at that time; never become less strict.

        What was under way when the last lesson was learnt teaches nothing new, but how long to wait.
        """
        lesson = None
        if advice.exhausted is not None and sent_at > self._learnt_at:
            lesson = self._learn(advice)
        if lesson is not None:
            self._learnt_at = now
        pause = None if advice.retry_after is None else self._pause(advice.retry_after + self._margin, now)
        return [correction for correction in (lesson, pause) if correction is not None]

    def _learn(self, advice: ServerAdvice) -> Correction | None:
        if advice.exhausted == "requests":
            newest = self._sent_requests[-1] if self._sent_requests else 0.0
            in_sixth = sum(sent > newest - self._period / _SHORT_WINDOWS for sent in self._sent_requests)
            if self._fine_requests is None and in_sixth <= _CLEARLY_LESS * self._short_requests:
                self._fine_requests = max(1, self._requests // _FINE_WINDOWS)
                return Correction("one-second window", self._period / _FINE_WINDOWS, requests=self._fine_requests)
            return self._widen()
        if advice.retry_after is not None and advice.retry_after <= _AT_THE_EDGE * self._period:
            return self._widen()
        if self._tokens_in_window < self._tokens / _MOST_TOKENS_CHARGED:
            # so far from the quota, somebody else uses it: the pause is all that helps
            return None
        charged = self._tokens_charged * self._tokens / self._tokens_in_window
        if charged <= self._tokens_charged:
            return None
        self._tokens_charged = min(_MOST_TOKENS_CHARGED, charged)
        return Correction("undercounted", 0.0, tokens=round(1_000 * self._tokens_charged))

    def _widen(self) -> Correction | None:
        if self._margin >= _MOST_MARGIN * self._period:
            return None
        self._margin = min(_MOST_MARGIN * self._period, max(_FIRST_MARGIN * self._period, 2 * self._margin))
        return Correction("margin", self._margin)

    def _charged(self, tokens: int) -> int:
        return (
            tokens
            if self._tokens_charged == 1
            else min(max(tokens, self._tokens), math.ceil(tokens * self._tokens_charged))
        )

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
        if self._fine_requests is not None and len(sent) >= self._fine_requests:
            at = max(at, sent[-self._fine_requests] + self._period / _FINE_WINDOWS + self._margin)
        if len(sent) >= self._short_requests:
            at = max(at, sent[-self._short_requests] + self._period / _SHORT_WINDOWS + self._margin)
        if len(sent) >= most_requests:
            at = max(at, sent[-most_requests] + self._period + self._margin)
        excess = self._tokens_in_window + tokens - most_tokens
        for entered, amount, _ in self._sent_tokens:
            if excess <= 0:
                break
            excess -= amount
            at = max(at, entered + self._period + self._margin)
        return at

    def _forget_old(self, now: float) -> None:
        # The sums are made in the order in which _fits_at makes them, so that what is told to fit then does.
        while self._sent_requests and self._sent_requests[0] + self._period + self._margin <= now:
            self._sent_requests.popleft()
        while self._sent_tokens and self._sent_tokens[0][0] + self._period + self._margin <= now:
            self._tokens_in_window -= self._sent_tokens.popleft()[1]
        if self._foreign_until <= now:
            self._foreign = (0, 0)

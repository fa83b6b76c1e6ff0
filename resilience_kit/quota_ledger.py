"""What lies in the server's windows now: who asks here before sending never goes above the quota in any of them.

It is bookkeeping, not a limiter: it says how long until a request fits, and is told what was sent and what the
server said. Azure counts tokens over a minute, and requests over a minute and over ten seconds of it. Whether its
windows are fixed or sliding is not documented, so the ledger keeps to every window that ends now: right for both.
What the server says beyond that is `quota_lessons`'.
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Protocol

from resilience_kit.quota_ceilings import FINE_WINDOWS, SHORT_WINDOWS
from resilience_kit.quota_lessons import RULES, Correction, Lessons, Seen
from resilience_kit.server_advice import ServerAdvice

# Requests that have left the window are remembered for so many periods, and no more than so many of them, to tell
# whether a refusal came at the window's edge.
_EDGE = 1 / 60
_MOST_AT_THE_EDGE = 1_024
# The edge of a window of a sixtieth, in such windows: the one above is as long as they are.
_FINE_EDGE = 0.1
# Requests sent so many periods after one may have overtaken it on their way.
_OVERTAKING = 1 / 600
# A second's requests are sent in so many parts and not at once: they would hold each other up on their way, one more
# than the other, and what holds up the event loop would move all of them into the next second. The parts follow each
# other a little sooner than they need to, so that a timer's delay costs nothing.
_PACES = 10
# No wait that the ledger knows of is longer than so many periods.
_LONGEST_WAIT = 4

_SENT_AT, _TOKENS, _IS_REFUSED = attrgetter("at"), attrgetter("tokens"), attrgetter("is_refused")


@dataclass(slots=True, eq=False)
class Sent:
    """A request in the ledger: when it was sent, its tokens, and what was in the window then, itself included."""

    at: float
    tokens: int
    requests_then: int
    tokens_then: int
    is_refused: bool = False


class QuotaLedger(Protocol):
    """What a limit asks about its quota, be it kept in this process or for a fleet."""

    def seconds_until_fits(self, tokens: int, now: float) -> float | None:
        """Seconds until one request of so many tokens may fit into every window; infinite if it never will.

        None where only the store of a fleet knows, which is to be asked.
        """
        ...

    def commit(self, tokens: int, now: float) -> Sent:
        """Count a request that is sent now."""
        ...

    def give_back(self, sent: Sent) -> None:
        """Count a request no more: it was not sent."""

    def answered(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Count what the server knows and the ledger does not."""

    def refused(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Learn from the refusal of a request."""

    def news(self) -> list[Correction]:
        """What has been learnt since this was asked last."""
        ...

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now."""
        ...

    def copy(self) -> "WindowLedger":
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
        rules: What may be learnt from the server, of `quota_lessons.RULES`.
    """

    __slots__ = (
        "_left",
        "_lessons",
        "_period",
        "_refused_in_window",
        "_requests",
        "_rules",
        "_sent",
        "_short_requests",
        "_tokens",
        "_tokens_in_window",
    )

    def __init__(self, requests: int, tokens: int, period: float, rules: frozenset[str] = RULES) -> None:
        self._requests = requests
        self._short_requests = max(1, requests // SHORT_WINDOWS)
        self._tokens = tokens
        self._period = period
        self._rules = rules
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sent: deque[Sent] = deque()
        self._left: deque[Sent] = deque(maxlen=_MOST_AT_THE_EDGE)
        self._tokens_in_window = 0
        self._refused_in_window = 0
        self._lessons = Lessons(self._requests, self._tokens, self._period, self._rules)

    def copy(self) -> "WindowLedger":
        """A ledger with the same content, to look ahead in."""
        twin = WindowLedger(self._requests, self._tokens, self._period, self._rules)
        twin._sent = self._sent.copy()
        twin._left = self._left.copy()
        twin._tokens_in_window = self._tokens_in_window
        twin._refused_in_window = self._refused_in_window
        twin._lessons = self._lessons.copy()
        return twin

    @property
    def requests(self) -> int:
        """The quota of requests."""
        return self._requests

    @property
    def short_requests(self) -> int:
        """The quota of requests in a sixth of the window."""
        return self._short_requests

    @property
    def tokens(self) -> int:
        """The quota of tokens."""
        return self._tokens

    @property
    def period(self) -> float:
        """The length of the quota's window in seconds."""
        return self._period

    @property
    def lessons(self) -> Lessons:
        """What was learnt from the server."""
        return self._lessons

    def sent(self, now: float) -> list[tuple[float, int]]:
        """When each request in the window that ends now was sent, and its tokens."""
        self._forget_old(now)
        return [(sent.at, sent.tokens) for sent in self._sent]

    def used(self, now: float) -> tuple[int, int]:
        """Requests and tokens in the window that ends now, those that only the server has seen included."""
        self._forget_old(now)
        lessons = self._lessons
        requests, tokens = lessons.unseen_requests.at(now), lessons.unseen_tokens.at(now)
        return len(self._sent) + requests, self._tokens_in_window + tokens

    def seconds_until_fits(self, tokens: int, now: float) -> float:
        """Seconds until one request of so many tokens may fit into every window; infinite if it never will.

        It may not fit then where a ceiling is to be tried upwards at that time.
        """
        self._forget_old(now)
        lessons = self._lessons
        if (
            len(self._sent) < self._short_requests
            and self._tokens_in_window + tokens <= self._tokens
            and not lessons.has_learnt
        ):
            return 0.0
        if tokens > self._tokens:
            return math.inf
        at = self._fits_below_ceilings(tokens, now)
        at = max(at, self._fits_beside_unseen(tokens, now), lessons.paused_until, lessons.ramp_at(now))
        if at > now + _LONGEST_WAIT * self._period:
            # what is known was noted by a clock that is far ahead of this one, such as another event loop's in a test
            self.reset()
            return 0.0
        return max(0.0, at - now)

    def seconds_until_fits_into(
        self, requests: int, short_requests: int, most_tokens: int, tokens: int, now: float
    ) -> float:
        """Seconds until one request fits into windows of so many requests and tokens, a part of the quota.

        Args:
            requests: Most requests in a period.
            short_requests: Most requests in a sixth of it.
            most_tokens: Most tokens in a period.
            tokens: The request's.
            now: The time.
        """
        self._forget_old(now)
        if requests <= 0 or short_requests <= 0:
            return math.inf
        at = max(
            self._leaves_room_at(requests, 1),
            self._leaves_room_at(short_requests, SHORT_WINDOWS),
            self._tokens_fit_at(tokens, most_tokens),
        )
        return max(0.0, at - now)

    def commit(self, tokens: int, now: float) -> Sent:
        """Count a request that is sent now."""
        sent_requests = self._sent
        self._tokens_in_window = tokens_then = self._tokens_in_window + tokens
        sent = Sent(now, tokens, len(sent_requests) + 1 - self._refused_in_window, tokens_then)
        sent_requests.append(sent)
        self._lessons.sent(now)
        return sent

    def give_back(self, sent: Sent) -> None:
        """Count a request no more: it was not sent."""
        index = self._index(sent)
        if index is not None:
            del self._sent[index]
            self._tokens_in_window -= sent.tokens

    def answered(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Count what the server knows and the ledger does not."""
        requests, tokens = sent.requests_then, sent.tokens_then
        # found by halving, since thousands may have been sent since
        first = bisect_right(self._sent, sent.at, key=_SENT_AT)
        last = bisect_right(self._sent, sent.at + _OVERTAKING * self._period, lo=first, key=_SENT_AT)
        requests += last - first
        tokens += sum(self._sent[index].tokens for index in range(first, last))
        self._lessons.answered(advice, sent.at, requests, tokens, now)

    def refused(self, advice: ServerAdvice, sent: Sent, now: float) -> None:
        """Learn from the refusal of a request."""
        self._lessons.refused(advice, self.count_refused(advice, sent, now), now)

    def count_refused(self, advice: ServerAdvice, sent: Sent, now: float) -> Seen:
        """Count a refused request as a request, but for no tokens: none were taken. Returns what was around it."""
        self._forget_old(now)
        index = None if advice.exhausted is None else self._index(sent)
        if index is not None:
            self._sent[index] = replace(sent, tokens=0, is_refused=True)
            self._tokens_in_window -= sent.tokens
            self._refused_in_window += 1
        return self._seen_around(sent)

    def news(self) -> list[Correction]:
        """What has been learnt since this was asked last."""
        news, self._lessons.news = self._lessons.news, []
        return news

    def _index(self, sent: Sent) -> int | None:
        # from a little before it on, since a clock may step back a little
        first = bisect_left(self._sent, sent.at - _OVERTAKING * self._period, key=_SENT_AT)
        try:
            return self._sent.index(sent, first)
        except ValueError:
            return None

    def _seen_around(self, refused: Sent) -> Seen:
        # by halving and in slices, since a hundred refusals may come at once, with thousands of requests in the window
        known = [*(sent for sent in self._left if sent is not refused), *self._sent]
        edge, short = _EDGE * self._period, self._period / SHORT_WINDOWS

        def since(seconds: float) -> int:
            return bisect_right(known, refused.at - seconds, key=_SENT_AT)

        def admitted(first: int, last: int | None = None) -> int:
            part = known[first:last]
            return len(part) - tuple(map(_IS_REFUSED, part)).count(True)

        itself = since(0.0)
        in_window, and_edge = since(self._period), since(self._period + edge)
        requests, tokens = admitted(in_window), sum(map(_TOKENS, known[in_window:]))
        return Seen(
            sent_at=refused.at,
            tokens=refused.tokens,
            requests_in_fine_and_edge=admitted(since((1 + _FINE_EDGE) * self._period / FINE_WINDOWS), itself),
            requests_in_short=admitted(since(short), itself),
            requests=requests,
            tokens_in_window=tokens,
            requests_in_short_and_edge=admitted(since(short + edge), itself),
            requests_and_edge=admitted(and_edge, in_window) + requests,
            tokens_and_edge=sum(map(_TOKENS, known[and_edge:in_window])) + tokens,
        )

    def _fits_beside_unseen(self, tokens: int, now: float) -> float:
        lessons = self._lessons
        at = now
        requests, unseen_tokens = lessons.unseen_requests, lessons.unseen_tokens
        if requests.at(now):
            fits_at = self._requests_fit_at(requests.leaves_of(lessons.requests.limit))
            at = max(at, min(fits_at, requests.until))
        if unseen_tokens.at(now):
            left = unseen_tokens.leaves_of(lessons.tokens.limit)
            fits_at = self._tokens_fit_at(tokens, left) if tokens <= left else math.inf
            at = max(at, min(fits_at, unseen_tokens.until))
        return at

    def _fits_below_ceilings(self, tokens: int, now: float) -> float:
        lessons = self._lessons
        at = max(
            self._requests_fit_at(lessons.requests.value),
            self._charges_fit_at(),
            self._tokens_fit_at(tokens, lessons.tokens.value),
        )
        grows_at = lessons.grows_at()
        if at <= now or grows_at == math.inf:
            return at
        quota_fits_at = max(self._requests_fit_at(self._requests), self._tokens_fit_at(tokens, self._tokens))
        if quota_fits_at <= now and lessons.grow(now):
            return self._fits_below_ceilings(tokens, now)
        return min(at, max(quota_fits_at, grows_at))

    def _charges_fit_at(self) -> float:
        """When less requests are charged for than the quota of tokens was seen to have room for."""
        most = self._lessons.charged_requests.value
        if len(self._sent) < most:
            return -math.inf
        charged = [sent for sent in self._sent if not sent.is_refused]
        if len(charged) < most:
            return -math.inf
        return charged[-most].at + self._period + self._lessons.margin_of(self._period)

    def _requests_fit_at(self, most: int) -> float:
        if most <= 0:
            return math.inf
        at = max(self._leaves_room_at(max(1, most // SHORT_WINDOWS), SHORT_WINDOWS), self._leaves_room_at(most, 1))
        fine = self._lessons.fine_requests
        if fine is None:
            return at
        fine = min(fine, math.ceil(most / FINE_WINDOWS))
        paced_at = self._leaves_room_at(math.ceil(fine / _PACES), (_PACES + 1) * FINE_WINDOWS)
        return max(at, self._leaves_room_at(fine, FINE_WINDOWS), paced_at)

    def _tokens_fit_at(self, tokens: int, most: int) -> float:
        # what is above a ceiling, but not above the quota, fits into an empty window
        excess = self._tokens_in_window + min(tokens, most) - most
        at = -math.inf
        if excess > 0:
            length = self._period + self._lessons.margin_of(self._period)
            for sent in self._sent:
                excess -= sent.tokens
                if excess <= 0:
                    at = sent.at + length
                    break
        return at

    def _leaves_room_at(self, most: int, windows: int) -> float:
        """When less than so many requests lie in a window of so many parts of the period."""
        if len(self._sent) < most:
            return -math.inf
        window = self._period / windows
        return self._sent[-most].at + window + self._lessons.margin_of(window)

    def _forget_old(self, now: float) -> None:
        # The sum is made in the order in which _fits_at makes it, so that what is told to fit then does.
        sent_requests, period = self._sent, self._period
        margin = self._lessons.margin_of(period) if self._lessons.margin else 0.0
        while sent_requests and (sent := sent_requests[0]).at + period + margin <= now:
            self._left.append(sent_requests.popleft())
            self._tokens_in_window -= sent.tokens
            if sent.is_refused:
                self._refused_in_window -= 1

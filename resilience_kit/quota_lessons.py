"""What the server's answers and refusals teach about its quota: a pause, less room, windows that differ from ours.

Every rule only ever tightens what the user set; what it tightened it may try again later, and never goes above the
user's own limit. Each has a name, under which it can be switched off and is told in events.
"""

import math
from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

from resilience_kit.errors import ConfigurationError
from resilience_kit.quota_ceilings import FINE_WINDOWS, MUCH_LESS, SHORT_WINDOWS, Ceiling, Unseen
from resilience_kit.server_advice import ServerAdvice

RULES = frozenset(
    {"retry-after", "slow start", "remaining", "limit", "margin", "one-second window", "ceiling", "latency"}
)

# What `adaptive=` may be.
Adaptive = bool | Literal["latency"] | Collection[str]

# How much longer than the server's the windows are, in periods, since requests are not as far apart when they arrive
# as when they were sent: this from the first answer on, twice as much with each refusal that it explains, up to the
# most. A minute's are 0.1 s and 0.4 s.
_FIRST_MARGIN, _MOST_MARGIN = 1 / 600, 1 / 150
# Of a second this share at first, more with the first refusal that it explains, and the most with another one within a
# period: that costs 7 % of the quota, and a hiccup now and then does not.
_FIRST_SHARE, _SECOND_SHARE, _MOST_SHARE = 0.04, 0.05, 0.075
# A refusal came at the edge of a window if it is over in less than this, in periods, and so much of the quota lies in
# the window and its edge.
_EDGE, _NEARLY_FULL = 1 / 60, 0.97
# A refusal for requests below this share of the quota is explained by a shorter window.
_CLEARLY_LESS = 0.8
# Headers that promised room where there was none raise no ceiling for so many periods.
_DISTRUST = 4
# A server that names a longer pause than this many periods speaks of something else than this quota (a day's, say):
# its error goes to the caller, and nobody else is held up.
_LONGEST_PAUSE = 2
# The pause after a refusal without a word on how long, in periods; twice as long each time that it was too short.
_FIRST_PAUSE, _LONGEST_UNTOLD_PAUSE, _MOST_DOUBLINGS = 1 / 120, 1 / 6, 8
# A slow start doubles what is sent every two round trips, of at least and at most so many periods, until it has sent so
# many requests; the first of them are probes.
_SHORTEST_ROUND, _LONGEST_ROUND, _RAMP, _PROBES = 1 / 6000, 1 / 60, 1_023, 2


@dataclass(frozen=True, slots=True)
class Correction:
    """How the server's word moved a limit; of the rules in `RULES`.

    Attributes:
        reason: The rule. "retry-after": nothing for some seconds. "slow start": after that, what is sent doubles every
            so many seconds. "remaining": requests or tokens that only the server has seen, for some seconds. "limit":
            the server's own limit of requests or tokens, which is below the user's.
            "margin": windows that are longer by some seconds. "one-second window": so many requests in any window of
            some seconds, and no more than a tenth of them at once. "ceiling": so many requests or tokens in place of
            the quota's, for some seconds at least. "latency": so many requests under way at once.
        seconds: As the reason says.
        requests: As the reason says.
        tokens: As the reason says.
        relaxes: Whether it took back a part of what was tightened before.
    """

    reason: str
    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    relaxes: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What a ledger knows of its own traffic around one request, that request left out.

    Attributes:
        sent_at: When it was sent.
        tokens: What it was counted for.
        requests_in_short: Admitted requests in the last sixth of a period before it.
        requests: Admitted requests in the last period, and since.
        tokens_in_window: Their tokens.
        requests_in_fine_and_edge: Admitted requests in the last sixtieth of a period before it, and a little longer.
        requests_in_short_and_edge: As `requests_in_short`, with those that have just left the window.
        requests_and_edge: As `requests`, likewise.
        tokens_and_edge: As `tokens_in_window`, likewise.
    """

    sent_at: float
    tokens: int
    requests_in_short: int
    requests: int
    tokens_in_window: int
    requests_in_fine_and_edge: int
    requests_in_short_and_edge: int
    requests_and_edge: int
    tokens_and_edge: int


def rules_of(adaptive: object) -> frozenset[str]:
    """The rules that apply: all but "latency", none, all, or those of the given names.

    Raises:
        ConfigurationError: It is none of these.
    """
    if isinstance(adaptive, bool):
        return RULES - {"latency"} if adaptive else frozenset()
    if adaptive == "latency":
        return RULES
    if isinstance(adaptive, Collection) and not isinstance(adaptive, str):
        rules = [rule for rule in adaptive if isinstance(rule, str) and rule in RULES]
        if len(rules) == len(adaptive):
            return frozenset(rules)
    raise ConfigurationError(
        f'adaptive={adaptive!r}: expected True, False, "latency" for all rules, or some of {sorted(RULES)}'
    )


@dataclass(frozen=True, slots=True)
class InForce:
    """What a window may hold by all that was learnt, which is less than the user's quota or all of it.

    Attributes:
        requests: Requests in a period.
        tokens: Tokens in a period.
        fine_requests: Requests in a sixtieth of it, where that is limited.
    """

    requests: int
    tokens: int
    fine_requests: int | None


class _Window(NamedTuple):
    """What an answer's headers say of one quota."""

    remaining: int | None
    limit: int | None
    reset: float | None


class Lessons:
    """All that was learnt of one server's quota.

    Args:
        requests: The user's quota of requests.
        tokens: The user's quota of tokens.
        period: The length of the quota's window in seconds.
        rules: The names of those that apply.
    """

    def __init__(self, requests: int, tokens: int, period: float, rules: frozenset[str]) -> None:
        self._period = period
        self._rules = rules
        self.requests = Ceiling(requests, period)
        self.tokens = Ceiling(tokens, period)
        # requests that the quota of tokens has room for, where they are charged for much more than here
        self.charged_requests = Ceiling(requests, period)
        self.unseen_requests = Unseen(requests, period)
        self.unseen_tokens = Unseen(tokens, period)
        # whether anything is known that keeps a request back which the quota has room for
        self.has_learnt = False
        self.margin = 0.0
        self._margin_share = _FIRST_SHARE
        self._at_a_fine_edge_at = -math.inf
        self._windows_learnt_at = -math.inf
        self.fine_requests: int | None = None
        self.paused_until = -math.inf
        self._requests_sent = 0
        self._first_sent_at: float | None = None
        self._newest_answer_sent_at = -math.inf
        self._learnt_at = -math.inf
        self._told_of_room_at = -math.inf
        self._suspected_at = -math.inf
        self._distrusts_remaining_until = -math.inf
        self._ramp_from = -math.inf
        self._ramp_round = 0.0
        self._ramp_sent = _RAMP
        self._probes_refused = 0
        self.news: list[Correction] = []

    def copy(self) -> "Lessons":
        """The same lessons, to look ahead with."""
        twin = copy(self)
        twin.requests, twin.tokens, twin.charged_requests = map(copy, self._ceilings())
        twin.unseen_requests, twin.unseen_tokens = copy(self.unseen_requests), copy(self.unseen_tokens)
        twin.news = []
        return twin

    def margin_of(self, window: float) -> float:
        """Seconds by which a window of so many seconds is kept longer."""
        return min(self.margin, self._margin_share * window)

    def in_force(self, now: float) -> InForce:
        """What a window may hold of all requests that are known."""
        requests = min(self.requests.value, self.charged_requests.value)
        tokens = self.tokens.value
        if self.unseen_requests.at(now):
            requests = min(requests, self.unseen_requests.leaves_of(self.requests.limit))
        if self.unseen_tokens.at(now):
            tokens = min(tokens, self.unseen_tokens.leaves_of(self.tokens.limit))
        return InForce(requests, tokens, self.fine_requests)

    def ramp_at(self, now: float) -> float:
        """When the next request of a slow start may be sent."""
        if self._ramp_sent >= _RAMP:
            return now
        return self._ramp_from + self._ramp_round * ((self._ramp_sent + 1).bit_length() - 1)

    def sent(self, now: float) -> None:
        """Note that a request is sent."""
        if self._first_sent_at is None:
            self._first_sent_at = now
        self._requests_sent += 1
        if self._ramp_sent < _RAMP:
            self._ramp_sent += 1

    def grow(self, now: float) -> bool:
        """Raise the ceilings whose time has come, as somebody waits below them. Returns whether any was."""
        due = [ceiling for ceiling in self._ceilings() if ceiling.grows_at(self._requests_sent) <= now]
        for ceiling in due:
            value, limit = ceiling.value, ceiling.limit
            ceiling.grow(now)
            if ceiling.limit > limit:
                self._tell("limit", 0.0, ceiling, ceiling.limit, relaxes=True)
            elif ceiling.value > value:
                self._tell("ceiling", self._period / FINE_WINDOWS, ceiling, ceiling.value, relaxes=True)
        return bool(due)

    def grows_at(self) -> float:
        """When a ceiling is raised next."""
        return min(ceiling.grows_at(self._requests_sent) for ceiling in self._ceilings())

    def answered(self, advice: ServerAdvice, sent_at: float, requests: int, tokens: int, now: float) -> None:
        """Believe what an answer's headers say is left, when so many requests and tokens were known here."""
        if not self.margin and "margin" in self._rules:
            self.margin = _FIRST_MARGIN * self._period
        if sent_at < self._newest_answer_sent_at:
            return
        self._newest_answer_sent_at = sent_at
        self._learn_what_remains(
            self.requests,
            self.unseen_requests,
            _Window(advice.remaining_requests, advice.limit_requests, advice.reset_requests),
            requests,
            now,
        )
        self._learn_what_remains(
            self.tokens,
            self.unseen_tokens,
            _Window(advice.remaining_tokens, advice.limit_tokens, advice.reset_tokens),
            tokens,
            now,
        )
        if "remaining" in self._rules and advice.remaining_tokens is not None and advice.remaining_tokens > 0:
            charged = max(1, self.tokens.limit - advice.remaining_tokens)
            self._learn_of_room(self.charged_requests, self.tokens.limit * requests // charged, now)

    def _learn_what_remains(self, ceiling: Ceiling, unseen: Unseen, said: _Window, known: int, now: float) -> None:
        # A remaining of 0 is not believed: Azure's Responses API was seen to send it where it means "unknown", and a
        # server that has nothing left says so with its next answer, a 429.
        if said.remaining is None or said.remaining <= 0:
            return
        if "limit" in self._rules:
            limit = said.limit if said.limit is not None and said.limit > 0 else ceiling.most
            self._keep_to(ceiling, min(limit, ceiling.most), now)
        if "remaining" not in self._rules:
            return
        amount = max(0, ceiling.limit - said.remaining - known)
        self.has_learnt = self.has_learnt or amount > 0
        if unseen.learn(amount, said.reset, now):
            self._tell("remaining", unseen.until - now, ceiling, amount)
        if 2 * known >= ceiling.value:
            self._learn_of_room(ceiling, known + said.remaining, now)

    def _keep_to(self, ceiling: Ceiling, limit: int, now: float) -> None:
        before = ceiling.limit
        if ceiling.keep_to(limit, now):
            self.has_learnt = True
            self._tell("limit", 0.0, ceiling, limit, relaxes=limit > before)

    def _learn_of_room(self, ceiling: Ceiling, room: int, now: float) -> None:
        if now >= self._distrusts_remaining_until and ceiling.learn_of_room(room, self._requests_sent, now):
            self._told_of_room_at = now
            self._tell("ceiling", self._period, ceiling, ceiling.value, relaxes=True)

    def refused(self, advice: ServerAdvice, seen: Seen, now: float) -> None:
        """Learn from the refusal of a request."""
        self.has_learnt = True
        is_new = self._is_new(seen)
        if advice.exhausted == "requests":
            self._learn_of_requests(advice, seen, now)
        elif advice.exhausted == "tokens":
            self._learn_of_tokens(advice, seen, now)
        if is_new:
            # the first ones of a slow start: the pause before it was too short
            self._probes_refused = self._probes_refused + 1 if self._ramp_sent <= _PROBES else 0
        self._pause(advice.retry_after, now)
        if not is_new:
            return
        if "slow start" in self._rules:
            shortest, longest = _SHORTEST_ROUND * self._period, _LONGEST_ROUND * self._period
            self._ramp_round = min(max(2 * (now - seen.sent_at), shortest), longest)
            self._ramp_from, self._ramp_sent = max(now, self.paused_until), 0
            self.news.append(Correction("slow start", self._ramp_round))
        self._learnt_at = now

    def _learn_of_requests(self, advice: ServerAdvice, seen: Seen, now: float) -> None:
        if seen.sent_at <= self._windows_learnt_at:
            # it was under way, and those that came before it need not have been sent before it
            return
        is_soon = advice.retry_after is None or advice.retry_after <= self._period / FINE_WINDOWS
        if is_soon and self._is_explained_by_windows(seen, now):
            self._windows_learnt_at = now
            return
        held = max(seen.requests, SHORT_WINDOWS * seen.requests_in_short)
        if self.fine_requests is not None:
            held = max(held, FINE_WINDOWS * seen.requests_in_fine_and_edge)
        self._lower(self.requests, held, seen, now)

    def _is_explained_by_windows(self, seen: Seen, now: float) -> bool:
        """Whether a refusal for requests is the work of windows other than they are kept here, which is learnt."""
        most = self.requests.most
        short, fine = max(1, most // SHORT_WINDOWS), max(1, most // FINE_WINDOWS)
        is_full = max(seen.requests_and_edge / most, seen.requests_in_short_and_edge / short) >= _NEARLY_FULL
        if seen.requests_in_fine_and_edge < fine:
            return is_full and (not self._is_new(seen) or self._widen())
        if self.fine_requests is not None:
            return not self._is_new(seen) or self._widen_fine(now)
        held = max(seen.requests, SHORT_WINDOWS * seen.requests_in_short)
        if "one-second window" in self._rules and held <= _CLEARLY_LESS * self.requests.value:
            self.fine_requests = fine
            self.news.append(Correction("one-second window", self._period / FINE_WINDOWS, requests=fine))
            return True
        return is_full and (not self._is_new(seen) or self._widen())

    def _learn_of_tokens(self, advice: ServerAdvice, seen: Seen, now: float) -> None:
        is_soon = advice.retry_after is None or advice.retry_after <= _EDGE * self._period
        is_full = seen.tokens_and_edge + seen.tokens >= _NEARLY_FULL * self.tokens.most
        if is_soon and is_full and (not self._is_new(seen) or self._widen()):
            return
        if seen.tokens_in_window < MUCH_LESS * self.tokens.most:
            self._lower(self.charged_requests, seen.requests, seen, now)
        else:
            self._lower(self.tokens, seen.tokens_in_window, seen, now)

    def _is_new(self, seen: Seen) -> bool:
        """Whether a refused request was not yet under way when the last lesson was learnt."""
        return seen.sent_at > self._learnt_at

    def _lower(self, ceiling: Ceiling, held: int, seen: Seen, now: float) -> None:
        if "ceiling" not in self._rules:
            return
        if held < MUCH_LESS * ceiling.most and ceiling.value == ceiling.most:
            # so far from the quota it may be a whim of the server's: only another one soon after is believed
            if not self._is_new(seen):
                return
            is_first = now > self._suspected_at + 2 * self._period
            self._suspected_at = now
            if is_first:
                return
        if seen.sent_at - self._told_of_room_at < self._period:
            # the server spoke of room, and there was none: its headers lag behind
            self._distrusts_remaining_until = now + _DISTRUST * self._period
        if ceiling.lower(held, seen.sent_at, self._requests_sent, now):
            if ceiling.value == ceiling.most:
                # there is no less than one request
                return
            if self._first_sent_at is not None and now < self._first_sent_at + self._period:
                # what an earlier process sent may have filled the first window, and does not fill the next
                ceiling.try_at(self._first_sent_at + self._period)
            self._tell("ceiling", self._period, ceiling, ceiling.value)

    def _tell(self, reason: str, seconds: float, of: Ceiling, amount: int, *, relaxes: bool = False) -> None:
        requests, tokens = (0, amount) if of is self.tokens else (amount, 0)
        self.news.append(Correction(reason, seconds, requests, tokens, relaxes))

    def _widen(self) -> bool:
        if self.margin >= _MOST_MARGIN * self._period or "margin" not in self._rules:
            return False
        self.margin = min(_MOST_MARGIN * self._period, max(_FIRST_MARGIN * self._period, 2 * self.margin))
        self.news.append(Correction("margin", self.margin))
        return True

    def _widen_fine(self, now: float) -> bool:
        if "margin" not in self._rules:
            return False
        is_rare = now > self._at_a_fine_edge_at + self._period
        self._at_a_fine_edge_at = now
        if self._margin_share < _SECOND_SHARE:
            self._margin_share = _SECOND_SHARE
        elif is_rare:
            return True
        elif self._margin_share < _MOST_SHARE:
            self._margin_share = _MOST_SHARE
        else:
            return False
        self.margin = max(_FIRST_MARGIN * self._period, self.margin)
        self.news.append(Correction("margin", self.margin_of(self._period / FINE_WINDOWS)))
        return True

    def _pause(self, retry_after: float | None, now: float) -> None:
        if "retry-after" not in self._rules:
            return
        if retry_after is None:
            seconds = self._period * min(
                _FIRST_PAUSE * 2 ** min(self._probes_refused, _MOST_DOUBLINGS), _LONGEST_UNTOLD_PAUSE
            )
        else:
            seconds = retry_after + self.margin
        if seconds <= _LONGEST_PAUSE * self._period and now + seconds > self.paused_until:
            self.paused_until = now + seconds
            self.news.append(Correction("retry-after", seconds))

    def _ceilings(self) -> tuple[Ceiling, Ceiling, Ceiling]:
        return self.requests, self.tokens, self.charged_requests

"""How much of a quota is ours, where that is less than the user's: what was seen to fit, and what others hold of it."""

import math

# Azure evaluates requests over ten seconds of a minute too, and some deployments over one second.
SHORT_WINDOWS, FINE_WINDOWS = 6, 60
# A ceiling is lowered to this share of what was in the window at a refusal, and raised in steps of the quota, each
# twice the last, one every sixtieth of a period.
_BELOW_REFUSED, _FIRST_STEP = 0.98, 0.005
# That is not tried before so many requests were sent since the last refusal, since trying costs some: of that many at
# most one in a hundred. It is tried after so many periods in any case, by who sends few: after the shortest time where
# the refusal may have been a whim of the server's, as the first one in long always may. The next one is believed for
# the longest time; far below the quota it is tried again each time after twice as long.
_REQUESTS_BETWEEN_TRIALS, _SHORTEST_HOLD, _LONGEST_HOLD = 300, 1, 16
# The server's `remaining` raises a ceiling where it leaves room for this share of the quota more.
_CLEARLY_MORE = 0.02
# A refusal below this share of the quota is a surprise; one for tokens tells more of what a request is charged.
MUCH_LESS = 0.25
# What somebody else uses varies by so much of the quota.
_SLACK = 0.02


class Ceiling:
    """What a window may hold where that is less than the user's quota: lowered by refusals, and tried upwards again.

    Additive increase and multiplicative decrease as in TCP's congestion control (RFC 5681), with steps that grow while
    nothing is refused. To try costs a refusal or two, so it is not done before many requests were sent.
    """

    __slots__ = (
        "_grows_at",
        "_grows_at_latest",
        "_grows_at_request",
        "_held_since",
        "_limit_ends_at",
        "_lowered_at",
        "_patience",
        "_period",
        "_step",
        "_value",
        "limit",
        "most",
    )

    def __init__(self, most: int, period: float) -> None:
        self.most = most
        # what the server says that its quota is, if that is less
        self.limit = most
        self._value = most
        self._period = period
        self._step = _FIRST_STEP
        self._lowered_at = self._held_since = -math.inf
        self._patience = _LONGEST_HOLD
        self._limit_ends_at = math.inf
        self._grows_at = self._grows_at_latest = math.inf
        self._grows_at_request = 0

    @property
    def value(self) -> int:
        """What a window may hold."""
        return min(self._value, self.limit)

    def grows_at(self, request: int) -> float:
        """When more is tried, if so many requests have been sent by then."""
        at = self._grows_at if request >= self._grows_at_request else self._grows_at_latest
        return min(at, self._limit_ends_at)

    def keep_to(self, limit: int, now: float) -> bool:
        """Take the server's word on its quota, until long after it was said last. Returns whether it is news."""
        is_news = limit != self.limit
        self.limit = limit
        self._limit_ends_at = now + _LONGEST_HOLD * self._period if limit < self.most else math.inf
        return is_news

    def lower(self, held: int, sent_at: float, request: int, now: float) -> bool:
        """Take what the window held at a refusal for all that fits. Returns whether it was news."""
        if sent_at <= self._lowered_at:
            # it was under way at the last refusal, and only tells more precisely what was held then
            self._value = max(1, min(self._value, held))
            return False
        is_far_below = held < MUCH_LESS * self.most
        is_seldom = now > self._lowered_at + _LONGEST_HOLD * self._period
        if self._value == self.most and (is_far_below or is_seldom):
            self._patience = _SHORTEST_HOLD
        elif not is_far_below:
            self._patience = _LONGEST_HOLD
        self._value = max(1, min(self._value, math.floor(held * _BELOW_REFUSED)))
        self._lowered_at, self._step = now, _FIRST_STEP
        self.hold(request, now)
        return True

    def hold(self, request: int, now: float) -> None:
        """Try nothing for a while."""
        if self._value < self.most:
            self._held_since = now
            self._grows_at, self._grows_at_latest = now + self._period, now + self._patience * self._period
            self._grows_at_request = request + _REQUESTS_BETWEEN_TRIALS

    def try_at(self, moment: float) -> None:
        """Try more at that moment, whatever is sent until then."""
        self._grows_at, self._grows_at_request = moment, 0

    def grow(self, now: float) -> None:
        """Try a step more, or forget a limit that has not been told for long."""
        if now >= self._limit_ends_at:
            self.keep_to(self.most, now)
            return
        if self._step == _FIRST_STEP:
            self._patience = min(2 * self._patience, _LONGEST_HOLD)
        self._held_since = now
        # at most twice as much, or a trial far below the quota would cost several refusals
        self._raise(self._value + min(self._value, max(1, math.ceil(self.most * self._step))), now)
        self._step *= 2

    def learn_of_room(self, room: int, request: int, now: float) -> bool:
        """Take the server's word that so much fits. Returns whether that is more than was known."""
        if self._value == self.most:
            return False
        is_more = room >= self._value + _CLEARLY_MORE * self.most
        if is_more:
            self._raise(room, now)
            self.hold(request, now)
        else:
            # its word spares a trial, but not for ever: headers may speak of something else
            self._grows_at, self._grows_at_request = now + self._period, request + _REQUESTS_BETWEEN_TRIALS
            self._grows_at_latest = self._held_since + _LONGEST_HOLD * self._period
        return is_more

    def _raise(self, value: int, now: float) -> None:
        self._value = min(self.most, value)
        self._grows_at = math.inf if self._value == self.most else now + self._period / FINE_WINDOWS
        self._grows_at_latest, self._grows_at_request = self._grows_at, 0


class Unseen:
    """What only the server has seen in its window: somebody else's, or what is counted higher than here.

    It is taken to go on for a period, or until the server's window turns, unless a newer answer says otherwise.
    """

    __slots__ = ("_amount", "_period", "_slack", "_told", "until")

    def __init__(self, quota: int, period: float) -> None:
        self._period = period
        self._slack = math.floor(_SLACK * quota)
        self._amount = 0
        self._told = 0
        self.until = -math.inf

    def learn(self, amount: int, reset: float | None, now: float) -> bool:
        """Take the server's word. Returns whether it is news."""
        self._amount = amount
        self.until = now + (self._period if reset is None else min(reset, self._period))
        is_news = amount > self._told + 2 * self._slack
        if is_news or amount == 0:
            self._told = amount
        return is_news

    def at(self, now: float) -> int:
        """How much of it counts still."""
        return self._amount if now < self.until else 0

    def leaves_of(self, limit: int) -> int:
        """What it leaves of a limit, so that what varies in it fits too."""
        return limit - self._amount - self._slack

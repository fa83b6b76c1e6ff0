"""How many calls may be under way at once where answers tell by their delay that the service has too much to do."""

import math

# So many answers are looked at together, or as many as may be under way if that is more.
_FEWEST_IN_A_ROUND = 10
# Answers are late if a round takes on average so many times what is usual.
_LATE = 2.0
# Then so much of the calls may stay under way; after a round in time, one more.
_DECREASE = 0.75
# How fast what is usual follows a round that took longer, and one that took less.
_FOLLOWS_UP, _FOLLOWS_DOWN = 0.05, 0.3


class ResponseTimes:
    """Fewer calls at once when answers take much longer than usual, and one more after each round that does not.

    Additive increase and multiplicative decrease by delay, as TCP Vegas has it and Netflix's concurrency-limits brought
    to services: a queue at the server shows in its answers before it refuses anything. What is usual follows slowly, so
    that a service that has become slower for good is not held down for ever.

    Args:
        most: Calls under way at once where nothing is late.
    """

    __slots__ = ("_before_pause", "_most", "_seconds", "_taken", "_usual", "limit")

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = most
        self._before_pause: int | None = None
        self._usual = math.nan
        self._seconds = 0.0
        self._taken = 0

    @property
    def is_paused(self) -> bool:
        """Whether no further call may start."""
        return self._before_pause is not None

    def pause(self) -> None:
        """Let no further call start; a limit of 0 costs those that look at it nothing."""
        if self._before_pause is None:
            self._before_pause, self.limit = self.limit, 0

    def resume(self) -> None:
        """Let as many be under way as before the pause."""
        if self._before_pause is not None:
            self.limit, self._before_pause = self._before_pause, None

    def observe(self, seconds: float) -> bool:
        """Note how long an answer took. Returns whether the limit moved."""
        if self.is_paused:
            return False
        self._seconds += seconds
        self._taken += 1
        if self._taken < max(_FEWEST_IN_A_ROUND, self.limit):
            return False
        average, before = self._seconds / self._taken, self.limit
        self._seconds, self._taken = 0.0, 0
        if math.isnan(self._usual):
            self._usual = average
        is_late = average > _LATE * self._usual
        self.limit = max(1, math.floor(self.limit * _DECREASE)) if is_late else min(self._most, self.limit + 1)
        self._usual += (_FOLLOWS_UP if average > self._usual else _FOLLOWS_DOWN) * (average - self._usual)
        return self.limit != before

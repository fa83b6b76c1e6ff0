"""How many retries a function may have: a share of its calls of the last minute, so that an outage is not multiplied.

What has one name in the statistics has one window: a method of all objects, and the clients of one name. What the
share is, and whether there is one, is each decorator's own.
"""

from collections import deque
from dataclasses import dataclass

from resilience_kit.forking import new_lock
from resilience_kit.registry import Registry, Value
from resilience_kit.waiting import now

# Seconds over which calls and retries are compared.
WINDOW = 60
# As many retries are allowed in any window, whatever the share: few calls would have none, and the first failures of
# many that have just begun would be lost.
FEWEST_RETRIES = 10


@dataclass(frozen=True, slots=True)
class RetryBudgetStatistics:
    """The calls of the last minute, and the retries of theirs that counted."""

    calls_in_window: int
    retries_in_window: int


@dataclass(frozen=True, slots=True)
class NothingDeclared:
    """A window has no parameters that could contradict each other."""


class _Second:
    __slots__ = ("calls", "retries", "second")

    def __init__(self, second: int) -> None:
        self.second = second
        self.calls = 0
        self.retries = 0


class RetryBudget:
    """The calls and the retries of the last minute, by whole seconds, so that thousands take no more room than few."""

    parameters: dict[str, Value]
    _seconds: deque[_Second]
    _newest: _Second
    _calls: int
    _retries: int

    def __init__(self, _name: str, _declared: NothingDeclared) -> None:
        self.parameters = {}
        self._lock = new_lock()
        self._start_anew(0)

    def count_call(self, current: float) -> None:
        """Count a call that begins; on the way of each one."""
        second = int(current)
        with self._lock:
            newest = self._newest if self._newest.second == second else self._turn_to(second)
            newest.calls += 1
            self._calls += 1

    def forget_call(self, counted_at: float) -> None:
        """Take back a call that was refused here: calls that are never sent would make room for retries that are."""
        with self._lock:
            for counted in self._seconds:
                # it may have waited for longer than the window, or since before a reset
                if counted.second == int(counted_at) and counted.calls:
                    counted.calls -= 1
                    self._calls -= 1

    def take(self, share: float, at_least: float) -> bool:
        """Whether there is a retry left, of a share of the calls but at least of so many; it is taken."""
        with self._lock:
            newest = self._turn_to(int(now()))
            if self._retries + 1 > max(at_least, share * self._calls):
                return False
            newest.retries += 1
            self._retries += 1
            return True

    def statistics(self) -> RetryBudgetStatistics:
        """Where the window stands now."""
        with self._lock:
            self._turn_to(int(now()))
            return RetryBudgetStatistics(self._calls, self._retries)

    def reset(self) -> None:
        """Forget all calls and retries."""
        with self._lock:
            self._start_anew(0)

    def _turn_to(self, second: int) -> _Second:
        """The second that is counted now; what is older than a window is forgotten."""
        seconds_back = self._newest.second - second
        if 0 <= seconds_back < WINDOW:
            # it is now, or a thread looked at the clock, and counts when another has already turned it
            return self._newest
        if seconds_back > 0:
            # the clock of another event loop, in a test: nobody knows how long ago that was
            self._start_anew(second)
            return self._newest
        self._newest = _Second(second)
        self._seconds.append(self._newest)
        while self._seconds[0].second <= second - WINDOW:
            forgotten = self._seconds.popleft()
            self._calls -= forgotten.calls
            self._retries -= forgotten.retries
        return self._newest

    def _start_anew(self, second: int) -> None:
        self._newest = _Second(second)
        self._seconds = deque([self._newest])
        self._calls = 0
        self._retries = 0


retry_budgets: Registry[NothingDeclared, RetryBudget] = Registry(
    "retry budget", "retries", RetryBudget, lambda _declared: {}
)

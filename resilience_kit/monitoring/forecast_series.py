"""One agent's tokens by interval over the last day, and models that learn from each interval what follows it.

The forecast is the last value plus what a linear model expects to be added. A model that has learnt nothing is thus
the naive forecast. It learns by absolute error, which a burst moves no further than any other interval.
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Forecasts that are scored before one is shown.
_LEAST_SCORED = 30
# The share of errors that the band leaves out on either side, and how far one error moves its edges, in mean errors.
_OUTSIDE = 0.1
_EDGE_STEP = 0.05
# After a silence, so many intervals are learnt from; what lies before them only passes. It bounds what a call may cost.
_MOST_LEARNT = 120
# A burst in a quiet day is thousands of times the mean: unbounded, it would drown all that was learnt.
_MOST_MEANS = 10.0

NewModel = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of one interval, in tokens; both errors are means of absolute errors so far."""

    expected: float
    low: float
    high: float
    last: float
    error: float
    last_error: float


@dataclass(slots=True)
class _Guess:
    """A prediction on its way: what it was made of, until its interval is over."""

    features: dict[str, float]
    scale: float
    last: float
    expected: float
    below: float
    above: float


@dataclass(slots=True)
class _Horizon:
    """One model, for one number of intervals ahead."""

    steps: int
    model: Any
    waiting: deque[_Guess] = field(default_factory=deque)
    below: float = 0.0
    above: float = 0.0
    scored: int = 0
    error_sum: float = 0.0
    last_error_sum: float = 0.0

    def learn(self, actual: float) -> None:
        """Compare the guess of an interval with what it brought."""
        if len(self.waiting) < self.steps:
            return
        guess = self.waiting.popleft()
        error = actual - guess.expected
        self.scored += 1
        self.error_sum += abs(error)
        # Each edge goes out a long way when it was passed, else in a short way: it stays where one in ten passes it,
        # also when the errors of the day are not those of the night.
        step = _EDGE_STEP * self.error_sum / self.scored
        self.below = max(0.0, self.below + step * ((error < -guess.below) - _OUTSIDE))
        self.above = max(0.0, self.above + step * ((error > guess.above) - _OUTSIDE))
        self.last_error_sum += abs(actual - guess.last)
        self.model.learn_one(guess.features, (actual - guess.last) / guess.scale)

    def guess(self, features: dict[str, float], scale: float, last: float) -> None:
        """Say what the interval `steps` after the last one will bring."""
        added = self.model.predict_one(features) * scale
        expected = max(0.0, last + added) if math.isfinite(added) else last
        self.waiting.append(_Guess(features, scale, last, expected, self.below, self.above))

    def prediction(self) -> Prediction | None:
        """The newest guess, once enough earlier ones were scored."""
        if not self.waiting or self.scored < _LEAST_SCORED:
            return None
        guess = self.waiting[-1]
        return Prediction(
            expected=guess.expected,
            low=max(0.0, guess.expected - self.below),
            high=guess.expected + self.above,
            last=guess.last,
            error=self.error_sum / self.scored,
            last_error=self.last_error_sum / self.scored,
        )


class Series:
    """The tokens of the intervals of a day, the open interval, and a model for each number of steps ahead."""

    __slots__ = ("_closed", "_cumulated", "_day", "_half", "_horizons", "_hour", "_open", "_tokens")

    def __init__(self, interval: int, *, day: int, steps: Sequence[int], new_model: NewModel) -> None:
        self._open = interval
        self._tokens = 0.0
        self._closed = 0
        self._day = day
        self._hour = max(1, day // 24)
        self._half = day // 48
        # All tokens before an interval, in a ring: the sum of any stretch is one subtraction.
        self._cumulated = array("d", bytes(8 * (day + self._half + 2)))
        self._horizons = {step: _Horizon(step, new_model()) for step in steps}

    def add(self, tokens: float, interval: int) -> None:
        """Count tokens; those of an interval that is over go to the open one."""
        self.close_before(interval)
        self._tokens += tokens

    def close_before(self, interval: int) -> None:
        """Learn from all intervals before this one; those in which nothing was counted were silent."""
        over = interval - self._open
        if over <= 0:
            return
        self._open = interval
        for left in range(min(over, len(self._cumulated)), 0, -1):
            self._close(self._tokens, learn=left <= _MOST_LEARNT)
            self._tokens = 0.0

    def prediction(self, steps: int) -> Prediction | None:
        """What is expected `steps` intervals after the last closed one; None while too little is known."""
        return self._horizons[steps].prediction()

    def _close(self, tokens: float, *, learn: bool) -> None:
        self._cumulated[(self._closed + 1) % len(self._cumulated)] = self._before(self._closed) + tokens
        self._closed += 1
        for horizon in self._horizons.values():
            if not learn:
                horizon.waiting.clear()
                continue
            horizon.learn(tokens)
            if self._closed > self._day + self._half:
                scale = max(1.0, self._mean(self._closed - self._day, self._closed))
                horizon.guess(self._features(horizon.steps, tokens, scale), scale, tokens)

    def _features(self, steps: int, last: float, scale: float) -> dict[str, float]:
        """What the model looks at, in means of the last day: where the last value stands, and what yesterday did."""
        newest = self._closed - 1
        then, later = self._around(newest - self._day), self._around(newest - self._day + steps)
        features = {
            "rise yesterday": later - then,
            "above yesterday": later - last,
            "above the hour": self._mean(self._closed - self._hour, self._closed) - last,
            "step": last - self._mean(newest - 1, newest),
        }
        return {name: max(-_MOST_MEANS, min(value / scale, _MOST_MEANS)) for name, value in features.items()}

    def _around(self, interval: int) -> float:
        return self._mean(interval - self._half, interval + self._half + 1)

    def _mean(self, start: int, end: int) -> float:
        return (self._before(end) - self._before(start)) / (end - start)

    def _before(self, interval: int) -> float:
        return self._cumulated[interval % len(self._cumulated)]

"""Tokens per minute to come, learnt by agent while calls are made: forecasts, warnings of peaks, advice to slow down.

Off unless you make a `Forecaster` and subscribe it. It changes no call: a warning is an event, and what to do with the
advice is up to you. Needs the extra `forecast`, which is river.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilience_kit.errors import ConfigurationError
from resilience_kit.events import BudgetSettled, Event, PeakExpected, emit
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.forecast_series import NewModel, Series
from resilience_kit.validating import is_number

__all__ = ["Forecast", "Forecaster"]

_DAY = 86_400
_MINUTE = 60
# Calls are taken from the queue at once, but for those that end while another one is counted.
_MOST_QUEUED = 10_000
# More than any call uses: such a figure is an error of whoever reported it.
_MOST_TOKENS = 1e9
# A peak is over when less than this share of the quota is expected; and advice never slows below this share.
_PEAK_IS_OVER = 0.9
_SLOWEST = 0.1


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an agent will use, beside the naive forecast that all stays as it is; all figures in tokens per minute.

    Attributes:
        agent: The agent, or None for all agents together.
        seconds: How far ahead: from the end of the last full interval to the end of the one that is meant.
        expected: The forecast.
        low: One time in ten, less than this came.
        high: One time in ten, more than this came.
        last_value: The naive forecast: what the last full interval had.
        error: The mean absolute error of all forecasts so far.
        last_value_error: That of the naive forecast over the same time.
    """

    agent: str | None
    seconds: float
    expected: float
    low: float
    high: float
    last_value: float
    error: float
    last_value_error: float

    @property
    def helps(self) -> bool:
        """Whether it has been nearer than the naive forecast so far; if not, go by `last_value`."""
        return self.error < self.last_value_error


class Forecaster:
    """Learns tokens per minute from the calls of `@token_budget` and `@resilient`, by agent and of all together.

    It tells nothing for a day: its models compare with yesterday. Intervals are closed when a call ends or somebody
    asks, so a forecast costs no thread and no timer.

    Args:
        name: What its events are named: the limit whose quota is meant.
        quota: Tokens per minute: a `PeakExpected` event is emitted when more is expected, once for each peak.
            Default: no warnings.
        horizons: How far ahead to look, in seconds: whole intervals, half a day at most.
        interval: Seconds that are counted together. A day must be a whole number of them.
        most_agents: So many agents have a model each; those that come later share one, named "other".
        clock: Seconds since the epoch. In tests, `resilience_kit.waiting.now` follows virtual time.

    Raises:
        ConfigurationError: An argument is none of these.
        ImportError: river is not installed (extra `forecast`).

    Example:
        >>> from resilience_kit import subscribe
        >>> from resilience_kit.monitoring.forecast import Forecaster
        >>> forecaster = Forecaster(quota=150_000)
        >>> stop = subscribe(forecaster.listen)
        >>> print(forecaster.forecast(seconds=900))  # on the first day
        None
        >>> forecaster.pacing(quota=150_000)
        1.0
        >>> stop()
    """

    def __init__(
        self,
        name: str = "default",
        *,
        quota: float | None = None,
        horizons: Sequence[float] = (60, 300, 900, 3_600),
        interval: float = 60,
        most_agents: int = 50,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not is_number(interval) or not 1 <= interval <= _DAY / 48 or _DAY % interval:
            raise ConfigurationError(
                f"Forecaster(interval={interval!r}): expected seconds that divide a day, from 1 to 1800, such as 60"
            )
        if quota is not None:
            _check_quota("Forecaster", quota)
        if not is_number(most_agents) or most_agents < 0 or most_agents != int(most_agents):
            raise ConfigurationError(f"Forecaster(most_agents={most_agents!r}): expected a whole number, 0 or more")
        half = _DAY / 2 - interval
        if not _are_horizons(horizons, interval, half):
            raise ConfigurationError(
                f"Forecaster(horizons={horizons!r}): expected whole intervals of {interval:g} seconds, "
                f"{half:g} seconds at most, such as ({5 * interval:g}, {15 * interval:g})"
            )
        self._name = name
        self._quota = quota
        self._steps = {seconds: int(seconds // interval) for seconds in sorted(horizons)}
        self._interval = interval
        self._most_agents = most_agents
        self._clock = clock
        self._new_model = _river_model()
        # A listener must not wait, and the garbage collector may end one call while its thread counts another: calls
        # are queued, and taken from the queue by whoever finds the lock free.
        self._queue: deque[tuple[str, float, int]] = deque(maxlen=_MOST_QUEUED)
        self._lock = new_lock()
        self._total: Series | None = None
        self._agents: dict[str, Series] = {}
        self._looked_for_peak: int | None = None
        self._in_peak = False

    def listen(self, event: Event) -> None:
        """Count the tokens of a call that ended; give this method to `subscribe`."""
        if not isinstance(event, BudgetSettled):
            return
        tokens = event.prompt_tokens + event.completion_tokens
        if not (is_number(tokens) and 0 < tokens <= _MOST_TOKENS):
            return
        self._queue.append((event.name, tokens, self._now()))
        if self._lock.acquire(blocking=False):
            try:
                self._count_queued()
                peak = self._new_peak()
            finally:
                self._lock.release()
            if peak is not None:
                emit(peak)

    def forecast(self, *, seconds: float, agent: str | None = None) -> Forecast | None:
        """What is expected so far ahead.

        Args:
            seconds: One of the horizons.
            agent: An agent's name. Default: all agents together.

        Returns:
            The forecast, or None where too little is known: of an agent without a call, and on the first day.

        Raises:
            ConfigurationError: `seconds` is not one of the horizons.
        """
        if seconds not in self._steps:
            known = ", ".join(f"{horizon:g}" for horizon in self._steps)
            raise ConfigurationError(f"forecast(seconds={seconds!r}): expected one of the horizons: {known}")
        with self._lock:
            self._count_queued()
            series = self._total if agent is None else self._agents.get(agent)
            return None if series is None else self._forecast(series, agent, seconds)

    def forecasts(self) -> list[Forecast]:
        """All that is expected: of all agents together, then of each agent, at each horizon."""
        with self._lock:
            self._count_queued()
            all_series: list[tuple[str | None, Series]] = [(None, self._total)] if self._total else []
            all_series.extend(self._agents.items())
            found = [self._forecast(series, agent, seconds) for agent, series in all_series for seconds in self._steps]
            return [forecast for forecast in found if forecast is not None]

    def pacing(self, quota: float) -> float:
        """By how much to slow what can wait, so that less of it meets the peak.

        Args:
            quota: Tokens per minute that there are.

        Returns:
            1.0: go on as you do. Below, and above 0: at this share of the usual pace. It is never above 1, and 1.0
            where too little is known or the forecast has been no better than the naive one.

        Raises:
            ConfigurationError: The quota is not a number above 0.
        """
        _check_quota("pacing", quota)
        with self._lock:
            self._count_queued()
            peak = self._peak(quota)
        return 1.0 if peak is None else max(_SLOWEST, quota / peak.expected)

    def _now(self) -> int:
        return int(self._clock() // self._interval)

    def _count_queued(self) -> None:
        while self._queue:
            name, tokens, interval = self._queue.popleft()
            if self._total is None:
                self._total = self._new_series(interval)
            self._total.add(tokens, interval)
            agent = name if name in self._agents or len(self._agents) < self._most_agents else "other"
            series = self._agents.get(agent)
            if series is None:
                series = self._agents[agent] = self._new_series(interval)
            series.add(tokens, interval)
        if self._total is not None:
            self._total.close_before(self._now())

    def _new_series(self, interval: int) -> Series:
        steps = tuple(self._steps.values())
        return Series(interval, day=int(_DAY // self._interval), steps=steps, new_model=self._new_model)

    def _forecast(self, series: Series, agent: str | None, seconds: float) -> Forecast | None:
        series.close_before(self._now())
        found = series.prediction(self._steps[seconds])
        if found is None:
            return None
        minutes = self._interval / _MINUTE
        return Forecast(
            agent=agent,
            seconds=seconds,
            expected=found.expected / minutes,
            low=found.low / minutes,
            high=found.high / minutes,
            last_value=found.last / minutes,
            error=found.error / minutes,
            last_value_error=found.last_error / minutes,
        )

    def _peak(self, quota: float) -> Forecast | None:
        """The nearest forecast above the quota that is worth believing."""
        if self._total is not None:
            for seconds in self._steps:
                forecast = self._forecast(self._total, None, seconds)
                if forecast is not None and forecast.helps and forecast.expected > quota:
                    return forecast
        return None

    def _new_peak(self) -> PeakExpected | None:
        """What to warn of: looked for once an interval, since forecasts are as old as the last full one."""
        now = self._now()
        if self._quota is None or now == self._looked_for_peak:
            return None
        self._looked_for_peak = now
        peak = self._peak(self._quota * _PEAK_IS_OVER)
        if peak is None:
            self._in_peak = False
        elif not self._in_peak and (peak := self._peak(self._quota)) is not None:
            self._in_peak = True
            tokens = round(peak.expected)
            return PeakExpected(name=self._name, seconds=peak.seconds, tokens=tokens, quota=self._quota)
        return None


def _are_horizons(given: object, interval: float, most: float) -> bool:
    if not isinstance(given, Sequence) or not given:
        return False
    return all(is_number(it) and 0 < it <= most and it % interval == 0 for it in given)


def _check_quota(function: str, quota: float) -> None:
    if not is_number(quota) or quota <= 0:
        raise ConfigurationError(f"{function}(quota={quota!r}): expected tokens per minute, a number above 0")


def _river_model() -> NewModel:
    """What makes a model; river takes a second to import, paid by those who forecast."""
    try:
        from river.linear_model import LinearRegression
        from river.optim import SGD
        from river.optim.losses import Absolute
    except ImportError as error:
        raise ImportError("Forecaster needs river: pip install 'resilience-kit[forecast]'") from error
    # No intercept: where nothing differs from yesterday and from the last hour, nothing is expected to change.
    return lambda: LinearRegression(optimizer=SGD(0.01), loss=Absolute(), intercept_lr=0.0)

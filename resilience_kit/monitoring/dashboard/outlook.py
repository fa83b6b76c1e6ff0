"""The tokens to come, beside the naive forecast: learnt from the history while somebody looks.

It learns from samples, so that calls pay nothing for it, and a process that has just started knows what the ones before
it saw.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resilience_kit.errors import ConfigurationError
from resilience_kit.events import BudgetSettled
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.forecast import Forecast, Forecaster
from resilience_kit.monitoring.measures import Sample, merge_by

if TYPE_CHECKING:
    from resilience_kit.monitoring.history import History

_MINUTE = 60
_HOUR = 3_600
_DAY = 86_400
# A model compares with yesterday: it learns from the second day on, and two weeks would take too long to read.
_LEARNT = 3 * _DAY
_LEAST = _DAY + _HOUR

_log = logging.getLogger("resilience_kit.monitoring")


class Outlook:
    """Learns from a history once a minute at most, in a thread of its own, when it is asked.

    Args:
        history: Where minutes are read. Default: nothing is learnt, and the outlook says why.
        forecaster: One that the program has already, which is asked instead.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        history: "History | None" = None,
        forecaster: Forecaster | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._history = history
        self._given = forecaster
        self._clock = clock
        self._lock = new_lock()
        self._thread: threading.Thread | None = None
        self._tried_at = 0.0
        self._learnt_until = 0.0
        self._began = 0.0
        self._replayed = 0.0
        self._learning: Forecaster | None = None
        self._told = _nothing("No forecast yet: it reads the history.")

    def told(self) -> dict[str, Any]:
        """The forecasts of all agents together, each hour's minutes before them, and a note; returns at once."""
        if self._given is None and self._history is None:
            return _nothing("No forecast: it learns from a history that is more than a day long, and there is none.")
        with self._lock:
            is_due = self._clock() >= self._tried_at + _MINUTE + 1
            if is_due and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._renew, name="resilience-kit-outlook", daemon=True)
                self._thread.start()
            return self._told

    def wait(self) -> None:
        """Wait until all is learnt that there was."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _renew(self) -> None:
        end = self._clock() // _MINUTE * _MINUTE
        try:
            self._told = self._renewed(end)
        except ImportError:
            self._told = _nothing("No forecast: river is not installed (pip install 'resilience-kit[forecast]').")
        except ConfigurationError as error:
            self._told = _nothing("No forecast: the history cannot be read.")
            _log.warning("the dashboard's forecast reads no history: %s", error)
        self._tried_at = end

    def _renewed(self, end: float) -> dict[str, Any]:
        start = self._learnt_until or end - _LEARNT
        minutes = [] if self._history is None else self._history.read(min(start, end - _HOUR), end, resolution=_MINUTE)
        tokens = tokens_by_minute(minutes)
        forecaster = self._given or self._learn({at: used for at, used in tokens.items() if start < at <= end}, end)
        self._learnt_until = end
        forecasts = [it for it in forecaster.forecasts() if it.agent is None]
        past = [end - _HOUR + number * _MINUTE for number in range(1, _HOUR // _MINUTE + 1)]
        return {
            "from": end,
            "past": {"at": past, "tokens": [tokens.get(at, 0) for at in past]},
            "points": [asdict(it) for it in forecasts],
            "note": note_on(forecasts) if forecasts else self._missing(end),
        }

    def _learn(self, tokens: dict[float, float], end: float) -> Forecaster:
        if self._learning is None:
            self._learning = Forecaster(horizons=(300, 900, 1_800, 3_600), most_agents=0, clock=lambda: self._replayed)
            self._began = min(tokens, default=end)
        for at, used in sorted(tokens.items()):
            # the middle of the minute that ends here
            self._replayed = at - _MINUTE / 2
            self._learning.listen(
                BudgetSettled(name="all", reserved=0, prompt_tokens=round(used), completion_tokens=0, usd=None)
            )
        self._replayed = end + 1
        return self._learning

    def _missing(self, end: float) -> str:
        if self._given is not None:
            return "No forecast yet: it learns for a day before it tells anything."
        hours = (end - self._began) / _HOUR
        return f"No forecast yet: the history goes back {hours:.0f} h, and it needs {_LEAST / _HOUR:.0f} h."


def tokens_by_minute(samples: Sequence[Sample]) -> dict[float, float]:
    """The tokens that calls used in each minute, by its end."""
    tokens: dict[float, float] = {}
    for sample in merge_by(samples, _MINUTE):
        end = (sample.at - sample.seconds / 2) // _MINUTE * _MINUTE + _MINUTE
        used = (it.counter("prompt_tokens") + it.counter("completion_tokens") for it in sample.of("agents").values())
        tokens[end] = sum(used)
    return tokens


def note_on(forecasts: Sequence[Forecast]) -> str:
    """Whether to go by the forecast, in words."""
    farthest = forecasts[-1]
    errors = f"{farthest.error:,.0f} tokens per minute, the naive one by {farthest.last_value_error:,.0f}"
    verdict = "Go by it." if farthest.helps else "Go by the naive one, which says that all stays as it is."
    minutes = farthest.seconds / _MINUTE
    return (
        f"{minutes:.0f} minutes ahead the forecast has been wrong by {errors}. {verdict} "
        "One time in ten it came out below the band, and one in ten above."
    )


def _nothing(note: str) -> dict[str, Any]:
    return {"points": [], "note": note}

"""What the page shows, in plain JSON: of one process, or of all together."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from resilience_kit.errors import ConfigurationError
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.alerts import Alerts
from resilience_kit.monitoring.costs import Costs, Spending, costs_of
from resilience_kit.monitoring.dashboard.outlook import Outlook
from resilience_kit.monitoring.dashboard.past import columns, row_of
from resilience_kit.monitoring.measures import Reading, Sample, merge, merge_by

if TYPE_CHECKING:
    from resilience_kit.monitoring.dashboard.sources import Source
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.sampler import Sampler

_MINUTE = 60
_HOUR = 3_600
_DAY = 86_400
# How far back each goes, the length of a step in it, and of how much a point tells, in seconds.
RANGES = {
    "minute": (_MINUTE, 1, 10),
    "hour": (_HOUR, 10, 30),
    "day": (_DAY, 300, 300),
    "week": (7 * _DAY, _HOUR, _HOUR),
}
# What alerts look at when somebody comes: as far back as most rules do.
_LOOK_BACK = 900
_LATE = 3.0
# A month is not read each second.
_COSTS_EVERY = 10
# A page that lists thousands is no help, and slow.
_MOST_ROWS = 100

_LIMIT_GAUGES = (
    *("in_flight", "max_concurrent", "waiting", "paused", "period"),
    *("requests_in_window", "requests_per_minute", "tokens_in_window", "tokens_per_minute"),
)
_LIMIT_COUNTERS = ("calls_admitted", "calls_delayed", "calls_refused", "calls_rate_limited", "seconds_waited")
_AGENT_COUNTERS = ("calls", "prompt_tokens", "completion_tokens", "usd", "calls_of_unknown_price", "truncations")


class Figures:
    """Builds what the page shows; blocks where figures come from a store or from a history.

    Args:
        title: What the page is headed.
        source: Where figures come from.
        history: Where days and weeks come from, and what was spent.
        sampler: What was spent where there is no history; None where the source is not this process.
        alerts: Whose alerts are shown. Default: those of the default rules.
        outlook: What expects the tokens to come.
        has_controls: Whether the page has buttons.
    """

    def __init__(
        self,
        title: str,
        source: "Source",
        *,
        history: "History | None" = None,
        sampler: "Sampler | None" = None,
        alerts: Alerts | None = None,
        outlook: Outlook | None = None,
        has_controls: bool = False,
    ) -> None:
        self._title = title
        self._source = source
        self._history = history
        self._spender = history or sampler
        self._alerts = alerts
        # by the rules that are on without a word; looked at only while somebody looks at the page
        self._own_alerts = Alerts(deliver=()) if alerts is None else None
        self._looked_at = 0.0
        self._outlook = outlook or Outlook()
        self._has_controls = has_controls
        self._lock = new_lock()
        self._costs: tuple[float, dict[str, Any] | None] = (-math.inf, None)

    def now(self, process: str | None = None) -> dict[str, Any]:
        """All but the past, of one process or of all."""
        standing = self._source.standing(process)
        recent = self._source.recent(_MINUTE, process)
        minute = merge(recent) if recent else Sample(standing.at, 0.0, "")
        newest = max((sample.at for sample in recent), default=0.0)
        last = [sample for sample in recent if sample.at > newest - RANGES["minute"][2]]
        return {
            "at": time.time(),
            "title": self._title,
            "has_controls": self._has_controls,
            "processes": self._source.processes(),
            "notes": self._source.notes(),
            "alerts": self._firing(),
            "circuits": [_circuit(it) for it in _by_name(standing, "circuit_breakers")],
            "limits": [_limit(it, minute.reading(it.section, it.name)) for it in _by_name(standing, "rate_limiters")],
            "agents": _agents(standing),
            "forecast": self._outlook.told(),
            "costs": self._spent(),
            "second": {"at": math.floor(newest), **row_of(last)} if last else None,
            "minute": row_of(recent) if recent else None,
            "footer": self._source.footer(),
        }

    def past(self, name: str, process: str | None = None) -> dict[str, Any]:
        """The columns of one of `RANGES`, and what is missing in them."""
        seconds, step, window = RANGES[name]
        current = time.time()
        end = math.ceil(current / step) * step
        note = None
        if name == "minute":
            note = "Each point tells of the ten seconds before it."
        if seconds > _HOUR and self._history is None:
            note = "The last hour is in memory; for days and weeks, give the dashboard a history."
        samples = [*self._source.recent(min(seconds, _HOUR) + window, process)]
        if self._history is not None and seconds >= _HOUR:
            try:
                samples = [*self._recorded(samples, current - seconds, process, step)]
            except ConfigurationError as error:
                note = str(error)
        found = columns(samples, end=end, seconds=seconds, step=step, window=window)
        return {"range": name, "note": note, **found}

    def _recorded(self, samples: list[Sample], start: float, process: str | None, step: int) -> Iterable[Sample]:
        """What the history has of a stretch of time: all of it, or what came before the samples in memory."""
        if self._history is None:
            return samples
        if step >= _MINUTE:
            resolution = _HOUR if step >= _HOUR else _MINUTE
            found = self._history.read(start, resolution=resolution)
            return [it for it in found if process in (None, it.process)]
        before = min((it.at - it.seconds for it in samples), default=time.time())
        # an hour of seconds takes a second to read: only those of the last minute are
        minute = before // _MINUTE * _MINUTE
        found = self._history.read(start, minute, resolution=_MINUTE) if minute > start else []
        found += self._history.read(max(start, minute), before) if before > start else []
        return [*(it for it in found if process in (None, it.process)), *samples]

    def _firing(self) -> list[dict[str, Any]]:
        if self._own_alerts is not None:
            # of several processes, some tell a second later than others
            until = time.time() - (_LATE if len(self._source.processes()) > 1 else 0.0)
            recent = self._source.recent(_LOOK_BACK, None)
            for sample in merge_by([it for it in recent if self._looked_at < it.at // 1 <= until], 1.0):
                self._looked_at = sample.at // 1
                self._own_alerts.take(sample)
        alerts = self._alerts or self._own_alerts
        found = [] if alerts is None else [it for it in alerts.current() if it.state == "firing"]
        return [
            {
                "rule": it.rule,
                "name": it.name,
                "severity": it.severity,
                "message": it.text,
                "since": it.since,
                "silenced": it.silenced,
            }
            for it in found[:_MOST_ROWS]
        ]

    def _spent(self) -> dict[str, Any] | None:
        if self._spender is None:
            return None
        with self._lock:
            built, told = self._costs
            if time.monotonic() >= built + _COSTS_EVERY or (told is None and self._history is None):
                try:
                    told = _costs(costs_of(self._spender))
                except ConfigurationError:
                    # the charts say what is wrong with the history
                    told = None
                self._costs = time.monotonic(), told
            return told


def _by_name(sample: Sample, section: str) -> list[Reading]:
    found = sorted((it for it in sample.readings if it.section == section), key=lambda it: it.name)
    return found[:_MOST_ROWS]


def _circuit(reading: Reading) -> dict[str, Any]:
    return {
        "name": reading.name,
        "state": reading.gauges.get("state", "CLOSED"),
        "failure_count": reading.gauges.get("failure_count", 0),
        "times_opened": reading.counter("times_opened"),
        "calls_refused": reading.counter("calls_refused"),
    }


def _limit(reading: Reading, minute: Reading | None) -> dict[str, Any]:
    last = minute or Reading(reading.section, reading.name)
    return {
        "name": reading.name,
        **{name: reading.gauges.get(name) or 0 for name in _LIMIT_GAUGES},
        **{name: reading.counter(name) for name in _LIMIT_COUNTERS},
        "rate_limited": last.counter("calls_rate_limited"),
        "wait_p95": last.histogram("wait").percentile(0.95),
        "answer_p95": last.histogram("answer").percentile(0.95),
    }


def _agents(standing: Sample) -> list[dict[str, Any]]:
    agents: list[dict[str, Any]] = [
        {"name": it.name, **{name: it.counter(name) for name in _AGENT_COUNTERS}}
        for it in standing.readings
        if it.section == "agents"
    ]
    agents.sort(key=lambda it: (-it["prompt_tokens"] - it["completion_tokens"], it["name"]))
    return agents[:_MOST_ROWS]


def _costs(costs: Costs) -> dict[str, Any]:
    unpriced = ", ".join(costs.unpriced_models or costs.unpriced_agents)
    notes = [f"Projected from {costs.projected_from}."]
    if costs.is_since_start:
        notes.append("All is of this process, since it started: with a history, days and months are told.")
    if unpriced:
        notes.append(f"Not counted, since no price is known: {unpriced}.")
    return {
        "today": costs.today.usd,
        "month": costs.month.usd,
        "projected": costs.projected_usd,
        "by_agent": _spenders(costs.today_by_agent, costs.month_by_agent),
        "by_model": _spenders(costs.today_by_model, costs.month_by_model),
        "note": " ".join(notes),
    }


def _spenders(today: Mapping[str, Spending], month: Mapping[str, Spending]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "today": today.get(name, Spending()).usd, "month": it.usd} for name, it in month.items()
    ]
    found.sort(key=lambda it: (-(it["month"] or 0.0), it["name"]))
    return found[:_MOST_ROWS]

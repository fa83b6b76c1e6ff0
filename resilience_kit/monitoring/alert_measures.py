"""What rules look at: a value for each name, worked out from samples as they come.

A value is None where nothing can be said: of too few calls, and of a budget whose pace is not known yet.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from resilience_kit.monitoring.alert_rules import Measure, Rule
from resilience_kit.monitoring.measures import Histogram, Reading, Sample
from resilience_kit.validating import is_number

if TYPE_CHECKING:
    from resilience_kit.monitoring.forecast import Forecaster

Values = Mapping[str, float | None]
# How many stretches a window is made of: what it takes in and lets go of at once.
_STRETCHES = 60
# The pace of a budget is believed once it was watched for this share of the window.
_LEAST_WATCHED = 0.1
_MINUTE = 60


class Meter(Protocol):
    """Works out a rule's values; told of each sample once, in their order."""

    def values(self, sample: Sample) -> Values:
        """The value of each name."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What a measure is about, in words for an alert's text."""

    kind: str
    what: str
    unit: str
    advice: str


SUBJECTS: dict[Measure, Subject] = {
    "circuit_open_seconds": Subject(
        "circuit",
        "has not been closed for",
        "s",
        "The service behind it fails: look at its status, and at the errors that the program logs. Calls are refused "
        "meanwhile; `fallback=` would answer them, and reset_circuit_breakers() tries again at once.",
    ),
    "rate_limited_share": Subject(
        "limit",
        "is refused by the server (429) this share of its calls:",
        "share",
        "Something else uses the same quota, or the server's is lower than the settings say: set REQUESTS_PER_MINUTE "
        "and TOKENS_PER_MINUTE to this program's share, or ask for more quota.",
    ),
    "wait_p95_seconds": Subject(
        "limit",
        "lets one call in twenty wait longer than",
        "s",
        "More is asked than the limit lets through: look at which of its bounds is reached (requests, tokens, "
        "max_concurrent, min_interval), raise it if the quota has more, or start less at once.",
    ),
    "budget_used_share": Subject(
        "budget of agent",
        "has this share used in its period:",
        "share",
        "Calls are refused, or wait, once all is used: raise budget_tokens or budget_usd, or let this agent do less "
        "until the period turns.",
    ),
    "budget_projected_share": Subject(
        "budget of agent",
        "will have used this share at its period's end, if all goes on like this:",
        "share",
        "It runs out before the period turns: let this agent do less, give it a cheaper model or shorter prompts, or "
        "raise budget_tokens or budget_usd.",
    ),
    "forecast_share": Subject(
        "limit",
        "is expected to be asked for this share of its tokens:",
        "share",
        "Calls will wait: move what can wait out of the peak (Forecaster.pacing() says by how much), or raise the "
        "quota before it.",
    ),
    "truncation_share": Subject(
        "agent",
        "has this share of its prompts cut:",
        "share",
        "Its answers are made without what was cut: raise its max_tokens, or keep its history shorter.",
    ),
}
_OWN = Subject("", "is at", "", "")


def meter_of(rule: Rule, forecasters: "Mapping[str, Forecaster]") -> Meter:
    """What works out the values of a rule."""
    if not isinstance(rule.measure, str):
        return _OwnMeter(rule.measure)
    if rule.measure == "forecast_share":
        return _Forecasts(forecasters)
    return _METERS[rule.measure](rule)


def text_of(rule: Rule, name: str, value: float | None, *, is_over: bool) -> str:
    """What an alert says: about whom, what was seen, and what to do about it."""
    subject = SUBJECTS[rule.measure] if isinstance(rule.measure, str) else _OWN
    # with repr(), so that a name with a newline cannot forge a line
    who = f"{subject.kind} {name!r}".strip()
    if is_over:
        return f"{rule.name} is over: {who}."
    seen, bound = _shown(value, subject.unit), _shown(rule.above, subject.unit)
    advice = rule.advice or subject.advice
    return f"{who[0].upper()}{who[1:]} {subject.what} {seen}; the bound is {bound}. {advice}".strip()


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "nothing known"
    if unit == "share":
        return f"{100 * value:.3g} %"
    return f"{value:.4g} {unit}".strip()


class Window:
    """Sums of counts over the last seconds, in some stretches: what is old goes a stretch at a time."""

    __slots__ = ("_step", "_stretches", "sums")

    def __init__(self, seconds: float, width: int) -> None:
        self._step = seconds / _STRETCHES
        self._stretches: deque[tuple[int, list[float]]] = deque()
        self.sums = [0.0] * width

    def add(self, counts: Sequence[float], at: float) -> None:
        """Take in counts of a time, and let go of what is too old by then."""
        number = int(at // self._step)
        if self._stretches and number < self._stretches[-1][0] - _STRETCHES:
            # the clock was set back
            self._stretches.clear()
            self.sums = [0.0] * len(self.sums)
        if any(counts):
            if not self._stretches or number > self._stretches[-1][0]:
                self._stretches.append((number, [0.0] * len(self.sums)))
            _add(self._stretches[-1][1], counts, 1)
            _add(self.sums, counts, 1)
        while self._stretches and self._stretches[0][0] <= number - _STRETCHES:
            _add(self.sums, self._stretches.popleft()[1], -1)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it."""
        return not self._stretches


def _add(sums: list[float], counts: Sequence[float], sign: int) -> None:
    for position, count in enumerate(counts):
        if count:
            sums[position] += sign * count


def _counters(*names: str) -> Callable[[Reading], Sequence[float]]:
    return lambda reading: [reading.counter(name) for name in names]


def _share(sums: Sequence[float], least: int) -> float | None:
    part, whole = sums
    # what is refused in this window may have been admitted before it
    return min(1.0, part / whole) if whole >= least else None


def _p95(sums: Sequence[float], least: int) -> float | None:
    counts = tuple(map(int, sums))
    return Histogram(counts).percentile(0.95) if sum(counts) >= least else None


class _WindowMeter:
    """A value of what was counted in the rule's window."""

    def __init__(
        self,
        rule: Rule,
        section: str,
        counts: Callable[[Reading], Sequence[float]],
        value: Callable[[Sequence[float], int], float | None],
    ) -> None:
        self._rule = rule
        self._section = section
        self._counts = counts
        self._value = value
        self._windows: dict[str, Window] = {}

    def values(self, sample: Sample) -> Values:
        readings = sample.of(self._section)
        for name, reading in readings.items():
            counts = self._counts(reading)
            window = self._windows.get(name)
            if window is None and any(counts):
                window = self._windows[name] = Window(self._rule.over_seconds, len(counts))
            if window is not None:
                window.add(counts, sample.at)
        for name in self._windows.keys() - readings.keys():
            self._windows[name].add((), sample.at)
        found = {name: self._value(window.sums, self._rule.least_calls) for name, window in self._windows.items()}
        self._windows = {name: window for name, window in self._windows.items() if not window.is_empty}
        return found


class _OpenCircuits:
    """For how long each circuit has not been closed: a trial that fails is part of the same outage."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def values(self, sample: Sample) -> Values:
        # seen at a sample's end, so the outage began at some time of its interval: no earlier than is certain
        open_ones = {
            name: min(self._since.get(name, sample.at), sample.at)
            for name, reading in sample.of("circuit_breakers").items()
            if reading.gauges.get("state") in ("OPEN", "HALF_OPEN")
        }
        self._since = open_ones
        return {name: sample.at - since for name, since in open_ones.items()}


class _UsedBudgets:
    def values(self, sample: Sample) -> Values:
        shares = {name: _used(reading) for name, reading in sample.of("token_budgets").items()}
        return {name: max(share.values()) for name, share in shares.items() if share}


@dataclass(frozen=True, slots=True)
class _Point:
    at: float
    used: Mapping[str, float]
    seconds_left: float


class _ProjectedBudgets:
    """What will be used at the end of each budget's period, at its pace in the window."""

    def __init__(self, over_seconds: float) -> None:
        self._over = over_seconds
        self._points: dict[str, deque[_Point]] = {}

    def values(self, sample: Sample) -> Values:
        found: dict[str, float | None] = {}
        kept: dict[str, deque[_Point]] = {}
        for name, reading in sample.of("token_budgets").items():
            used, seconds_left = _used(reading), reading.gauges.get("seconds_left")
            if not used or not is_number(seconds_left):
                continue
            point = _Point(sample.at, used, seconds_left)
            points = kept[name] = self._points.get(name, deque())
            if points and _is_of_another_period(points[-1], point):
                points.clear()
            found[name] = self._projected(points, point)
            if not points or point.at - points[-1].at >= self._over / _STRETCHES:
                points.append(point)
            while points[0].at < point.at - self._over:
                points.popleft()
        self._points = kept
        return found

    def _projected(self, points: Sequence[_Point], now: _Point) -> float | None:
        if not points:
            return None
        first = points[0]
        watched = now.at - first.at
        if watched < self._over * _LEAST_WATCHED:
            return None
        paces = {unit: (share - first.used.get(unit, share)) / watched for unit, share in now.used.items()}
        return max(share + paces[unit] * now.seconds_left for unit, share in now.used.items())


def _is_of_another_period(before: _Point, now: _Point) -> bool:
    is_less_used = any(now.used.get(unit, 0) < share for unit, share in before.used.items())
    # a second of tolerance: the gauges of a second are not read at the same time in each
    return is_less_used or now.at < before.at or now.seconds_left > before.seconds_left + 1


def _used(reading: Reading) -> dict[str, float]:
    """The share of a budget that is used, by unit; nothing where it has no bound."""
    gauges = reading.gauges
    bounds = {"tokens": gauges.get("budget_tokens"), "usd": gauges.get("budget_usd")}
    used = {"tokens": gauges.get("tokens_used"), "usd": gauges.get("usd_used")}
    return {
        unit: amount / bound
        for unit, bound in bounds.items()
        if is_number(bound) and bound > 0 and is_number(amount := used[unit])
    }


class _Forecasts:
    """The largest forecast of all agents together, in shares of a limit's tokens per minute."""

    def __init__(self, forecasters: "Mapping[str, Forecaster]") -> None:
        self._forecasters = forecasters

    def values(self, sample: Sample) -> Values:
        found: dict[str, float | None] = {}
        limits = sample.of("rate_limiters") if self._forecasters else {}
        for name, forecaster in self._forecasters.items():
            quota = _tokens_per_minute(limits.get(name))
            # one that has been no better than the naive forecast is not worth an alert
            expected = [it.expected for it in forecaster.forecasts() if it.agent is None and it.helps]
            found[name] = max(expected) / quota if expected and quota else None
        return found


def _tokens_per_minute(limit: Reading | None) -> float | None:
    if limit is None:
        return None
    tokens, period = limit.gauges.get("tokens_per_minute"), limit.gauges.get("period")
    if not is_number(tokens) or not is_number(period) or period <= 0:
        return None
    return tokens * _MINUTE / period


class _OwnMeter:
    def __init__(self, measure: Callable[[Sample], Mapping[str, float]]) -> None:
        self._measure = measure

    def values(self, sample: Sample) -> Values:
        return self._measure(sample)


def only(values: Values, names: Iterable[str] | None) -> Values:
    """The values of some names, or of all."""
    return values if names is None else {name: values[name] for name in names if name in values}


_METERS: dict[Measure, Callable[[Rule], Meter]] = {
    "circuit_open_seconds": lambda _: _OpenCircuits(),
    "rate_limited_share": lambda rule: _WindowMeter(
        rule, "rate_limiters", _counters("calls_rate_limited", "calls_admitted"), _share
    ),
    "wait_p95_seconds": lambda rule: _WindowMeter(
        rule, "rate_limiters", lambda reading: reading.histogram("wait").counts, _p95
    ),
    "budget_used_share": lambda _: _UsedBudgets(),
    "budget_projected_share": lambda rule: _ProjectedBudgets(rule.over_seconds),
    "truncation_share": lambda rule: _WindowMeter(rule, "agents", _counters("truncations", "calls"), _share),
}

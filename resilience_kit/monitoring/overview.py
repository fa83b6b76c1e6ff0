"""What `resilience-kit top` and `stats` show: the dashboard's figures as records, from samples or from its JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.measures import Histogram, Reading, Sample, merge
from resilience_kit.validating import is_number

# The worst first.
_STATES = ("OPEN", "HALF_OPEN", "CLOSED")
_SEVERITIES = ("critical", "warning")
# A page that lists thousands is no help.
_MOST_ROWS = 100
_LONGEST_TEXT = 1_000


@dataclass(frozen=True, slots=True)
class AlertRow:
    """An alert that fires: the rule, the name that it is about, and what it says."""

    name: str
    rule: str = ""
    severity: str = "warning"
    message: str = ""
    since: float | None = None


@dataclass(frozen=True, slots=True)
class CircuitRow:
    """Where a circuit stands, and its counts."""

    name: str
    state: str = "CLOSED"
    failure_count: float = 0
    times_opened: float = 0
    calls_refused: float = 0


@dataclass(frozen=True, slots=True)
class LimitRow:
    """How near a limit is, and how long its calls of the last minute waited and took, in seconds."""

    name: str
    requests_in_window: float = 0
    requests_per_minute: float = 0
    tokens_in_window: float = 0
    tokens_per_minute: float = 0
    period: float = 60
    in_flight: float = 0
    max_concurrent: float = 0
    waiting: float = 0
    paused: float = 0
    rate_limited: float = 0
    wait_p95: float | None = None
    answer_p95: float | None = None

    @property
    def share(self) -> float:
        """How much of the scarcer of its quotas is used."""
        return max(
            share_of(self.requests_in_window, self.requests_per_minute),
            share_of(self.tokens_in_window, self.tokens_per_minute),
        )


@dataclass(frozen=True, slots=True)
class AgentRow:
    """What an agent used."""

    name: str
    calls: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    usd: float = 0
    calls_of_unknown_price: float = 0
    truncations: float = 0


@dataclass(frozen=True, slots=True)
class LastMinute:
    """What happened in the last minute: counts, and percentiles of waits and answers in seconds; None if not known."""

    requests: float | None = None
    tokens: float | None = None
    rate_limited: float | None = None
    retries: float | None = None
    wait_p50: float | None = None
    wait_p95: float | None = None
    answer_p50: float | None = None
    answer_p95: float | None = None
    answer_p99: float | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """All that is shown at one time.

    Attributes:
        at: When it was so, in seconds since the epoch.
        source: Where it comes from, and since when its counts count.
        processes: Whose figures are added up.
        alerts: Those that fire, the gravest first.
        circuits: Those that are not closed first.
        limits: The fullest first.
        agents: Those who used most first.
        last_minute: What happened in the last minute.
    """

    at: float
    source: str
    processes: tuple[str, ...] = ()
    alerts: tuple[AlertRow, ...] = ()
    circuits: tuple[CircuitRow, ...] = ()
    limits: tuple[LimitRow, ...] = ()
    agents: tuple[AgentRow, ...] = ()
    last_minute: LastMinute = LastMinute()

    def to_dict(self) -> dict[str, Any]:
        """The overview in plain JSON."""
        return asdict(self)


_Row = TypeVar("_Row", AlertRow, CircuitRow, LimitRow, AgentRow)


def overview_of(
    recent: Iterable[Sample],
    total: Sample | None,
    *,
    source: str,
    alerts: Iterable[AlertRow] = (),
    silence: float = 5.0,
) -> Overview:
    """Make an overview of samples.

    Args:
        recent: Those of the last minute, at least one, of any processes: the last one of each says where all stands.
        total: The counts that are shown of circuits and agents. Default: those of the last minute.
        source: Where they come from, and since when `total` counts.
        alerts: Those that fire.
        silence: A process whose last sample is so many seconds older than the newest one has ended.
    """
    samples = sorted(recent, key=lambda sample: sample.at)
    minute = merge(samples)
    counted = minute if total is None else total
    newest = {sample.process: sample for sample in samples}
    live = [sample for sample in newest.values() if sample.at > minute.at - silence]
    standing = merge(live)
    return _sorted(
        Overview(
            at=minute.at,
            source=source,
            processes=tuple(sorted(sample.process for sample in live)),
            alerts=(*alerts,),
            circuits=(*(_circuit(it, counted) for it in standing.of("circuit_breakers").values()),),
            limits=(*(_limit(it, minute) for it in standing.of("rate_limiters").values()),),
            agents=(*(_filled(AgentRow(it.name), it.counters) for it in counted.of("agents").values()),),
            last_minute=_last_minute(minute),
        )
    )


def overview_from_json(value: Any, *, source: str) -> Overview:
    """Read what a dashboard answers at /api/now.

    Raises:
        ConfigurationError: It is something else; what it holds is not told.
    """
    if not isinstance(value, dict) or not isinstance(value.get("limits"), list):
        raise ConfigurationError(f"{source} answers, and not as a dashboard of resilience-kit does")
    limits = _rows(LimitRow, value["limits"])
    minute = value.get("minute")
    last_minute = (
        _filled(LastMinute(), minute)
        if isinstance(minute, dict)
        else LastMinute(
            rate_limited=sum(it.rate_limited for it in limits),
            wait_p95=_largest(it.wait_p95 for it in limits),
            answer_p95=_largest(it.answer_p95 for it in limits),
        )
    )
    processes = value.get("processes")
    at = value.get("at")
    return _sorted(
        Overview(
            at=float(at) if is_number(at) else 0.0,
            source=source,
            processes=tuple(map(str, processes[:_MOST_ROWS])) if isinstance(processes, list) else (),
            alerts=_rows(AlertRow, value.get("alerts")),
            circuits=_rows(CircuitRow, value.get("circuits")),
            limits=limits,
            agents=_rows(AgentRow, value.get("agents")),
            last_minute=last_minute,
        )
    )


def share_of(used: float, most: float) -> float:
    """How much of a quota is used; 0 where there is none."""
    return used / most if most > 0 else 0.0


def _sorted(overview: Overview) -> Overview:
    """The same with what matters most first, and no more than can be read."""
    alerts = sorted(overview.alerts, key=lambda it: (_place(it.severity, _SEVERITIES), it.since or 0, it.rule, it.name))
    circuits = sorted(overview.circuits, key=lambda it: (_place(it.state, _STATES), it.name))
    limits = sorted(overview.limits, key=lambda it: (-it.share, -it.waiting, it.name))
    agents = sorted(overview.agents, key=lambda it: (-it.prompt_tokens - it.completion_tokens, -it.calls, it.name))
    return replace(
        overview,
        alerts=tuple(alerts[:_MOST_ROWS]),
        circuits=tuple(circuits[:_MOST_ROWS]),
        limits=tuple(limits[:_MOST_ROWS]),
        agents=tuple(agents[:_MOST_ROWS]),
    )


def _place(value: str, known: Sequence[str]) -> int:
    return known.index(value) if value in known else len(known)


def _circuit(standing: Reading, counted: Sample) -> CircuitRow:
    counters = (counted.reading(standing.section, standing.name) or standing).counters
    return _filled(CircuitRow(standing.name), {**standing.gauges, **counters})


def _limit(standing: Reading, minute: Sample) -> LimitRow:
    last = minute.reading(standing.section, standing.name) or standing
    return replace(
        _filled(LimitRow(standing.name), standing.gauges),
        rate_limited=last.counter("calls_rate_limited"),
        wait_p95=last.histogram("wait").percentile(0.95),
        answer_p95=last.histogram("answer").percentile(0.95),
    )


def _last_minute(minute: Sample) -> LastMinute:
    limits, retries = minute.of("rate_limiters").values(), minute.of("retries").values()
    wait, answer = (_all_of(limits, kind) for kind in ("wait", "answer"))
    return LastMinute(
        requests=sum(it.counter("calls_admitted") for it in limits),
        tokens=sum(it.counter("tokens_admitted") for it in limits),
        rate_limited=sum(it.counter("calls_rate_limited") for it in limits),
        retries=sum(it.counter("retries") for it in retries),
        wait_p50=wait.percentile(0.5),
        wait_p95=wait.percentile(0.95),
        answer_p50=answer.percentile(0.5),
        answer_p95=answer.percentile(0.95),
        answer_p99=answer.percentile(0.99),
    )


def _all_of(readings: Iterable[Reading], kind: str) -> Histogram:
    total = Histogram()
    for reading in readings:
        total = total.add(reading.histogram(kind))
    return total


def _rows(kind: type[_Row], values: Any) -> tuple[_Row, ...]:
    if not isinstance(values, list):
        return ()
    return tuple(
        _filled(kind(it["name"][:_LONGEST_TEXT]), it)
        for it in values[:_MOST_ROWS]
        if isinstance(it, dict) and isinstance(it.get("name"), str)
    )


_Filled = TypeVar("_Filled", AlertRow, CircuitRow, LimitRow, AgentRow, LastMinute)


def _filled(record: _Filled, values: Mapping[str, Any]) -> _Filled:
    """A record with the values of its fields, each of which must be of its kind: others are left as they are."""
    found: dict[str, Any] = {}
    for field in fields(record):
        value = values.get(field.name)
        if field.name == "name" or value is None:
            continue
        if isinstance(getattr(record, field.name), str):
            if isinstance(value, str):
                found[field.name] = value[:_LONGEST_TEXT]
        elif isinstance(value, bool) or is_number(value):
            found[field.name] = int(value) if isinstance(value, bool) else value
    return replace(record, **found)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((it for it in values if it is not None), default=None)

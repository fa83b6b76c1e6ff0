"""What calls cost in US dollars: today, this month and, if it goes on like this, by the month's end.

From a `History` where there is one, else from what a `Sampler` has counted since it was started. Where a price is not
known, that is said by name: an unknown price is never 0.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo

from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample, merge
from resilience_kit.monitoring.sampler import Sampler

_DAY = 86_400.0
# Less than this says nothing of a month.
_LEAST_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Spending:
    """What some calls used, and cost.

    Attributes:
        calls: How many there were.
        prompt_tokens: Tokens of their prompts.
        completion_tokens: Tokens of their answers.
        known_usd: US dollars of those whose price is known.
        calls_of_unknown_price: How many are not among those.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    known_usd: float = 0.0
    calls_of_unknown_price: int = 0

    @property
    def usd(self) -> float | None:
        """US dollars; at least so many if some prices are unknown, and None if all are."""
        return None if self.calls and self.calls_of_unknown_price >= self.calls else self.known_usd


@dataclass(frozen=True, slots=True)
class Costs:
    """What calls cost, as of `at`.

    Attributes:
        at: Seconds since the epoch.
        today: Since midnight.
        month: Since the first of the month, or since anything is known of it.
        days: For how many days of the month something is known; the projection is made from their average.
        projected_usd: What the month will have cost at its end, if its other days are like the average of those; None
            before there is an hour to go by, and where no price is known.
        today_by_agent: As `today`, by agent.
        month_by_agent: As `month`, by agent.
        today_by_model: As `today`, by model.
        month_by_model: As `month`, by model; calls that do not say what they used are of none.
        unpriced_models: The models of this month that have calls without a known price; `pricing.set_prices` takes one.
        unpriced_agents: The agents of such calls, and of those that do not say what they used.
        is_since_start: Whether all this is of this process alone, and since its sampler was started.
    """

    at: float
    today: Spending = field(default_factory=Spending)
    month: Spending = field(default_factory=Spending)
    days: float = 0.0
    projected_usd: float | None = None
    today_by_agent: Mapping[str, Spending] = field(default_factory=dict)
    month_by_agent: Mapping[str, Spending] = field(default_factory=dict)
    today_by_model: Mapping[str, Spending] = field(default_factory=dict)
    month_by_model: Mapping[str, Spending] = field(default_factory=dict)
    unpriced_models: tuple[str, ...] = ()
    unpriced_agents: tuple[str, ...] = ()
    is_since_start: bool = False

    @property
    def projected_from(self) -> str:
        """In words, what the projection is made from."""
        if self.projected_usd is None:
            return "nothing yet: less than an hour of this month is known, or no price is"
        return f"the average of the {self.days:.1f} days of this month that are known"


def costs_of(source: History | Sampler, *, zone: tzinfo | None = None, now: float | None = None) -> Costs:
    """What calls cost, today and this month, all together and by agent and model.

    With a history it blocks while it reads: in an event loop, call it by `asyncio.to_thread`.

    Args:
        source: A history, with all the processes that write to it; or a sampler, with what it counted since it was
            started: a process that runs for longer than a day then has more than today's in `today`.
        zone: Where days and months begin, such as `zoneinfo.ZoneInfo("Europe/Berlin")`. Default: this machine's zone.
        now: Seconds since the epoch. Default: by the clock.

    Raises:
        ConfigurationError: The history cannot be read.

    Example:
        >>> from resilience_kit.monitoring.costs import costs_of
        >>> from resilience_kit.monitoring.sampler import Sampler
        >>> costs_of(Sampler()).month.usd
        0.0
    """
    at = time.time() if now is None else now
    day, month, end = _boundaries(at, zone)
    if isinstance(source, Sampler):
        total = source.total
        # all that it knows, which may have begun before the day did
        first = max(month, total.at - total.seconds) if total.at else at
        return _costs(at, [total], [total], first, end, is_since_start=True)
    of_today, of_month = source.total(day), source.total(month)
    if of_month is None:
        return Costs(at)
    first = max(month, of_month.at - of_month.seconds)
    return _costs(at, [of_today] if of_today else [], [of_month], first, end)


def _costs(
    at: float, today: list[Sample], month: list[Sample], first: float, end: float, *, is_since_start: bool = False
) -> Costs:
    of_today = merge(today).readings if today else ()
    of_month = merge(month).readings
    spent = _sum(of_month, "agents")
    known = at - first
    usd = spent.usd
    projected = None
    if known >= _LEAST_SECONDS and usd is not None:
        projected = usd + usd / known * max(0.0, end - at)
    agents, models = _by_name(of_month, "agents"), _by_name(of_month, "models")
    return Costs(
        at=at,
        today=_sum(of_today, "agents"),
        month=spent,
        days=max(0.0, known) / _DAY,
        projected_usd=projected,
        today_by_agent=_by_name(of_today, "agents"),
        month_by_agent=agents,
        today_by_model=_by_name(of_today, "models"),
        month_by_model=models,
        unpriced_models=_unpriced(models),
        unpriced_agents=_unpriced(agents),
        is_since_start=is_since_start,
    )


def _boundaries(at: float, zone: tzinfo | None) -> tuple[float, float, float]:
    """When the day and the month began, and when the month ends."""
    # without a zone, the machine's counts
    midnight = datetime.fromtimestamp(at, zone).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    first = midnight.replace(day=1)
    # in 32 days is the next month, whatever its first day's offset from UTC
    next_first = (first + timedelta(days=32)).replace(day=1)
    return midnight.timestamp(), first.timestamp(), next_first.timestamp()


def _by_name(readings: Iterable[Reading], section: str) -> dict[str, Spending]:
    found = {it.name: _spending(it) for it in readings if it.section == section}
    return {name: it for name, it in found.items() if it.calls}


def _sum(readings: Iterable[Reading], section: str) -> Spending:
    total = Reading(section, "all")
    for reading in readings:
        if reading.section == section:
            total = total.merge(reading)
    return _spending(total)


def _spending(reading: Reading) -> Spending:
    return Spending(
        calls=round(reading.counter("calls")),
        prompt_tokens=round(reading.counter("prompt_tokens")),
        completion_tokens=round(reading.counter("completion_tokens")),
        known_usd=float(reading.counter("usd")),
        calls_of_unknown_price=round(reading.counter("calls_of_unknown_price")),
    )


def _unpriced(by_name: Mapping[str, Spending]) -> tuple[str, ...]:
    return tuple(sorted(name for name, it in by_name.items() if it.calls_of_unknown_price))

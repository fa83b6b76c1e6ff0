"""Alerts: rules that are looked at with each sample, and what is told when one begins to fire and when it is over.

Time comes from the samples alone, so what is told depends on nothing else.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resilience_kit.errors import ConfigurationError
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.alert_delivery import Courier, Deliver, log_alert
from resilience_kit.monitoring.alert_measures import Meter, Values, meter_of, only, text_of
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule, Silence, check_rules, load_rules
from resilience_kit.monitoring.measures import Sample
from resilience_kit.validating import is_number

if TYPE_CHECKING:
    from resilience_kit.monitoring.forecast import Forecaster

__all__ = ["Alert", "Alerts", "example_alert"]

State = Literal["ok", "pending", "firing"]

_log = logging.getLogger(__name__)
# Names are the program's, and may be its users': of each rule, so many are watched.
_MOST_NAMES = 1_000
# Where nothing was seen for so many seconds, such as on a laptop that slept, nothing is known to have lasted.
_LONGEST_GAP = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A rule's verdict on one name.

    Attributes:
        rule: The rule's name.
        name: The limit, circuit, budget or agent.
        state: "pending" while the measure has not been above the bound for long enough, "firing" once it has, "ok" when
            it is over.
        severity: "warning" or "critical".
        since: When the measure rose above the bound, in seconds since the epoch.
        at: When this was so, in seconds since the epoch.
        value: The measure; None where nothing can be said, as of a circuit that is gone.
        bound: The rule's bound.
        text: What was seen, and what to do about it.
        process: Whose samples it was seen in; "" where they are of several processes.
        silenced: Whether it is not delivered.

    Example:
        >>> from resilience_kit.monitoring.alert_rules import Rule
        >>> from resilience_kit.monitoring.alerts import example_alert
        >>> alert = example_alert(Rule(name="slow", measure="wait_p95_seconds", above=10), at=1_700_000_000)
        >>> alert.state, alert.value, alert.bound
        ('firing', 15.0, 10)
    """

    rule: str
    name: str
    state: State
    severity: str
    since: float
    at: float
    value: float | None
    bound: float
    text: str
    process: str
    silenced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The alert in plain JSON."""
        return asdict(self)


def example_alert(rule: Rule, at: float) -> Alert:
    """What a rule would deliver if it fired, for a test of the way to its receivers; it says so in its text."""
    value = rule.above + max(1.0, abs(rule.above)) / 2
    return Alert(
        rule=rule.name,
        name="test",
        state="firing",
        severity=rule.severity,
        since=at - rule.for_seconds,
        at=at,
        value=value,
        bound=rule.above,
        text=f"This is a test of {rule.name}, and all is well. {text_of(rule, 'test', value, is_over=False)}",
        process="test",
    )


class Condition:
    """The state of one rule for one name.

    Args:
        rule: The rule.
    """

    __slots__ = ("_above_since", "_below_since", "_last", "_rule", "state", "told")

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._above_since = math.nan
        self._below_since = math.nan
        self._last = math.nan
        self.state: State = "ok"
        # whether somebody was told that it fires
        self.told = False

    @property
    def since(self) -> float:
        """When the measure rose above the bound; not a number while it is ok."""
        return self._above_since

    def update(self, value: float | None, at: float, *, seconds: float = 0) -> State:
        """Take in the next value.

        Args:
            value: The measure; None or not a number where nothing can be said, which is nothing to complain about.
            at: When it was so, in seconds.
            seconds: For how long before that it stands.

        Returns:
            The state after it.
        """
        was_away = at - seconds - self._last > _LONGEST_GAP or at < self._last
        self._last = at
        is_above = value is not None and value > self._rule.above
        if self.state != "firing":
            if not is_above:
                self.state, self._above_since = "ok", math.nan
                return self.state
            if self.state == "ok" or was_away:
                self.state, self._above_since = "pending", at
            if at - self._above_since >= self._rule.for_seconds:
                self.state, self._below_since = "firing", math.nan
            return self.state
        if value is not None and value > self._rule.clears:
            self._below_since = math.nan
            return self.state
        if math.isnan(self._below_since) or was_away:
            self._below_since = at
        if at - self._below_since >= self._rule.clear_for_seconds:
            self.state = "ok"
        return self.state


@dataclass(slots=True)
class _Watch:
    """A rule at work."""

    rule: Rule
    meter: Meter
    conditions: dict[str, Condition]
    has_failed: bool = False
    is_full: bool = False


class Alerts:
    """Looks at rules with each sample, and delivers what begins to fire and what is over.

    Make one, and give its `take` to a `Sampler` as a sink. Several processes with one store have samples of each: where
    one alert for all is wanted, let one process look at the fleet's samples.

    Args:
        rules: The rules, or the path of a TOML file with them. Default: `DEFAULT_RULES`.
        silences: What is not delivered for a while.
        deliver: Who is told, each in a thread of its own: `Webhook`s and any functions that take an `Alert`. Default:
            the log.
        forecasters: For the measure "forecast_share": the `Forecaster` of each limit, by its name.

    Raises:
        ConfigurationError: A rule cannot work, or two have the same name.

    Example:
        >>> from resilience_kit.monitoring.alerts import Alerts
        >>> from resilience_kit.monitoring.measures import Reading, Sample
        >>> alerts = Alerts(deliver=())
        >>> budget = Reading("token_budgets", "MathAgent", gauges={"budget_tokens": 100, "tokens_used": 95})
        >>> [alert] = alerts.take(Sample(1.0, 1.0, "one", (budget,)))
        >>> alert.rule, alert.state, alert.value
        ('budget-used', 'firing', 0.95)
    """

    def __init__(
        self,
        rules: Iterable[Rule] | str | Path = DEFAULT_RULES,
        *,
        silences: Iterable[Silence] = (),
        deliver: Iterable[Deliver] = (log_alert,),
        forecasters: "Mapping[str, Forecaster] | None" = None,
    ) -> None:
        if isinstance(rules, str | Path):
            said = load_rules(rules)
            rules, silences = said.rules, (*said.silences, *silences)
        self.rules = check_rules(rules)
        self._watches = [_Watch(rule, meter_of(rule, forecasters or {}), {}) for rule in self.rules]
        self._silences = tuple(silences)
        self._couriers = [Courier(each) for each in deliver]
        self._current: tuple[Alert, ...] = ()
        self._lock = new_lock()

    def take(self, sample: Sample) -> list[Alert]:
        """Look at all rules with the next sample. Nothing that a rule or a delivery does is raised here.

        Args:
            sample: What happened since the last one.

        Returns:
            What was delivered: alerts that began to fire, and those that are over.
        """
        news: list[Alert] = []
        current: list[Alert] = []
        with self._lock:
            for watch in self._watches:
                self._look(watch, sample, current, news)
            # stable: of one severity in the order of the rules
            current.sort(key=lambda alert: (alert.state != "firing", alert.severity != "critical"))
            self._current = tuple(current)
        for alert in news:
            for courier in self._couriers:
                courier.send(alert)
        return news

    def current(self) -> tuple[Alert, ...]:
        """What fires now, and what is on its way to; the worst first, silenced ones too."""
        return self._current

    def silence(self, *, until: float, rule: str | None = None, name: str | None = None) -> None:
        """Deliver nothing for a while; what still fires when it ends is delivered then.

        Args:
            until: When it ends, in seconds since the epoch.
            rule: The rule that is meant. Default: all.
            name: The limit, circuit, budget or agent that is meant. Default: all.

        Raises:
            ConfigurationError: There is no such rule, or `until` is not a number.
        """
        if not is_number(until):
            raise ConfigurationError(f"silence(until={until!r}): expected seconds since the epoch")
        names = [each.name for each in self.rules]
        if rule is not None and rule not in names:
            raise ConfigurationError(f"silence(rule={rule!r}): expected one of {', '.join(names)}")
        with self._lock:
            self._silences = (*self._silences, Silence(until=until, rule=rule, name=name))

    def close(self, timeout: float = 5.0) -> bool:
        """Wait until all is delivered, and end the receivers' threads.

        Args:
            timeout: Seconds to wait at most for each receiver.

        Returns:
            Whether all was.
        """
        # each is waited for, also after one that could not
        delivered = [courier.close(timeout) for courier in self._couriers]
        return all(delivered)

    def _look(self, watch: _Watch, sample: Sample, current: list[Alert], news: list[Alert]) -> None:
        rule = watch.rule
        values = _values(watch, sample)
        for name in [*values, *(watch.conditions.keys() - values.keys())]:
            condition = watch.conditions.get(name)
            value = values.get(name)
            if condition is None:
                if value is None or not value > rule.above or not _has_room(watch):
                    continue
                condition = watch.conditions[name] = Condition(rule)
            state = condition.update(value, sample.at, seconds=sample.seconds)
            if state == "ok":
                del watch.conditions[name]
                # also if it is silenced by now: who was told that it fires would wait for ever
                if condition.told:
                    news.append(self._alert(rule, name, value, condition, sample))
                continue
            alert = self._alert(rule, name, value, condition, sample)
            current.append(alert)
            if state == "firing" and not condition.told and not alert.silenced:
                condition.told = True
                news.append(alert)

    def _alert(self, rule: Rule, name: str, value: float | None, condition: Condition, sample: Sample) -> Alert:
        return Alert(
            rule=rule.name,
            name=name,
            state=condition.state,
            severity=rule.severity,
            since=condition.since,
            at=sample.at,
            value=value,
            bound=rule.above,
            text=text_of(rule, name, value, is_over=condition.state == "ok"),
            process=sample.process,
            silenced=any(silence.covers(rule.name, name, sample.at) for silence in self._silences),
        )


def _values(watch: _Watch, sample: Sample) -> Values:
    """A rule's values; none where its measure fails, which is told once."""
    try:
        values = only(watch.meter.values(sample), watch.rule.names)
        return {name: value if is_number(value) else None for name, value in values.items()}
    except Exception as error:  # noqa: BLE001 - a measure of the program's own may raise anything, and harms no other rule
        if not watch.has_failed:
            watch.has_failed = True
            _log.warning("the measure of the alert rule %r raised %s", watch.rule.name, type(error).__name__)
        return {}


def _has_room(watch: _Watch) -> bool:
    if len(watch.conditions) < _MOST_NAMES:
        return True
    if not watch.is_full:
        watch.is_full = True
        _log.warning(
            "the alert rule %r is broken by %d names: those that follow are not watched", watch.rule.name, _MOST_NAMES
        )
    return False

"""What alerts watch for: rules written in Python or in a TOML file, and those that are on without a word.

A rule without a mistake is the only one there is: a bad one stops the program at once, and says where it stands, what
it says and what was expected.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.measures import Sample
from resilience_kit.monitoring.visible_text import visible
from resilience_kit.validating import is_number

__all__ = ["DEFAULT_RULES", "Rule", "Silence", "load_rules"]

Measure = Literal[
    "circuit_open_seconds",
    "rate_limited_share",
    "wait_p95_seconds",
    "budget_used_share",
    "budget_projected_share",
    "forecast_share",
    "truncation_share",
]
Severity = Literal["warning", "critical"]
# One of the program's own: a value for each name, worked out from a sample.
OwnMeasure = Callable[[Sample], Mapping[str, float]]

_MEASURES, _SEVERITIES = get_args(Measure), get_args(Severity)
_MOST_SECONDS = 7 * 86_400
_MOST_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An alert fires for a name when a measure has been above a bound for some time.

    Args:
        name: What the rule is called: it is named in alerts, and silenced by it.
        measure: What is looked at: "circuit_open_seconds" since a circuit was last closed; "rate_limited_share" of
            calls that the server refused with a 429; "wait_p95_seconds" that calls wait for a slot and quota;
            "budget_used_share" of a budget's period; "budget_projected_share" that will be used at the period's end
            if all goes on as in the last `over_seconds`; "forecast_share" of a limit's tokens that a `Forecaster`
            expects; "truncation_share" of an agent's calls. Or a function that takes a `Sample` and returns a value
            by name; it is called in the sampler's thread, once a second.
        above: The bound: the alert is on its way while the measure is above it.
        clears_at: A firing alert is on its way to be over while the measure is at this value or below it; between the
            two it stays what it is. Default: `above`.
        for_seconds: How long the measure has to be above the bound before the alert fires. Default: at once.
        clear_for_seconds: How long it has to be at `clears_at` or below before the alert is over. Default: at once.
        over_seconds: The time over which shares, waits and the pace of a budget are measured.
        least_calls: Of fewer calls in that time nothing is said: one of one is 100 %.
        severity: "warning" or "critical": how it is logged, and for the receiver to sort by.
        names: The limits, circuits, budgets or agents that are meant. Default: all.
        advice: What to do about it, at the end of the alert's text. Default: what the kit knows about the measure.

    Raises:
        ConfigurationError: A value cannot work.

    Example:
        >>> from resilience_kit.monitoring.alert_rules import Rule
        >>> Rule(name="checkout-429s", measure="rate_limited_share", above=0.01, names=("checkout",)).over_seconds
        300
    """

    name: str
    measure: Measure | OwnMeasure
    above: float
    clears_at: float | None = None
    for_seconds: float = 0
    clear_for_seconds: float = 0
    over_seconds: float = 300
    least_calls: int = 1
    severity: Severity = "warning"
    names: tuple[str, ...] | None = None
    advice: str | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        problem = _problem(given)
        if problem is not None:
            key, expected = problem
            raise ConfigurationError(f"Rule({key}={given[key]!r}): expected {expected}")

    @property
    def clears(self) -> float:
        """The value at which, or below which, a firing alert is on its way to be over."""
        return self.above if self.clears_at is None else self.clears_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Alerts that are not delivered for a while; they are still shown.

    Args:
        until: When it ends, in seconds since the epoch.
        rule: The rule that is meant. Default: all.
        name: The limit, circuit, budget or agent that is meant. Default: all.

    Example:
        >>> from resilience_kit.monitoring import Silence
        >>> Silence(until=1_700_000_000, rule="slow-waits").covers("slow-waits", "chat", at=1_699_999_999)
        True
    """

    until: float
    rule: str | None = None
    name: str | None = None

    def covers(self, rule: str, name: str, at: float) -> bool:
        """Whether an alert is silent at a time.

        Args:
            rule: The alert's rule.
            name: The limit, circuit, budget or agent that it is about.
            at: The time, in seconds since the epoch.
        """
        return at < self.until and self.rule in (None, rule) and self.name in (None, name)


@dataclass(frozen=True, slots=True)
class RuleFile:
    """What a file of rules says: its rules with the defaults that it leaves on, and what is silent."""

    rules: tuple[Rule, ...]
    silences: tuple[Silence, ...] = ()


def load_rules(path: str | Path) -> RuleFile:
    r"""Read a file of rules.

    A rule with the name of a default one changes that one, and needs to say only what differs; any other says at least
    its `measure` and `above`. `enabled = false` switches a rule off, and `keep_defaults = false` all default ones.

    Args:
        path: A TOML file, with a table `[rules.NAME]` for each rule and `[[silences]]` with `until` and, if they are
            not for all, `rule` and `name`.

    Returns:
        The rules in force, and the silences.

    Raises:
        ConfigurationError: It cannot be read, or says something that cannot work: the message has the file, the key,
            the value and what was expected.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from resilience_kit.monitoring.alert_rules import load_rules
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "alerts.toml")
        ...     _ = file.write_text('[rules.circuit-open]\nabove = 10')
        ...     load_rules(file).rules[0].above
        10
    """
    try:
        said = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{visible(path)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # of bytes that are no text, text that is no TOML, a number that is too long, and what is nested too deeply
        raise ConfigurationError(f"{visible(path)}: expected TOML: {visible(error)}") from error
    _check_keys(path, "", said, ("keep_defaults", "rules", "silences"))
    keeps = said.get("keep_defaults", True)
    if not isinstance(keeps, bool):
        raise _bad(path, "keep_defaults", keeps, "true or false")
    defaults = {rule.name: rule for rule in DEFAULT_RULES} if keeps else {}
    tables = said.get("rules", {})
    if not isinstance(tables, dict):
        raise _bad(path, "rules", tables, "tables such as [rules.circuit-open]")
    rules: dict[str, Rule | None] = dict(defaults)
    for name, table in tables.items():
        rules[name] = _rule(path, name, table, defaults.get(name))
    silences = said.get("silences", [])
    if not isinstance(silences, list):
        raise _bad(path, "silences", silences, "tables such as [[silences]]")
    return RuleFile(
        tuple(rule for rule in rules.values() if rule is not None),
        tuple(
            _silence(path, f"silences[{number}]", table, tables.keys() | defaults.keys())
            for number, table in enumerate(silences)
        ),
    )


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Make sure that each name is there once.

    Raises:
        ConfigurationError: Two rules have the same name.
    """
    checked = tuple(rules)
    names = [rule.name for rule in checked]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"two rules are named {name!r}: expected a name of its own for each")
    return checked


def _rule(path: str | Path, name: str, table: object, default: Rule | None) -> Rule | None:
    where = f"rules.{name}"
    if not isinstance(table, dict):
        raise _bad(path, where, table, f"a table, [{where}]")
    keys = [field.name for field in fields(Rule) if field.name != "name"]
    _check_keys(path, where, table, ("enabled", *keys))
    given: dict[str, Any] = dict(table)
    is_enabled = given.pop("enabled", True)
    if not isinstance(is_enabled, bool):
        raise _bad(path, f"{where}.enabled", is_enabled, "true or false")
    if isinstance(given.get("names"), list):
        given["names"] = tuple(given["names"])
    if default is None:
        for key in ("measure", "above"):
            if key not in given:
                raise ConfigurationError(
                    f"{visible(path)}: {visible(where)}: {key} is missing: expected {_EXPECTED[key]}"
                )
        complete: dict[str, Any] = {field.name: field.default for field in fields(Rule)} | given
    else:
        complete = {field.name: getattr(default, field.name) for field in fields(Rule)} | given
        # a bound that was lowered beneath the default's takes that with it
        if "clears_at" not in given and default.clears_at is not None and is_number(given.get("above")):
            complete["clears_at"] = default.clears_at * given["above"] / default.above
    problem = _problem(complete | {"name": name})
    if problem is not None:
        key, expected = problem
        raise _bad(path, f"{where}.{key}", complete.get(key, name), expected)
    if not is_enabled:
        return None
    return Rule(name=name, **given) if default is None else replace(default, **complete)


def _silence(path: str | Path, where: str, table: object, rules: Iterable[str]) -> Silence:
    if not isinstance(table, dict):
        raise _bad(path, where, table, "a table, [[silences]]")
    _check_keys(path, where, table, ("until", "rule", "name"))
    until = table.get("until")
    if not isinstance(until, datetime) or until.tzinfo is None:
        raise _bad(path, f"{where}.until", until, "a date with a time and its offset, as 2027-01-31T08:00:00Z")
    rule, name = table.get("rule"), table.get("name")
    if rule is not None and not (isinstance(rule, str) and rule in rules):
        raise _bad(path, f"{where}.rule", rule, f"one of {_listed(rules)}")
    if name is not None and not isinstance(name, str):
        raise _bad(path, f"{where}.name", name, "a text")
    return Silence(until=until.timestamp(), rule=rule, name=name)


_EXPECTED = {
    "name": f"a text of {_MOST_CHARACTERS} characters at most",
    "measure": f"one of {', '.join(_MEASURES)}",
    "above": "a number",
    "clears_at": "a number that is not larger than `above`",
    "for_seconds": "seconds, 0 or more, a week at most",
    "clear_for_seconds": "seconds, 0 or more, a week at most",
    "over_seconds": "seconds, 1 or more, a week at most",
    "least_calls": "a whole number, 1 or more",
    "severity": f"one of {', '.join(_SEVERITIES)}",
    "names": 'texts, as ["chat", "embeddings"]',
    "advice": "a text",
}


def _problem(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key of a rule that cannot work, and what was expected of it."""
    names, above, clears_at = given["names"], given["above"], given["clears_at"]
    is_fine = {
        "name": isinstance(given["name"], str) and 0 < len(given["name"]) <= _MOST_CHARACTERS,
        "measure": callable(given["measure"]) or given["measure"] in _MEASURES,
        "above": is_number(above),
        "clears_at": clears_at is None or (is_number(clears_at) and is_number(above) and clears_at <= above),
        "for_seconds": _is_seconds(given["for_seconds"], 0),
        "clear_for_seconds": _is_seconds(given["clear_for_seconds"], 0),
        "over_seconds": _is_seconds(given["over_seconds"], 1),
        "least_calls": is_number(given["least_calls"]) and given["least_calls"] >= 1 and given["least_calls"] % 1 == 0,
        "severity": given["severity"] in _SEVERITIES,
        "names": names is None or (isinstance(names, tuple) and all(isinstance(it, str) for it in names)),
        "advice": given["advice"] is None or isinstance(given["advice"], str),
    }
    return next(((key, _EXPECTED[key]) for key, fine in is_fine.items() if not fine), None)


def _is_seconds(value: object, least: float) -> bool:
    return is_number(value) and least <= value <= _MOST_SECONDS


def _check_keys(path: str | Path, where: str, table: Mapping[str, object], known: tuple[str, ...]) -> None:
    for key, value in table.items():
        if key not in known:
            raise _bad(path, f"{where}.{key}" if where else key, value, f"one of the keys {_listed(known)}")


def _bad(path: str | Path, key: str, value: object, expected: str) -> ConfigurationError:
    try:
        written = repr(value)
    except RecursionError:
        written = "what is nested too deeply"
    return ConfigurationError(f"{visible(path)}: {visible(key)} = {written}: expected {visible(expected)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(visible, sorted(names)))


DEFAULT_RULES = (
    Rule(
        name="circuit-open",
        measure="circuit_open_seconds",
        above=30,
        clear_for_seconds=60,
        severity="critical",
    ),
    Rule(
        name="rate-limited",
        measure="rate_limited_share",
        above=0.05,
        clears_at=0.02,
        for_seconds=60,
        clear_for_seconds=60,
        least_calls=20,
    ),
    Rule(
        name="slow-waits",
        measure="wait_p95_seconds",
        above=10,
        clears_at=5,
        for_seconds=120,
        clear_for_seconds=120,
        least_calls=20,
    ),
    # a budget of a minute is used again and again: that is one alert, not one each minute
    Rule(name="budget-used", measure="budget_used_share", above=0.9, clears_at=0.8, clear_for_seconds=300),
    Rule(
        name="budget-runs-out",
        measure="budget_projected_share",
        above=1.0,
        clears_at=0.9,
        for_seconds=300,
        clear_for_seconds=300,
        over_seconds=900,
    ),
    Rule(name="forecast-above-quota", measure="forecast_share", above=1.0, clears_at=0.9, clear_for_seconds=300),
    Rule(
        name="truncations",
        measure="truncation_share",
        above=0.1,
        clears_at=0.05,
        clear_for_seconds=300,
        over_seconds=3_600,
        least_calls=20,
    ),
)

"""Alerts as a state machine: time comes from the samples, so nothing sleeps."""

import logging
import math
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from resilience_kit import ConfigurationError
from resilience_kit.monitoring.alert_rules import DEFAULT_RULES, Rule, Silence
from resilience_kit.monitoring.alerts import Alerts, Condition, example_alert
from resilience_kit.monitoring.forecast import Forecast
from resilience_kit.monitoring.measures import Histogram, Reading, Sample

DEFAULTS = {rule.name: rule for rule in DEFAULT_RULES}


def sample(at, *readings, seconds=1.0):
    return Sample(at, seconds, "one", readings)


def pressure(**parameters):
    """A rule on a value that the test itself gives: see `told`."""
    return Rule(
        **{
            "name": "pressure",
            "measure": lambda given: {reading.name: reading.gauges["value"] for reading in given.readings},
            "above": 10,
            **parameters,
        }
    )


def told(alerts, values, name="chat"):
    """What is delivered, second by second, for values; None is a second in which the name is not there."""
    news = []
    for at, value in enumerate(values, 1):
        readings = () if value is None else (Reading("own", name, gauges={"value": value}),)
        news.extend((alert.at, alert.state) for alert in alerts.take(sample(float(at), *readings)))
    return news


# The state of one condition

values = st.lists(st.sampled_from([0.0, 5.0, 6.0, 8.0, 10.0, 11.0, 50.0, None, math.nan]), max_size=60)
seconds = st.integers(0, 5)


@given(values=values, for_seconds=seconds)
def test_it_fires_if_and_only_if_the_value_was_above_the_bound_for_the_duration(values, for_seconds):
    condition = Condition(pressure(for_seconds=for_seconds, clear_for_seconds=1_000))
    fires = [condition.update(value, float(at)) == "firing" for at, value in enumerate(values)]

    def held(at):
        return at >= for_seconds and all(
            value is not None and value > 10 for value in values[at - for_seconds : at + 1]
        )

    first = next((at for at in range(len(values)) if held(at)), None)
    assert fires == [first is not None and at >= first for at in range(len(values))]


@given(values=values, clear_for_seconds=seconds)
def test_it_is_over_if_and_only_if_the_value_was_low_enough_for_the_duration(values, clear_for_seconds):
    condition = Condition(pressure(clears_at=5, clear_for_seconds=clear_for_seconds))
    condition.update(50, 0.0)
    states = []
    for at, value in enumerate(values, 1):
        states.append(condition.update(value, float(at)))
        if states[-1] != "firing":
            break
    window = range(clear_for_seconds, len(states))
    is_low = [not (value is not None and value > 5) for value in values]
    over = [at for at in window if all(is_low[at - clear_for_seconds : at + 1])]

    assert ("ok" in states) == bool(over)
    assert not over or states.index("ok") == over[0]


@given(inside=st.lists(st.floats(5, 10, exclude_min=True), min_size=1, max_size=50), was_firing=st.booleans())
def test_between_the_two_bounds_nothing_changes(inside, was_firing):
    condition = Condition(pressure(clears_at=5))
    condition.update(50 if was_firing else 0, 0.0)
    before = condition.state

    assert {condition.update(value, float(at)) for at, value in enumerate(inside, 1)} == {before}


@given(values=values, for_seconds=seconds, clear_for_seconds=seconds)
def test_between_any_two_changes_lie_their_durations(values, for_seconds, clear_for_seconds):
    alerts = Alerts([pressure(clears_at=5, for_seconds=for_seconds, clear_for_seconds=clear_for_seconds)], deliver=())
    news = told(alerts, values)

    assert [state for _, state in news] == (["firing", "ok"] * len(news))[: len(news)]
    for (before, _), (at, state) in pairwise(news):
        assert at - before >= 1 + (for_seconds if state == "firing" else clear_for_seconds)


def test_an_alert_on_its_way_is_pending_since_the_value_rose():
    condition = Condition(pressure(for_seconds=10))

    assert [condition.update(11, at) for at in (5.0, 14.0)] == ["pending", "pending"]
    assert condition.since == 5
    assert condition.update(11, 15.0) == "firing"


def test_what_was_not_seen_for_a_minute_is_not_taken_for_lasting():
    condition = Condition(pressure(for_seconds=100))
    condition.update(11, 0.0)

    assert condition.update(11, 3_600.0, seconds=1) == "pending"
    assert condition.since == 3_600


def test_samples_of_an_hour_have_no_gap_between_them():
    condition = Condition(pressure(for_seconds=5_000))
    states = [condition.update(11, float(at), seconds=3_600) for at in (3_600, 7_200, 10_800)]

    assert states == ["pending", "pending", "firing"]


def test_an_end_that_was_not_seen_for_a_minute_is_not_taken_for_lasting():
    condition = Condition(pressure(clear_for_seconds=100))
    states = [condition.update(value, at, seconds=1) for value, at in ((11, 0.0), (0, 1.0), (0, 3_600.0), (0, 3_700.0))]

    assert states == ["firing", "firing", "firing", "firing"]
    assert condition.update(0, 3_700.0) == "firing"


def test_a_clock_that_was_set_back_starts_the_wait_anew():
    condition = Condition(pressure(for_seconds=10))
    condition.update(11, 1_000.0)

    assert [condition.update(11, at) for at in (100.0, 109.0, 110.0)] == ["pending", "pending", "firing"]


# What is told of it


def test_what_fires_and_what_is_over_is_told_once_each():
    assert told(Alerts([pressure()], deliver=()), [0, 11, 12, 13, 9, 9]) == [(2.0, "firing"), (5.0, "ok")]


def test_a_name_that_is_gone_has_nothing_to_complain_about():
    assert told(Alerts([pressure()], deliver=()), [11, None]) == [(1.0, "firing"), (2.0, "ok")]


def test_what_was_only_pending_is_not_told():
    assert told(Alerts([pressure(for_seconds=5)], deliver=()), [11, 11, 0]) == []


def test_current_shows_what_fires_and_what_is_on_its_way_with_the_worst_first():
    alerts = Alerts(
        [
            pressure(name="soon", for_seconds=60, severity="critical"),
            pressure(name="mild"),
            pressure(name="grave", severity="critical"),
        ],
        deliver=(),
    )
    told(alerts, [11])

    shown = [(alert.rule, alert.state) for alert in alerts.current()]
    assert shown == [("grave", "firing"), ("mild", "firing"), ("soon", "pending")]


def test_an_alert_says_of_whom_it_is_what_was_seen_and_what_to_do():
    alerts = Alerts([DEFAULTS["budget-used"]], deliver=())
    gauges = {"budget_tokens": 100, "tokens_used": 95, "budget_usd": None, "usd_used": 0.0}
    (alert,) = alerts.take(sample(1.0, Reading("token_budgets", "Math\nAgent", gauges=gauges)))

    assert alert.text == (
        "Budget of agent 'Math\\nAgent' has this share used in its period: 95 %; the bound is 90 %. Calls are refused, "
        "or wait, once all is used: raise budget_tokens or budget_usd, or let this agent do less until the period "
        "turns."
    )
    assert (alert.value, alert.bound, alert.since, alert.process) == (0.95, 0.9, 1.0, "one")


def test_advice_of_ones_own_takes_the_place_of_the_kits():
    (alert,) = Alerts([pressure(advice="Ring Anna.")], deliver=()).take(
        sample(1.0, Reading("own", "boiler", gauges={"value": 12}))
    )
    assert alert.text == "'boiler' is at 12; the bound is 10. Ring Anna."


def test_an_example_says_that_it_is_one():
    alert = example_alert(DEFAULTS["circuit-open"], 1_000.0)
    assert (alert.state, alert.name) == ("firing", "test")
    assert alert.text.startswith("This is a test of circuit-open, and all is well. Circuit 'test' has not been closed")


def test_only_the_names_of_a_rule_are_watched():
    alerts = Alerts([pressure(names=("embeddings",))], deliver=())

    assert told(alerts, [11], name="chat") == []
    assert told(alerts, [11], name="embeddings") == [(1.0, "firing")]


# Silence


def test_what_is_silent_is_shown_and_not_told_until_the_silence_ends():
    alerts = Alerts([pressure()], silences=[Silence(until=3.0, rule="pressure", name="chat")], deliver=())

    assert told(alerts, [11, 11]) == []
    assert alerts.current()[0].silenced
    assert told(alerts, [11, 11, 11, 11]) == [(3.0, "firing")]


@pytest.mark.parametrize(("rule", "name"), [(None, None), ("pressure", None), (None, "chat"), ("pressure", "chat")])
def test_a_silence_holds_for_what_it_names(rule, name):
    alerts = Alerts([pressure()], deliver=())
    alerts.silence(until=100.0, rule=rule, name=name)

    assert told(alerts, [11]) == []


def test_a_silence_of_another_name_or_rule_holds_nothing_back():
    alerts = Alerts([pressure(), pressure(name="other")], deliver=())
    alerts.silence(until=100.0, name="embeddings")
    alerts.silence(until=100.0, rule="other")

    assert told(alerts, [11]) == [(1.0, "firing")]


def test_who_was_told_that_it_fires_is_told_that_it_is_over_although_it_is_silent():
    alerts = Alerts([pressure()], deliver=())
    told(alerts, [11])
    alerts.silence(until=100.0)

    assert told(alerts, [0]) == [(1.0, "ok")]


@pytest.mark.parametrize(
    ("silence", "expected"),
    [({"until": "tomorrow"}, "seconds since the epoch"), ({"until": 5, "rule": "presure"}, "one of pressure")],
)
def test_a_silence_that_cannot_work_is_refused(silence, expected):
    with pytest.raises(ConfigurationError, match=expected):
        Alerts([pressure()], deliver=()).silence(**silence)


# Bounds and failures


def test_a_measure_that_fails_is_told_once_and_harms_no_other_rule(caplog):
    alerts = Alerts([pressure(name="broken", measure=lambda given: 1 / 0), pressure()], deliver=())

    assert told(alerts, [11, 11]) == [(1.0, "firing")]
    assert caplog.messages == ["the measure of the alert rule 'broken' raised ZeroDivisionError"]


def test_more_than_a_thousand_names_are_not_watched_and_that_is_told_once(caplog):
    alerts = Alerts([pressure()], deliver=())
    readings = [Reading("own", f"name {number}", gauges={"value": 11}) for number in range(1_002)]
    with caplog.at_level(logging.WARNING):
        news = alerts.take(sample(1.0, *readings))
        alerts.take(sample(2.0, *readings))

    assert len(news) == len(alerts.current()) == 1_000
    assert len(caplog.messages) == 1


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(ConfigurationError, match="two rules are named 'pressure'"):
        Alerts([pressure(), pressure()], deliver=())


def test_rules_may_be_a_file_with_its_silences(tmp_path):
    file = tmp_path / "alerts.toml"
    file.write_text(
        "keep_defaults = false\n[rules.used]\nmeasure = 'budget_used_share'\nabove = 0.5\n"
        "[[silences]]\nuntil = 1970-01-01T00:01:00Z\n"
    )
    alerts = Alerts(file, deliver=())
    budget = Reading("token_budgets", "MathAgent", gauges={"budget_tokens": 100, "tokens_used": 60})

    assert [len(alerts.take(sample(at, budget))) for at in (59.0, 60.0)] == [0, 1]


# What the rules look at


def seen(rule, samples, **parameters):
    """When a rule began to fire and when it was over, for these samples."""
    alerts = Alerts([rule], deliver=(), **parameters)
    return [(alert.at, alert.state, alert.name) for each in samples for alert in alerts.take(each)]


def circuit(state):
    return Reading("circuit_breakers", "chat", gauges={"state": state})


def test_a_circuit_is_open_too_long_although_trials_half_open_it():
    states = ["CLOSED", "OPEN", "HALF_OPEN", "OPEN", "OPEN", "CLOSED"]
    rule = Rule(name="open", measure="circuit_open_seconds", above=25)

    assert seen(rule, [sample(10.0 * at, circuit(state), seconds=10) for at, state in enumerate(states)]) == [
        (40.0, "firing", "chat"),
        (50.0, "ok", "chat"),
    ]


def test_a_circuit_that_closed_between_two_outages_is_counted_anew():
    states = ["OPEN", "OPEN", "CLOSED", "OPEN", "OPEN", "OPEN"]
    rule = Rule(name="open", measure="circuit_open_seconds", above=15)

    assert seen(rule, [sample(10.0 * at, circuit(state), seconds=10) for at, state in enumerate(states)]) == [
        (50.0, "firing", "chat")
    ]


def calls(admitted, rate_limited=0):
    return Reading("rate_limiters", "chat", {"calls_admitted": admitted, "calls_rate_limited": rate_limited})


def test_the_share_of_429s_is_that_of_the_window():
    rule = Rule(name="429s", measure="rate_limited_share", above=0.1, over_seconds=60, least_calls=10)
    quiet = [sample(float(at), calls(1)) for at in range(1, 100)]
    loud = [sample(float(at), calls(1, 1)) for at in range(100, 107)]
    after = [sample(float(at), calls(1)) for at in range(107, 200)]

    assert seen(rule, [*quiet, *loud, *after]) == [(106.0, "firing", "chat"), (160.0, "ok", "chat")]


def test_of_fewer_calls_than_the_rule_wants_nothing_is_said():
    rule = Rule(name="429s", measure="rate_limited_share", above=0.1, over_seconds=60, least_calls=10)

    assert seen(rule, [sample(float(at), calls(1, 1)) for at in range(1, 10)]) == []


def test_a_name_that_is_no_longer_in_the_samples_leaves_the_window():
    rule = Rule(name="429s", measure="rate_limited_share", above=0.1, over_seconds=60, least_calls=1)
    gone = [sample(float(at)) for at in range(2, 80)]

    assert seen(rule, [sample(1.0, calls(1, 1)), *gone]) == [(1.0, "firing", "chat"), (61.0, "ok", "chat")]


def test_a_clock_that_was_set_back_empties_the_window():
    rule = Rule(name="429s", measure="rate_limited_share", above=0.1, over_seconds=60, least_calls=5)

    assert seen(rule, [sample(1_000.0, calls(9)), sample(100.0, calls(5, 5))]) == [(100.0, "firing", "chat")]


def test_waits_are_looked_at_by_their_95th_percentile():
    rule = Rule(name="waits", measure="wait_p95_seconds", above=10, over_seconds=60, least_calls=20)

    def waits(short, long):
        times = Histogram.of([0.1] * short + [20.0] * long)
        return sample(1.0, Reading("rate_limiters", "chat", histograms={"wait": times}))

    assert seen(rule, [waits(96, 4)]) == []
    assert seen(rule, [waits(90, 10)]) == [(1.0, "firing", "chat")]
    assert seen(rule, [waits(0, 19)]) == []


def budget(used, left=None, *, bound=1_000, usd=0.0, bound_usd=None):
    gauges = {
        "budget_tokens": bound,
        "tokens_used": used,
        "budget_usd": bound_usd,
        "usd_used": usd,
        "seconds_left": left,
    }
    return Reading("token_budgets", "MathAgent", gauges=gauges)


@pytest.mark.parametrize(
    ("reading", "fires"),
    [
        (budget(900), False),
        (budget(901), True),
        (budget(0, usd=4.6, bound_usd=5.0), True),
        (budget(0, bound=None, usd=4.6, bound_usd=5.0), True),
        (budget(5_000, bound=None), False),
    ],
)
def test_a_budget_is_used_by_whichever_of_its_bounds_is_nearer(reading, fires):
    assert bool(seen(DEFAULTS["budget-used"], [sample(1.0, reading)])) == fires


def spending(pace, *, period=10_000, until=2_000, start=0):
    """A budget of 1,000 tokens whose use grows by `pace` a second."""
    return [sample(float(at), budget(pace * at, period - at), seconds=10) for at in range(start, until, 10)]


def test_a_budget_that_will_run_out_early_is_told_long_before():
    # 0.2 a second make 2,000 of 1,000: at 5,000 s all is used
    assert seen(DEFAULTS["budget-runs-out"], spending(0.2)) == [(390.0, "firing", "MathAgent")]


def test_a_budget_that_lasts_is_not_told_of():
    assert seen(DEFAULTS["budget-runs-out"], spending(0.099)) == []


def later(samples, seconds):
    return [sample(seconds + each.at, *each.readings, seconds=10) for each in samples]


def test_what_a_budget_will_use_is_over_when_its_period_turns():
    samples = [*spending(0.2, until=1_000), *later(spending(0.05, until=1_000), 1_000)]

    assert seen(DEFAULTS["budget-runs-out"], samples)[-1] == (1_300.0, "ok", "MathAgent")


def test_the_pace_of_a_budget_is_that_of_its_own_period():
    samples = [*spending(0.05, until=1_000), *later(spending(0.2), 1_000)]

    assert seen(DEFAULTS["budget-runs-out"], samples) == [(1_390.0, "firing", "MathAgent")]


def test_a_budget_without_a_period_is_not_projected():
    samples = [sample(float(at), budget(at), seconds=10) for at in range(0, 2_000, 10)]

    assert seen(DEFAULTS["budget-runs-out"], samples) == []


class Foresight:
    """A forecaster that expects what the test says; learning takes a day of calls."""

    def __init__(self, expected, error=1.0):
        self.expected = expected
        self.error = error

    def forecasts(self):
        return [
            Forecast(agent, 60.0, expected, 0, 0, 0, self.error, 2.0)
            for agent, expected in ((None, self.expected), (None, 0.0), ("MathAgent", 1e9))
        ]


@pytest.mark.parametrize(
    ("forecaster", "period", "fires"),
    [
        (Foresight(1_001), 60, True),
        (Foresight(1_000), 60, False),
        (Foresight(1_001), 30, False),
        (Foresight(2_001), 30, True),
        (Foresight(1_001, error=3.0), 60, False),
    ],
)
def test_a_forecast_is_compared_with_the_limits_tokens_per_minute(forecaster, period, fires):
    limit = Reading("rate_limiters", "chat", gauges={"tokens_per_minute": 1_000, "period": period})
    found = seen(DEFAULTS["forecast-above-quota"], [sample(1.0, limit)], forecasters={"chat": forecaster})

    assert bool(found) == fires


@pytest.mark.parametrize("readings", [(), (Reading("rate_limiters", "chat"),)], ids=["no limit", "no gauges"])
def test_a_forecast_of_a_limit_of_which_nothing_is_known_says_nothing(readings):
    forecasters = {"chat": Foresight(1e9)}

    assert seen(DEFAULTS["forecast-above-quota"], [sample(1.0, *readings)], forecasters=forecasters) == []


def test_an_agent_whose_prompts_are_cut_too_often_is_told():
    def agent(calls, truncations):
        return sample(1.0, Reading("agents", "MathAgent", {"calls": calls, "truncations": truncations}))

    assert seen(DEFAULTS["truncations"], [agent(100, 10)]) == []
    assert seen(DEFAULTS["truncations"], [agent(100, 11)]) == [(1.0, "firing", "MathAgent")]

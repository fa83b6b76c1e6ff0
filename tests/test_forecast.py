"""Forecasts, warnings and advice, in virtual time: a day has 48 intervals here, and nobody waits for one."""

import dataclasses
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from resilience_kit import ConfigurationError, get_all_resilience_stats, subscribe, token_budget
from resilience_kit.events import Admitted, BudgetSettled, PeakExpected
from resilience_kit.monitoring.forecast import Forecaster

HALF_HOUR = 1_800
DAY = 48
QUIET, BUSY = 30_000, 300_000  # tokens in half an hour: 1,000 and 10,000 per minute
# quiet but for four busy hours
DAILY = [BUSY if 20 <= slot < 28 else QUIET for slot in range(DAY)]
DOCS = Path(__file__).parent.parent / "docs" / "forecast.md"


def settled(tokens, agent="MathAgent"):
    return BudgetSettled(name=agent, reserved=0, prompt_tokens=tokens, completion_tokens=0, usd=None)


class Traffic:
    """A forecaster, and the clock that it looks at."""

    def __init__(self, **options):
        self.slot = 0
        options = {"interval": HALF_HOUR, "horizons": (HALF_HOUR, 2 * HALF_HOUR), **options}
        self.forecaster = Forecaster(clock=lambda: self.slot * options["interval"] + 1, **options)

    def goes_on(self, values, agent="MathAgent"):
        for tokens in values:
            self.forecaster.listen(settled(tokens, agent))
            self.slot += 1
        return self

    def next(self, *, agent=None, seconds=HALF_HOUR):
        return self.forecaster.forecast(seconds=seconds, agent=agent)


@pytest.fixture
def peaks():
    heard = []
    stop = subscribe(lambda event: heard.append(event) if isinstance(event, PeakExpected) else None)
    yield heard
    stop()


# What is known when


def test_nothing_is_forecast_before_the_first_call():
    assert Traffic().next() is None


def test_nothing_is_forecast_on_the_first_day():
    assert Traffic().goes_on(DAILY).next() is None


def test_something_is_forecast_on_the_third_day():
    assert Traffic().goes_on(DAILY * 2).next() is not None


def test_nothing_is_forecast_of_an_agent_without_a_call():
    assert Traffic().goes_on(DAILY * 2).next(agent="Nobody") is None


def test_all_forecasts_are_none_at_all_on_the_first_day():
    assert Traffic().goes_on(DAILY).forecaster.forecasts() == []


# What it learns


def test_a_pattern_that_repeats_is_learnt_better_than_by_the_last_value():
    found = Traffic().goes_on(DAILY * 20).next(seconds=2 * HALF_HOUR)
    assert found.error < 0.6 * found.last_value_error


def test_it_says_that_it_helps_where_it_does():
    assert Traffic().goes_on(DAILY * 20).next().helps


def test_it_says_that_it_does_not_help_where_there_is_nothing_to_learn():
    assert not Traffic().goes_on([QUIET] * DAY * 3).next().helps


def test_a_busy_hour_is_expected_before_it_comes():
    before_the_peak = Traffic().goes_on(DAILY * 20 + DAILY[:20]).next()
    assert before_the_peak.expected > 3 * before_the_peak.last_value


def test_traffic_that_never_changes_is_expected_to_go_on():
    assert Traffic().goes_on([QUIET] * DAY * 3).next().expected == QUIET / 30


def test_the_naive_forecast_is_the_last_full_interval_per_minute():
    assert Traffic().goes_on(DAILY * 2 + [BUSY]).next().last_value == BUSY / 30


def test_the_naive_error_is_that_of_the_last_value():
    # it changes at each step, and is always as far off
    found = Traffic().goes_on([QUIET, BUSY] * DAY * 2).next()
    assert found.last_value_error == (BUSY - QUIET) / 30


def test_nothing_below_zero_is_expected():
    traffic = Traffic().goes_on(([BUSY] * 24 + [1] * 24) * 10)
    lowest = []
    for tokens in ([BUSY] * 24 + [1] * 24) * 2:
        traffic.goes_on([tokens])
        lowest += [it for found in traffic.forecaster.forecasts() for it in (found.low, found.expected)]
    assert min(lowest) >= 0


def test_the_forecast_lies_in_its_band():
    found = Traffic().goes_on(DAILY * 5).next()
    assert found.low <= found.expected <= found.high


def test_the_band_holds_four_times_of_five():
    dice, held = random.Random(1), []
    traffic = Traffic().goes_on([dice.randrange(QUIET, BUSY) for _ in range(DAY * 5)])
    for _ in range(DAY * 20):
        found, tokens = traffic.next(), dice.randrange(QUIET, BUSY)
        traffic.goes_on([tokens])
        held.append(found.low <= tokens / 30 <= found.high)
    assert 0.75 < sum(held) / len(held) < 0.85


def test_one_burst_does_not_spoil_what_was_learnt():
    traffic = Traffic().goes_on(DAILY * 20 + [500_000_000])
    assert traffic.goes_on(DAILY[1:] + DAILY * 2 + DAILY[:20]).next().expected > 2 * QUIET / 30


# Whose tokens they are


def test_agents_are_forecast_by_name():
    traffic = Traffic()
    for tokens in DAILY * 2:
        traffic.forecaster.listen(settled(10 * tokens, "Other"))
        traffic.goes_on([tokens])
    assert traffic.next(agent="MathAgent").last_value == DAILY[-1] / 30


def test_all_agents_are_forecast_together():
    traffic = Traffic()
    for tokens in DAILY * 2:
        traffic.forecaster.listen(settled(10 * tokens, "Other"))
        traffic.goes_on([tokens])
    assert traffic.next().last_value == 11 * DAILY[-1] / 30


def test_each_agent_and_all_together_are_listed_at_each_horizon():
    listed = Traffic().goes_on(DAILY * 2).forecaster.forecasts()
    assert [(it.agent, it.seconds) for it in listed] == [
        (None, 1_800),
        (None, 3_600),
        ("MathAgent", 1_800),
        ("MathAgent", 3_600),
    ]


def test_agents_beyond_the_bound_share_one_model():
    traffic = Traffic(most_agents=2)
    for tokens in DAILY * 2:
        for agent in ("a", "b", "c", "d"):
            traffic.forecaster.listen(settled(tokens, agent))
        traffic.slot += 1
    assert {it.agent for it in traffic.forecaster.forecasts()} == {None, "a", "b", "other"}


def test_a_call_of_a_budget_is_counted():
    @token_budget("Writer")
    def ask(prompt):
        return {"usage": {"prompt_tokens": QUIET - 10, "completion_tokens": 10}}

    traffic = Traffic()
    stop = subscribe(traffic.forecaster.listen)
    for _ in range(2 * DAY):
        ask("2 + 2?")
        traffic.slot += 1
    stop()
    assert traffic.next(agent="Writer").last_value == QUIET / 30


# What it is not misled by


@pytest.mark.parametrize("tokens", [-5, 0, float("nan"), float("inf"), 10**400, "many"])
def test_tokens_that_cannot_be_are_ignored(tokens):
    traffic = Traffic().goes_on(DAILY * 2 + [QUIET])
    traffic.slot -= 1
    traffic.forecaster.listen(dataclasses.replace(settled(0), prompt_tokens=tokens, completion_tokens=type(tokens)()))
    traffic.slot += 1
    assert traffic.next().last_value == QUIET / 30


def test_events_of_other_kinds_are_ignored():
    traffic = Traffic()
    traffic.forecaster.listen(Admitted(name="chat", waited=0, tokens=5))
    assert not traffic.forecaster._agents


def test_an_interval_without_calls_had_no_tokens():
    traffic = Traffic().goes_on(DAILY * 2)
    traffic.slot += 1
    assert traffic.next().last_value == 0


def test_silent_nights_are_nights_too():
    traffic = Traffic()
    for _ in range(20):
        traffic.slot += 20  # nobody calls, and nobody asks
        traffic.goes_on(DAILY[20:])
    traffic.slot += 20
    assert traffic.next().expected > 2 * QUIET / 30


def test_a_silence_too_long_to_learn_from_whole_is_forecast_to_last():
    traffic = Traffic(interval=600, horizons=(600,)).goes_on([QUIET, BUSY] * 144)
    traffic.slot += 140
    assert traffic.next(seconds=600).expected < QUIET / 10


def test_a_clock_that_leaps_ahead_is_outlived():
    traffic = Traffic().goes_on(DAILY * 2)
    traffic.slot += 10**12
    assert traffic.goes_on(DAILY * 2).next() is not None


def test_while_the_clock_is_behind_calls_count_in_the_open_interval():
    traffic = Traffic().goes_on(DAILY * 2)
    traffic.slot -= DAY
    traffic.forecaster.listen(settled(BUSY))
    traffic.slot += DAY
    assert traffic.next().last_value == (DAILY[-1] + BUSY) / 30


def test_calls_of_many_threads_are_all_counted():
    traffic = Traffic().goes_on(DAILY * 2)
    threads = [
        threading.Thread(target=lambda: [traffic.forecaster.listen(settled(3)) for _ in range(500)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    traffic.slot += 1
    assert traffic.next().last_value == 8 * 500 * 3 / 30


def test_a_call_that_ends_while_another_is_counted_does_not_wait_and_is_counted_later():
    traffic = Traffic().goes_on(DAILY * 2)
    with traffic.forecaster._lock:
        traffic.forecaster.listen(settled(QUIET))
    traffic.slot += 1
    assert traffic.next().last_value == QUIET / 30


def test_a_forecast_is_frozen():
    found = Traffic().goes_on(DAILY * 2).next()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.expected = 0


# Warnings


def test_a_peak_is_told_once(peaks):
    traffic = Traffic(quota=5_000).goes_on(DAILY * 20)
    peaks.clear()
    traffic.goes_on(DAILY)
    assert len(peaks) == 1


def test_the_next_peak_is_told_again(peaks):
    traffic = Traffic(quota=5_000).goes_on(DAILY * 20)
    peaks.clear()
    traffic.goes_on(DAILY * 3)
    assert len(peaks) == 3


def test_a_peak_is_told_before_it_comes(peaks):
    traffic = Traffic(quota=5_000).goes_on(DAILY * 20)
    peaks.clear()
    traffic.goes_on(DAILY[:20])
    assert len(peaks) == 1


def test_a_warning_names_the_limit_its_quota_and_how_far_ahead_it_is(peaks):
    Traffic(name="chat", quota=5_000).goes_on(DAILY * 20)
    assert {(it.name, it.quota, it.seconds in (1_800, 3_600)) for it in peaks} == {("chat", 5_000, True)}


def test_what_hovers_about_the_quota_is_one_peak(peaks):
    hovering = [BUSY if slot % 2 else 0.93 * BUSY for slot in range(8)]
    daily = [int(hovering[slot - 20]) if 20 <= slot < 28 else QUIET for slot in range(DAY)]
    traffic = Traffic(quota=9_600, horizons=(HALF_HOUR,)).goes_on(daily * 20)
    peaks.clear()
    traffic.goes_on(daily)
    assert len(peaks) == 1


def test_without_a_quota_nothing_is_told(peaks):
    Traffic().goes_on(DAILY * 20)
    assert peaks == []


def test_a_forecast_that_has_not_helped_warns_of_nothing(peaks):
    Traffic(quota=500).goes_on([QUIET] * DAY * 5)
    assert peaks == []


def test_a_warning_is_a_log_line(caplog):
    Traffic(name="chat", quota=5_000).goes_on(DAILY * 20)
    assert {record.name for record in caplog.records if "peak-expected name='chat'" in record.message} == {
        "resilience_kit.forecast"
    }


# Pacing


def test_on_the_first_day_the_pace_is_kept():
    assert Traffic().goes_on(DAILY).forecaster.pacing(1) == 1.0


def test_ahead_of_a_peak_the_pace_is_slowed():
    assert Traffic().goes_on(DAILY * 20 + DAILY[:20]).forecaster.pacing(3_000) < 1


def test_the_pace_is_never_above_one_and_never_nothing():
    traffic, paces = Traffic().goes_on(DAILY * 20), []
    for tokens in DAILY * 2:
        traffic.goes_on([tokens])
        paces += [traffic.forecaster.pacing(quota) for quota in (0.001, 900, 5_000, 1e12)]
    assert 0 < min(paces) <= max(paces) == 1


def test_a_forecast_that_has_not_helped_slows_nothing():
    assert Traffic().goes_on([QUIET] * DAY * 5).forecaster.pacing(1) == 1.0


def test_a_forecaster_changes_no_statistics():
    before = get_all_resilience_stats()
    Traffic(quota=5_000).goes_on(DAILY * 20)
    assert get_all_resilience_stats() == before


# How it is made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 7}, r"Forecaster\(interval=7\): expected seconds that divide a day"),
        ({"interval": 3_600}, r"Forecaster\(interval=3600\): expected .* from 1 to 1800"),
        ({"quota": 0}, r"Forecaster\(quota=0\): expected tokens per minute"),
        ({"most_agents": -1}, r"Forecaster\(most_agents=-1\): expected a whole number"),
        ({"most_agents": 2.5}, r"Forecaster\(most_agents=2.5\): expected a whole number"),
        ({"horizons": 60}, r"Forecaster\(horizons=60\): expected whole intervals of 60 seconds"),
        ({"horizons": ()}, r"Forecaster\(horizons=\(\)\): expected whole intervals of 60 seconds"),
        ({"horizons": (90,)}, r"Forecaster\(horizons=\(90,\)\): expected whole intervals"),
        ({"horizons": (86_400,)}, r"43140 seconds at most, such as \(300, 900\)"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_to_write(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Forecaster(**options)


def test_a_horizon_that_was_not_asked_for_is_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match=r"forecast\(seconds=5\): expected one of the horizons: 1800, 3600"):
        Traffic().next(seconds=5)


def test_a_pace_for_no_quota_is_refused():
    with pytest.raises(ConfigurationError, match=r"pacing\(quota=0\): expected tokens per minute"):
        Traffic().forecaster.pacing(0)


def test_without_river_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.linear_model", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'resilience-kit[forecast]'")):
        Forecaster()


def test_importing_the_module_does_not_import_river():
    program = "import sys, resilience_kit.monitoring.forecast; print('river' in sys.modules)"
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=DOCS.parent.parent, capture_output=True, text=True, check=True)  # noqa: S603 - our own program
    assert finished.stdout == "False\n"


@pytest.mark.parametrize(
    "block", re.findall(r"^```python\n(.*?)^```", DOCS.read_text("utf-8"), re.DOTALL | re.MULTILINE)
)
def test_an_example_of_the_docs_runs_as_it_is_pasted(block):
    exec(compile(block, DOCS, "exec"), {"__name__": "__main__"})  # noqa: S102 - this is what a reader does

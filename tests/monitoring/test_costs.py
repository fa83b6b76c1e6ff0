"""Costs: by the day and the month of a time zone, and never 0 where a price is unknown."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from resilience_kit import set_prices, token_budget
from resilience_kit.monitoring import History, Sampler, costs_of
from resilience_kit.monitoring.measures import Reading, Sample
from resilience_kit.pricing import Price

BERLIN = ZoneInfo("Europe/Berlin")
# nine days and twelve hours into November, which has 30 days
NOW = datetime(2026, 11, 10, 12, tzinfo=UTC).timestamp()
HOUR, DAY = 3_600, 86_400


def spent(before, usd=1.0, agent="A", model="gpt-4o", *, calls=1, unknown=0):
    """What an agent spent in a minute, so many seconds before now."""
    counters = {"calls": calls, "prompt_tokens": 100, "completion_tokens": 50, "usd": usd}
    if unknown:
        counters["calls_of_unknown_price"] = unknown
    readings = Reading("agents", agent, counters), Reading("models", model, counters)
    return Sample(NOW - before, 60, "one", readings)


@pytest.fixture
def costs(tmp_path):
    """Tell the costs of what was spent."""

    def costs(*samples, zone=UTC, now=NOW):
        with History(tmp_path / "history.sqlite3", clock=lambda: now) as history:
            for sample in sorted(samples, key=lambda sample: sample.at):
                history.add(sample)
        return costs_of(history, zone=zone, now=now)

    return costs


def test_today_and_this_month_begin_at_midnight(costs):
    found = costs(
        spent(HOUR, 1), spent(12 * HOUR - 60, 2), spent(12 * HOUR, 4), spent(9.5 * DAY - 60, 8), spent(9.5 * DAY, 16)
    )
    assert (found.today.usd, found.month.usd) == (3, 15)


def test_a_day_begins_where_the_time_zone_says(costs):
    samples = spent(12 * HOUR + 60, 1), spent(13 * HOUR, 2)
    assert (costs(*samples).today.usd, costs(zone=BERLIN).today.usd) == (0, 1)


def test_a_day_may_begin_within_an_hour(costs):
    # in Kolkata, it is half past five in the afternoon
    samples = spent(17.5 * HOUR - 60, 1), spent(17.5 * HOUR, 2)
    assert costs(*samples, zone=ZoneInfo("Asia/Kolkata")).today.usd == 1


def test_without_a_time_zone_the_machines_counts(costs, monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert costs(spent(17.5 * HOUR - 60, 1), spent(17.5 * HOUR, 2), zone=None).today.usd == 1
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_month_is_projected_from_the_average_of_its_days_so_far(costs):
    found = costs(spent(9.5 * DAY - 60, 1), spent(60, 18))
    assert found.days == pytest.approx(9.5)
    assert found.projected_usd == pytest.approx(19 / 9.5 * 30)
    assert found.projected_from == "the average of the 9.5 days of this month that are known"


def test_days_of_which_nothing_is_known_are_not_taken_for_free(costs):
    found = costs(spent(2 * DAY - 60, 1), spent(60, 3))
    assert found.days == pytest.approx(2)
    assert found.projected_usd == pytest.approx(4 + 2 * 20.5)


def test_a_month_is_as_long_as_it_is(costs):
    now = datetime(2028, 2, 15, tzinfo=UTC).timestamp()
    samples = [Sample(now - it, 60, "one", spent(0).readings) for it in (14 * DAY - 60, 60)]
    assert costs(*samples, now=now).projected_usd == pytest.approx(2 / 14 * 29)


def test_a_month_with_a_change_of_the_clock_ends_an_hour_earlier(costs):
    now = datetime(2026, 3, 1, 0, tzinfo=BERLIN).timestamp() + 10 * DAY
    samples = [Sample(now - it, 60, "one", spent(0).readings) for it in (10 * DAY - 60, 60)]
    assert costs(*samples, now=now, zone=BERLIN).projected_usd == pytest.approx(2 / 10 * (31 - 1 / 24))


def test_an_hour_must_be_known_before_there_is_a_projection(costs):
    found = costs(spent(1_000), spent(60))
    assert found.projected_usd is None
    assert found.projected_from.startswith("nothing yet")


def test_costs_are_told_by_agent_and_by_model(costs):
    found = costs(spent(60, 1, "A", "gpt-4o"), spent(120, 2, "B", "gpt-4o"), spent(2 * DAY, 4, "B", "o3"))
    assert {name: it.usd for name, it in found.month_by_agent.items()} == {"A": 1, "B": 6}
    assert {name: it.usd for name, it in found.today_by_agent.items()} == {"A": 1, "B": 2}
    assert {name: it.usd for name, it in found.month_by_model.items()} == {"gpt-4o": 3, "o3": 4}
    assert {name: it.usd for name, it in found.today_by_model.items()} == {"gpt-4o": 3}


def test_a_price_that_is_unknown_is_named_and_is_not_0(costs):
    found = costs(spent(60, 1), spent(2 * HOUR, 0, "B", "ours", calls=3, unknown=3))
    assert (found.unpriced_models, found.unpriced_agents) == (("ours",), ("B",))
    assert found.month_by_model["ours"].usd is None
    assert (found.month.usd, found.month.calls_of_unknown_price) == (1, 3)


def test_where_no_price_is_known_at_all_there_is_no_sum_and_no_projection(costs):
    found = costs(spent(60, 0, unknown=1), spent(DAY, 0, unknown=1))
    assert (found.today.usd, found.month.usd, found.projected_usd) == (None, None, None)


def test_where_nothing_was_called_nothing_was_spent(costs):
    found = costs(Sample(NOW - 60, 60, "one"))
    assert (found.today.usd, found.month.usd, found.projected_usd) == (0, 0, None)


def test_nothing_before_this_month_is_nothing_this_month(costs):
    assert costs(spent(12 * DAY)).month.usd == 0


def test_a_sampler_tells_what_was_spent_since_its_start():
    set_prices({"ours": Price(1_000, 2_000)})
    ask = token_budget("A")(lambda prompt: {"model": "ours", "usage": {"prompt_tokens": 10, "completion_tokens": 5}})
    with Sampler() as sampler:
        ask("2 + 2?")
    found = costs_of(sampler)
    assert found.is_since_start
    assert found.today.usd == found.month_by_model["ours"].usd == pytest.approx(0.02)
    assert found.month.calls == 1

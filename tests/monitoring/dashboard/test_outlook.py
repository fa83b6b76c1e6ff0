"""The forecast on the page: learnt from a history, and silent where nothing is known."""

import math
import sys

import pytest

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.dashboard.outlook import Outlook, note_on, tokens_by_minute
from resilience_kit.monitoring.forecast import Forecast, Forecaster
from resilience_kit.monitoring.history import History
from resilience_kit.monitoring.measures import Reading, Sample

DAY = 86_400
NOW = 1_000 * DAY + 40_000.0


def minute(end, tokens, *, process="one"):
    readings = (Reading("agents", "MathAgent", {"prompt_tokens": tokens - 10, "completion_tokens": 10}),)
    return Sample(end, 60.0, process, readings)


def wave(at):
    """A day's work, up and down each hour."""
    return round(1_000 + 800 * math.sin(at / 3_600 * 2 * math.pi))


class Recorded:
    """Minutes that were measured, without a disk."""

    place = "memory"

    def __init__(self, hours, *, until=NOW):
        first = until // 60 * 60
        self.samples = [minute(first - 60 * number, wave(first - 60 * number)) for number in range(hours * 60)]
        self.asked = []

    def read(self, start, end=None, *, resolution=1):
        self.asked.append((start, end))
        return [it for it in self.samples if start <= it.at - it.seconds and (end is None or it.at <= end)]


def told_by(outlook):
    outlook.told()
    outlook.wait()
    return outlook.told()


def test_more_than_a_day_of_history_gives_a_forecast_with_its_band():
    told = told_by(Outlook(Recorded(60), clock=lambda: NOW))
    assert [point["seconds"] for point in told["points"]] == [300, 900, 1_800, 3_600]
    assert all(point["low"] <= point["expected"] <= point["high"] for point in told["points"])


def test_the_naive_forecast_is_the_last_minute():
    told = told_by(Outlook(Recorded(60), clock=lambda: NOW))
    assert {point["last_value"] for point in told["points"]} == {told["past"]["tokens"][-1]}


def test_the_last_hour_is_told_beside_it():
    told = told_by(Outlook(Recorded(60), clock=lambda: NOW))
    end = NOW // 60 * 60
    assert told["past"]["at"] == [end - 3_600 + 60 * number for number in range(1, 61)]
    assert told["past"]["tokens"] == [wave(at) for at in told["past"]["at"]]


def test_it_learns_each_minute_once():
    clock = [NOW]
    recorded = Recorded(60, until=NOW + 120)
    outlook = Outlook(recorded, clock=lambda: clock[0])
    told_by(outlook)
    clock[0] += 120
    first, second = told_by(outlook), Outlook(recorded, clock=lambda: clock[0])
    assert first["points"] == told_by(second)["points"]


def test_it_is_not_read_twice_in_a_minute():
    recorded = Recorded(2)
    outlook = Outlook(recorded, clock=lambda: NOW)
    told_by(outlook)
    told_by(outlook)
    assert len(recorded.asked) == 1


def test_too_short_a_history_is_said_to_be_so():
    told = told_by(Outlook(Recorded(5), clock=lambda: NOW))
    assert (told["points"], told["note"]) == ([], "No forecast yet: the history goes back 5 h, and it needs 25 h.")


def test_without_a_history_it_says_what_is_missing():
    assert "there is none" in Outlook().told()["note"]


def test_without_river_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.linear_model", None)
    assert "resilience-kit[forecast]" in told_by(Outlook(Recorded(30), clock=lambda: NOW))["note"]


def test_a_history_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "broken").write_bytes(b"no database" * 1_000)
    assert "cannot be read" in told_by(Outlook(History(tmp_path / "broken"), clock=lambda: NOW))["note"]


def test_a_forecaster_of_the_programs_own_is_asked_instead():
    told = told_by(Outlook(forecaster=Forecaster(clock=lambda: NOW), clock=lambda: NOW))
    assert told["note"] == "No forecast yet: it learns for a day before it tells anything."


def test_processes_are_added_up_by_the_minute():
    samples = [minute(60, 100, process="one"), minute(60, 50, process="two"), minute(120, 30)]
    assert tokens_by_minute(samples) == {60: 150, 120: 30}


@pytest.mark.parametrize(("error", "verdict"), [(10.0, "Go by it."), (30.0, "Go by the naive one")])
def test_the_note_says_by_which_forecast_to_go(error, verdict):
    forecast = Forecast(None, 3_600, expected=5, low=1, high=9, last_value=4, error=error, last_value_error=20.0)
    assert verdict in note_on([forecast])


def test_a_forecast_that_fails_is_tried_again():
    class Failing(Recorded):
        def read(self, start, end=None, *, resolution=1):
            super().read(start, end, resolution=resolution)
            raise ConfigurationError("there is no history to read")

    clock = [NOW]
    outlook = Outlook(Failing(1), clock=lambda: clock[0])
    told_by(outlook)
    clock[0] += 120
    told_by(outlook)
    assert len(outlook._history.asked) == 2

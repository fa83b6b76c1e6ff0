"""Alerts on a fleet: which samples they look at, and when. Of a real store see tests/fleet."""

import pytest

from resilience_kit.errors import StoreUnavailableError
from resilience_kit.monitoring.alert_rules import Rule
from resilience_kit.monitoring.alerts import Alerts
from resilience_kit.monitoring.fleet_alerts import FleetAlerts
from resilience_kit.monitoring.fleet_samples import ProcessSamples
from resilience_kit.monitoring.measures import Reading, Sample


class Told:
    """What processes have told, as the test says it: where it is None, the store is lost."""

    def __init__(self):
        self.samples = []

    def read(self):
        if self.samples is None:
            raise StoreUnavailableError("lost", name="resilience", reason="lost")
        names = sorted({sample.process for sample in self.samples})
        return [
            ProcessSamples(name, tuple(it for it in self.samples if it.process == name), Sample(0.0, 0.0, name))
            for name in names
        ]


@pytest.fixture
def fleet():
    """Alerts on what is told, and what they looked at: at which time, of which process, and the calls in it."""
    told, looked = Told(), []

    def look(sample):
        looked.append((sample.at, sample.process, sum(it.counter("calls") for it in sample.readings)))
        return {}

    alerts = FleetAlerts(Alerts([Rule(name="look", measure=look, above=0)], deliver=()), told)
    alerts.told, alerts.looked = told, looked
    return alerts


def second(at, process="one"):
    return Sample(float(at), 1.0, process, (Reading("models", "gpt-4o", {"calls": 1}),))


def test_each_stretch_is_looked_at_once_with_the_calls_of_all(fleet):
    for now in range(101, 120):
        fleet.told.samples = [second(at, process) for at in range(101, now + 1) for process in ("one", "two")]
        fleet.take(second(now))

    assert fleet.looked == [(105.0, "", 10), (110.0, "", 10), (115.0, "", 10)]


def test_a_stretch_is_not_looked_at_before_the_last_process_can_have_told_of_it(fleet):
    fleet.told.samples = [second(at) for at in range(101, 106)]
    for now in (105, 106, 107):
        fleet.take(second(now))
    assert fleet.looked == []

    fleet.take(second(108))
    assert fleet.looked == [(105.0, "one", 5)]


@pytest.mark.parametrize("samples", [[], None], ids=["no store", "store lost"])
def test_without_a_store_a_process_looks_at_itself(fleet, samples):
    fleet.told.samples = samples
    for now in (101, 102, 103):
        fleet.take(second(now))

    assert fleet.looked == [(101.0, "one", 1), (102.0, "one", 1), (103.0, "one", 1)]


def test_when_the_store_is_back_what_was_seen_is_not_looked_at_again(fleet):
    fleet.told.samples = None
    for now in range(101, 108):
        fleet.take(second(now))
    fleet.told.samples = [second(at) for at in range(101, 125)]
    fleet.take(second(125))

    assert [at for at, _, _ in fleet.looked] == [101, 102, 103, 104, 105, 106, 107, 115, 120]


def test_what_is_told_is_returned():
    told = Told()
    alerts = FleetAlerts(Alerts([Rule(name="all", measure=lambda sample: {"chat": 1}, above=0)], deliver=()), told)

    assert [alert.state for alert in alerts.take(second(101))] == ["firing"]
    assert alerts.take(second(102)) == []

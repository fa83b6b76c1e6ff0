"""Alerts on a whole fleet: one process looks at the samples of all, so that one outage is told once."""

import math

from resilience_kit.errors import StoreUnavailableError
from resilience_kit.monitoring.alerts import Alert, Alerts
from resilience_kit.monitoring.fleet_samples import FleetSamples
from resilience_kit.monitoring.measures import Sample, merge_by

# Samples of one second do not come from all processes at once: in so many, each has told at least one.
_STRETCH = 5.0
# How long after its end a stretch is looked at, so that the last process has told of it.
_PATIENCE = 3.0


class FleetAlerts:
    """Has alerts look at the samples of all processes that share a store, in stretches of five seconds.

    Give its `take` to the `Sampler` of one process. While there is no store, or it is lost, the alerts look at that
    process alone.

    Args:
        alerts: What is to look at them, and at nothing else.
        fleet: Where they are read. Each process has its samples put there by a sink of its own, `FleetSamples.add`.

    Example:
        >>> from resilience_kit.monitoring.alerts import Alerts
        >>> from resilience_kit.monitoring.fleet_alerts import FleetAlerts
        >>> from resilience_kit.monitoring.fleet_samples import FleetSamples
        >>> from resilience_kit.monitoring.measures import Sample
        >>> FleetAlerts(Alerts(deliver=()), FleetSamples()).take(Sample(1.0, 1.0, "one"))
        []
    """

    def __init__(self, alerts: Alerts, fleet: FleetSamples) -> None:
        self._alerts = alerts
        self._fleet = fleet
        self._seen = -math.inf

    def take(self, sample: Sample) -> list[Alert]:
        """Look at what the fleet has told by now. It blocks until the store has answered.

        Args:
            sample: This process's own, which says how late it is.

        Returns:
            What was delivered.
        """
        try:
            told = self._fleet.read()
        except StoreUnavailableError:
            # the events tell of it
            told = []
        if not told:
            return self._look([sample])
        stretches = merge_by((each for process in told for each in process.samples), _STRETCH)
        return self._look([each for each in stretches if each.at <= sample.at - _PATIENCE])

    def _look(self, samples: list[Sample]) -> list[Alert]:
        news: list[Alert] = []
        for each in samples:
            # after a while alone, what the store has of that time was seen
            if each.at - each.seconds >= self._seen - 1:
                self._seen = each.at
                news.extend(self._alerts.take(each))
        return news

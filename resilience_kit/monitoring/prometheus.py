"""All that the kit counts as Prometheus metrics, read when Prometheus asks. Needs the extra `prometheus`.

A call pays for nothing of it but what the `Sampler` takes of it, for the histograms.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from resilience_kit import stats
from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.measures import BOUNDS, Histogram
from resilience_kit.monitoring.metric_names import (
    CIRCUIT_STATE,
    HISTOGRAMS,
    METRICS,
    Metric,
    names_by_section,
    states,
)
from resilience_kit.monitoring.sampler import Sampler, running_sampler

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(f"{error}: pip install 'resilience-kit[prometheus]'") from error

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def export_to_prometheus(
    registry: CollectorRegistry | None = None, *, sampler: Sampler | None = None
) -> Callable[[], None]:
    """Add the kit's metrics to a registry of prometheus_client, which serves them as it does all others.

    Each process has its own, also where a store makes them one fleet: budgets and quotas of a fleet are the same in
    all, so ask for their `max`. Names of limits, agents, functions and models are the values of labels: those after the
    first 1,000 of a kind are added up as "other", and what is longer than 100 characters is cut.

    Args:
        registry: Default: the one that prometheus_client serves where nobody says otherwise.
        sampler: Whose histograms of waits and answers are shown. Default: `running_sampler()`.

    Returns:
        A function that takes them away again; calling it again does nothing. The sampler goes on.

    Raises:
        ConfigurationError: They are in the registry already.

    Example:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from resilience_kit import rate_limited
        >>> from resilience_kit.monitoring import export_to_prometheus, running_sampler
        >>> registry = CollectorRegistry()
        >>> stop = export_to_prometheus(registry)
        >>> rate_limited("chat", tokens=0)(lambda: "four")()
        'four'
        >>> 'resilience_kit_calls_admitted_total{limit="chat"} 1.0' in generate_latest(registry).decode()
        True
        >>> stop()
        >>> running_sampler().stop()
    """
    into = REGISTRY if registry is None else registry
    collector = _KitCollector(running_sampler if sampler is None else lambda: sampler)
    try:
        into.register(collector)
    except ValueError as error:
        raise ConfigurationError("the kit's metrics are in this registry already") from error
    # from now on, and not from the first scrape
    collector.sampler()
    is_registered = True

    def stop() -> None:
        nonlocal is_registered
        if is_registered:
            is_registered = False
            into.unregister(collector)

    return stop


class _KitCollector(Collector):
    def __init__(self, sampler: Callable[[], Sampler]) -> None:
        self.sampler = sampler
        self._names = names_by_section()

    def describe(self) -> Iterable[Family]:
        """The families without values: what else the registry has must not have their names."""
        yield from map(_family, (*METRICS, CIRCUIT_STATE))
        yield from map(_histogram_family, HISTOGRAMS)

    def collect(self) -> Iterator[Family]:
        """The families with their values of now."""
        shown = stats.get_all_resilience_stats()
        for metric in (*METRICS, CIRCUIT_STATE):
            names, section = self._names[metric.section], shown[metric.section]
            found = states(section, names) if metric is CIRCUIT_STATE else metric.values(section, names)
            family = _family(metric)
            for labels, value in found.items():
                family.add_metric(labels, value)
            yield family
        total = self.sampler().total
        for metric in HISTOGRAMS:
            (source,) = metric.sources
            merged: dict[str, Histogram] = {}
            for name, reading in total.of(metric.section).items():
                label = self._names[metric.section].shown(name)
                merged[label] = merged.get(label, Histogram()).add(reading.histogram(source))
            histograms = _histogram_family(metric)
            for label, histogram in merged.items():
                histograms.add_metric((label,), _buckets(histogram), histogram.total)
            yield histograms


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return family(metric.prometheus, metric.text, labels=metric.labels)


def _histogram_family(metric: Metric) -> HistogramMetricFamily:
    return HistogramMetricFamily(metric.prometheus, metric.text, labels=metric.labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, BOUNDS), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))

"""How it moved: the columns of the charts, from samples of any length."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from resilience_kit.monitoring.measures import Histogram, Reading, Sample, start_of

_MINUTE = 60.0
# What the charts show of each second or stretch; counts are per minute, times in seconds.
COUNTS = ("tokens", "requests", "rate_limited", "retries")
TIMES = {"wait_p50": ("wait", 0.5), "wait_p95": ("wait", 0.95)} | {
    f"answer_p{percent}": ("answer", percent / 100) for percent in (50, 95, 99)
}
COLUMNS = (*COUNTS, "quota_tokens", "quota_requests", *TIMES)


@dataclass(slots=True)
class _Stretch:
    """What lies in one stretch of time."""

    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    histograms: dict[str, Histogram] = field(default_factory=dict)
    quotas: dict[str, tuple[float, float]] = field(default_factory=dict)
    # from when on for how long it was measured: of a step that has just begun, little
    measured: dict[float, float] = field(default_factory=dict)

    def measure(self, sample: Sample, start: float, length: float) -> None:
        """Take in a sample that tells of so much time from `start` on."""
        self.measured[start] = max(self.measured.get(start, 0.0), length)
        for reading in sample.readings:
            self.add(reading)

    def add(self, reading: Reading) -> None:
        if reading.section == "retries":
            self.counts["retries"] += reading.counter("retries")
        elif reading.section == "rate_limiters":
            self.counts["tokens"] += reading.counter("tokens_admitted")
            self.counts["requests"] += reading.counter("calls_admitted")
            self.counts["rate_limited"] += reading.counter("calls_rate_limited")
            for name, histogram in reading.histograms.items():
                self.histograms[name] = self.histograms.get(name, Histogram()).add(histogram)
            period = number(reading, "period") or _MINUTE
            quotas = (number(reading, f"{kind}_per_minute") * _MINUTE / period for kind in ("tokens", "requests"))
            before = self.quotas.get(reading.name, (0.0, 0.0))
            tokens, requests = map(max, before, quotas)
            self.quotas[reading.name] = tokens, requests

    def row(self) -> dict[str, float | None]:
        """The figures of all columns."""
        seconds = sum(self.measured.values())
        row: dict[str, float | None] = {name: self.counts[name] * _MINUTE / seconds for name in COUNTS}
        for position, name in enumerate(("quota_tokens", "quota_requests")):
            row[name] = sum(quota[position] for quota in self.quotas.values()) or None
        for name, (kind, share) in TIMES.items():
            row[name] = self.histograms.get(kind, Histogram()).percentile(share)
        return row


def row_of(samples: Iterable[Sample]) -> dict[str, float | None]:
    """The columns' figures of some seconds together."""
    stretch = _Stretch()
    for sample in samples:
        stretch.measure(sample, start_of(sample, 1.0), 1.0)
    return stretch.row()


def columns(
    samples: Iterable[Sample], *, end: float, seconds: float, step: float, window: float | None = None
) -> dict[str, Any]:
    """The columns of the last so many seconds, one row a step; None where nobody measured.

    Args:
        samples: Of any processes, in any order.
        end: The end of the newest stretch, in seconds since the epoch: a multiple of `step`.
        seconds: How far back to go: a multiple of `step`.
        step: Seconds from row to row.
        window: Of how many seconds before it a row tells. Default: a step.
    """
    overlap = round((window or step) / step)
    stretches: defaultdict[float, _Stretch] = defaultdict(_Stretch)
    for sample in samples:
        start = start_of(sample, step)
        # a stretch that has just begun is not yet as long as a step
        length = min(max(sample.at - start, 1.0), step)
        if sample.seconds > step:
            # one of a minute says the same of each of its steps
            start, length = start_of(sample, sample.seconds), sample.seconds
        steps = round(max(sample.seconds, step) / step) - 1 + overlap
        # of those that are shown: a sample that others wrote may be as long as it likes
        shown = range(max(0, round((end - seconds - start) / step)), min(steps, round((end - start) / step)))
        for later in shown:
            stretches[start + later * step].measure(sample, start, length)
    rows = []
    for number_of_step in range(round(seconds / step)):
        start = end - seconds + number_of_step * step
        row = stretches[start].row() if start in stretches else dict.fromkeys(COLUMNS)
        rows.append((start + step, row))
    return {
        "start": end - seconds,
        "end": end,
        "at": [at for at, _ in rows],
        **{name: [row[name] for _, row in rows] for name in COLUMNS},
    }


def number(reading: Reading, gauge: str) -> float:
    """A gauge as a number; 0 where it is none."""
    value = reading.gauges.get(gauge)
    return value if isinstance(value, (int, float)) else 0.0

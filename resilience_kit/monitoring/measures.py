"""What was measured: counts of one interval by section and name, which add up over time and over processes.

The sections and their counters are those of `get_all_resilience_stats()`. A `Sample` is what one process saw in a
second, or what some saw in a minute or an hour: all are the same kind, and any two can be merged.
"""

import json
import math
import zlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from resilience_kit.errors import ConfigurationError
from resilience_kit.validating import is_number

Gauge = float | str | None

T = TypeVar("T")

# Upper bounds of a histogram's buckets in seconds, four in each power of ten.
BOUNDS: tuple[float, ...] = (
    *(0.001, 0.0018, 0.0032, 0.0056),
    *(0.01, 0.018, 0.032, 0.056),
    *(0.1, 0.18, 0.32, 0.56),
    *(1.0, 1.8, 3.2, 5.6),
    *(10.0, 18.0, 32.0, 56.0),
    *(100.0, 180.0, 320.0, 560.0),
    1000.0,
)

# Of these each process has its own; of all other numbers one says what counts for all, as of a fleet's quota.
_SUMMED = frozenset({"in_flight", "waiting", "trials_in_flight", "calls_in_window", "retries_in_window"})
# The worst one last.
_STATES = ("CLOSED", "HALF_OPEN", "OPEN")
_NOTHING = (0,) * (len(BOUNDS) + 1)
# The buckets as JSON names them.
_NUMBERS = {str(number): number for number in range(len(_NOTHING))}

# What a sample from elsewhere may have at most: it may be anything.
_MOST_READINGS = 10_000
_MOST_VALUES = 100
_LONGEST_NAME = 1_000
_LATEST = 1e11
# Sums of larger ones, and what is computed with them, might be more than a number can be.
_LARGEST = 1e100
# A sample of ten thousand readings is smaller.
MOST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often something took how long.

    Attributes:
        counts: How often it took at most so long, by `BOUNDS`, and more than the last bound; each is counted once.
        total: Seconds of all together.

    Example:
        >>> from resilience_kit.monitoring.measures import Histogram
        >>> Histogram.of([0.2, 0.2, 3]).percentile(0.95) > 1.8
        True
    """

    counts: tuple[int, ...] = _NOTHING
    total: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Histogram":
        """Count each of some times."""
        counts, total = list(_NOTHING), 0.0
        for each in seconds:
            counts[bisect_left(BOUNDS, each)] += 1
            total += each
        return cls(tuple(counts), total)

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Their mean in seconds; None if there are none."""
        count = self.count
        return self.total / count if count else None

    def add(self, other: "Histogram") -> "Histogram":
        """Both together."""
        counts = tuple(map(int.__add__, self.counts, other.counts))
        return Histogram(counts, self.total + other.total)

    def percentile(self, share: float) -> float | None:
        """The seconds that this share of them did not exceed, as near as the buckets say; None if there are none.

        Less than a millisecond is 0: most calls do not wait at all.

        Args:
            share: From 0 to 1: 0.95 for the 95th percentile.
        """
        total = self.count
        if not total:
            return None
        wanted, before = share * total, 0
        for number, count in enumerate(self.counts):
            if count and before + count >= wanted:
                if number in (0, len(BOUNDS)):
                    return BOUNDS[-1] if number else 0.0
                low, high = BOUNDS[number - 1 : number + 1]
                return low + (high - low) * (wanted - before) / count
            before += count
        return BOUNDS[-1]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured of one name in an interval.

    Attributes:
        section: As in `get_all_resilience_stats()`, such as "rate_limiters".
        name: The limit, circuit, function, budget, agent or model.
        counters: By how much each rose in the interval; one that is left out did not.
        gauges: Where it stood at the interval's end.
        histograms: "wait" and "answer" of rate limiters: seconds until calls were admitted, and from there to their
            answer's end.
    """

    section: str
    name: str
    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, Gauge] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def counter(self, name: str) -> float:
        """By how much a counter rose."""
        return self.counters.get(name, 0)

    def histogram(self, name: str) -> Histogram:
        """A histogram; an empty one where nothing was counted."""
        return self.histograms.get(name, Histogram())

    def merge(self, other: "Reading") -> "Reading":
        """Both together, where `other` is a later one of the same process."""
        return self._with(other, {**self.gauges, **other.gauges})

    def beside(self, other: "Reading") -> "Reading":
        """Both together, where `other` is another process's."""
        return self._with(other, _merged(self.gauges, other.gauges, _of_both))

    def _with(self, other: "Reading", gauges: Mapping[str, Gauge]) -> "Reading":
        counters = _merged(self.counters, other.counters, lambda _, one, two: one + two)
        histograms = _merged(self.histograms, other.histograms, lambda _, one, two: one.add(two))
        return Reading(self.section, self.name, counters, gauges, histograms)


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured in one interval.

    Attributes:
        at: Its end, in seconds since the epoch.
        seconds: Its length.
        process: Whose it is; "" where some were added up.
        readings: One of each section and name.
    """

    at: float
    seconds: float
    process: str
    readings: tuple[Reading, ...] = ()

    def of(self, section: str) -> dict[str, Reading]:
        """All readings of a section, by name."""
        return {reading.name: reading for reading in self.readings if reading.section == section}

    def reading(self, section: str, name: str) -> Reading | None:
        """The reading of a name; None if there is none."""
        found = (it for it in self.readings if it.section == section and it.name == name)
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """The sample in plain JSON, without what is 0."""
        return {
            "at": self.at,
            "seconds": self.seconds,
            "process": self.process,
            "readings": [_reading_to_dict(reading) for reading in self.readings],
        }

    def to_json(self) -> str:
        """The sample as a JSON text."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, value: Any) -> "Sample":
        """Read what `to_dict` made.

        Raises:
            ConfigurationError: It is something else; what it holds is not told.
        """
        match value:
            case {"at": at, "seconds": seconds, "process": str(process), "readings": list(readings)}:
                is_time = _is_amount(at) and _is_amount(seconds) and max(at, seconds) <= _LATEST
                if is_time and _is_name(process) and len(readings) <= _MOST_READINGS:
                    return cls(float(at), float(seconds), process, tuple(map(_reading_from_dict, readings)))
        raise _not_ours("sample")

    @classmethod
    def from_json(cls, text: str | bytes) -> "Sample":
        """Read what `to_json` made.

        Raises:
            ConfigurationError: It is something else; what it holds is not told.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        return cls.from_dict(value)


def packed(sample: Sample) -> bytes:
    """A sample in few bytes, to be kept or sent."""
    return zlib.compress(sample.to_json().encode(), 1)


def unpacked(data: Any) -> Sample:
    """The sample that was packed.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        # of a number, bytes() would make so many zeros
        text = b"" if isinstance(data, int) else zlib.decompressobj().decompress(bytes(data), MOST_BYTES)
    except (zlib.error, TypeError, ValueError):
        text = b""
    return Sample.from_json(text)


def merge(samples: Iterable[Sample]) -> Sample:
    """Add up samples: of one process over time, and then over processes.

    Counters and histograms are sums. Gauges are the latest of each process; over processes, calls under way,
    waiting or counted for a retry budget are summed, a circuit is in the worst of its states, and of other numbers the
    largest counts.

    Args:
        samples: In any order; at least one.

    Returns:
        A sample from the start of the first to the end of the last. Its process is "" if they are of several.

    Raises:
        ConfigurationError: There are none.

    Example:
        >>> from resilience_kit.monitoring.measures import Reading, Sample, merge
        >>> seconds = [Sample(at, 1, "one", (Reading("models", "gpt-4o", {"calls": 2}),)) for at in (1, 2)]
        >>> merge(seconds).reading("models", "gpt-4o").counter("calls")
        4
    """
    by_process: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.process].append(sample)
    if not by_process:
        raise ConfigurationError("merge() needs at least one sample")
    if len(by_process) == 1:
        ((process, own),) = by_process.items()
        own.sort(key=lambda sample: sample.at)
        return _joined(process, own, Reading.merge)
    return _joined("", [merge(own) for own in by_process.values()], Reading.beside)


def merge_by(samples: Iterable[Sample], seconds: float) -> list[Sample]:
    """Add up samples by the stretch of time in which the middle of each lies, the earliest stretch first.

    Args:
        samples: In any order, of any processes.
        seconds: The length of a stretch; they begin at whole multiples of it since the epoch.

    Returns:
        One sample for each stretch in which there are any, from the start of its first to the end of its last.

    Example:
        >>> from resilience_kit.monitoring.measures import Sample, merge_by
        >>> [(it.at, it.seconds) for it in merge_by([Sample(at, 1, "one") for at in (59, 60, 61)], 60)]
        [(60, 2), (61, 1)]
    """
    by_start: defaultdict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_start[start_of(sample, seconds)].append(sample)
    return [merge(own) for _, own in sorted(by_start.items())]


def start_of(sample: Sample, seconds: float) -> float:
    """When the stretch of time began in which a sample's middle lies, in seconds since the epoch."""
    return math.floor((sample.at - sample.seconds / 2) / seconds) * float(seconds)


def _joined(process: str, samples: list[Sample], join: Callable[[Reading, Reading], Reading]) -> Sample:
    readings: dict[tuple[str, str], Reading] = {}
    for sample in samples:
        for reading in sample.readings:
            key = reading.section, reading.name
            before = readings.get(key)
            readings[key] = reading if before is None else join(before, reading)
    start = min(sample.at - sample.seconds for sample in samples)
    at = max(sample.at for sample in samples)
    return Sample(at, at - start, process, tuple(readings.values()))


def _merged(one: Mapping[str, T], two: Mapping[str, T], join: Callable[[str, T, T], T]) -> dict[str, T]:
    merged = dict(one)
    for key, value in two.items():
        merged[key] = join(key, merged[key], value) if key in merged else value
    return merged


def _of_both(name: str, one: Gauge, two: Gauge) -> Gauge:
    """A gauge of two processes."""
    if isinstance(one, str) or isinstance(two, str):
        states = [it for it in (one, two) if isinstance(it, str)]
        return max(states, key=lambda state: _STATES.index(state) if state in _STATES else -1)
    if one is None or two is None:
        return two if one is None else one
    return one + two if name in _SUMMED else max(one, two)


def _reading_to_dict(reading: Reading) -> dict[str, Any]:
    value: dict[str, Any] = {"section": reading.section, "name": reading.name}
    if reading.counters:
        value["counters"] = dict(reading.counters)
    if reading.gauges:
        value["gauges"] = dict(reading.gauges)
    if reading.histograms:
        value["histograms"] = {
            name: {
                "counts": {str(number): count for number, count in enumerate(it.counts) if count},
                "total": it.total,
            }
            for name, it in reading.histograms.items()
        }
    return value


def _reading_from_dict(value: Any) -> Reading:
    if not isinstance(value, dict) or not _is_name(value.get("section")) or not _is_name(value.get("name")):
        raise _not_ours("reading")
    return Reading(
        value["section"],
        value["name"],
        _checked(value.get("counters", {}), _amount),
        _checked(value.get("gauges", {}), _gauge),
        _checked(value.get("histograms", {}), _histogram),
    )


def _checked(values: Any, check: Callable[[Any], T]) -> dict[str, T]:
    if not isinstance(values, dict) or len(values) > _MOST_VALUES or not all(map(_is_name, values)):
        raise _not_ours("reading")
    return {name: check(value) for name, value in values.items()}


def _amount(value: Any) -> float:
    if not _is_amount(value):
        raise _not_ours("counter")
    return value  # type: ignore[no-any-return]  # _is_amount() has seen that it is a number


def _gauge(value: Any) -> Gauge:
    if value is None or _is_name(value) or (is_number(value) and abs(value) <= _LARGEST):
        return value  # type: ignore[no-any-return]  # one of a gauge's types, as was just seen
    raise _not_ours("gauge")


def _histogram(value: Any) -> Histogram:
    match value:
        case {"counts": dict(by_number), "total": total} if _is_amount(total) and len(by_number) <= len(_NOTHING):
            counts = list(_NOTHING)
            for number, count in by_number.items():
                if number not in _NUMBERS or not _is_amount(count) or count != int(count):
                    raise _not_ours("histogram")
                counts[_NUMBERS[number]] = int(count)
            return Histogram(tuple(counts), float(total))
    raise _not_ours("histogram")


def _is_amount(value: Any) -> bool:
    return is_number(value) and 0 <= value <= _LARGEST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _not_ours(kind: str) -> ConfigurationError:
    # as little as can be said: what is there may be anything
    return ConfigurationError(f"this is no {kind} of the kit's")

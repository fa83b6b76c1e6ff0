"""Where the page's figures come from: this process, a fleet by way of its store, or a history that others write."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from resilience_kit.errors import ConfigurationError, StoreUnavailableError
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.measures import Reading, Sample, merge
from resilience_kit.stats import COUNTERS, get_all_resilience_stats

if TYPE_CHECKING:
    from resilience_kit.monitoring.fleet_samples import FleetSamples, ProcessSamples
    from resilience_kit.monitoring.history import History
    from resilience_kit.monitoring.sampler import Sampler

_MINUTE = 60
_HOUR = 3_600
_DAY = 86_400
# A process that has told nothing for so many seconds does not run.
_GONE = 10.0
# What is asked of a store or a history holds for so many seconds: several figures are made of it.
_FRESH = 0.5


class Source(Protocol):
    """Some processes' figures."""

    def footer(self) -> str:
        """Whose figures these are."""
        ...

    def notes(self) -> list[str]:
        """What is missing in them, and why."""
        ...

    def processes(self) -> list[str]:
        """Who there is to choose from; one or none where there is nothing to choose."""
        ...

    def standing(self, process: str | None) -> Sample:
        """Where all stands now, of one process or of all; its counters are those that the page lists."""
        ...

    def recent(self, seconds: float, process: str | None) -> Sequence[Sample]:
        """Samples of single seconds of the last while, an hour at most."""
        ...


class OwnProcess:
    """This process's figures.

    Args:
        sampler: Gives the sampler; asked each time, since that of a forked child has to be started anew.
    """

    def __init__(self, sampler: "Callable[[], Sampler]") -> None:
        self._sampler = sampler

    def footer(self) -> str:
        """This process."""
        return f"Process {self._sampler().process}; counts since it started."

    def notes(self) -> list[str]:
        """Nothing is missing."""
        return []

    def processes(self) -> list[str]:
        """This process is all there is."""
        return []

    def standing(self, process: str | None) -> Sample:
        """The statistics, with the counts since the process started."""
        return sample_of(get_all_resilience_stats())

    def recent(self, seconds: float, process: str | None) -> Sequence[Sample]:
        """What is in memory."""
        return self._sampler().samples(seconds)


class FleetProcesses:
    """The figures of all processes that tell a store of theirs.

    The store keeps a minute; what is older is kept here, as far as somebody looked.

    Args:
        fleet: What reads the store.
    """

    def __init__(self, fleet: "FleetSamples") -> None:
        self._fleet = fleet
        self._lock = new_lock()
        self._read_at = -_FRESH
        self._told: Sequence[ProcessSamples] = ()
        self._kept = _Kept()
        self._problem: str | None = None

    def footer(self) -> str:
        """How many there are."""
        count = len(self._read())
        return f"{count} {'process' if count == 1 else 'processes'}; counts since each started."

    def notes(self) -> list[str]:
        """Whether the store answers."""
        self._read()
        return [] if self._problem is None else [self._problem]

    def processes(self) -> list[str]:
        """All that live, by name."""
        return [it.process for it in self._read()]

    def standing(self, process: str | None) -> Sample:
        """What each has counted since it began to tell."""
        return _merged(it.total for it in self._read() if process in (None, it.process))

    def recent(self, seconds: float, process: str | None) -> Sequence[Sample]:
        """What the store has, and what was seen in it before."""
        self._read()
        with self._lock:
            return self._kept.recent(seconds, process)

    def _read(self) -> "Sequence[ProcessSamples]":
        with self._lock:
            if time.monotonic() < self._read_at + _FRESH:
                return self._told
            try:
                self._told, self._problem = self._fleet.read(), None
            except StoreUnavailableError:
                self._told = ()
                self._problem = "The store does not answer: nothing is known of the processes at the moment."
            except ConfigurationError as error:
                self._told, self._problem = (), str(error)
            self._read_at = time.monotonic()
            self._kept.add(sample for told in self._told for sample in told.samples)
            return self._told


class RecordedProcesses:
    """What processes have written into a history, of which none is this one.

    Args:
        history: Where they write.
    """

    def __init__(self, history: "History") -> None:
        self._history = history
        self._lock = new_lock()
        self._read_at = -math.inf
        self._kept = _Kept()
        self._problem: str | None = None

    def footer(self) -> str:
        """Where the figures come from."""
        return f"From the history at {self._history.place}; counts of the last 24 hours."

    def notes(self) -> list[str]:
        """Whether the history can be read, and whether somebody writes it."""
        last = self._newest()
        if self._problem is not None:
            return [self._problem]
        return [] if last else ["No process writes this history at the moment: what it tells is over."]

    def processes(self) -> list[str]:
        """All that write now, by name."""
        return sorted({sample.process for sample in self._newest()})

    def standing(self, process: str | None) -> Sample:
        """What was counted in a day, and where all stood last."""
        last = _merged(sample for sample in self._newest() if process in (None, sample.process))
        now = {(it.section, it.name): it for it in last.readings}
        day = _merged(self._chosen(_DAY, process, resolution=_HOUR))
        counted = {(it.section, it.name): it for it in day.readings}
        readings = []
        for key in {**counted, **now}:
            section, name = key
            stands, has = now.get(key), counted.get(key)
            # of what no process has any more, nothing stands anywhere
            if stands is not None or section not in ("rate_limiters", "circuit_breakers"):
                gauges = {} if stands is None else stands.gauges
                readings.append(Reading(section, name, {} if has is None else has.counters, gauges))
        return replace(last, readings=tuple(readings))

    def recent(self, seconds: float, process: str | None) -> Sequence[Sample]:
        """The seconds that are kept."""
        self._newest()
        with self._lock:
            return self._kept.recent(seconds, process)

    def _chosen(self, seconds: float, process: str | None, *, resolution: int) -> list[Sample]:
        try:
            samples = self._history.read(time.time() - seconds, resolution=resolution)
        except ConfigurationError as error:
            self._problem = str(error)
            return []
        self._problem = None
        return [sample for sample in samples if process in (None, sample.process)]

    def _newest(self) -> Sequence[Sample]:
        """The last sample of each process that runs."""
        with self._lock:
            current = time.monotonic()
            if current >= self._read_at + _FRESH:
                # a minute more than since the last time, for those that write late
                self._kept.add(self._chosen(min(current - self._read_at + _MINUTE, _HOUR), None, resolution=1))
                self._read_at = current
            return [*{sample.process: sample for sample in self._kept.recent(_GONE, None)}.values()]


class _Kept:
    """The samples of an hour, of some processes."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[float, Sample]] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Take in samples, of which some may be known."""
        for sample in samples:
            self._samples.setdefault(sample.process, {})[sample.at] = sample
        oldest = time.time() - _HOUR
        for name, kept in [*self._samples.items()]:
            # in the order of time
            while kept and (first := next(iter(kept))) < oldest:
                del kept[first]
            if not kept:
                del self._samples[name]

    def recent(self, seconds: float, process: str | None) -> list[Sample]:
        """Those of the last while, of one process or of all."""
        after = time.time() - seconds
        chosen = (kept for name, kept in self._samples.items() if process in (None, name))
        return [sample for kept in chosen for at, sample in kept.items() if at > after]


def sample_of(stats: dict[str, Any]) -> Sample:
    """All statistics as one sample: counters since the start, and where all stands."""
    readings = [
        Reading(
            section,
            name,
            {key: value for key, value in values.items() if key in COUNTERS[section]},
            {key: value for key, value in values.items() if key not in COUNTERS[section]},
        )
        for section in COUNTERS
        for name, values in stats.get(section, {}).items()
    ]
    return Sample(time.time(), 0.0, str(os.getpid()), tuple(readings))


def _merged(samples: Iterable[Sample]) -> Sample:
    """All together; an empty sample where there is none."""
    found = [*samples]
    return merge(found) if found else Sample(time.time(), 0.0, "")

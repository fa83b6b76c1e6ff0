"""A sample each second of all that the kit counts, taken in a thread of its own, kept for an hour and handed on.

A call pays for no more than being told of: how long its answer took is put into a queue, and the thread counts it.
All else is read from `get_all_resilience_stats()`.
"""

import asyncio
import atexit
import logging
import os
import socket
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from resilience_kit import events, stats
from resilience_kit.events import Admitted, Answered, Event
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.measures import Histogram, Reading, Sample, merge, start_of
from resilience_kit.monitoring.sinks import Sink, SinkThread

_SECOND = 1.0
# Where the last sample was so late, there is none for what is left of its second.
_SHORTEST = 0.1
_MINUTE = 60.0
_KEPT = 3_600.0
# Of seconds, no more than so many readings that are not those of the second before: some 30 MB.
_MOST_READINGS = 50_000
# More calls than a process can make in two seconds: only a thread that was held up for longer loses the oldest.
_MOST_QUEUED = 200_000
# Of each section, as many as the kit counts of agents by their names.
_MOST_NAMES = 1_000
_LONGEST_NAME = 200
# How long stop() waits for the last sample.
_PATIENCE = 5.0

_log = logging.getLogger("resilience_kit.monitoring")

_Key = tuple[str, str]


class Sampler:
    """Takes a `Sample` at each full second, with what happened since the one before.

    It counts nothing before it is started. In a forked child it is stopped, with all that it knew forgotten.

    Args:
        sinks: Functions that take each sample, each in a thread of its own. One that raises is warned of once; one
            that is slow misses samples once 60 wait for it.
        process: The name of this process among others. Default: that of the host and the number of the process.
        clock: Seconds since the epoch.

    Example:
        >>> from resilience_kit import rate_limited
        >>> from resilience_kit.monitoring.sampler import Sampler
        >>> with Sampler() as sampler:
        ...     rate_limited("chat", tokens=10)(lambda: "four")()
        'four'
        >>> sampler.total.reading("rate_limiters", "chat").counter("tokens_admitted")
        10
    """

    def __init__(
        self, sinks: Iterable[Sink] = (), *, process: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._own_name = process
        self._clock = clock
        self._sinks = [SinkThread(sink) for sink in sinks]
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        """Begin as one that was never started; in a forked child, whoever held the lock is not there."""
        self.process = self._own_name or f"{socket.gethostname()}-{os.getpid()}"
        self._lock = threading.Lock()
        # who takes a sample; it may wait for the lock, and not the other way round
        self._taking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._unsubscribe: Callable[[], None] | None = None
        self._waits: deque[tuple[str, float]] = deque(maxlen=_MOST_QUEUED)
        self._answers: deque[tuple[str, float]] = deque(maxlen=_MOST_QUEUED)
        # what was taken from the queues for the next sample, by name
        self._waited: defaultdict[str, list[float]] = defaultdict(list)
        self._answered: defaultdict[str, list[float]] = defaultdict(list)
        self._before: dict[_Key, dict[str, Any]] = {}
        self._taken_at = 0.0
        self._readings: dict[_Key, Reading] = {}
        # each with how many of its readings are new
        self._seconds: deque[tuple[Sample, int]] = deque()
        self._new_readings = 0
        self._minutes: deque[Sample] = deque()
        self._total = Sample(0.0, 0.0, self.process)
        self._has_warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Sampler {'running' if self.is_running else 'stopped'} process={self.process!r}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether it takes samples."""
        return self._thread is not None

    @property
    def latest(self) -> Sample | None:
        """The last sample; None before the first."""
        with self._lock:
            return self._seconds[-1][0] if self._seconds else None

    @property
    def total(self) -> Sample:
        """All since it was first started, as one sample."""
        with self._lock:
            return self._total

    def samples(self, seconds: float = _KEPT, *, resolution: float = _SECOND) -> list[Sample]:
        """The samples of the last while, the oldest first.

        Args:
            seconds: How far back, an hour at most. Where much happens, those of single seconds do not reach so far.
            resolution: 1 for those of seconds, 60 for those of minutes, of which the last one is not over yet.
        """
        after = self._clock() - seconds
        with self._lock:
            kept = [*self._minutes] if resolution >= _MINUTE else [sample for sample, _ in self._seconds]
        return [sample for sample in kept if sample.at > after]

    def add_sink(self, sink: Sink) -> Callable[[], None]:
        """Have a function take each sample from now on.

        Args:
            sink: The function. It gets a thread of its own, so it may block.

        Returns:
            What ends that.
        """
        added = SinkThread(sink)
        with self._lock:
            self._sinks = [*self._sinks, added]
            if self.is_running:
                added.start()

        def remove() -> None:
            with self._lock:
                self._sinks = [it for it in self._sinks if it is not added]
            added.end()

        return remove

    def start(self) -> None:
        """Begin to take samples, if that is not so yet."""
        with self._lock:
            if self._thread is not None:
                return
            self._before, self._taken_at = _counters_of(stats.get_all_resilience_stats()), time.monotonic()
            self._unsubscribe = events.subscribe(self._hear, tally=self._tally, times_answers=True)
            self._end = threading.Event()
            for sink in self._sinks:
                sink.start()
            self._thread = threading.Thread(
                target=self._run, args=(self._end,), name="resilience-kit-sampler", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Take a last sample, hand it on, and end the threads; in an event loop, without waiting for that."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._end.set()
            if self._unsubscribe is not None:
                self._unsubscribe()
        if asyncio._get_running_loop() is None:  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
            _wait_for([thread, *(sink.thread for sink in self._sinks)])

    def _leave_parent(self) -> None:
        """Stop in a forked child: its parent's threads are not there."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        for sink in self._sinks:
            sink.forget()
        self._forget()

    # What a call pays for

    def _tally(self, kind: type[Event], name: str, values: tuple[Any, ...]) -> None:
        if kind is Answered:
            self._answers.append((name, values[0]))
        elif kind is Admitted and values[0]:
            self._waits.append((name, values[0]))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Admitted) and event.waited:
            self._waits.append((event.name, event.waited))

    # Its thread

    def _run(self, end: threading.Event) -> None:
        while not end.wait(self._seconds_to_next()):
            self._take()
        self._take()
        with self._lock:
            # else it was started again meanwhile
            if self._thread is None:
                for sink in self._sinks:
                    sink.end()

    def _seconds_to_next(self) -> float:
        left = _SECOND - self._clock() % _SECOND
        return left if left > _SHORTEST else left + _SECOND

    def _take(self) -> None:
        with self._taking:
            self._take_one()

    def _take_one(self) -> None:
        # before the statistics are read, so that they have all names of these
        _move(self._waits, self._waited)
        _move(self._answers, self._answered)
        try:
            shown, monotonic = stats.get_all_resilience_stats(), time.monotonic()
            readings, new = self._read(shown)
            sample = Sample(self._clock(), monotonic - self._taken_at, self.process, readings)
        except Exception as error:  # noqa: BLE001 - the thread lives as long as the program, whatever fails once
            self._warn_once(f"a sample failed with {type(error).__name__}, and the next one holds its counts")
            return
        self._taken_at = monotonic
        self._keep(sample, new)
        for sink in self._sinks:
            sink.give(sample)

    def _read(self, shown: dict[str, Any]) -> tuple[tuple[Reading, ...], int]:
        """All readings, and how many of them are not those of the second before."""
        now = _counters_of(shown)
        readings: dict[_Key, Reading] = {}
        for (section, name), counters in now.items():
            before = self._before.get((section, name), {})
            # what went back to zero has risen from there
            rises = {key: it - before.get(key, 0) if it >= before.get(key, 0) else it for key, it in counters.items()}
            gauges = {key: it for key, it in shown[section][name].items() if key not in counters}
            histograms: dict[str, Histogram] = {}
            if section == "rate_limiters":
                delayed = Histogram.of(self._waited.get(name, ()))
                at_once = max(0, round(rises["calls_admitted"] - rises["calls_delayed"]))
                waited = delayed.add(Histogram((at_once, *Histogram().counts[1:])))
                histograms = {"wait": waited, "answer": Histogram.of(self._answered.get(name, ()))}
            reading = Reading(
                section,
                name[:_LONGEST_NAME],
                {key: rise for key, rise in rises.items() if rise},
                gauges,
                {key: histogram for key, histogram in histograms.items() if histogram.count},
            )
            self._add(readings, reading)
        self._before = now
        self._waited.clear()
        self._answered.clear()
        new = sum(self._readings.get(key) is not reading for key, reading in readings.items())
        self._readings = readings
        return tuple(readings.values()), new

    def _add(self, readings: dict[_Key, Reading], reading: Reading) -> None:
        key = reading.section, reading.name
        if key in readings:
            reading = readings[key].beside(reading)
        before = self._readings.get(key)
        # most of a quiet program's readings are those of the second before: they are kept once
        readings[key] = before if before is not None and before == reading else reading

    def _keep(self, sample: Sample, new: int) -> None:
        with self._lock:
            self._seconds.append((sample, new))
            self._new_readings += new
            while self._seconds[0][0].at <= sample.at - _KEPT or self._new_readings > max(new, _MOST_READINGS):
                self._new_readings -= self._seconds.popleft()[1]
            is_open = self._minutes and start_of(self._minutes[-1], _MINUTE) == start_of(sample, _MINUTE)
            self._minutes.append(merge([self._minutes.pop(), sample]) if is_open else sample)
            while self._minutes[0].at <= sample.at - _KEPT:
                self._minutes.popleft()
            self._total = merge([self._total, sample]) if self._total.at else sample

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned:
            self._has_warned.add(text)
            _log.warning("%s", text)


def running_sampler() -> Sampler:
    """The sampler that all of a process may share, started now if it does not run.

    Example:
        >>> from resilience_kit.monitoring.sampler import running_sampler
        >>> running_sampler() is running_sampler()
        True
        >>> running_sampler().stop()
    """
    global _shared  # noqa: PLW0603 - the one that is shared, made when it is first asked for
    with _shared_lock:
        if _shared is None:
            _shared = Sampler()
        _shared.start()
        return _shared


def _counters_of(shown: dict[str, Any]) -> dict[_Key, dict[str, Any]]:
    """The counters alone, of the first names of each section."""
    return {
        (section, name): {key: counters[key] for key in known if key in counters}
        for section, known in stats.COUNTERS.items()
        for name, counters in [*shown[section].items()][:_MOST_NAMES]
    }


def _move(queue: deque[tuple[str, float]], by_name: defaultdict[str, list[float]]) -> None:
    """Take what is in a queue now; others may append meanwhile."""
    for _ in range(len(queue)):
        name, seconds = queue.popleft()
        by_name[name].append(seconds)


def _wait_for(threads: Iterable[threading.Thread | None]) -> None:
    until = time.monotonic() + _PATIENCE
    for thread in threads:
        # a sink may stop the sampler
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


_all: "weakref.WeakSet[Sampler]" = weakref.WeakSet()
_shared: Sampler | None = None
_shared_lock = new_lock()


def _stop_in_child() -> None:
    for sampler in [*_all]:
        sampler._leave_parent()  # noqa: SLF001 - its own class


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stop_in_child)


@atexit.register
def _stop_all() -> None:
    for sampler in [*_all]:
        sampler.stop()

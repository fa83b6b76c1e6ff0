"""What was measured, kept on disk: seconds for an hour, minutes for a week, hours for a year.

Each sample that is added goes into the rows of its second, its minute and its hour, which are all written at once, at
most a second later: there is nothing to catch up with after a crash, and nothing to tidy up but what is too old.
"""

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from resilience_kit.errors import ConfigurationError
from resilience_kit.monitoring.history_tables import KEPT, Key, SqlAlchemyTable, SqliteTable, Table
from resilience_kit.monitoring.measures import Sample, merge, start_of, unpacked
from resilience_kit.monitoring.visible_text import visible

DEFAULT_PLACE = "resilience-history.sqlite3"

_SECOND = 1.0
_MINUTE, _HOUR = 60, 3_600
# Rows that wait while the place cannot be written to: ten minutes of seconds.
_MOST_UNWRITTEN = 600
# Of the rows that a sample may still be added to, three of each process.
_MOST_OPEN = 3_000
_LONGEST_PROCESS = 200
# How long close() waits for the last rows.
_PATIENCE = 5.0

_log = logging.getLogger("resilience_kit.monitoring")


class History:
    """Samples on disk, written by one thread of this process and read by any.

    Some processes may write to one place, each under its own name. A place that cannot be written to is warned of
    once; what waits for it is bounded, and single seconds are forgotten first.

    Args:
        place: A file of SQLite, which is made when it is first needed, or a URL of SQLAlchemy's (extra `history`), such
            as "postgresql+psycopg://user:password@host/name", in which a table `resilience_samples` is made.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: SQLAlchemy cannot use the URL.
        ImportError: There is a URL, and SQLAlchemy or the database's driver is not installed.

    Example:
        >>> from resilience_kit.monitoring.history import History
        >>> from resilience_kit.monitoring.sampler import Sampler
        >>> with History("history.sqlite3") as history, Sampler([history.add]):
        ...     pass  # your program
    """

    def __init__(
        self, place: str | os.PathLike[str] = DEFAULT_PLACE, *, clock: Callable[[], float] = time.time
    ) -> None:
        is_url = isinstance(place, str) and "://" in place
        self._table: Table = SqlAlchemyTable(str(place)) if is_url else SqliteTable(place)
        self._clock = clock
        # as often as the thread writes
        self._interval = _SECOND
        self._has_warned: set[str] = set()
        self._has_samples = False
        self._start_anew()
        _all.add(self)

    def _start_anew(self) -> None:
        self._thread: threading.Thread | None = None
        self._has_news = threading.Condition()
        self._writing = threading.Lock()
        self._has_ended = False
        self._open: dict[tuple[int, str], tuple[Key, Sample]] = {}
        self._added: list[Sample] = []
        self._untaken: deque[Sample] = deque(maxlen=_MOST_UNWRITTEN)
        self._unwritten: dict[Key, Sample] = {}
        self._is_failing = False
        self._pruned_at = -float(_MINUTE)

    def __repr__(self) -> str:
        return f"<History {self.place!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def place(self) -> str:
        """The file or the URL, without its password."""
        return self._table.place

    def add(self, sample: Sample) -> None:
        """Have a sample written within a second; returns at once. It may be given to a `Sampler` as a sink.

        Args:
            sample: What was measured.
        """
        with self._has_news:
            self._has_ended, self._has_samples = False, True
            self._added.append(sample)
            # merged by the thread, unless it is held up: then what was added last is what is known best
            del self._added[:-_MOST_UNWRITTEN]
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="resilience-kit-history", daemon=True)
                self._thread.start()
            self._has_news.notify()

    def read(self, start: float, end: float | None = None, *, resolution: int = 1) -> list[Sample]:
        """The samples of a stretch of time, of each process, the oldest first; `merge_by` adds processes up.

        It blocks while it reads: in an event loop, call it by `asyncio.to_thread`.

        Args:
            start: Seconds since the epoch.
            end: Likewise; those that begin at it or later are left out. Default: up to now.
            resolution: 1 for seconds, of which there is an hour; 60 for minutes, of a week; 3600 for hours, of a year.
                The last one is not over yet.

        Raises:
            ConfigurationError: There is no such resolution, or nothing that can be read at the place.

        Example:
            >>> from resilience_kit.monitoring.history import History
            >>> from resilience_kit.monitoring.measures import Sample
            >>> with History("read.sqlite3", clock=lambda: 61) as history:
            ...     history.add(Sample(at=60, seconds=1, process="one"))
            >>> [sample.at for sample in history.read(0, 100)]
            [60.0]
        """
        if resolution not in KEPT:
            raise ConfigurationError(f"read(resolution={resolution!r}): expected 1, 60 or 3600 seconds")
        problem = None
        try:
            rows = self._table.read(resolution, start, self._clock() + 1 if end is None else end)
        except self._table.errors as error:
            if isinstance(error, FileNotFoundError) and self._has_samples:
                # the first are on their way
                return []
            problem = _told(error)
        if problem is not None:
            # a database's error may quote its URL
            raise ConfigurationError(f"there is no history to read at {self.place!r}: {problem}")
        samples = []
        for data in rows:
            try:
                samples.append(unpacked(data))
            except ConfigurationError:
                self._warn_once(f"the history at {self.place!r} holds rows that are not the kit's, which were left out")
        return samples

    def total(self, start: float, end: float | None = None) -> Sample | None:
        """All of a stretch of time added up, by whole hours, and by minutes where it begins or ends within one.

        Where there are no minutes any more, an hour counts if its middle lies in the stretch. It blocks as `read` does.

        Args:
            start: Seconds since the epoch.
            end: Likewise. Default: up to now.

        Returns:
            A sample of all processes; None if there is nothing.

        Raises:
            ConfigurationError: There is nothing that can be read at the place.
        """
        until = self._clock() if end is None else end
        found: list[Sample] = []
        broken = {start // _HOUR * _HOUR} if start % _HOUR else set[float]()
        if end is not None:
            broken.add(end // _HOUR * _HOUR)
        hours = self.read(start // _HOUR * _HOUR, until, resolution=_HOUR)
        found.extend(sample for sample in hours if start_of(sample, _HOUR) not in broken)
        for hour in broken:
            minutes = self.read(hour, hour + _HOUR, resolution=_MINUTE)
            if minutes:
                found.extend(it for it in minutes if start <= start_of(it, _MINUTE) < until)
            elif start <= hour + _HOUR / 2 < until:
                found.extend(self.read(hour, hour + _HOUR, resolution=_HOUR))
        return merge(found) if found else None

    def close(self) -> None:
        """Write what is unwritten, and end the thread; in an event loop, without waiting for that.

        A sample that is added later begins anew.
        """
        with self._has_news:
            self._has_ended = True
            self._has_news.notify()
            thread = self._thread
        if thread is not None and asyncio._get_running_loop() is None:  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
            thread.join(_PATIENCE)

    # The writer

    def _write_all(self) -> None:
        written_at = -self._interval
        while True:
            with self._has_news:
                while not self._has_ended:
                    left = written_at + self._interval - time.monotonic()
                    has_work = self._added or self._is_failing
                    if has_work and left <= 0:
                        break
                    self._has_news.wait(left if has_work else None)
                samples, self._added = self._added, []
                has_ended = self._has_ended
            if samples or self._is_failing:
                with self._writing:
                    self._write(samples)
                written_at = time.monotonic()
            if has_ended:
                with self._has_news:
                    if not self._added:
                        self._thread = None
                        self._table.close()
                        return

    def _write(self, samples: list[Sample]) -> None:
        self._untaken.extend(samples)
        try:
            while self._untaken:
                self._take(self._untaken[0])
                self._untaken.popleft()
            if self._unwritten:
                self._table.write(self._unwritten)
                self._unwritten.clear()
            self._prune()
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread must live to write again
            self._is_failing = True
            self._table.close()
            self._warn_once(
                f"the history at {self.place!r} cannot be written: {_told(error)}; the last ten minutes are kept until "
                "it can"
            )
            self._forget_oldest()
            return
        if self._is_failing:
            self._is_failing = False
            _log.info("the history at %r is written again", self.place)

    def _take(self, sample: Sample) -> None:
        """Add a sample to its second, its minute and its hour."""
        process = sample.process[:_LONGEST_PROCESS]
        keys = [Key(resolution, int(start_of(sample, resolution)), process) for resolution in KEPT]
        # all of them are made before one is kept: a sample that cannot be taken now is taken later, once
        rows = {key: self._with(key, sample) for key in keys}
        for key, row in rows.items():
            newest, _ = self._open.pop((key.resolution, process), (key, None))
            if key >= newest:
                self._open[key.resolution, process] = key, row
        self._unwritten.update(rows)
        while len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]

    def _with(self, key: Key, sample: Sample) -> Sample:
        """A row with a sample added to it."""
        newest, row = self._open.get((key.resolution, key.process), (None, None))
        if newest != key:
            row = self._unwritten.get(key)
        if row is None and (newest is None or key < newest):
            row = self._on_disk(key)
            # of another history beside this one, which has the sample already
            if row is not None and row.at >= sample.at:
                return row
        return sample if row is None else merge([row, sample])

    def _on_disk(self, key: Key) -> Sample | None:
        """What there is of a key from before this history began, or from one beside it."""
        data = self._table.get(key)
        try:
            return None if data is None else unpacked(data)
        except ConfigurationError:
            return None

    def _prune(self) -> None:
        now = time.monotonic()
        if now >= self._pruned_at + _MINUTE:
            self._table.prune(self._clock())
            self._pruned_at = now

    def _forget_oldest(self) -> None:
        """Keep memory bounded while nothing can be written: hours are few, and seconds matter least."""
        excess = len(self._unwritten) - _MOST_UNWRITTEN
        for key in sorted(self._unwritten)[: max(0, excess)]:
            del self._unwritten[key]

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned and len(self._has_warned) < _MOST_UNWRITTEN:
            self._has_warned.add(text)
            _log.warning("%s", text)

    def _leave_parent(self) -> None:
        self._table.leave_parent()
        self._start_anew()


def _told(error: Exception) -> str:
    """What went wrong: SQLite's own words hold nothing but its own; other databases' may quote what was asked."""
    name = type(error).__name__
    # a file from elsewhere may have tables of any name
    return f"{name}: {visible(error)}" if type(error).__module__ == "sqlite3" else name


_all: "weakref.WeakSet[History]" = weakref.WeakSet()


_held: list[threading.Lock] = []


def _before_fork() -> None:
    # a database's library has locks of its own, which a thread that is not in the child would never give back
    _held.extend(it._writing for it in [*_all] if it._writing.acquire(timeout=_PATIENCE))  # noqa: SLF001 - its own class


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _leave_parents() -> None:
    _held.clear()
    for history in [*_all]:
        history._leave_parent()  # noqa: SLF001 - its own class


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_leave_parents)


@atexit.register
def _close_all() -> None:
    for history in [*_all]:
        history.close()

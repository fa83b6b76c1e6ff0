"""Whoever takes samples: each in a thread of its own, so that none waits for another and nobody for them."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from resilience_kit.monitoring.measures import Sample

Sink = Callable[[Sample], object]

# A minute's worth.
_MOST_WAITING = 60

_log = logging.getLogger("resilience_kit.monitoring")


class SinkThread:
    """A function that takes samples, and the thread that calls it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        # by its name: the repr() of a partial holds its arguments, and another one may raise
        self._name = getattr(sink, "__qualname__", type(sink).__qualname__)
        self._has_warned: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Begin as one that was never started."""
        self.thread: threading.Thread | None = None
        self._waiting: deque[Sample] = deque()
        self._has_news = threading.Condition()
        self._has_ended = True
        self._is_running = False

    def start(self) -> None:
        """Begin to take samples, if that is not so yet."""
        with self._has_news:
            self._has_ended = False
            if self._is_running:
                return
            self._is_running = True
            self.thread = threading.Thread(target=self._run, name="resilience-kit-sink", daemon=True)
            self.thread.start()

    def give(self, sample: Sample) -> None:
        """Have the sample taken soon; the oldest that waits makes room for it if there are too many."""
        with self._has_news:
            if self._has_ended:
                return
            self._waiting.append(sample)
            is_full = len(self._waiting) > _MOST_WAITING
            if is_full:
                self._waiting.popleft()
            self._has_news.notify()
        if is_full:
            self._warn_once(f"{self._name!r} is too slow to take a sample each second, and misses some")

    def end(self) -> None:
        """Have what waits taken, and then end; waits for neither."""
        with self._has_news:
            self._has_ended = True
            self._has_news.notify()

    def _run(self) -> None:
        while True:
            with self._has_news:
                while not self._waiting and not self._has_ended:
                    self._has_news.wait()
                if not self._waiting:
                    self._is_running = False
                    return
                sample = self._waiting.popleft()
            try:
                self._sink(sample)
            except Exception as error:  # noqa: BLE001 - a sink may raise anything, and is asked again
                self._warn_once(f"{self._name!r} raised {type(error).__name__} on a sample")

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned:
            self._has_warned.add(text)
            _log.warning("%s", text)

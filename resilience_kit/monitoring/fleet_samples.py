"""The samples of all processes of a fleet, by way of its store: each puts its own there, and anybody adds them up.

Where no store is set, nothing is put anywhere. The worker of the process's membership does it once a second, so
nobody waits for the store; what a process put there is gone a few seconds after it is.
"""

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resilience_kit.errors import ConfigurationError, StoreContentError, StoreUnavailableError
from resilience_kit.fleet.connection import Argument, packaged_script
from resilience_kit.fleet.fleets import Fleet, current_fleet
from resilience_kit.forking import new_lock
from resilience_kit.monitoring.measures import Sample, merge, packed, unpacked

# A minute of seconds.
_MOST_SAMPLES = 60
# A process that has put nothing there for so many milliseconds is gone.
_LEASE = 5_000
_MOST_PROCESSES = 1_000
# Whose samples are asked for at once: few enough to be told within the store's deadline.
_AT_ONCE = 20
# More than a thousand names make of a second.
_MOST_BYTES = 1 << 18
_ID = re.compile(r"[0-9a-f]{16}")

_log = logging.getLogger("resilience_kit.monitoring")


@dataclass(frozen=True, slots=True)
class ProcessSamples:
    """What one process of a fleet has told of itself.

    Attributes:
        process: Its name; where two have the same, with a part of their ids.
        samples: Of its last seconds, the oldest first.
        total: All since it began to tell.
    """

    process: str
    samples: tuple[Sample, ...]
    total: Sample


class FleetSamples:
    """Puts this process's samples into the fleet's store, and reads everybody's.

    Args:
        fleet: Which one. Default: that of the settings in force, if there is one.

    Example:
        >>> from resilience_kit.monitoring.fleet_samples import FleetSamples
        >>> from resilience_kit.monitoring.sampler import Sampler
        >>> fleet = FleetSamples()
        >>> with Sampler([fleet.add]):
        ...     fleet.read()  # RESILIENCE_STORE is not set
        []
    """

    def __init__(self, fleet: Fleet | None = None) -> None:
        self._given = fleet
        self._lock = new_lock()
        self._unsent: deque[bytes] = deque(maxlen=_MOST_SAMPLES)
        self._total: Sample | None = None
        self._fleet: Fleet | None = None
        self._end_beats: Callable[[], None] = _nothing
        self._has_warned: set[str] = set()

    def add(self, sample: Sample) -> None:
        """Have a sample put into the store soon; may be given to a `Sampler` as a sink.

        Args:
            sample: What was measured.

        Raises:
            ConfigurationError: There is a store, and the extra `fleet` is not installed.
        """
        fleet = self._given or current_fleet()
        if fleet is None:
            return
        data = packed(sample)
        if len(data) > _MOST_BYTES:
            self._warn_once("a sample is too large to be shown to the fleet: too many names have come together")
            return
        with self._lock:
            self._unsent.append(data)
            is_other = self._total is None or self._total.process != sample.process
            self._total = sample if self._total is None or is_other else merge([self._total, sample])
            if fleet is not self._fleet:
                self._end_beats()
                self._fleet, self._end_beats = fleet, fleet.member.on_beat(lambda: self._put(fleet))

    def read(self, seconds: float = _MOST_SAMPLES) -> list[ProcessSamples]:
        """What each living process has told, by its name; nothing where no store is set.

        It blocks until the store has answered: in an event loop, call it by `asyncio.to_thread`. What is in the store
        and not the kit's is warned of once, and left out.

        Args:
            seconds: How far back, a minute at most.

        Raises:
            ConfigurationError: There is a store, and the extra `fleet` is not installed.
            StoreUnavailableError: The store is gone or slow.
        """
        fleet = self._given or current_fleet()
        if fleet is None:
            return []
        if fleet.member.is_lost:
            raise StoreUnavailableError(
                f"the store at {fleet.connection.place} is lost", name=fleet.connection.prefix, reason="lost"
            )
        try:
            found = self._read(fleet, max(1, round(seconds)))
        except StoreUnavailableError as error:
            fleet.member.lost(error)
            raise
        names = Counter(it.process for _, it in found)
        told = [it if names[it.process] == 1 else _renamed(it, f"{it.process}-{member[:4]}") for member, it in found]
        return sorted(told, key=lambda it: it.process)

    def close(self) -> None:
        """Put nothing more into the store."""
        with self._lock:
            self._end_beats()
            self._fleet, self._end_beats = None, _nothing

    def _put(self, fleet: Fleet) -> None:
        """In the thread of the member, which tells of what this raises."""
        with self._lock:
            unsent, total = [*self._unsent], self._total
        if total is None:
            return
        connection, member = fleet.connection, fleet.member.id
        keys = [connection.key("samples"), *_keys_of(fleet, member)]
        arguments: list[Argument] = [member, _LEASE, _MOST_SAMPLES, packed(total), *unsent]
        connection.run_blocking(packaged_script("samples"), keys, arguments)
        with self._lock:
            # what was not known to have arrived is sent again, and told apart by its time
            for sent in unsent:
                if self._unsent and self._unsent[0] is sent:
                    self._unsent.popleft()

    def _read(self, fleet: Fleet, most: int) -> list[tuple[str, ProcessSamples]]:
        connection = fleet.connection
        index = [connection.key("samples")]
        try:
            answer = connection.run_blocking(packaged_script("sampled"), index, [_MOST_PROCESSES])
        except StoreContentError:
            self._warn_of_garbage(index[0])
            return []
        ids = [member.decode(errors="replace") for member in answer]
        members = [member for member in ids if _ID.fullmatch(member)]
        if len(members) != len(ids):
            self._warn_of_garbage(index[0])
        found: list[tuple[str, ProcessSamples]] = []
        for first in range(0, len(members), _AT_ONCE):
            some = members[first : first + _AT_ONCE]
            keys = [key for member in some for key in _keys_of(fleet, member)]
            answers = connection.run_blocking(packaged_script("read_samples"), keys, [most])
            for member, parts in zip(some, answers, strict=True):
                # else it has just gone
                if parts is not None:
                    try:
                        found.append((member, _told(parts)))
                    except ConfigurationError:
                        self._warn_of_garbage(_keys_of(fleet, member)[0])
        return found

    def _warn_of_garbage(self, key: str) -> None:
        self._warn_once(f"what lies in the store under {key!r} is not what the kit put there, and was left out")

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned and len(self._has_warned) < _MOST_PROCESSES:
            self._has_warned.add(text)
            _log.warning("%s", text)


def added_up(processes: Sequence[ProcessSamples]) -> Sample | None:
    """All that living processes counted since they began to tell; None if there are none."""
    return merge(it.total for it in processes) if processes else None


def _keys_of(fleet: Fleet, member: str) -> list[str]:
    return [fleet.connection.key("samples", member), fleet.connection.key("samples", member, "total")]


def _told(parts: Any) -> ProcessSamples:
    """What a process has put there.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(parts, list) or not parts:
        raise ConfigurationError("nothing of the kit's lies there")
    total, *samples = map(unpacked, parts)
    by_time = {sample.at: replace(sample, process=total.process) for sample in samples}
    return ProcessSamples(total.process, tuple(by_time[at] for at in sorted(by_time)), total)


def _renamed(told: ProcessSamples, name: str) -> ProcessSamples:
    samples = tuple(replace(sample, process=name) for sample in told.samples)
    return ProcessSamples(name, samples, replace(told.total, process=name))


def _nothing() -> None:
    return

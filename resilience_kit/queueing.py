"""The queue before a limit: who waits in it, in which order, and who looks after it at what time.

It is a SortedKeyList of sortedcontainers: a heap does not tell how many are ahead, nor lets one out of its middle, and
a sorted list moves all that stand in it for each one that leaves.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Generic, TypeVar, cast

from sortedcontainers import SortedKeyList

from resilience_kit.registry import mode
from resilience_kit.waiting import Waiter

# Timers may fire a rounding error before the moment that they were set for: no wait is shorter than a microsecond.
SHORTEST_WAIT = 1e-6
# Seconds after which a loop or a thread in which callers wait looks after the queue, though its head is not there: the
# loop of the head may stand still, or its thread be gone. They double with each look, or a long wait would be busy with
# looking.
_FIRST_GRACE = 1.0


class _Lookout:
    """An event loop or a thread in which callers wait, and how many: it looks after the queue from time to time."""

    __slots__ = ("callers", "grace", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self.callers = 0
        self.grace = _FIRST_GRACE


class Place:
    """A place in the queue: `turn` is when the caller is due, as if all priorities were one."""

    __slots__ = ("_lookout", "turn", "waiter")

    turn: float
    waiter: Waiter
    _lookout: _Lookout | None


PlaceT = TypeVar("PlaceT", bound=Place)


class Queue(Generic[PlaceT]):
    """Places by their turn, and those of one turn as they came; to be used under a lock.

    Args:
        look: Serves the queue under the lock; called in the loops and threads in which callers wait.
        longest_grace: Most seconds from look to look.
    """

    __slots__ = ("_alarm", "_longest_grace", "_look", "_places", "lookouts")

    def __init__(self, look: Callable[[], None], longest_grace: float) -> None:
        self._look = look
        self._longest_grace = longest_grace
        self._places: SortedKeyList[PlaceT] = SortedKeyList(key=attrgetter("turn"))
        # By loop or thread; empty if nobody waits.
        self.lookouts: dict[Hashable, _Lookout] = {}
        # Where and when the head of the queue is served next.
        self._alarm: tuple[Hashable, float] = (None, math.inf)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def head(self) -> PlaceT:
        """The first in the queue."""
        return cast("PlaceT", self._places[0])

    def first(self, number: int) -> "islice[PlaceT]":
        """So many from the head on."""
        return islice(self._places, number)

    def ahead(self, turn: float) -> int:
        """How many are due at that time or before."""
        return cast("int", self._places.bisect_key_right(turn))

    def index(self, place: PlaceT) -> int:
        """How many are ahead of one in the queue."""
        return cast("int", self._places.index(place))

    def join(self, place: PlaceT) -> None:
        """Queue up."""
        self._places.add(place)
        home = place.waiter.home
        lookout = self.lookouts.get(home)
        if lookout is None:
            lookout = self.lookouts[home] = _Lookout(place.waiter)
            self._look_later(lookout)
        lookout.callers += 1
        place._lookout = lookout  # noqa: SLF001 - kept on the place, for the queue alone

    def leave(self, place: PlaceT) -> None:
        """Leave the queue; a second time does nothing."""
        lookout, place._lookout = place._lookout, None  # noqa: SLF001 - see above
        if lookout is not None:
            self._places.remove(place)
            lookout.callers -= 1
            if not lookout.callers:
                del self.lookouts[lookout.waiter.home]

    def set_alarm(self, current: float, due: float) -> None:
        """Have the head's home look when the head is due; an earlier alarm there does as well."""
        waiter = self.head.waiter
        home, at = self._alarm
        if home is not waiter.home or at > current + due:
            self._alarm = waiter.home, current + due
            waiter.call_later(max(due, SHORTEST_WAIT), partial(self._ring, self._alarm))

    def _ring(self, alarm: tuple[Hashable, float]) -> None:
        # Another one may have been set since, which is still to come.
        if self._alarm is alarm:
            self._alarm = (None, math.inf)
            self._look()

    def _look_later(self, lookout: _Lookout) -> None:
        # a test that skips its waits would skip this one before the head's
        if not mode.skips_waiting:
            lookout.waiter.call_later(min(lookout.grace, self._longest_grace), partial(self._look_again, lookout))
            lookout.grace *= 2

    def _look_again(self, lookout: _Lookout) -> None:
        if lookout.callers:
            self._look()
            self._look_later(lookout)

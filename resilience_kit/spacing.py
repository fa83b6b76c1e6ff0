"""The distance between the starts of two calls: aiolimiter's bucket with room for one, on the kit's clock."""

from asyncio import AbstractEventLoop
from typing import cast

from aiolimiter import AsyncLimiter

from resilience_kit.waiting import now


class _Clock:
    time = staticmethod(now)
    is_closed = staticmethod(lambda: False)


class Spacing(AsyncLimiter):
    """A bucket with room for one call.

    aiolimiter 1.3.0 binds a bucket to the loop that uses it first, and can wait for room but not say how long.
    """

    __slots__ = ()

    @property
    def _loop(self) -> AbstractEventLoop:
        return cast("AbstractEventLoop", _Clock)

    def seconds_until_room(self) -> float:
        """Seconds until the next call may start."""
        return 0.0 if self.has_capacity() else (self._level + 1 - self.max_rate) * self.time_period / self.max_rate

    def fill(self) -> None:
        """Note that a call starts."""
        self._level += 1

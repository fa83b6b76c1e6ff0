"""An event loop whose clock jumps to the next timer instead of waiting for it: hours pass in the time of their work."""

import asyncio
import selectors
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")

# More than the resolution of the system's clock, up to which a loop takes a timer for due.
_TICK = 1e-8

__all__ = ["VirtualTimeLoop"]


class _JumpingSelector(selectors.DefaultSelector):
    """What the loop waits in; here the wait is over at once, and the clock is ahead by it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and for nothing that time would bring")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop for tasks that wait for time and for each other, and for no other thread and no network.

    A test of limits and backoffs in it takes as long as the work and not as long as the waits, and finds the same times
    in every run. Where all tasks wait and no timer is set, nothing could ever wake them: that is a `RuntimeError`.

    Example:
        >>> import asyncio
        >>> from resilience_kit.testing import VirtualTimeLoop
        >>> with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        ...     runner.run(asyncio.sleep(3_600))
        ...     print(runner.get_loop().time())
        3600.0
    """

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call a function at a time of this clock, which is at the earliest a little ahead of now.

        Args:
            when: Virtual seconds since the loop was made.
            callback: The function.
            *args: What it is called with.
            context: The context that it runs in. Default: a copy of the current one.
        """
        # aiolimiter 1.3.0 sets a timer for the little that rounding left over; if no time passed, then for ever again.
        return super().call_at(max(when, self.time() + _TICK), callback, *args, context=context)

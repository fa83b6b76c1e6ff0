"""An event loop whose clock jumps to the next timer instead of waiting for it: hours pass in the time of their work."""

import asyncio
import selectors


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

    Example:
        >>> import asyncio
        >>> from resilience_kit.virtual_time import VirtualTimeLoop
        >>> with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        ...     runner.run(asyncio.sleep(3_600, "an hour later"))
        'an hour later'
    """

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now

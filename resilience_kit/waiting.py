"""Time: what it is now, and how a thread or a task lets it pass and is woken.

All waiting of the kit is written once, as coroutines over the `Waiting` protocol. `ThreadWaiting` blocks inside
them and so never suspends them; `TaskWaiting` suspends. `decorating` chooses by the kind of the function.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from resilience_kit.registry import mode

T = TypeVar("T")


def now() -> float:
    """Seconds on the running event loop's clock, else on the monotonic clock: the same clock, but for tests.

    A loop with virtual time is followed, and so is a test that skips its waits.
    """
    try:
        base = asyncio.get_running_loop().time()
    except RuntimeError:
        base = time.monotonic()
    return base + mode.seconds_skipped


class Waiter(Protocol):
    """One caller that waits to be woken."""

    def wake(self) -> None:
        """Wake the caller, from any thread; if it is not waiting now, its next wait ends at once."""

    async def wait(self, seconds: float | None, *, for_another_call: bool) -> None:
        """Wait to be woken, `seconds` at most; None waits without end.

        A test that skips its waits does not skip those for another call, which takes the time that it takes.
        """

    @property
    def is_dead(self) -> bool:
        """Whether the caller can never run again."""


class Waiting(Protocol):
    """How one kind of function waits."""

    async def sleep(self, seconds: float) -> None:
        """Let seconds pass."""

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that may block for long."""

    def waiter(self) -> Waiter:
        """A waiter for the current thread or task."""


def _skip(seconds: float) -> None:
    mode.seconds_skipped += max(0.0, seconds)


class ThreadWaiter:
    """A thread that waits to be woken."""

    __slots__ = ("_event",)
    is_dead = False

    def __init__(self) -> None:
        self._event = threading.Event()

    def wake(self) -> None:
        """Wake the thread."""
        self._event.set()

    async def wait(self, seconds: float | None, *, for_another_call: bool) -> None:
        """Block the thread until it is woken, `seconds` at most."""
        if mode.skips_waiting and seconds is not None and not for_another_call:
            _skip(seconds)
        else:
            self._event.wait(None if seconds is None else min(seconds, threading.TIMEOUT_MAX))
        self._event.clear()


class ThreadWaiting:
    """How a sync function waits: it blocks its thread."""

    waiter = ThreadWaiter

    async def sleep(self, seconds: float) -> None:
        """Block the thread."""
        if mode.skips_waiting:
            _skip(seconds)
        else:
            time.sleep(seconds)  # noqa: ASYNC251 - a sync function is waiting: no event loop runs this

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it here: the thread may block."""
        return function(*arguments)


class TaskWaiter:
    """A task that waits to be woken."""

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    @property
    def is_dead(self) -> bool:
        """Whether the task's loop was closed under it."""
        return self._loop.is_closed()

    def wake(self) -> None:
        """Wake the task, from whatever thread or loop."""
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
            self._event.set()
        else:
            # A loop that is closed by now raises: nobody waits there any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float | None, *, for_another_call: bool) -> None:
        """Suspend the task until it is woken, `seconds` at most."""
        if mode.skips_waiting and seconds is not None and not for_another_call:
            _skip(seconds)
            await asyncio.sleep(0)
        else:
            try:
                async with asyncio.timeout(seconds):
                    await self._event.wait()
            except TimeoutError:
                return
        self._event.clear()


class TaskWaiting:
    """How a coroutine function waits: it suspends its task."""

    waiter = TaskWaiter

    async def sleep(self, seconds: float) -> None:
        """Suspend the task."""
        if mode.skips_waiting:
            _skip(seconds)
            seconds = 0
        await asyncio.sleep(seconds)

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it in a thread, so that the loop goes on."""
        return await asyncio.to_thread(function, *arguments)

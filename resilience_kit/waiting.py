"""Time: what it is now, and how a thread or a task lets it pass and is woken.

All waiting of the kit is written once, as coroutines over the `Waiting` protocol. `ThreadWaiting` blocks inside
them and so never suspends them; `TaskWaiting` suspends. `decorating` chooses by the kind of the function.
"""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from contextlib import suppress
from operator import itemgetter
from typing import Any, Protocol, TypeVar

from resilience_kit.registry import mode

T = TypeVar("T")


def now() -> float:
    """Seconds on the running event loop's clock, else on the monotonic clock: the same clock, but for tests.

    A loop with virtual time is followed, and so is a test that skips its waits.
    """
    loop = asyncio._get_running_loop()  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
    return (time.monotonic() if loop is None else loop.time()) + mode.seconds_skipped


class Waiter(Protocol):
    """One caller that waits to be woken."""

    @property
    def home(self) -> Hashable:
        """The event loop or the thread that it waits in."""

    @property
    def is_gone(self) -> bool:
        """Whether the caller waits no more: it was cancelled, or can never run again."""

    def wake(self) -> None:
        """End the caller's wait, from any thread."""

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Have its home call a function after a time, asked from any thread; a thread does as long as it waits.

        A test that skips its waits skips this one.
        """

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have its home run a coroutine function beside the wait, asked from any thread; a thread while it waits."""

    def wait(self, seconds: float | None) -> Awaitable[None]:
        """Wait to be woken, `seconds` at most; None waits without end."""
        ...


class Waiting(Protocol):
    """How one kind of function waits."""

    @property
    def blocks(self) -> bool:
        """Whether it blocks its thread, and so never suspends a coroutine."""

    async def sleep(self, seconds: float) -> None:
        """Let seconds pass."""

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that may block for long."""

    def waiter(self) -> Waiter:
        """A waiter for the current thread or task."""


def _skip(seconds: float) -> float:
    """Let the kit's clock jump ahead. Returns the seconds that are left to wait."""
    mode.seconds_skipped += max(0.0, seconds)
    return 0.0


class ThreadWaiter:
    """A thread that waits to be woken."""

    __slots__ = ("_event", "_is_woken", "_requests")
    is_gone = False

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_woken = False
        # what is to be called, and when
        self._requests: list[tuple[float, Callable[[], object]]] = []

    @property
    def home(self) -> "ThreadWaiter":
        """Itself: a thread waits for one thing at a time."""
        return self

    def wake(self) -> None:
        """Wake the thread."""
        self._is_woken = True
        self._event.set()

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Interrupt the thread's wait for a call of the function."""
        if mode.skips_waiting:
            seconds = _skip(seconds)
        self._requests.append((time.monotonic() + seconds, function))
        self._event.set()

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Interrupt the thread's wait for a coroutine whose waiting blocks, so that it ends at its first step."""

        def run() -> None:
            with suppress(StopIteration):
                function().send(None)

        self._requests.append((time.monotonic(), run))
        self._event.set()

    async def wait(self, seconds: float | None) -> None:
        """Block the thread until it is woken, `seconds` at most."""
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while not self._is_woken and (current := time.monotonic()) < deadline:
            request = min(self._requests, key=itemgetter(0), default=None)
            if request is not None and request[0] <= current:
                self._requests.remove(request)
                request[1]()
            else:
                until = deadline if request is None else min(request[0], deadline)
                self._event.wait(min(until - current, threading.TIMEOUT_MAX))
                self._event.clear()


class ThreadWaiting:
    """How a sync function waits: it blocks its thread."""

    blocks = True
    waiter = ThreadWaiter

    async def sleep(self, seconds: float) -> None:
        """Block the thread."""
        if mode.skips_waiting:
            _skip(seconds)
        else:
            # time.sleep() takes no more
            time.sleep(min(seconds, threading.TIMEOUT_MAX))  # noqa: ASYNC251 - a sync function is waiting: no event loop runs this

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it here: the thread may block."""
        return function(*arguments)


class TaskWaiter:
    """A task that waits to be woken."""

    __slots__ = ("_beside", "_future")

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # a loop does not keep its tasks alive
        self._beside: asyncio.Task[None] | None = None

    @property
    def home(self) -> asyncio.AbstractEventLoop:
        """The task's loop."""
        return self._future.get_loop()

    @property
    def is_gone(self) -> bool:
        """Whether the task was cancelled, or its loop closed under it."""
        return self._future.cancelled() or self._future.get_loop().is_closed()

    def wake(self) -> None:
        """Wake the task, from whatever thread or loop."""
        self._in_loop(self._end)

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Have the task's loop call the function, whether the task still waits or not."""
        if mode.skips_waiting:
            seconds = _skip(seconds)
        self._in_loop(self._future.get_loop().call_later, seconds, function)

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a task in the waiting task's loop; it goes on when that one is cancelled."""

        def begin() -> None:
            self._beside = self._future.get_loop().create_task(function())

        self._in_loop(begin)

    def wait(self, seconds: float | None) -> Awaitable[None]:
        """Suspend the task until it is woken, `seconds` at most."""
        return self._future if seconds is None else self._wait_at_most(seconds)

    async def _wait_at_most(self, seconds: float) -> None:
        timer = self._future.get_loop().call_later(seconds, self._end)
        try:
            await self._future
        finally:
            timer.cancel()

    def _end(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def _in_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        loop = self._future.get_loop()
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented, and unlike get_running_loop() it does not raise
            function(*arguments)
        else:
            # A loop that is closed by now raises: nobody waits there any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(function, *arguments)


class TaskWaiting:
    """How a coroutine function waits: it suspends its task."""

    blocks = False
    waiter = TaskWaiter

    async def sleep(self, seconds: float) -> None:
        """Suspend the task."""
        if mode.skips_waiting:
            seconds = _skip(seconds)
        await asyncio.sleep(seconds)

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it in a thread, so that the loop goes on."""
        return await asyncio.to_thread(function, *arguments)

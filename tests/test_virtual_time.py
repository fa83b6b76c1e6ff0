"""The loop whose clock jumps."""

import asyncio
import time

import pytest
from aiolimiter import AsyncLimiter

from resilience_kit.virtual_time import VirtualTimeLoop


@pytest.fixture
def runner():
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        yield runner


def test_hours_of_sleep_pass_at_once(runner):
    started = time.monotonic()
    runner.run(asyncio.sleep(100_000))

    assert time.monotonic() - started < 10


def test_the_clock_shows_the_time_slept(runner):
    async def sleep_twice():
        await asyncio.sleep(2)
        await asyncio.sleep(3.5)
        return asyncio.get_running_loop().time()

    assert runner.run(sleep_twice()) == pytest.approx(5.5)


def test_tasks_wake_in_the_order_of_their_timers(runner):
    woken = []

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        woken.append(seconds)

    async def sleep_all():
        await asyncio.gather(*(sleep(seconds) for seconds in (3, 1, 2)))

    runner.run(sleep_all())

    assert woken == [1, 2, 3]


def test_a_wait_that_nothing_ends_is_an_error_and_does_not_hang(runner):
    with pytest.raises(RuntimeError, match="everything waits"):
        runner.run(asyncio.Event().wait())


def test_a_timer_that_is_due_at_once_lets_time_pass(runner):
    async def fill_for_ten_seconds():
        limiter, clock = AsyncLimiter(10, 1), asyncio.get_running_loop().time
        while clock() < 10:
            await limiter.acquire()
        return clock()

    assert runner.run(fill_for_ten_seconds()) == pytest.approx(10, abs=0.2)

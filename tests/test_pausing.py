"""A rate limit that is held back by hand."""

import asyncio

import pytest

from resilience_kit import ConfigurationError, RateLimitTimeoutError, get_all_resilience_stats, rate_limited, reset_all
from resilience_kit.pausing import pause, resume
from resilience_kit.rate_limits import rate_limits

pytestmark = pytest.mark.looptime


def declare(**parameters):
    """A function that notes when it was called, and takes a second."""
    times = []

    @rate_limited("chat", min_interval=0, **parameters)
    async def ask(number=0):
        times.append((number, asyncio.get_running_loop().time()))
        await asyncio.sleep(1)

    return ask, times


def stats():
    return get_all_resilience_stats()["rate_limiters"]["chat"]


async def test_new_calls_wait_until_the_limit_is_resumed_in_the_order_in_which_they_came():
    ask, times = declare(max_concurrent=9)
    await ask()
    pause("chat")
    calls = [asyncio.create_task(ask(number)) for number in (1, 2, 3)]
    await asyncio.sleep(100)
    assert (len(times), stats()["waiting"]) == (1, 3)
    resume("chat")
    await asyncio.gather(*calls)
    assert [number for number, _ in times] == [0, 1, 2, 3]
    assert {at for _, at in times[1:]} == {101}


async def test_calls_under_way_go_on():
    ask, times = declare()
    call = asyncio.create_task(ask())
    await asyncio.sleep(0.5)
    pause("chat")
    await call
    assert (stats()["in_flight"], len(times)) == (0, 1)


async def test_the_statistics_tell_a_pause():
    ask, _ = declare(max_concurrent=4)
    await ask()
    told = [(stats()["paused"], stats()["max_concurrent"])]
    pause("chat")
    told.append((stats()["paused"], stats()["max_concurrent"]))
    resume("chat")
    told.append((stats()["paused"], stats()["max_concurrent"]))
    assert told == [(0, 4), (1, 0), (0, 4)]


async def test_a_call_that_may_not_wait_that_long_gives_up():
    ask, _ = declare(max_wait=5)
    await ask()
    pause("chat")
    with pytest.raises(RateLimitTimeoutError, match="no slot was free within max_wait=5 s"):
        await ask()
    assert stats()["waiting"] == 0


async def test_a_call_that_is_cancelled_in_a_pause_leaves_nothing_behind():
    ask, times = declare()
    await ask()
    pause("chat")
    call = asyncio.create_task(ask())
    await asyncio.sleep(1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    resume("chat")
    assert (stats()["waiting"], stats()["in_flight"], len(times)) == (0, 0, 1)


async def test_a_pause_counts_once_however_often_it_is_said():
    ask, times = declare()
    await ask()
    pause("chat")
    pause("chat")
    resume("chat")
    resume("chat")
    await ask()
    assert (len(times), stats()["max_concurrent"]) == (2, 3)


async def test_a_reset_ends_a_pause():
    ask, times = declare()
    await ask()
    pause("chat")
    call = asyncio.create_task(ask())
    await asyncio.sleep(1)
    reset_all()
    await call
    assert len(times) == 2


async def test_answers_that_come_in_a_pause_do_not_end_it():
    ask, _ = declare(max_concurrent=10, adaptive="latency")
    calls = [asyncio.create_task(ask()) for _ in range(10)]
    await asyncio.sleep(0.5)
    pause("chat")
    await asyncio.gather(*calls)
    assert stats()["max_concurrent"] == 0


async def test_a_name_that_nobody_uses_is_told_with_those_that_are_used():
    ask, _ = declare()
    await ask()
    with pytest.raises(ConfigurationError, match=r"no rate limit .nothing. is in use\. Known names: chat"):
        pause("nothing")
    with pytest.raises(ConfigurationError):
        resume("nothing")
    assert list(rate_limits.items()) == ["chat"]

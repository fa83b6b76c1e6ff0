"""The queue before a limit: its order, who leaves it, and who looks after it."""

import asyncio
import random
import threading

import pytest

from resilience_kit import (
    CircuitOpenError,
    RateLimitTimeoutError,
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
)
from resilience_kit.queueing import Place, Queue
from resilience_kit.rate_limits import rate_limits
from resilience_kit.testing import no_waiting
from resilience_kit.waiting import TaskWaiter, ThreadWaiter

pytestmark = pytest.mark.looptime


def limit(name="chat"):
    return get_all_resilience_stats()["rate_limiters"][name]


class Service:
    """Notes who is served, and holds its slot as long as it is told to."""

    def __init__(self):
        self.served = []
        self.is_open = asyncio.Event()

    async def __call__(self, label=None):
        self.served.append(label)
        await self.is_open.wait()


async def all_run():
    """Let all tasks run as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)


# Who leaves


async def test_cancelling_many_leaves_nothing():
    ask = rate_limited("chat", requests_per_minute=60_000, max_concurrent=10, min_interval=0)(Service())
    tasks = [asyncio.create_task(ask()) for _ in range(2_000)]
    await all_run()
    assert (limit()["waiting"], limit()["in_flight"]) == (1_990, 10)

    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(it) for it in ended} == {asyncio.CancelledError}
    assert (limit()["waiting"], limit()["in_flight"], limit()["requests_in_window"]) == (0, 0, 10)
    assert rate_limits.items()["chat"]._queue.lookouts == {}


async def test_after_many_were_cancelled_a_call_is_served_at_once():
    service = Service()
    ask = rate_limited("chat", tokens_per_minute=100, tokens=50, max_concurrent=2, min_interval=0)(service)
    tasks = [asyncio.create_task(ask()) for _ in range(100)]
    await all_run()
    for task in tasks[1:]:
        task.cancel()
    await all_run()
    assert limit()["tokens_in_window"] == 100, "the first two were sent"

    service.is_open.set()
    await asyncio.sleep(60)
    await ask("last")
    assert asyncio.get_running_loop().time() == pytest.approx(60)


async def test_a_slot_that_comes_free_goes_past_those_that_were_cancelled_with_its_holder():
    service = Service()
    ask = rate_limited("chat", max_concurrent=1, min_interval=0)(service)
    tasks = [asyncio.create_task(ask(label)) for label in range(5)]
    await all_run()
    for task in tasks[:4]:
        task.cancel()
    await all_run()

    assert service.served == [0, 4]
    assert limit()["requests_in_window"] == 2
    assert limit()["calls_admitted"] == 2
    service.is_open.set()
    await tasks[4]


async def test_the_last_in_the_queue_may_leave_first():
    service = Service()
    ask = rate_limited("chat", max_concurrent=1, min_interval=0)(service)
    tasks = [asyncio.create_task(ask(label)) for label in range(5)]
    await all_run()
    for task in reversed(tasks[1:]):
        task.cancel()
        await all_run()
    assert limit()["waiting"] == 0

    service.is_open.set()
    await tasks[0]
    assert service.served == [0]


# In which order


@pytest.mark.parametrize("seed", range(5))
async def test_those_that_stay_are_served_by_priority_and_then_as_they_came(seed):
    draw = random.Random(seed)
    service = Service()
    service.is_open.set()
    settings = {"requests_per_minute": 600, "max_concurrent": 1, "min_interval": 0.5}
    by_priority = [rate_limited("chat", priority=priority, **settings)(service) for priority in range(3)]
    await by_priority[0]("first")
    callers = [(draw.randrange(3), number) for number in range(60)]
    tasks = {caller: asyncio.create_task(by_priority[caller[0]](caller)) for caller in callers}
    await all_run()
    for caller in draw.sample(callers, 20):
        tasks.pop(caller).cancel()
    await asyncio.gather(*tasks.values())

    assert service.served == ["first", *sorted(tasks)]


async def test_who_comes_first_in_a_later_turn_is_first_when_nobody_else_is_there():
    service = Service()
    ask = rate_limited("chat", tokens_per_minute=10, tokens=10, max_concurrent=9, min_interval=0)(service)
    service.is_open.set()
    await ask("now")
    later = rate_limited("chat", priority=5, tokens=10)(service)
    await later("then")

    assert service.served == ["now", "then"]
    assert asyncio.get_running_loop().time() == pytest.approx(60)


# Who looks after it


async def test_a_long_queue_has_as_few_timers_as_a_short_one():
    service = Service()
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, max_concurrent=9, min_interval=0)(service)
    tasks = [asyncio.create_task(ask()) for _ in range(500)]
    await all_run()

    assert limit()["waiting"] == 499
    assert len(asyncio.get_running_loop()._scheduled) <= 3
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_callers_of_a_loop_that_goes_on_are_served_past_those_of_one_that_stands_still():
    served = []

    @rate_limited("chat", requests_per_minute=6, period=0.06, max_concurrent=99, min_interval=0)
    async def ask(label):
        served.append(label)

    async def several(*labels):
        await asyncio.gather(*map(ask, labels))

    standing = asyncio.new_event_loop()
    asyncio.run(ask("first"))
    abandoned = [standing.create_task(ask("abandoned")) for _ in range(3)]
    standing.call_soon(standing.stop)
    standing.run_forever()
    asyncio.run(several("second", "third"))
    assert served == ["first", "second", "third"]

    standing.run_until_complete(asyncio.gather(*abandoned))
    standing.close()
    assert (limit()["waiting"], limit()["in_flight"]) == (0, 0)


def test_a_thread_is_served_past_a_loop_that_stands_still():
    settings = {"requests_per_minute": 6, "period": 0.06, "max_concurrent": 9, "min_interval": 0}
    ask_later = rate_limited("chat", **settings)(asyncio.sleep)
    ask = rate_limited("chat")(lambda: "four")
    asyncio.run(ask_later(0))
    standing = asyncio.new_event_loop()
    abandoned = standing.create_task(ask_later(0))
    standing.call_soon(standing.stop)
    standing.run_forever()

    assert ask() == "four"
    standing.run_until_complete(abandoned)
    standing.close()


def test_callers_whose_loops_were_closed_hold_nobody_up():
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, max_concurrent=9, min_interval=0)(asyncio.sleep)
    with no_waiting():
        asyncio.run(ask(0))
    loops = [asyncio.new_event_loop() for _ in range(3)]
    abandoned = [loop.create_task(ask(0)) for loop in loops for _ in range(2)]
    for loop in loops:
        loop.call_soon(loop.stop)
        loop.run_forever()
    for loop in loops:
        loop.close()
    assert limit()["waiting"] == 6

    with no_waiting():
        asyncio.run(ask(0))
    assert (limit()["waiting"], limit()["in_flight"]) == (0, 0)
    assert rate_limits.items()["chat"]._queue.lookouts == {}
    del abandoned


async def test_a_circuit_that_opens_while_a_call_waits_refuses_it_and_gives_its_slot_back():
    circuit = circuit_protected("chat", failure_threshold=1, recovery_timeout=600)

    @circuit
    @rate_limited("chat", tokens_per_minute=10, tokens=10, max_concurrent=9, min_interval=0)
    async def ask():
        pass

    @circuit
    async def fail():
        raise ConnectionError

    await ask()
    waiting = asyncio.create_task(ask())
    await all_run()
    with pytest.raises(ConnectionError):
        await fail()
    with pytest.raises(CircuitOpenError):
        await waiting
    assert (limit()["in_flight"], limit()["tokens_in_window"]) == (0, 0)


async def test_looks_go_on_as_long_as_somebody_waits():
    looks = []
    queue = Queue(lambda: looks.append(asyncio.get_running_loop().time()), longest_grace=5)
    place = Place()
    place.turn, place.waiter = 0.0, TaskWaiter()
    queue.join(place)
    await asyncio.sleep(20)
    assert looks == [pytest.approx(seconds) for seconds in (1, 3, 7, 12, 17)]

    queue.leave(place)
    queue.leave(place)
    await asyncio.sleep(20)
    assert len(looks) == 5
    assert len(queue) == 0


async def test_who_is_due_at_the_end_of_its_patience_is_served(monkeypatch):
    """Also where the timer of its patience comes first: here there is no other."""
    monkeypatch.setattr(Queue, "set_alarm", lambda *_: None)
    monkeypatch.setattr(Queue, "_look_later", lambda *_: None)
    settings = {"tokens_per_minute": 10, "tokens": 10, "max_concurrent": 9, "min_interval": 0}
    ask = rate_limited("chat", max_wait=60, **settings)(Service())
    tasks = [asyncio.create_task(ask(label)) for label in ("first", "second")]
    await asyncio.sleep(61)

    assert (limit()["waiting"], limit()["in_flight"]) == (0, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_is_refused_at_the_end_of_its_patience_hears_how_long_it_would_be():
    service = Service()
    service.is_open.set()
    settings = {"tokens_per_minute": 10, "tokens": 10, "max_concurrent": 9, "min_interval": 0}
    patient = rate_limited("chat", **settings)(service)
    hasty = rate_limited("chat", priority=1, max_wait=70, **settings)(service)
    await patient("first")
    waiting = asyncio.create_task(hasty("second"))
    await asyncio.sleep(1)
    others = [asyncio.create_task(patient("others")) for _ in range(2)]
    with pytest.raises(RateLimitTimeoutError) as refused:
        await waiting

    assert asyncio.get_running_loop().time() == pytest.approx(70)
    assert refused.value.retry_after == pytest.approx(110), "one of the others at 120, and then itself at 180"
    await asyncio.gather(*others)


# How a thread waits


def run(coroutine):
    """Run what never suspends."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_a_thread_that_waits_calls_what_it_is_asked_to_in_their_order():
    called = []
    waiter = ThreadWaiter()
    waiter.call_later(0.02, lambda: (called.append("second"), waiter.wake()))
    waiter.call_later(0.01, lambda: called.append("first"))
    run(waiter.wait(None))
    assert called == ["first", "second"]


def test_a_thread_is_asked_by_another_while_it_waits():
    threads = []
    waiter = ThreadWaiter()

    def ask():
        waiter.call_later(0, lambda: (threads.append(threading.current_thread()), waiter.wake()))

    other = threading.Timer(0.02, ask)
    other.start()
    run(waiter.wait(None))
    other.join()
    assert threads == [threading.current_thread()]


def test_a_thread_waits_no_longer_than_it_is_told_to():
    waiter = ThreadWaiter()
    waiter.call_later(60, lambda: pytest.fail("too early"))
    run(waiter.wait(0.01))

"""@rate_limited: never above the quota in any window, first come first served, one limit for all threads and loops."""

import asyncio
import signal
import threading
from collections import Counter
from contextlib import suppress

import pytest
from aiolimiter import AsyncLimiter

from resilience_kit import (
    CircuitOpenError,
    ConfigurationError,
    RateLimitTimeoutError,
    circuit_protected,
    get_all_resilience_stats,
    rate_limited,
    reset_all,
    subscribe,
)
from resilience_kit.events import QuotaRelaxed, QuotaTightened, Waiting, WaitRefused
from resilience_kit.quota_ledger import WindowLedger
from resilience_kit.testing import no_waiting
from resilience_kit.waiting import TaskWaiter

pytestmark = pytest.mark.looptime

UNPACED = {"max_concurrent": 10_000, "min_interval": 0}


def most_in_any_window(times: list[float], seconds: float) -> int:
    """The most entries in a half-open window of so many seconds."""
    return max(sum(start <= time < start + seconds for time in times) for start in times)


def in_flight(name: str = "default") -> int:
    return get_all_resilience_stats()["rate_limiters"][name]["in_flight"]


class Recorder:
    """Notes when each call starts, in seconds of the loop."""

    def __init__(self, seconds: float = 0.0):
        self.starts = []
        self.order = []
        self.seconds = seconds

    async def __call__(self, label=None):
        self.starts.append(asyncio.get_running_loop().time())
        self.order.append(label)
        await asyncio.sleep(self.seconds)


async def test_row_8_no_window_holds_more_than_the_quota_where_aiolimiter_admits_nearly_twice_as_much():
    async def naive():
        limiter, started, admitted = AsyncLimiter(60, 60), asyncio.get_running_loop().time(), []
        while (now := asyncio.get_running_loop().time()) < started + 120:
            admitted.append(now)
            await limiter.acquire()
        return admitted

    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=60, **UNPACED)(recorder)
    await asyncio.gather(*(ask() for _ in range(200)))

    assert most_in_any_window(await naive(), 60) > 100
    assert most_in_any_window(recorder.starts, 60) == 60


async def test_requests_are_also_counted_over_a_sixth_of_the_period_as_azure_does():
    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=60, **UNPACED)(recorder)
    await asyncio.gather(*(ask() for _ in range(60)))

    assert most_in_any_window(recorder.starts, 10) == 10


async def test_a_burst_that_fits_goes_at_once_and_the_next_call_waits_until_it_fits_and_not_longer():
    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=60, tokens_per_minute=100, tokens=25, **UNPACED)(recorder)
    await asyncio.gather(*(ask() for _ in range(5)))

    assert recorder.starts == [0, 0, 0, 0, pytest.approx(60)]


async def test_tokens_may_be_a_function_of_the_calls_own_arguments():
    @rate_limited("chat", tokens_per_minute=100, tokens=lambda prompt, answer: len(prompt) + answer, **UNPACED)
    async def ask(prompt, answer):
        return asyncio.get_running_loop().time()

    assert await ask("x" * 40, answer=20) == 0
    assert await ask("x" * 40, answer=0) == 0
    assert await ask("x", answer=0) == pytest.approx(60)


async def test_tokens_are_estimated_from_the_prompt_and_the_answers_maximum():
    @rate_limited("chat", **UNPACED)
    async def ask(messages, *, model="gpt-4o", max_tokens=100):
        return "four"

    await ask([{"role": "user", "content": "hello world"}])

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["tokens_in_window"] == 9 + 100


async def test_a_call_without_a_prompt_costs_no_tokens():
    await rate_limited("chat", tokens_per_minute=1, **UNPACED)(Recorder())()

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["tokens_in_window"] == 0


async def test_row_7_a_large_request_is_served_in_its_turn_where_aiolimiter_lets_it_starve():
    limiter, served = AsyncLimiter(100, 60), []

    async def naive(label, tokens):
        await limiter.acquire(tokens)
        served.append(label)

    recorder = Recorder()

    async def patient(label, tokens):
        await recorder(label)

    ask = rate_limited(
        "chat", requests_per_minute=600, tokens_per_minute=100, tokens=lambda _, tokens: tokens, **UNPACED
    )(patient)
    for call in (naive, ask):
        async with asyncio.TaskGroup() as group:
            group.create_task(call("fill", 100))
            await asyncio.sleep(1)
            group.create_task(call("large", 90))
            for _ in range(50):
                await asyncio.sleep(1)
                group.create_task(call("small", 1))

    assert served.index("large") > 40
    assert recorder.order.index("large") == 1


async def test_within_one_priority_calls_are_served_first_come_first_served():
    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=6, **UNPACED)(recorder)
    await asyncio.gather(*(ask(label) for label in range(12)))

    assert recorder.order == list(range(12))


async def test_a_lower_priority_number_is_served_sooner():
    recorder = Recorder()
    settings = {"requests_per_minute": 6, **UNPACED}
    background = rate_limited("chat", priority=1, **settings)(recorder)
    urgent = rate_limited("chat", priority=0, **settings)(recorder)
    await asyncio.gather(*(background("background") for _ in range(4)), *(urgent("urgent") for _ in range(3)))

    assert recorder.order == ["background", *["urgent"] * 3, *["background"] * 3]


async def test_a_low_priority_is_overtaken_for_no_longer_than_a_period_for_each_step():
    recorder = Recorder()
    settings = {"requests_per_minute": 6, **UNPACED}
    background = rate_limited("chat", priority=1, **settings)(recorder)
    urgent = rate_limited("chat", priority=0, **settings)(recorder)
    async with asyncio.TaskGroup() as group:
        group.create_task(urgent("urgent"))
        group.create_task(background("background"))
        for _ in range(40):
            await asyncio.sleep(5)  # two urgent calls for each that the quota lets through
            group.create_task(urgent("urgent"))

    # what came in the background call's first minute goes before it, and nothing that came later
    assert recorder.order.index("background") == 12


async def test_at_most_max_concurrent_calls_are_under_way():
    running, most = 0, 0

    @rate_limited("chat", requests_per_minute=6_000, max_concurrent=3, min_interval=0)
    async def ask():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        running -= 1

    await asyncio.gather(*(ask() for _ in range(10)))

    assert most == 3


async def test_calls_start_min_interval_apart():
    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=6_000, min_interval=0.5, max_concurrent=100)(recorder)
    await asyncio.gather(*(ask() for _ in range(4)))

    assert recorder.starts == pytest.approx([0, 0.5, 1, 1.5])


async def test_row_9_a_request_above_the_whole_quota_is_refused_with_what_to_do_about_it():
    with pytest.raises(ValueError, match="maximum capacity"):
        await AsyncLimiter(100, 60).acquire(101)

    ask = rate_limited("chat", tokens_per_minute=100, tokens=101, **UNPACED)(Recorder())
    with pytest.raises(RateLimitTimeoutError, match=r"101 tokens never fits into 100 .* lower max_tokens") as refused:
        await ask()
    assert refused.value.retry_after is None


async def test_row_9_one_limit_holds_over_two_live_loops_and_a_plain_thread():
    starts = []
    settings = {"requests_per_minute": 60, "max_wait": 0, **UNPACED}

    @rate_limited("chat", **settings)
    async def ask():
        starts.append("in a loop")

    @rate_limited("chat", **settings)
    def ask_blocking():
        starts.append("in a thread")

    def in_thread():
        with suppress(RateLimitTimeoutError):
            while True:
                ask_blocking()

    async def all_at_once():
        await asyncio.gather(*(ask() for _ in range(20)), return_exceptions=True)

    def in_loop():
        asyncio.run(all_at_once())

    threads = [threading.Thread(target=target) for target in (in_loop, in_loop, in_thread)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)

    assert len(starts) == 10, "ten of the sixty fit into a sixth of the minute"


async def test_max_wait_refuses_at_once_when_the_wait_is_known_to_be_longer():
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, max_wait=59, **UNPACED)(Recorder())
    await ask()

    with pytest.raises(RateLimitTimeoutError, match="max_wait=59") as refused:
        await ask()
    assert asyncio.get_running_loop().time() == 0
    assert refused.value.retry_after == pytest.approx(60)


async def test_max_wait_knows_of_those_ahead_in_the_queue():
    settings = {"tokens_per_minute": 100, "tokens": 100, **UNPACED}
    patient = rate_limited("chat", **settings)(Recorder())
    hasty = rate_limited("chat", max_wait=100, **settings)(Recorder())
    async with asyncio.TaskGroup() as group:
        group.create_task(patient())
        group.create_task(patient())
        await asyncio.sleep(0)
        with pytest.raises(RateLimitTimeoutError) as refused:
            await hasty()
        assert refused.value.retry_after == pytest.approx(120)


async def test_max_wait_looks_at_no_more_calls_the_longer_the_queue_is(monkeypatch):
    ask = rate_limited("chat", max_concurrent=1, min_interval=0, requests_per_minute=100_000)(Recorder(seconds=1))
    hasty = rate_limited("chat", max_wait=5)(Recorder())
    waiting = [asyncio.create_task(ask()) for _ in range(2_000)]
    await asyncio.sleep(0.5)
    looks = []
    fits = WindowLedger.seconds_until_fits
    monkeypatch.setattr(WindowLedger, "seconds_until_fits", lambda *of: looks.append(of) or fits(*of))
    with pytest.raises(RateLimitTimeoutError, match="no slot was free"):
        await hasty()
    for task in waiting:
        task.cancel()

    assert 500 < len(looks) < 600


def test_an_interrupt_while_a_thread_looks_ahead_leaves_nobody_in_the_queue(monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    @rate_limited("chat", requests_per_minute=6, max_wait=100, **UNPACED)
    def ask():
        return "four"

    ask()
    monkeypatch.setattr(WindowLedger, "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask()

    assert limit()["waiting"] == 0


async def test_max_wait_ends_a_wait_for_a_slot_that_nobody_gives_back():
    slow = rate_limited("chat", max_concurrent=1, min_interval=0)(Recorder(seconds=100))
    hasty = rate_limited("chat", max_wait=5)(Recorder())
    task = asyncio.create_task(slow())
    await asyncio.sleep(0)

    with pytest.raises(RateLimitTimeoutError, match="no slot was free within max_wait=5 s"):
        await hasty()
    assert asyncio.get_running_loop().time() == pytest.approx(5)
    await task


async def test_without_waiting_max_wait_still_leaves_a_call_time_to_give_its_slot_back():
    ask = rate_limited("chat", max_concurrent=1, min_interval=0, max_wait=5)(Recorder(seconds=1))
    with no_waiting():
        await asyncio.gather(ask(), ask())

    assert in_flight("chat") == 0


def test_max_wait_may_be_longer_than_a_thread_can_wait():
    started, release = threading.Event(), threading.Event()

    @rate_limited("chat", max_concurrent=1, min_interval=0, max_wait=1e12)
    def ask():
        started.set()
        release.wait(5)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        raised = []
        patch.setattr(threading, "excepthook", raised.append)
        threads[0].start()
        started.wait(5)
        threads[1].start()
        while get_all_resilience_stats()["rate_limiters"]["chat"]["waiting"] == 0 and threads[1].is_alive():
            pass
        release.set()
        for thread in threads:
            thread.join(5)

    assert raised == []


async def test_max_wait_ends_a_wait_that_others_made_longer():
    settings = {"tokens_per_minute": 100, "tokens": 100, **UNPACED}
    urgent = rate_limited("chat", **settings)(Recorder())
    later = rate_limited("chat", priority=1, max_wait=70, **settings)(Recorder())
    async with asyncio.TaskGroup() as group:
        group.create_task(urgent())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(later())
        await asyncio.sleep(1)
        group.create_task(urgent())
        with pytest.raises(RateLimitTimeoutError, match="max_wait=70"):
            await waiting
        assert asyncio.get_running_loop().time() == pytest.approx(70)


async def test_a_call_that_gets_a_slot_before_there_is_quota_is_served_when_there_is():
    recorder = Recorder(seconds=5)
    ask = rate_limited("chat", tokens_per_minute=100, tokens=60, max_concurrent=1, min_interval=0)(recorder)
    await asyncio.gather(ask(), ask())

    assert recorder.starts == [0, pytest.approx(60)]


async def test_a_cancelled_wait_leaves_its_place_to_the_next():
    recorder = Recorder()
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, **UNPACED)(recorder)
    await ask("first")
    cancelled = asyncio.create_task(ask("cancelled"))
    last = asyncio.create_task(ask("last"))
    await asyncio.sleep(1)
    cancelled.cancel()
    await last

    assert recorder.order == ["first", "last"]
    assert recorder.starts[-1] == pytest.approx(60)


async def test_a_cancelled_call_gives_its_slot_back():
    ask = rate_limited("chat", max_concurrent=1)(Recorder(seconds=100))
    task = asyncio.create_task(ask())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])

    assert in_flight("chat") == 0


async def test_a_call_that_is_cancelled_as_it_is_granted_gives_slot_and_quota_back():
    recorder = Recorder(seconds=1)
    ask = rate_limited("chat", tokens_per_minute=100, tokens=50, max_concurrent=1, min_interval=0)(recorder)

    async def ask_and_cancel_the_next():
        await ask("first")  # its slot goes to the next call, whose task does not run before this one waits
        granted.cancel()

    first = asyncio.create_task(ask_and_cancel_the_next())
    granted = asyncio.create_task(ask("granted"))
    await asyncio.wait([first, granted])

    statistics = get_all_resilience_stats()["rate_limiters"]["chat"]
    assert (statistics["in_flight"], statistics["tokens_in_window"]) == (0, 50)


async def test_what_a_layer_below_refuses_costs_no_quota():
    @rate_limited("chat", tokens=10, **UNPACED)
    @circuit_protected("chat", failure_threshold=1)
    async def ask():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await ask()
    with pytest.raises(CircuitOpenError):
        await ask()

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["tokens_in_window"] == 10


async def test_a_refusal_of_another_call_that_the_function_makes_costs_its_own_quota():
    sent = []

    @rate_limited("inner", tokens_per_minute=1, tokens=2)
    async def inner():
        pass

    @rate_limited("outer", requests_per_minute=2, min_interval=0, max_wait=0)
    async def ask():
        sent.append("outer")
        await inner()

    for _ in range(5):
        with pytest.raises(RateLimitTimeoutError):
            await ask()

    assert sent == ["outer"]


class RefusalError(Exception):
    """What an HTTP client raises for a status of 429."""

    status_code = 429

    def __init__(self, **headers):
        super().__init__("refused")
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


async def test_one_refusal_makes_all_callers_of_the_name_wait_as_long_as_the_server_says():
    @rate_limited("chat", **UNPACED)
    async def refused():
        raise RefusalError(retry_after="13")

    recorder = Recorder()
    with pytest.raises(RefusalError):
        await refused()
    await asyncio.gather(*(rate_limited("chat", **UNPACED)(recorder)() for _ in range(3)))

    assert recorder.starts == pytest.approx([13, 13, 13], abs=0.05), "one first, to try, and then the others"


async def test_a_caller_that_waits_for_the_slot_of_a_refused_call_hears_of_the_refusal_too():
    starts = []

    @rate_limited("chat", max_concurrent=1, min_interval=0)
    async def ask():
        starts.append(asyncio.get_running_loop().time())
        await asyncio.sleep(1)
        if len(starts) == 1:
            raise RefusalError(retry_after="13")

    await asyncio.gather(ask(), ask(), return_exceptions=True)

    assert starts == pytest.approx([0, 14])


async def test_a_refusal_for_a_day_holds_nobody_else_up():
    @rate_limited("chat", **UNPACED)
    async def refused():
        raise RefusalError(retry_after="86400")

    recorder = Recorder()
    with pytest.raises(RefusalError):
        await refused()
    await rate_limited("chat", **UNPACED)(recorder)()

    assert recorder.starts == [0]


# What is learnt from the server, and what is not


async def refused_once(adaptive):
    """Let a call be refused for 13 seconds, and note when the next one starts."""

    @rate_limited("chat", adaptive=adaptive, **UNPACED)
    async def refused():
        raise RefusalError(retry_after="13")

    recorder = Recorder()
    with pytest.raises(RefusalError):
        await refused()
    await rate_limited("chat", adaptive=adaptive, **UNPACED)(recorder)()
    return recorder.starts


async def test_what_is_not_adaptive_learns_nothing_from_a_refusal():
    assert await refused_once(adaptive=False) == [0]


async def test_of_the_rules_only_those_apply_that_are_named():
    assert await refused_once(adaptive={"ceiling", "remaining"}) == [0]


async def test_a_rule_that_is_named_applies():
    assert await refused_once(adaptive=["retry-after"]) == [pytest.approx(13)]


@pytest.mark.parametrize("adaptive", [True, "latency"])
async def test_by_default_the_rules_apply(adaptive):
    assert await refused_once(adaptive=adaptive) == [pytest.approx(13)]


def test_two_decorators_of_a_name_that_disagree_on_the_rules_are_an_error():
    rate_limited("chat", adaptive=["ceiling", "margin"])
    rate_limited("chat", adaptive={"margin", "ceiling"})
    with pytest.raises(ConfigurationError, match="two configurations"):
        rate_limited("chat", adaptive=False)


async def most_at_once_when_slow(adaptive):
    """Send 2,000 calls of 1 s each, of which the middle ones take a second more for each that is under way."""
    under_way, most = 0, [0, 0, 0]

    @rate_limited("chat", adaptive=adaptive, max_concurrent=20, min_interval=0, requests_per_minute=10**6)
    async def ask(part):
        nonlocal under_way
        under_way += 1
        await asyncio.sleep(1 + under_way if part == 1 else 1)
        under_way -= 1
        most[part] = limit()["max_concurrent"]

    for part, calls in enumerate((400, 200, 1_400)):
        await asyncio.gather(*(ask(part) for _ in range(calls)))
    return most


def limit():
    return get_all_resilience_stats()["rate_limiters"]["chat"]


async def test_fewer_calls_are_under_way_while_answers_are_late_and_as_many_as_before_after_it():
    before, while_late, after = await most_at_once_when_slow("latency")

    assert (before, after) == (20, 20)
    assert while_late <= 10


async def test_a_stream_whose_reader_takes_its_time_is_no_late_answer():
    @rate_limited("chat", adaptive="latency", max_concurrent=20, min_interval=0, requests_per_minute=10**6)
    async def stream():
        for word in ("It", "is", "four."):
            yield word

    async def read(pause):
        async for _ in stream():
            await asyncio.sleep(pause)

    for pause in (0.1, 5):
        for _ in range(5):
            await asyncio.gather(*(read(pause) for _ in range(20)))

    assert limit()["max_concurrent"] == 20


async def test_by_default_late_answers_change_nothing():
    assert await most_at_once_when_slow(adaptive=True) == [20, 20, 20]


async def test_why_fewer_or_more_may_be_under_way_is_told(heard):
    await most_at_once_when_slow("latency")
    moved = [event for event in heard if isinstance(event, QuotaTightened | QuotaRelaxed)]

    assert {(type(event), event.reason) for event in moved} == {(QuotaTightened, "latency"), (QuotaRelaxed, "latency")}
    assert all(1 <= event.requests <= 20 for event in moved)


class Raw:
    """A raw response: a body's headers without its body."""

    def __init__(self, **headers):
        self.headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}


async def test_a_remaining_below_what_the_ledger_knows_is_believed_until_the_window_is_over():
    tightened = []
    stop = subscribe(lambda event: tightened.append(event) if isinstance(event, QuotaTightened) else None)

    @rate_limited("chat", tokens_per_minute=100, tokens=10, **UNPACED)
    async def ask():
        return Raw(x_ratelimit_remaining_tokens=5)

    recorder = Recorder()
    await ask()
    await rate_limited("chat", tokens_per_minute=100, tokens=10, **UNPACED)(recorder)()
    stop()

    assert recorder.starts == [pytest.approx(60)]
    assert [(event.reason, event.tokens) for event in tightened] == [("remaining", 85)]


async def test_a_remaining_above_what_the_ledger_knows_loosens_nothing():
    @rate_limited("chat", tokens_per_minute=100, tokens=100, **UNPACED)
    async def ask():
        return Raw(x_ratelimit_remaining_tokens=1_000_000)

    await ask()
    await ask()

    assert 60 <= asyncio.get_running_loop().time() < 60.2


async def test_a_reset_shortens_how_long_a_remaining_is_believed():
    @rate_limited("chat", tokens_per_minute=100, tokens=10, **UNPACED)
    async def ask():
        return Raw(x_ratelimit_remaining_tokens=5, x_ratelimit_reset_tokens="7s")

    await ask()
    await ask()

    assert asyncio.get_running_loop().time() == pytest.approx(7)


@pytest.mark.parametrize("remaining", [-1, 0])
async def test_a_remaining_of_nothing_beside_an_answer_is_taken_for_unknown(remaining):
    @rate_limited("chat", tokens_per_minute=100, tokens=10, **UNPACED)
    async def ask():
        return Raw(x_ratelimit_remaining_tokens=remaining, x_ratelimit_remaining_requests=remaining)

    await ask()
    await ask()

    assert asyncio.get_running_loop().time() == 0


async def test_waits_and_refusals_are_told_to_listeners():
    told = []
    stop = subscribe(told.append)
    settings = {"tokens_per_minute": 100, "tokens": 100, **UNPACED}
    ask = rate_limited("chat", **settings)(Recorder())
    hasty = rate_limited("chat", max_wait=1, **settings)(Recorder())
    await ask()
    waiting = asyncio.create_task(ask())
    await asyncio.sleep(0)
    with pytest.raises(RateLimitTimeoutError):
        await hasty()
    await waiting
    stop()

    kinds = Counter(type(event) for event in told)
    assert (kinds[Waiting], kinds[WaitRefused]) == (1, 1)


async def test_reset_all_lets_those_go_that_wait_for_quota():
    recorder = Recorder()
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, min_interval=0.5)(recorder)
    await ask()
    waiting = asyncio.create_task(ask())
    await asyncio.sleep(1)
    reset_all()
    await waiting

    assert recorder.starts == pytest.approx([0, 1])


def test_a_sync_function_waits_in_its_thread():
    @rate_limited("chat", requests_per_minute=6, **UNPACED)
    def ask():
        return get_all_resilience_stats()["rate_limiters"]["chat"]["seconds_waited"]

    with no_waiting():
        for _ in range(3):
            ask()

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["seconds_waited"] == pytest.approx(20, abs=0.1)


def test_a_thread_that_waits_for_a_slot_is_woken_by_the_one_that_gives_it_back():
    release, entered = threading.Event(), threading.Event()

    @rate_limited("chat", max_concurrent=1, min_interval=0)
    def ask():
        entered.set()
        return release.wait(5)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(5)
    release.set()
    for thread in threads:
        thread.join(5)

    assert not any(thread.is_alive() for thread in threads)


def test_an_interrupt_while_a_thread_waits_gives_its_place_back():
    ask = rate_limited("chat", requests_per_minute=1, **UNPACED)(lambda: None)
    ask()
    # to the thread that waits: a signal that another thread takes does not end its wait
    interrupt = threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        ask()
    interrupt.join()

    assert get_all_resilience_stats()["rate_limiters"]["chat"]["waiting"] == 0


def test_an_interrupt_while_listeners_hear_of_a_call_gives_its_slot_back():
    def interrupt(event):
        raise KeyboardInterrupt

    ask = rate_limited("chat")(lambda: None)
    unsubscribe = subscribe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask()
    unsubscribe()

    assert in_flight("chat") == 0


async def test_a_long_queue_costs_no_more_for_each_that_waits_than_a_short_one(monkeypatch):
    waits = []
    wait = TaskWaiter.wait

    async def counted(waiter, seconds, **options):
        waits.append(seconds)
        await wait(waiter, seconds, **options)

    monkeypatch.setattr(TaskWaiter, "wait", counted)
    recorder = Recorder()
    ask = rate_limited("chat", requests_per_minute=60, max_concurrent=10, min_interval=1)(recorder)
    await asyncio.gather(*map(ask, range(500)))

    assert recorder.order == list(range(500))
    assert len(waits) < 500 * 20


def test_a_caller_whose_loop_was_closed_in_the_queue_holds_nobody_up():
    ask = rate_limited("chat", tokens_per_minute=100, tokens=100, **UNPACED)(Recorder())
    with no_waiting():
        asyncio.run(ask())
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(ask())
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()

    with no_waiting():
        asyncio.run(ask())
    del abandoned

    assert in_flight("chat") == 0


def test_a_head_of_the_queue_whose_loop_stands_still_holds_nobody_up():
    ask = rate_limited("chat", requests_per_minute=6, period=0.06, **UNPACED)(Recorder())
    standing = asyncio.new_event_loop()
    asyncio.run(ask())
    abandoned = standing.create_task(ask())
    standing.call_soon(standing.stop)
    standing.run_forever()
    asyncio.run(ask())
    standing.run_until_complete(abandoned)
    standing.close()

    assert in_flight("chat") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"requests_per_minute": 0},
        {"requests_per_minute": -1},
        {"requests_per_minute": 1.5},
        {"requests_per_minute": "60"},
        {"requests_per_minute": True},
        {"tokens_per_minute": 0},
        {"tokens_per_minute": float("nan")},
        {"max_concurrent": 0},
        {"min_interval": -0.1},
        {"min_interval": float("inf")},
        {"period": 0},
        {"tokens": -1},
        {"tokens": "many"},
        {"priority": "high"},
        {"priority": None},
        {"priority": 10**400},
        {"max_wait": -1},
        {"adaptive": "ceiling"},
        {"adaptive": ["floor"]},
        {"adaptive": [["ceiling"]]},
        {"adaptive": None},
    ],
    ids=str,
)
def test_an_argument_that_cannot_work_is_refused_when_it_is_written(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        rate_limited("chat", **arguments)


@pytest.mark.parametrize("what", [5, None, object(), "text"], ids=lambda what: type(what).__name__)
def test_what_is_not_a_function_is_not_decorated(what):
    with pytest.raises(ConfigurationError, match="rate_limited"):
        rate_limited(what) if not isinstance(what, str) else rate_limited("chat")(what)


def test_a_class_is_not_decorated():
    with pytest.raises(ConfigurationError, match="put it on its methods"):
        rate_limited(Recorder)


@pytest.mark.parametrize("nonsense", [-1, None, "many", float("nan")], ids=repr)
async def test_a_tokens_function_that_returns_nonsense_is_refused_with_what_it_returned(nonsense):
    ask = rate_limited("chat", tokens=lambda: nonsense, **UNPACED)(Recorder())
    with pytest.raises(ConfigurationError, match="the tokens function returned"):
        await ask()
    assert in_flight("chat") == 0


async def test_what_a_tokens_function_raises_reaches_the_caller():
    def tokens():
        raise KeyError("mine")

    ask = rate_limited("chat", tokens=tokens, **UNPACED)(Recorder())
    with pytest.raises(KeyError, match="mine"):
        await ask()
    assert in_flight("chat") == 0
